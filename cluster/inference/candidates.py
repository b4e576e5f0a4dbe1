"""With which models of this machine a canary can be computed (`cluster.inference.canary`)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Final

from cluster.core.errors import ModelUnavailable
from cluster.inference.canary import Candidate
from cluster.models.disk import Manifest
from cluster.models.keeper import Keeper
from cluster.models.refs import ModelRef
from cluster.models.store import read_index

MOST: Final = 16
AGAIN_SECONDS: Final = 60.0
"""After which what couldn't be looked into is tried again."""
_END: Final = 64 * 2**10
_DIGITS: Final = 16
_MAKES_IMAGES: Final = frozenset({"StableDiffusionPipeline", "StableDiffusionXLPipeline"})


@dataclass(frozen=True, slots=True)
class _Seen:
    """A base model's folder as it was looked into; `found` is None for one of another kind, and
    there is no folder where it couldn't be looked into."""

    at: float
    folder: Path | None = None
    stamp: tuple[int, ...] = ()
    size: int = 0
    found: Candidate | None = None


class Candidates:
    """Remembers what it has looked into. One thread at a time may ask it."""

    def __init__(self, keeper: Keeper, clock: Callable[[], float] = monotonic) -> None:
        self._keeper = keeper
        self._clock = clock
        self._seen: dict[str, _Seen] = {}

    def look(self) -> tuple[Candidate, ...]:
        """Models that make images by themselves: those that the operator has put here or pinned
        first, and of these the smallest."""
        here = self._keeper.store.on_disk()
        self._seen = {key: self._looked_at(key, self._seen.get(key)) for key in here}
        fit = [
            (not found.own, each.size, found.model, found)
            for each in self._seen.values()
            if (found := each.found) is not None
        ]
        return tuple(each[-1] for each in sorted(fit, key=lambda each: each[:-1])[:MOST])

    def _looked_at(self, key: str, before: _Seen | None) -> _Seen:
        """What lies there, looked into again when it was replaced."""
        try:
            if before is not None and self._stands(before):
                return before
            return self._look_at(key)
        except (ModelUnavailable, OSError):  # no model of that kind, or it is being moved
            return _Seen(self._clock())

    def _stands(self, seen: _Seen) -> bool:
        if seen.folder is None:
            return self._clock() - seen.at < AGAIN_SECONDS
        return _stamp(seen.folder) == seen.stamp

    def _look_at(self, key: str) -> _Seen:
        name, _, variant = key.partition("+")
        ref, disk = ModelRef("base", name, variant), self._keeper.disk
        folder = self._keeper.store.find(ref)
        stamp = _stamp(folder)
        if read_index(folder).pipeline not in _MAKES_IMAGES:
            return _Seen(self._clock(), folder, stamp)
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        size = sum(file.stat().st_size for file in files if file.suffix == ".safetensors")
        manifest = disk.manifest(ref.key) if folder == disk.model(ref.key) else None
        own = manifest is None or ref in self._keeper.pinned
        contents = _contents(folder, files) if manifest is None else _listed(manifest)
        return _Seen(self._clock(), folder, stamp, size, Candidate(key, contents, own))


def _stamp(folder: Path) -> tuple[int, ...]:
    """Another one when the folder was replaced, or its index written anew."""
    index = folder / "model_index.json"
    found = [folder.stat(), *([index.stat()] if index.is_file() else ())]
    return tuple(number for stat in found for number in (stat.st_ino, stat.st_mtime_ns))


def _listed(manifest: Manifest) -> str:
    """A digest of what was fetched."""
    lines = sorted(f"{file.path} {file.sha256}" for file in manifest.files)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:_DIGITS]


def _contents(folder: Path, files: Sequence[Path]) -> str:
    """A digest of a folder's files: their sizes, beginnings and ends, which differ where weights
    were trained anew."""
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder).as_posix()} {size}\n".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_END))
            stream.seek(max(0, size - _END))
            digest.update(stream.read(_END))
    return digest.hexdigest()[:_DIGITS]
