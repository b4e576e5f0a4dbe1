"""The whole configuration, and its smaller sections."""

from __future__ import annotations

import hashlib
import json
import re
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, model_validator

from cluster.config.fleet import FleetConfig
from cluster.config.models import ModelsConfig
from cluster.config.network import NetworkConfig
from cluster.config.url_files import put_in
from cluster.config.values import (
    ConfigPath,
    HttpUrl,
    Listed,
    OptionalPath,
    Seconds,
    Section,
    base_of,
    path_of,
)
from cluster.core.lifecycle import Policy
from cluster.core.strikes import Limit
from cluster.core.types import GigaBytes

_SQLITE = "sqlite:///"


def _seed_path(value: object, info: ValidationInfo) -> Path | None:
    if isinstance(value, str) and len(value.split()) >= 12:
        raise ValueError("expected the path of a file that holds the phrase, not the phrase itself")
    return None if value is None else path_of(value, info)


def _ray_address(value: object) -> str | None:
    """Nothing else that `ray.init` knows: `local` would start a second cluster without cards."""
    if value is None or value == "auto":
        return value
    host_and_port = r"([\w.-]+|\[[0-9a-fA-F:.]+\]):(\d{1,5})"
    found = re.fullmatch(host_and_port, value, re.ASCII) if isinstance(value, str) else None
    if found is None or not 0 < int(found[2]) < 2**16:
        raise ValueError("expected null, auto, or the host:port of the cluster's head")
    return found[0]


def _journal_url(value: object, info: ValidationInfo) -> str:
    if isinstance(value, str) and value.startswith(_SQLITE):
        path = value.removeprefix(_SQLITE)
        if path and path != ":memory:":
            return _SQLITE + str((base_of(info) / Path(path).expanduser()).resolve())
    if isinstance(value, str) and re.match(r"postgresql(\+\w+)?://[^\s/]+/\S", value):
        return value
    raise ValueError("expected sqlite:///path or postgresql://user@host/database")


SeedPath = Annotated[Path | None, BeforeValidator(_seed_path)]
RayAddress = Annotated[str | None, BeforeValidator(_ray_address)]
JournalUrl = Annotated[str, BeforeValidator(_journal_url)]


class IdentityConfig(Section):
    """`seed_file` holds the BIP-39 phrase in plain text, `keystore_file` an encrypted keystore
    (V3): one of them, readable by its owner only. `password_file` holds the keystore's password;
    without one the environment variable CRYNUX_PASSWORD does, or it is asked for. `accounts` is the
    most node accounts that are ever used; all are derived, at some milliseconds each, before the
    coordinator answers."""

    seed_file: SeedPath = None
    keystore_file: OptionalPath = None
    password_file: OptionalPath = None
    accounts: int = Field(default=8, ge=1, le=1_000)

    @model_validator(mode="after")
    def _one_key(self) -> IdentityConfig:
        if self.seed_file is not None and self.keystore_file is not None:
            raise ValueError("seed_file and keystore_file: the operator has one key; name one file")
        return self

    @property
    def key_file(self) -> Path | None:
        return self.keystore_file or self.seed_file


class SimulatedGpus(Section):
    name: str = Field(min_length=1)
    """The driver's name; the platform is added as for a real card."""
    vram: int = Field(ge=1)
    """Whole GB."""
    count: int = Field(default=1, ge=1, le=1000)

    @property
    def vram_gb(self) -> GigaBytes:
        return GigaBytes(self.vram)


class RayConfig(Section):
    """`address` null starts Ray on this machine; `auto` or host:port joins a running cluster."""

    address: RayAddress = None
    namespace: str = Field(default="crynux", pattern=r"^[A-Za-z0-9_.-]+$")
    platform: str = Field(default="docker", pattern=r"^[a-z0-9_-]+$")
    simulated_gpus: Listed[SimulatedGpus] = ()


class JournalConfig(Section):
    url: JournalUrl = Field(default="sqlite:///data/journal.db", repr=False)
    url_file: OptionalPath = None

    @model_validator(mode="before")
    @classmethod
    def _from_file(cls, values: object, info: ValidationInfo) -> object:
        return put_in(values, {"url_file": ("url", None)}, partial(path_of, info=info))


class ArtifactsConfig(Section):
    path: ConfigPath = Path("data/artifacts")


