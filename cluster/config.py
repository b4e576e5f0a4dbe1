"""The operator's configuration: read once, checked once, then passed in as a frozen value.

Whatever is wrong with a file becomes one line that names the file, the key, what is wrong and how
to mend it (`ConfigError`). Relative paths are relative to the configuration file. What can hold a
credential (a database URL, an endpoint with a key in it) is left out of `repr`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, cast
from urllib.parse import urlsplit

import httpx
import yaml
from eth_utils.address import is_address, is_checksum_address, to_checksum_address
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import ErrorDetails

from cluster.chain.fees import LEAST_STEP, FeeSettings
from cluster.core.capacity import MOST_SLOTS
from cluster.core.errors import ConfigError, ModelUnavailable
from cluster.core.fleet import FleetPolicy
from cluster.core.lifecycle import Policy
from cluster.core.types import Address, GigaBytes, Wei
from cluster.models.refs import ModelRef, of_model_id
from cluster.models.settings import HUB, Limits, StoreSettings, parse_s3
from cluster.models.urls import UrlRules, listed_host, origin_of
from cluster.url_files import put_in

WEI_PER_CNX = 10**18
_ZERO_ADDRESS = "0x" + "00" * 20
_SQLITE = "sqlite:///"

# --- values -------------------------------------------------------------------------------------


def _path(value: object, info: ValidationInfo) -> Path:
    if not isinstance(value, str | Path) or not str(value):
        raise ValueError("expected a path")
    return (_base(info) / Path(value).expanduser()).resolve()


def _seed_path(value: object, info: ValidationInfo) -> Path | None:
    if isinstance(value, str) and len(value.split()) >= 12:
        raise ValueError("expected the path of a file that holds the phrase, not the phrase itself")
    return None if value is None else _path(value, info)


def _base(info: ValidationInfo) -> Path:
    context = info.context
    return context["base"] if isinstance(context, dict) else Path.cwd()


def _address(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        raise ValueError("YAML took the address for a number; put it in quotes")
    if not isinstance(value, str) or not is_address(value) or not value.startswith("0x"):
        raise ValueError("expected an address: 0x and 40 hex digits")
    checksummed = to_checksum_address(value)
    if value.lower() == _ZERO_ADDRESS:
        raise ValueError("the zero address is a placeholder; put the real one here")
    if value not in (value.lower(), checksummed) and not is_checksum_address(value):
        raise ValueError(
            "the address fails its checksum, so a digit is probably wrong; copy it again"
        )
    return checksummed


def _http_url(value: object) -> str:
    problem = "expected a URL such as https://host:port/path"
    if not isinstance(value, str):
        raise ValueError(problem)
    try:
        parts = urlsplit(value)
        valid = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
        httpx.URL(value)  # which is what will read it later
    except (ValueError, httpx.InvalidURL):
        valid = False
    if not valid or re.search(r"\s", value):
        raise ValueError(problem)
    return value.rstrip("/")


def _ws_url(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not value.startswith(("ws://", "wss://")):
        raise ValueError("expected a URL such as wss://host:port/path")
    return _http_url(f"http{value.removeprefix('ws')}").replace("http", "ws", 1)


def _explorer_url(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or value.count("{hash}") != 1:
        raise ValueError("expected a URL with {hash} in it, such as https://host/tx/{hash}")
    _http_url(value.replace("{hash}", "0x00"))
    return value


def _s3_url(value: object) -> str | None:
    if value is None:
        return None
    try:
        parse_s3(value if isinstance(value, str) else "")
    except ValueError:
        raise ValueError("expected s3://bucket or s3://bucket/prefix") from None
    return str(value)


def _optional_path(value: object, info: ValidationInfo) -> Path | None:
    return None if value is None else _path(value, info)


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
            return _SQLITE + str((_base(info) / Path(path).expanduser()).resolve())
    if isinstance(value, str) and re.match(r"postgresql(\+\w+)?://[^\s/]+/\S", value):
        return value
    raise ValueError("expected sqlite:///path or postgresql://user@host/database")


def _amount(value: object) -> Wei:
    """Wei, from an amount in CNX: text, a whole number or a decimal one."""
    problem = "expected an amount in CNX such as 400 or '400.5'"
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(problem)
    try:
        wei = Decimal(str(value)) * WEI_PER_CNX
    except ArithmeticError:
        raise ValueError(problem) from None
    if not wei.is_finite() or not 0 < wei < 2**256 or wei != wei.to_integral_value():
        raise ValueError(problem)
    return Wei(int(wei))


def _optional_amount(value: object) -> Wei | None:
    return None if value is None else _amount(value)


def _optional_address(value: object) -> str | None:
    return None if value is None else _address(value)


def _version(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"\d+\.\d+\.\d+", value):
        raise ValueError("expected three numbers in quotes, such as '2.5.0'")
    return value


def _listed(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _hosts(value: object, ports: bool = False) -> object:
    try:
        return (
            tuple(listed_host(host, ports) for host in value) if isinstance(value, list) else value
        )
    except ValueError:
        also = " or mirror.lan:8080" if ports else ""
        raise ValueError(f"expected a host such as mirror.lan{also}") from None


ConfigPath = Annotated[Path, BeforeValidator(_path)]
ConfigAddress = Annotated[str, BeforeValidator(_address)]
HttpUrl = Annotated[str, BeforeValidator(_http_url)]
JournalUrl = Annotated[str, BeforeValidator(_journal_url)]
Hosts = Annotated[tuple[str, ...], BeforeValidator(_hosts)]
HostsAndPorts = Annotated[tuple[str, ...], BeforeValidator(partial(_hosts, ports=True))]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


# --- the schema ---------------------------------------------------------------------------------


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True)


class IdentityConfig(Section):
    """`seed_file` holds the BIP-39 phrase in plain text, `keystore_file` an encrypted keystore
    (V3): one of them, readable by its owner only. `password_file` holds the keystore's password;
    without one the environment variable CRYNUX_PASSWORD does, or it is asked for. `accounts` is the
    most node accounts that are ever used; all are derived, at some milliseconds each, before the
    coordinator answers."""

    seed_file: Annotated[Path | None, BeforeValidator(_seed_path)] = None
    keystore_file: Annotated[Path | None, BeforeValidator(_optional_path)] = None
    password_file: Annotated[Path | None, BeforeValidator(_optional_path)] = None
    accounts: int = Field(default=8, ge=1, le=1_000)

    @model_validator(mode="after")
    def _one_key(self) -> IdentityConfig:
        if self.seed_file is not None and self.keystore_file is not None:
            raise ValueError("seed_file and keystore_file: the operator has one key; name one file")
        return self

    @property
    def key_file(self) -> Path | None:
        return self.keystore_file or self.seed_file


class Contracts(Section):
    task: ConfigAddress
    node: ConfigAddress
    qos: ConfigAddress

    @property
    def addresses(self) -> tuple[Address, Address, Address]:
        """Task, node and QoS contract."""
        return Address(self.task), Address(self.node), Address(self.qos)


_NETWORK_FILES = {
    "rpc_url_file": ("rpc_url", "fallback_rpc_urls"),
    "ws_url_file": ("ws_url", None),
    "relay_url_file": ("relay_url", None),
}


class EndpointConfig(Section):
    """One RPC endpoint. Of those that do equally well the one with the lowest `priority` is asked
    first, of equals the first in order; `rpc_url` has 0. `calls_per_second` where it has a rate of
    its own; `ws_url` as in the section around."""

    url: HttpUrl = Field(repr=False)
    priority: int = Field(default=10, ge=0, le=1_000)
    calls_per_second: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    ws_url: Annotated[str | None, BeforeValidator(_ws_url)] = Field(default=None, repr=False)


class NetworkConfig(Section):
    """`fallback_rpc_urls` are asked in this order where the ones before don't answer as they
    should; transactions go to all. `rpc_calls_per_second` is for each of them. `ws_url` announces
    new blocks (eth_subscribe), where an endpoint offers that. A `_file` holds the URL in its place;
    that of `rpc_url` may have further lines, which are asked before `fallback_rpc_urls`. What a
    transaction offers for gas is raised by `fee_step_percent` while it isn't mined, up to
    `fee_ceiling_gwei`."""

    rpc_url: HttpUrl = Field(repr=False)
    rpc_url_file: Annotated[Path | None, BeforeValidator(_optional_path)] = None
    fallback_rpc_urls: Annotated[tuple[HttpUrl, ...], BeforeValidator(_listed)] = Field(
        default=(), repr=False
    )
    endpoints: Annotated[tuple[EndpointConfig, ...], BeforeValidator(_listed)] = Field(
        default=(), repr=False
    )
    """Further ones, of which more is to be said than a URL."""
    ws_url: Annotated[str | None, BeforeValidator(_ws_url)] = Field(default=None, repr=False)
    ws_url_file: Annotated[Path | None, BeforeValidator(_optional_path)] = None
    rpc_calls_per_second: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    fee_step_percent: int = Field(default=25, ge=LEAST_STEP, le=200)
    """Of less, most nodes take no replacement."""
    fee_ceiling_gwei: float = Field(default=1_000.0, gt=0, allow_inf_nan=False)
    chain_id: int = Field(ge=1)
    devnet: bool = False
    contracts: Contracts
    relay_url: HttpUrl = Field(repr=False)
    relay_url_file: Annotated[Path | None, BeforeValidator(_optional_path)] = None
    node_version: Annotated[str, BeforeValidator(_version)] = "2.5.0"
    stake: Annotated[Wei, BeforeValidator(_amount)] = cast(Wei, "400")
    """Written in CNX, held in wei."""
    block_poll_seconds: Seconds = 1.0
    stalled_after_seconds: Seconds | None = 300.0
    """Null where the chain makes blocks only when there is something to put in them."""
    explorer_url: Annotated[str | None, BeforeValidator(_explorer_url)] = None
    """Where a transaction is shown to people: a URL with `{hash}` in it."""

    @model_validator(mode="before")
    @classmethod
    def _from_files(cls, values: object, info: ValidationInfo) -> object:
        return put_in(values, _NETWORK_FILES, partial(_path, info=info))

    @property
    def all_endpoints(self) -> tuple[EndpointConfig, ...]:
        """Every one, in the order of the configuration."""
        first = EndpointConfig(url=self.rpc_url, priority=0, ws_url=self.ws_url)
        others = (EndpointConfig(url=url) for url in self.fallback_rpc_urls)
        return (first, *others, *self.endpoints)

    @property
    def ws_urls(self) -> tuple[str, ...]:
        return tuple(each.ws_url for each in self.all_endpoints if each.ws_url is not None)

    @property
    def fees(self) -> FeeSettings:
        return FeeSettings(step=self.fee_step_percent, cap=Wei(int(self.fee_ceiling_gwei * 10**9)))

    @property
    def version(self) -> tuple[int, int, int]:
        major, minor, patch = (int(part) for part in self.node_version.split("."))
        return major, minor, patch


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

    address: Annotated[str | None, BeforeValidator(_ray_address)] = None
    namespace: str = Field(default="crynux", pattern=r"^[A-Za-z0-9_.-]+$")
    platform: str = Field(default="docker", pattern=r"^[a-z0-9_-]+$")
    simulated_gpus: Annotated[tuple[SimulatedGpus, ...], BeforeValidator(_listed)] = ()


class JournalConfig(Section):
    url: JournalUrl = Field(default="sqlite:///data/journal.db", repr=False)
    url_file: Annotated[Path | None, BeforeValidator(_optional_path)] = None

    @model_validator(mode="before")
    @classmethod
    def _from_file(cls, values: object, info: ValidationInfo) -> object:
        return put_in(values, {"url_file": ("url", None)}, partial(_path, info=info))


class ArtifactsConfig(Section):
    path: ConfigPath = Path("data/artifacts")


class MirrorConfig(Section):
    """`url` is s3://bucket/prefix; credentials come by boto3's usual chain. `endpoint` is that of
    another S3-compatible server."""

    url: Annotated[str | None, BeforeValidator(_s3_url)] = None
    endpoint: HttpUrl | None = None
    region: str | None = Field(default=None, min_length=1)


class HubConfig(Section):
    endpoint: HttpUrl = HUB
    token_file: Annotated[Path | None, BeforeValidator(_optional_path)] = None


class LinksConfig(Section):
    """Models by URL. `allow_hosts`, as `host` (at `ports`) or `host:port`, may have any address and
    be asked by plain http: the operator's own. Where there are `only_hosts`, links lead to those,
    or their subdomains, or one's own. `deny_hosts` are never asked, nor their subdomains.
    What one of `certain_hosts` hasn't got is reported as the task's fault.
    """

    civitai_token_file: Annotated[Path | None, BeforeValidator(_optional_path)] = None
    allow_http: bool = False
    ports: Annotated[tuple[int, ...], BeforeValidator(_listed)] = (80, 443)
    allow_hosts: HostsAndPorts = ()
    only_hosts: Hosts = ()
    deny_hosts: Hosts = ()
    certain_hosts: Hosts = ()


class ModelsConfig(Section):
    """`preload`: base models, as `name` or `name+variant`, that never leave the cards. `pin`: model
    ids, as `kind:name[+variant]`, that are fetched at start and never leave the disk; those to be
    preloaded are pinned too. `sources` in the order in which they are asked; none: nothing is ever
    fetched."""

    root: ConfigPath = Path("data/models")
    preload: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()
    pin: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()
    sources: Annotated[tuple[Literal["mirror", "hub", "web"], ...], BeforeValidator(_listed)] = (
        "mirror",
        "hub",
        "web",
    )
    mirror: MirrorConfig = MirrorConfig()
    hub: HubConfig = HubConfig()
    web: LinksConfig = LinksConfig()
    report_missing: bool = True
    proxy: HttpUrl | None = Field(default=None, repr=False)
    quota_gb: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    largest_file_gb: float = Field(default=64.0, gt=0, allow_inf_nan=False)
    spare_gb: float = Field(default=5.0, ge=0, allow_inf_nan=False)
    bandwidth_mbit: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _model_ids(self) -> ModelsConfig:
        for key, ids in (("preload", self.preload_ids), ("pin", self.pin)):
            for model_id in ids:
                try:
                    of_model_id(model_id)
                except ModelUnavailable as error:
                    raise ValueError(f"{key}: {error}") from None
        return self

    @property
    def preload_ids(self) -> tuple[str, ...]:
        return tuple(f"base:{name}" for name in self.preload)

    @property
    def pinned(self) -> frozenset[ModelRef]:
        return frozenset(map(of_model_id, (*self.preload_ids, *self.pin)))

    def store(self) -> StoreSettings:
        """What the machines with cards need to know of it."""
        rules = UrlRules(
            self.web.allow_http,
            frozenset(self.web.ports),
            frozenset(self.web.allow_hosts),
            frozenset(self.web.deny_hosts),
            only_hosts=frozenset(self.web.only_hosts),
        )
        # What a task's link may lead to isn't widened by where the operator's hub is.
        own = () if self.hub.endpoint == HUB else (origin_of(self.hub.endpoint),)
        return StoreSettings(
            self.root,
            self.sources,
            self.mirror.url,
            self.mirror.endpoint,
            self.mirror.region,
            self.hub.endpoint,
            self.hub.token_file,
            self.web.civitai_token_file,
            self.proxy,
            rules,
            replace(rules, origins=frozenset(own)),
            Limits(
                None if self.quota_gb is None else int(self.quota_gb * 2**30),
                int(self.largest_file_gb * 2**30),
                int(self.spare_gb * 2**30),
                None if self.bandwidth_mbit is None else self.bandwidth_mbit * 125_000,
            ),
            self.pinned,
            self.report_missing,
            frozenset(self.web.certain_hosts),
        )


class GpuConfig(Section):
    """For each card. `host_memory_gb`: GiB for models that wait in host memory. A task that makes
    no step for `stall_seconds` is ended with its process, and tried on another card; to load its
    models is one step, so it must be longer than that takes."""

    host_memory_gb: float = Field(default=8.0, ge=0, allow_inf_nan=False)
    stall_seconds: float = Field(default=300.0, ge=1, allow_inf_nan=False)


class ServeConfig(Section):
    """`token_file` holds the bearer token that acting needs (one word of 16 characters or more);
    without one, only this machine may act, and only where `host` is a loopback address. Reads need
    it too, unless `open_reads`."""

    token_file: Annotated[Path | None, BeforeValidator(_optional_path)] = None
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
    """`model` is a base model as `name[+variant]`, null for the smallest on each card's disk."""

    interval_seconds: float = Field(default=3600.0, ge=0, allow_inf_nan=False)
    model: str | None = Field(default=None, min_length=1)


