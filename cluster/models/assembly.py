"""A store and its keeper as the configuration has them. No secret is held: tokens are files, read
when they are needed, on the machine that needs them."""

from __future__ import annotations

import ssl
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final, Protocol
from urllib.parse import urlsplit

import httpx2
import structlog

from cluster.core.errors import ConfigError
from cluster.models import mirror
from cluster.models.certificates import trusting
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
    """Where nothing can be fetched, what lies there is used (`Keeper.trouble`)."""
    # What is opened here comes from strangers. py_ecc, which web3 brings, lifts this so far that
    # JSON nested deep enough would end the process in any library that reads it.
    sys.setrecursionlimit(RECURSION)
    store = ModelStore(settings.root)
    if not settings.sources:
        return Keeper(store)
    log = structlog.get_logger("models")
    try:
        keeper = Keeper(store, sources_of(settings), settings.limits, settings.pinned)
        keeper.room.tidy()
    except ConfigError as error:
        log.warning("store_without_sources", root=str(settings.root), error=str(error))
        return Keeper(store, trouble=str(error))
    except OSError as error:
        log.warning("store_not_writable", root=str(settings.root), error=str(error))
        reason = error.strerror or type(error).__name__
        return Keeper(store, trouble=f"the store in {settings.root} can't be written: {reason}")
    return keeper


class MakeClient(Protocol):
    def __call__(
        self, rules: UrlRules, /, *, proxy: str | None, verify: ssl.SSLContext | bool
    ) -> httpx2.Client: ...


class _Make(Protocol):
    def __call__(self, rules: UrlRules, /) -> httpx2.Client: ...


def sources_of(
    settings: StoreSettings, make_client: MakeClient = guarded_client
) -> tuple[Source, ...]:
    """Raises `ConfigError` where a file that says how they are reached can't be used."""
    verify = trusting(settings.ca_file) if settings.ca_file else True
    make = partial(make_client, proxy=_proxy(settings), verify=verify)
    made = {"mirror": _mirror, "hub": _hub, "web": _web}
    found = [made[name](settings, make) for name in settings.sources]
    return tuple(source for source in found if source is not None)


def _proxy(settings: StoreSettings) -> str | None:
    """Its file is never shown: it may hold a password."""
    file = settings.proxy_file
    if file is None:
        return settings.proxy
    try:
        url = file.read_text(encoding="utf-8").strip()
        httpx2.Proxy(url)
        parts = urlsplit(url)
        valid = parts.scheme in {"http", "https"} and bool(parts.hostname)
    except OSError as error:
        raise ConfigError(f"models.proxy_file: can't read {file}: {error.strerror}") from None
    except (ValueError, httpx2.InvalidURL):
        valid = False
    if not valid:
        raise ConfigError(f"models.proxy_file: no URL such as http://user:word@host:3128 in {file}")
    return url


def _mirror(settings: StoreSettings, _: _Make) -> Source | None:
    if settings.mirror_url is None:
        return None
    client = partial(
        mirror.client, settings.mirror_endpoint, settings.mirror_region, settings.ca_file
    )
    return mirror.Mirror(settings.mirror_url, client)


def _hub(settings: StoreSettings, make: _Make) -> Source:
    certain = settings.report_missing and settings.hub_endpoint == HUB
    made = partial(make, settings.hub_rules)
    return Hub(made, settings.hub_endpoint, _secret(settings.hub_token_file), certain)


def _web(settings: StoreSettings, make: _Make) -> Source:
    hosts = settings.certain_hosts if settings.report_missing else frozenset[str]()
    certain = partial(speaks_for_all, hosts=hosts, rules=settings.rules)
    client = make(settings.rules)
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
