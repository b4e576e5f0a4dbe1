"""What `crynux-cluster models` does to the store of this machine, and what it shows of it."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

from rich import box
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from cluster.core.errors import ClusterError, ConfigError, ModelUnavailable, TaskInvalid
from cluster.models.assembly import open_keeper, sources_of
from cluster.models.disk import Manifest
from cluster.models.keeper import Keeper, Stays, Wanted
from cluster.models.mirror import Mirror
from cluster.models.refs import ModelRef, of_model_id, ref
from cluster.models.settings import StoreSettings
from cluster.models.store import ModelStore
from cluster.status_view import size

POLL_SECONDS = 0.2
LINE_SECONDS = 5.0


def ref_of(text: str) -> ModelRef:
    """`[kind:]name[+variant]`, a base model without a kind; after a LoRA's `+` comes its file.

    Raises `ConfigError`.
    """
    kind, colon, rest = text.partition(":")
    if not colon or rest.startswith("//"):
        kind, rest = "base", text
    name, _, word = rest.partition("+") if "://" not in rest else (rest, "", "")
    try:
        if kind == "lora":
            return ref("lora", name, file=word)
        if kind in {"base", "controlnet"}:
            return of_model_id(f"{kind}:{rest}")
        return ref(kind, name, word)
    except (ModelUnavailable, TaskInvalid) as error:
        raise ConfigError(
            f"{text}: {error}; expected kind:org/name[+variant] or kind:URL, such as "
            "base:org/name+fp16 or lora:org/name+file.safetensors"
        ) from None


def fetch(settings: StoreSettings, names: Sequence[str], console: Console) -> None:
    """Bring models to this machine's disk. Raises `ClusterError` for the first that can't be."""
    refs = [ref_of(name) for name in names]
    keeper = _writable(settings)
    for each in refs:
        with _shown(keeper, each):
            _ensure(keeper, each)
        console.print(f"{each} is here", markup=False, highlight=False)


def mirror(settings: StoreSettings, names: Sequence[str], console: Console) -> None:
    """Put models into the mirror, from this machine's disk or from where they are fetched."""
    refs = [ref_of(name) for name in names]
    if settings.mirror_url is None:
        raise ConfigError("models.mirror.url: missing; name the bucket, such as s3://bucket/prefix")
    keeper = _writable(settings)
    target = next((source for source in sources_of(settings) if isinstance(source, Mirror)), None)
    if target is None:
        raise ConfigError("models.sources: add mirror, or nothing is ever read from it")
    for each in refs:
        with _shown(keeper, each):
            _ensure(keeper, each)
        manifest = keeper.disk.manifest(each.key)
        if manifest is None:
            raise ConfigError(
                f"{each} was laid into models.root by hand; copy its folder to "
                f"{settings.mirror_url}/{each.name}/ as it is"
            )
        with _bars() as bars:
            bar = bars.add_task(f"to the mirror: {each}", total=manifest.size)
            folder = keeper.disk.model(each.key)
            target.upload(each, folder, manifest, partial(bars.advance, bar))
        console.print(f"{each} is in {settings.mirror_url}", markup=False, highlight=False)


def drop(settings: StoreSettings, names: Sequence[str], console: Console) -> None:
    """Remove fetched models from this machine's disk; what is in use or configured stays."""
    refs = [ref_of(name) for name in names]
    keeper = _writable(settings)
    for each in refs:
        match keeper.drop(each):
            case Stays.IN_USE as stays:
                raise ClusterError(f"{each}: {stays.value}; try again when it has ended")
            case Stays.NOT_FETCHED:
                raise ConfigError(f"{each}: not among the fetched models; `models list` shows them")
            case Stays.PINNED as stays:
                raise ConfigError(f"{each}: {stays.value}")
        console.print(f"{each} is removed", markup=False, highlight=False)


@dataclass(frozen=True, slots=True)
class Row:
    manifest: Manifest
    pinned: bool
    in_use: bool
    uses: float
    used_at: float


def rows(settings: StoreSettings) -> tuple[Row, ...]:
    disk = ModelStore(settings.root).disk
    now = time.time()
    found = []
    for key, manifest in disk.manifests().items():
        count, at = disk.need(key, now)
        in_use = disk.is_locked(f"{key}.use")
        found.append(Row(manifest, manifest.ref in settings.pinned, in_use, count, at))
    return tuple(sorted(found, key=lambda row: str(row.manifest.ref)))


