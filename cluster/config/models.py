"""The section `models`: which are kept, and where they come from."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, model_validator

from cluster.config.values import ConfigPath, HttpUrl, Listed, OptionalPath, Section
from cluster.core.errors import ModelUnavailable
from cluster.models.refs import ModelRef, of_model_id
from cluster.models.settings import HUB, Limits, StoreSettings, parse_s3
from cluster.models.urls import UrlRules, listed_host, origin_of


def _s3_url(value: object) -> str | None:
    if value is None:
        return None
    try:
        parse_s3(value if isinstance(value, str) else "")
    except ValueError:
        raise ValueError("expected s3://bucket or s3://bucket/prefix") from None
    return str(value)


def _hosts(value: object, ports: bool = False) -> object:
    try:
        return (
            tuple(listed_host(host, ports) for host in value) if isinstance(value, list) else value
        )
    except ValueError:
        also = " or mirror.lan:8080" if ports else ""
        raise ValueError(f"expected a host such as mirror.lan{also}") from None


S3Url = Annotated[str | None, BeforeValidator(_s3_url)]
Hosts = Annotated[tuple[str, ...], BeforeValidator(_hosts)]
HostsAndPorts = Annotated[tuple[str, ...], BeforeValidator(partial(_hosts, ports=True))]


class MirrorConfig(Section):
    """`url` is s3://bucket/prefix; credentials come by boto3's usual chain. `endpoint` is that of
    another S3-compatible server."""

    url: S3Url = None
    endpoint: HttpUrl | None = None
    region: str | None = Field(default=None, min_length=1)


class HubConfig(Section):
    endpoint: HttpUrl = HUB
    token_file: OptionalPath = None


class LinksConfig(Section):
    """Models by URL. `allow_hosts`, as `host` (at `ports`) or `host:port`, may have any address and
    be asked by plain http: the operator's own. Where there are `only_hosts`, links lead to those,
    or their subdomains, or one's own. `deny_hosts` are never asked, nor their subdomains.
    What one of `certain_hosts` hasn't got is reported as the task's fault.
    """

    civitai_token_file: OptionalPath = None
    allow_http: bool = False
    ports: Listed[int] = (80, 443)
    allow_hosts: HostsAndPorts = ()
    only_hosts: Hosts = ()
    deny_hosts: Hosts = ()
    certain_hosts: Hosts = ()


class ModelsConfig(Section):
    """`preload`: base models, as `name` or `name+variant`, that never leave the cards. `pin`: model
    ids, as `kind:name[+variant]`, that are fetched at start and never leave the disk; those to be
    preloaded are pinned too. `sources` in the order in which they are asked; none: nothing is ever
    fetched. `proxy_file` holds the URL of a proxy that wants a password: what is told to other
    processes by value has none. Certificates in `ca_file` are believed beside the usual ones."""

    root: ConfigPath = Path("data/models")
    preload: Listed[str] = ()
    pin: Listed[str] = ()
    sources: Listed[Literal["mirror", "hub", "web"]] = ("mirror", "hub", "web")
    mirror: MirrorConfig = MirrorConfig()
    hub: HubConfig = HubConfig()
    web: LinksConfig = LinksConfig()
    report_missing: bool = True
    proxy: HttpUrl | None = Field(default=None, repr=False)
    proxy_file: OptionalPath = None
    ca_file: OptionalPath = None
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

    @model_validator(mode="after")
    def _one_proxy(self) -> ModelsConfig:
        if self.proxy is not None and "@" in urlsplit(self.proxy).netloc:
            raise ValueError("proxy: a URL with a user or password belongs into proxy_file's file")
        if self.proxy is not None and self.proxy_file is not None:
            raise ValueError("proxy: name it, or its file (proxy_file), not both")
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
            self.proxy_file,
            self.ca_file,
        )
