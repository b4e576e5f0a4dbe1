"""With which models of this machine a canary can be computed (`cluster.inference.canary`)."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
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
READ_WHOLE: Final = 2
"""Of how many, the best first, everything that is computed with is read through: a canary is asked
with the first that the machines of a class have. Of the others, sizes and ends."""
_SMALL: Final = 16 * 2**20
"""Bytes of a file that is read through though it holds no weights: a vocabulary, a setting."""
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
    read: tuple[Path, ...] = ()
    """The files that were read through; empty where none was yet."""


class Candidates:
    """Remembers what it has looked into. One thread at a time may ask it."""

    def __init__(self, keeper: Keeper, clock: Callable[[], float] = monotonic) -> None:
        self._keeper = keeper
        self._clock = clock
        self._seen: dict[str, _Seen] = {}

    def look(self) -> tuple[Candidate, ...]:
        """Models that make images by themselves: those that the operator has put here or pinned
        first, and of these the smallest. One look reads at most one of them through, of many GB
        perhaps: a card that comes up waits for the first look, and is asked with the best one."""
        here = self._keeper.store.on_disk()
        self._seen = {key: self._looked_at(key, self._seen.get(key)) for key in here}
        fit = [
            (not found.own, each.size, found.model, key)
            for key, each in self._seen.items()
            if (found := each.found) is not None
        ]
        best = [key for *_, key in sorted(fit)[:MOST]]
        for key in (each for each in best[:READ_WHOLE] if not self._seen[each].read):
            self._seen[key] = self._read_through(self._seen[key])
            if self._seen[key].read:
                break
        return tuple(found for key in best if (found := self._seen[key].found) is not None)

    def _read_through(self, seen: _Seen) -> _Seen:
        """With a digest of all that is computed with: weights that are spoilt in their middle are
        another question. What can't be read is none, and tried again later."""
        if seen.folder is None or seen.found is None:
            return seen
        try:
            files = _computed_with(seen.folder, seen.found.model.partition("+")[2])
            contents = _whole(seen.folder, files)
            stamp = _stamp(seen.folder, files)
        except (ModelUnavailable, OSError):  # it is being moved, or the disk has lost it
            return _Seen(self._clock())
        found = replace(seen.found, contents=contents)
        return replace(seen, stamp=stamp, found=found, read=files)

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
        return _stamp(seen.folder, seen.read) == seen.stamp

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
        contents = _ends(folder, files) if manifest is None else _listed(manifest)
        return _Seen(self._clock(), folder, stamp, size, Candidate(key, contents, own))


def _stamp(folder: Path, files: Iterable[Path] = ()) -> tuple[int, ...]:
    """Another one when the folder was replaced, or its index or one of the files written anew."""
    index = folder / "model_index.json"
    found = [folder.stat(), *([index.stat()] if index.is_file() else ())]
    found += [file.stat() for file in files]
    return tuple(n for stat in found for n in (stat.st_ino, stat.st_mtime_ns, stat.st_size))


def _computed_with(folder: Path, variant: str) -> tuple[Path, ...]:
    """The weights of that variant, and the small files beside them."""
    from cluster.inference.parts import weights  # the engine's, which is up: it takes torch with it

    found = {
        file
        for file in folder.rglob("*")
        if not file.name.startswith(".")
        and file.suffix != ".safetensors"
        and file.is_file()
        and file.stat().st_size <= _SMALL
    }
    for part in folder.iterdir():
        if part.is_dir():
            with contextlib.suppress(ModelUnavailable):  # a tokenizer, a scheduler
                found.update(weights(part, variant or None))
    return tuple(sorted(found))


def _whole(folder: Path, files: Iterable[Path]) -> str:
    """A digest of the files' every byte. The engine's own, taken once for a file that stays as it
    is: what is computed with was read for it, or needn't be again."""
    from cluster.inference.parts import digest_of

    digest = hashlib.sha256()
    for file in files:
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + digest_of(file))
    return digest.hexdigest()[:_DIGITS]


def _listed(manifest: Manifest) -> str:
    """A digest of what was fetched."""
    lines = sorted(f"{file.path} {file.sha256}" for file in manifest.files)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:_DIGITS]


def _ends(folder: Path, files: Iterable[Path]) -> str:
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