def plain(settings: StoreSettings) -> dict[str, object]:
    """What `models list --json` prints."""
    found = rows(settings)
    return {
        "root": str(settings.root),
        "quota_bytes": settings.limits.quota,
        "used_bytes": sum(row.manifest.size for row in found),
        "models": [
            {
                "model": str(row.manifest.ref),
                "source": row.manifest.source,
                "revision": row.manifest.revision,
                "bytes": row.manifest.size,
                "files": len(row.manifest.files),
                "fetched_at": row.manifest.fetched_at,
                "last_used_at": row.used_at or None,
                "uses": round(row.uses, 3),
                "pinned": row.pinned,
                "in_use": row.in_use,
            }
            for row in found
        ],
        "laid_by_hand": sorted(_laid(settings, found)),
    }


def render(settings: StoreSettings) -> RenderableType:
    found = rows(settings)
    table = Table("model", "source", "size", "last used", "", box=box.SIMPLE_HEAD, pad_edge=False)
    for row in found:
        used = datetime.fromtimestamp(row.used_at, UTC).strftime("%Y-%m-%d %H:%M") + "Z"
        marks = ", ".join(
            word for word, holds in (("pinned", row.pinned), ("in use", row.in_use)) if holds
        )
        table.add_row(
            escape(str(row.manifest.ref)),
            row.manifest.source,
            size(row.manifest.size),
            used if row.used_at else "-",
            marks,
        )
    quota = settings.limits.quota
    total = size(sum(row.manifest.size for row in found))
    of = f" of {size(quota)} (models.quota_gb)" if quota is not None else ""
    lines = [Text(f"{len(found)} models fetched into {settings.root}: {total}{of}")]
    if laid := sorted(_laid(settings, found)):
        lines.append(Text(f"laid there by hand: {', '.join(laid)}"))
    return Group(*([table] if found else []), *lines)


def _laid(settings: StoreSettings, found: Sequence[Row]) -> frozenset[str]:
    fetched = {row.manifest.ref.base_key for row in found if row.manifest.ref.kind == "base"}
    return ModelStore(settings.root).on_disk() - fetched


def _writable(settings: StoreSettings) -> Keeper:
    if not settings.sources:
        raise ConfigError("models.sources: empty, so nothing is fetched; name mirror, hub or web")
    keeper = open_keeper(settings)
    if not keeper.sources:
        raise ConfigError(f"models.root: can't write in {settings.root}")
    return keeper


def _ensure(keeper: Keeper, wanted: ModelRef) -> None:
    try:
        keeper.ensure(wanted, Wanted())
    except TaskInvalid as error:  # nobody's task: what was typed isn't there
        raise ConfigError(str(error)) from None


_COLUMNS = (
    TextColumn("{task.description}", markup=False),
    BarColumn(),
    DownloadColumn(),
    TransferSpeedColumn(),
    TimeRemainingColumn(),
)


@contextmanager
def _bars() -> Iterator[Progress]:
    """On a terminal, and nothing elsewhere; to standard error, so that it spoils no output."""
    console = Console(stderr=True)
    with Progress(
        *_COLUMNS, console=console, transient=True, disable=not console.is_terminal
    ) as bars:
        yield bars


@contextmanager
def _shown(keeper: Keeper, wanted: ModelRef) -> Iterator[None]:
    """How far the download is, whichever process makes it: a bar, or a line now and then."""
    ended = threading.Event()

    def watch(bars: Progress) -> None:
        bar = bars.add_task(str(wanted), total=None)
        said_at = time.monotonic()
        while not ended.wait(POLL_SECONDS):
            told = keeper.disk.progress(wanted.key)
            if told is None:
                continue
            bars.update(bar, completed=told.done, total=told.total or None)
            if bars.disable and time.monotonic() - said_at > LINE_SECONDS:
                said_at = time.monotonic()
                left = "" if told.seconds_left is None else f", {told.seconds_left:.0f} s left"
                of = f" of {size(told.total)}" if told.total else ""
                rate = size(told.rate)
                print(f"{wanted}: {size(told.done)}{of}, {rate}/s{left}", file=sys.stderr)

    with _bars() as bars:
        watcher = threading.Thread(target=watch, args=(bars,), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()
