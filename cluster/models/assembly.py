"""A store and its keeper as the configuration has them. No secret is held: tokens are files, read
when they are needed, on the machine that needs them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final, Protocol

import httpx2
import structlog

from cluster.models import mirror
from cluster.models.guarded_http import guarded_client
from cluster.models.hub import Hub
from cluster.models.keeper import Keeper
from cluster.models.settings import HUB, StoreSettings
from cluster.models.sources import Source
from cluster.models.store import ModelStore
from cluster.models.urls import UrlRules, speaks_for_all
from cluster.models.web import Web

RECURSION: Final = 1000
"""Python's own limit."""


def open_keeper(settings: StoreSettings) -> Keeper:
    """Where the store can't be written nothing is fetched, and what lies there is used."""
    # What is opened here comes from strangers. py_ecc, which web3 brings, lifts this so far that
    # JSON nested deep enough would end the process in any library that reads it.
    sys.setrecursionlimit(RECURSION)
    store = ModelStore(settings.root)
    if not settings.sources:
        return Keeper(store)
    keeper = Keeper(store, sources_of(settings), settings.limits, settings.pinned)
    try:
        keeper.room.tidy()
    except OSError as error:
        log = structlog.get_logger("models")
        log.warning("store_not_writable", root=str(settings.root), error=str(error))
        reason = error.strerror or type(error).__name__
        return Keeper(store, trouble=f"the store in {settings.root} can't be written: {reason}")
    return keeper


class MakeClient(Protocol):
    def __call__(self, rules: UrlRules, /, *, proxy: str | None) -> httpx2.Client: ...


def sources_of(
    settings: StoreSettings, make_client: MakeClient = guarded_client
) -> tuple[Source, ...]:
    made = {"mirror": _mirror, "hub": _hub, "web": _web}
    found = [made[name](settings, make_client) for name in settings.sources]
    return tuple(source for source in found if source is not None)


def _mirror(settings: StoreSettings, _: MakeClient) -> Source | None:
    if settings.mirror_url is None:
        return None
    client = partial(mirror.client, settings.mirror_endpoint, settings.mirror_region)
    return mirror.Mirror(settings.mirror_url, client)


def _hub(settings: StoreSettings, make_client: MakeClient) -> Source:
    make = partial(make_client, settings.hub_rules, proxy=settings.proxy)
    certain = settings.report_missing and settings.hub_endpoint == HUB
    return Hub(make, settings.hub_endpoint, _secret(settings.hub_token_file), certain)


def _web(settings: StoreSettings, make_client: MakeClient) -> Source:
    hosts = settings.certain_hosts if settings.report_missing else frozenset[str]()
    certain = partial(speaks_for_all, hosts=hosts, rules=settings.rules)
    client = make_client(settings.rules, proxy=settings.proxy)
    return Web(client, settings.rules, _secret(settings.civitai_token_file), certain)


def _secret(file: Path | None) -> Callable[[], str | None]:
    """What the file says now; None where it can't be read, which the host then answers to."""

    def read() -> str | None:
        if file is None:
            return None
        try:
            return file.read_text(encoding="utf-8").strip() or None
        except (OSError, ValueError):
            structlog.get_logger("models").warning("token_unreadable", file=str(file))
            return None

    return read
