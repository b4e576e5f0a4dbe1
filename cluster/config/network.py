"""The section `network`: the chain, its contracts and the relay."""

from __future__ import annotations

import re
from functools import partial
from typing import Annotated, cast

from pydantic import BeforeValidator, Field, ValidationInfo, model_validator

from cluster.chain.fees import LEAST_STEP, FeeSettings
from cluster.config.url_files import put_in
from cluster.config.values import (
    Amount,
    ConfigAddress,
    HttpUrl,
    Listed,
    OptionalPath,
    Seconds,
    Section,
    http_url,
    path_of,
)
from cluster.core.types import Address, Wei


def _ws_url(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not value.startswith(("ws://", "wss://")):
        raise ValueError("expected a URL such as wss://host:port/path")
    return http_url(f"http{value.removeprefix('ws')}").replace("http", "ws", 1)


def _explorer_url(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or value.count("{hash}") != 1:
        raise ValueError("expected a URL with {hash} in it, such as https://host/tx/{hash}")
    http_url(value.replace("{hash}", "0x00"))
    return value


def _version(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"\d+\.\d+\.\d+", value):
        raise ValueError("expected three numbers in quotes, such as '2.5.0'")
    return value


WsUrl = Annotated[str | None, BeforeValidator(_ws_url)]
ExplorerUrl = Annotated[str | None, BeforeValidator(_explorer_url)]
Version = Annotated[str, BeforeValidator(_version)]


class Contracts(Section):
    task: ConfigAddress
    node: ConfigAddress
    qos: ConfigAddress

    @property
    def addresses(self) -> tuple[Address, Address, Address]:
        """Task, node and QoS contract."""
        return Address(self.task), Address(self.node), Address(self.qos)


class EndpointConfig(Section):
    """One RPC endpoint. Of those that do equally well the one with the lowest `priority` is asked
    first, of equals the first in order; `rpc_url` has 0. `calls_per_second` where it has a rate of
    its own; `ws_url` as in the section around."""

    url: HttpUrl = Field(repr=False)
    priority: int = Field(default=10, ge=0, le=1_000)
    calls_per_second: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    ws_url: WsUrl = Field(default=None, repr=False)


_URL_FILES = {
    "rpc_url_file": ("rpc_url", "fallback_rpc_urls"),
    "ws_url_file": ("ws_url", None),
    "relay_url_file": ("relay_url", None),
}


class NetworkConfig(Section):
    """`fallback_rpc_urls` are asked in this order where the ones before don't answer as they
    should; transactions go to all. `rpc_calls_per_second` is for each of them. `ws_url` announces
    new blocks (eth_subscribe), where an endpoint offers that. A `_file` holds the URL in its place;
    that of `rpc_url` may have further lines, which are asked before `fallback_rpc_urls`. What a
    transaction offers for gas is raised by `fee_step_percent` while it isn't mined, up to
    `fee_ceiling_gwei`."""

    rpc_url: HttpUrl = Field(repr=False)
    rpc_url_file: OptionalPath = None
    fallback_rpc_urls: Listed[HttpUrl] = Field(default=(), repr=False)
    endpoints: Listed[EndpointConfig] = Field(default=(), repr=False)
    """Further ones, of which more is to be said than a URL."""
    ws_url: WsUrl = Field(default=None, repr=False)
    ws_url_file: OptionalPath = None
    rpc_calls_per_second: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    fee_step_percent: int = Field(default=25, ge=LEAST_STEP, le=200)
    """Of less, most nodes take no replacement."""
    fee_ceiling_gwei: float = Field(default=1_000.0, gt=0, allow_inf_nan=False)
    chain_id: int = Field(ge=1)
    devnet: bool = False
    contracts: Contracts
    relay_url: HttpUrl = Field(repr=False)
    relay_url_file: OptionalPath = None
    node_version: Version = "2.5.0"
    stake: Amount = cast(Wei, "400")
    """Written in CNX, held in wei."""
    block_poll_seconds: Seconds = 1.0
    stalled_after_seconds: Seconds | None = 300.0
    """Null where the chain makes blocks only when there is something to put in them."""
    explorer_url: ExplorerUrl = None
    """Where a transaction is shown to people: a URL with `{hash}` in it."""

    @model_validator(mode="before")
    @classmethod
    def _from_files(cls, values: object, info: ValidationInfo) -> object:
        return put_in(values, _URL_FILES, partial(path_of, info=info))

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