class VerifyConfig(Section):
    fraction: float = Field(default=0.0, ge=0, le=1)


def _slots(value: object) -> int | Literal["auto"]:
    if value == "auto":
        return "auto"
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_SLOTS:
        raise ValueError(f"expected auto, or a number from 1 to {MOST_SLOTS}")
    return value


Slots = Annotated[int | Literal["auto"], BeforeValidator(_slots)]


class SlotsOf(Section):
    gpu: str = Field(min_length=1)
    """The driver's name for the card."""
    slots: Slots


class FleetConfig(Section):
    """Amounts are written in CNX. `slots_per_gpu`: node accounts for each card; `auto` takes as
    many as keep it busy, by what was measured, at most `max_slots`. `slots_by_gpu`: other slots for
    cards of a name. `stake_budget` bounds the
    stakes of all accounts together. `gas_reserve` is what an account must own beyond its stake to
    join; below `gas_low` the treasury tops it up to `gas_target`. Earnings beyond `gas_target` go
    to `beneficiary` once they are more than `sweep_above`. Accounts of cards that left are paused
    after `pause_after_seconds`. `auto` false: what spends or changes the fleet waits for
    `crynux-cluster fleet apply`."""

    auto: bool = True
    slots_per_gpu: Slots = 1
    slots_by_gpu: Annotated[tuple[SlotsOf, ...], BeforeValidator(_listed)] = ()
    max_slots: int = Field(default=8, ge=1, le=MOST_SLOTS)
    stake_budget: Annotated[Wei | None, BeforeValidator(_optional_amount)] = None
    gas_reserve: Annotated[Wei, BeforeValidator(_amount)] = cast(Wei, "0.01")
    gas_low: Annotated[Wei, BeforeValidator(_amount)] = cast(Wei, "0.005")
    gas_target: Annotated[Wei, BeforeValidator(_amount)] = cast(Wei, "0.05")
    beneficiary: Annotated[str | None, BeforeValidator(_optional_address)] = None
    sweep_above: Annotated[Wei, BeforeValidator(_amount)] = cast(Wei, "10")
    pause_after_seconds: Seconds = 120.0

    @model_validator(mode="after")
    def _in_order(self) -> FleetConfig:
        if not self.gas_low <= self.gas_reserve <= self.gas_target:
            raise ValueError("gas_low, gas_reserve and gas_target: expected in rising order")
        return self

    @model_validator(mode="after")
    def _each_gpu_once(self) -> FleetConfig:
        names = [each.gpu for each in self.slots_by_gpu]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"slots_by_gpu: {name} stands twice")
        return self

    def check_accounts(self, accounts: Mapping[int, Address]) -> None:
        """Raises `ConfigError` where earnings would go to an account that they are swept from."""
        for index, account in accounts.items():
            if account == self.beneficiary:
                raise ConfigError(
                    f"fleet.beneficiary: {account} is node account {index} itself; name an address "
                    "that isn't one, the treasury's if need be"
                )

    def policy(self, stake: Wei) -> FleetPolicy:
        beneficiary = None if self.beneficiary is None else Address(self.beneficiary)
        return FleetPolicy(
            stake,
            self.gas_reserve,
            self.gas_low,
            self.gas_target,
            self.stake_budget,
            beneficiary,
            None if beneficiary is None else self.sweep_above,
        )


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


