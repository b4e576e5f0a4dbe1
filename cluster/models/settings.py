"""What a store's keeper is told: plain values, no secret, quick to import."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cluster.models.refs import ModelRef
from cluster.models.urls import UrlRules

HUB: Final = "https://huggingface.co"
_S3: Final = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/([\w!.*'()/-]*))?", re.ASCII)


def parse_s3(url: str) -> tuple[str, str]:
    """Bucket and prefix (without slashes around it). Raises `ValueError`."""
    match = _S3.fullmatch(url)
    if match is None:
        raise ValueError("expected s3://bucket or s3://bucket/prefix")
    return match[1], (match[2] or "").strip("/")


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes, and bytes a second. `quota` is for all that was fetched; `spare` stays free on the
    disk. `rounds`: how often all sources are tried for who has no deadline."""

    quota: int | None = None
    largest_file: int = 64 * 2**30
    spare: int = 2 * 2**30
    rate: float | None = None
    rounds: int = 6
    part: int = 16 * 2**20
    connections: int = 4


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """`sources` in the order in which they are asked; `mirror_url` None where there is no mirror.
    Token files are None, or read anew for each request; `proxy_file`, for a proxy whose URL has a
    password, and `ca_file` as a store is opened."""

    root: Path
    sources: tuple[str, ...] = ()
    mirror_url: str | None = None
    mirror_endpoint: str | None = None
    mirror_region: str | None = None
    hub_endpoint: str = HUB
    hub_token_file: Path | None = None
    civitai_token_file: Path | None = None
    proxy: str | None = None
    rules: UrlRules = UrlRules()  # noqa: RUF009 - frozen
    """For the links of tasks."""
    hub_rules: UrlRules = UrlRules()  # noqa: RUF009 - frozen
    limits: Limits = Limits()  # noqa: RUF009 - frozen
    pinned: frozenset[ModelRef] = frozenset()
    report_missing: bool = True
    """Whether the hub, or one of `certain_hosts`, can make a lack certain."""
    certain_hosts: frozenset[str] = frozenset()
    proxy_file: Path | None = None
    ca_file: Path | None = None
    """Certificates that are believed beside the usual ones."""