class GpuConfig(Section):
    """For each card. `host_memory_gb`: GiB for models that wait in host memory. A task that makes
    no step for `stall_seconds`, and reads no model on, is ended with its process and tried on
    another card: less than the network gives a task, more than one network takes to load.
    `lora_strength`: `weight` puts a LoRA on as strongly as its task says, in percent; `full` puts
    all on wholly, as nodes do whose runner passes the weight where diffusers ignores it."""

    lora_strength: Literal["weight", "full"] = "weight"
    host_memory_gb: float = Field(default=8.0, ge=0, allow_inf_nan=False)
    stall_seconds: float = Field(default=120.0, ge=1, allow_inf_nan=False)


class ServeConfig(Section):
    """`token_file` holds the bearer token that acting needs (one word of 16 characters or more);
    without one, only this machine may act, and only where `host` is a loopback address. Reads need
    it too, unless `open_reads`."""

    token_file: OptionalPath = None
    open_reads: bool = False
    host: str = Field(default="127.0.0.1", min_length=1)
    port: int = Field(default=8000, ge=1, le=65535)


class PolicyConfig(Section):
    """`cluster.core.lifecycle.Policy`, whose defaults these are."""

    abort_margin: float = Field(default=Policy().abort_margin, ge=0, allow_inf_nan=False)
    answer_grace: float = Field(default=Policy().answer_grace, ge=0, allow_inf_nan=False)
    max_attempts: int = Field(default=Policy().max_attempts, ge=1)
    retry_backoff: float = Field(default=Policy().retry_backoff, ge=0, allow_inf_nan=False)

    @property
    def policy(self) -> Policy:
        return Policy(**self.model_dump())


class LogsConfig(Section):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "json", "console"] = "auto"


class TracingConfig(Section):
    endpoint: HttpUrl | None = None
    """Where OTLP over HTTP is taken, whole: `http://collector:4318/v1/traces`."""


class LeaseConfig(Section):
    ttl_seconds: Seconds = 15.0


class CanaryConfig(Section):
    """`model` is a base model as `name[+variant]`, null for the smallest on each card's disk. A
    card that fails `strikes` times (0: however often) within `strike_window_seconds` is quarantined
    though it answers well: not by what tasks do to every card (`cluster.core.strikes`)."""

    interval_seconds: float = Field(default=3600.0, ge=0, allow_inf_nan=False)
    model: str | None = Field(default=None, min_length=1)
    strikes: int = Field(default=Limit().strikes, ge=0)
    strike_window_seconds: float = Field(default=Limit().seconds, gt=0, allow_inf_nan=False)


class VerifyConfig(Section):
    fraction: float = Field(default=0.0, ge=0, le=1)


class Config(Section):
    identity: IdentityConfig = IdentityConfig()
    network: NetworkConfig
    ray: RayConfig = RayConfig()
    journal: JournalConfig = Field(default_factory=dict, validate_default=True)
    artifacts: ArtifactsConfig = Field(default_factory=dict, validate_default=True)
    models: ModelsConfig = Field(default_factory=dict, validate_default=True)
    gpu: GpuConfig = GpuConfig()
    serve: ServeConfig = ServeConfig()
    policy: PolicyConfig = PolicyConfig()
    logs: LogsConfig = LogsConfig()
    tracing: TracingConfig = TracingConfig()
    lease: LeaseConfig = LeaseConfig()
    canary: CanaryConfig = CanaryConfig()
    verify: VerifyConfig = VerifyConfig()
    fleet: FleetConfig = FleetConfig()

    @model_validator(mode="after")
    def _simulate_on_devnets_only(self) -> Config:
        if self.ray.simulated_gpus and not self.network.devnet:
            raise ValueError(
                "ray.simulated_gpus: refused on any chain that isn't marked a devnet; "
                "remove the simulated GPUs, or set network.devnet to true if it is one"
            )
        return self


def digest(config: Config) -> str:
    """Short and stable: the supervisor compares it to see whether the configuration changed."""
    text = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def changes(before: Config, after: Config) -> tuple[str, ...]:
    """The keys (`section.key`) whose values differ."""
    old, new = before.model_dump(mode="json"), after.model_dump(mode="json")
    return tuple(
        f"{section}.{key}"
        for section in new
        for key in new[section]
        if old[section].get(key) != new[section][key]
    )