# --- reading ------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Refuses a key that is no word, and one that stands twice, where YAML would silently take
    the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                problem = "a key that is a list or a mapping"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            if key.value in seen:
                problem = f"the key {key.value} stands twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def load(path: str | Path) -> Config:
    """The configuration at `path`; raises `ConfigError`."""
    file = Path(path)
    raw = _read_mapping(file)
    try:
        return Config.model_validate(raw, context={"base": file.resolve().parent})
    except ValidationError as error:
        line = _explain(error)
    raise ConfigError(f"{file}: {line}")


def _read_mapping(file: Path) -> dict[str, Any]:
    try:
        # The base class is SafeLoader.
        raw = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506
    except FileNotFoundError:
        raise ConfigError(f"{file}: there is no such file; configs/ has examples") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"{file}: can't be read: {reason}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: {_explain_yaml(error)}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{file}: expected keys and values (YAML), such as 'network:'")
    return {str(key): value for key, value in raw.items()}


def _explain_yaml(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}: " if mark is not None else ""
    problem = getattr(error, "problem", None) or "check indentation, quotes and brackets"
    return f"{where}not valid YAML: {problem}"


def _explain(error: ValidationError) -> str:
    # A misspelt key also makes the right one missing: name the misspelt one.
    errors = sorted(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return _explain_one(errors[0]) + more


def _explain_one(error: ErrorDetails) -> str:
    location = error["loc"]
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    key = key.removeprefix(".")
    kind = error["type"]
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    if kind == "extra_forbidden":
        return f"{key}: unknown key{_suggest(location)}"
    if kind == "missing":
        return f"{key}: missing, and there is no default; add it"
    if kind in {"model_type", "model_attributes_type"}:
        return f"{key}: expected keys and values{_got(location, error['input'])}"
    if not key:
        return message
    return f"{key}: {message}{_got(location, error['input'])}"


def _got(location: tuple[int | str, ...], value: object) -> str:
    """The wrong value, unless it is long or may hold a secret."""
    secret = location[0] in {"identity", "journal"} or not {
        "rpc_url",
        "fallback_rpc_urls",
        "endpoints",
        "ws_url",
        "relay_url",
        "proxy",
    }.isdisjoint(location)
    if secret or isinstance(value, Mapping | list | tuple):
        return ""
    text = "null" if value is None else json.dumps(value, default=str)
    return f", got {text}" if len(text) <= 80 else ""


def _suggest(location: tuple[int | str, ...]) -> str:
    known = tuple(_keys_at(Config, location[:-1]))
    close = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known here: {', '.join(known)}"


def _keys_at(model: type[BaseModel], location: tuple[int | str, ...]) -> tuple[str, ...]:
    for part in location:
        if isinstance(part, int):
            continue
        model = _section(model.model_fields[part].annotation)
    return tuple(model.model_fields)


def _section(annotation: object) -> type[BaseModel]:
    """The section model that a field's type is, or is a tuple of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return _section(getattr(annotation, "__args__", (Section,))[0])
