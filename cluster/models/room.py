"""Room on the disk for what is fetched: a quota, some space that stays free, what leaves for it.

What leaves is worth the least for its bytes: what it took to fetch, times how often it was needed
of late. What is in use or pinned stays. One process at a time makes room, and what it promised to
a download counts as taken until that ends. What broken downloads left counts too, and leaves first.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cluster.core.eviction import Resident, victims
from cluster.models.diary import Diary
from cluster.models.disk import WRITING, Disk, Manifest, all_in
from cluster.models.refs import ModelRef
from cluster.models.refusals import Refused, Rule

_LOCK: Final = ".room"
LEAST_NEED: Final = 0.1
"""What is left of one use after three weeks."""
_NEEDLESS: Final = 0.01
WRITING_SECONDS: Final = 60.0
STALE: Final = 86400.0
"""Seconds after which what a broken download left behind isn't kept for the next try."""


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes: `quota` for all that was fetched (None: what the disk has), `spare` stays free."""

    disk: Disk
    diary: Diary
    quota: int | None
    spare: int
    pinned: frozenset[ModelRef]
    clock: Callable[[], float]

    def make(
        self,
        size: int,
        ref: ModelRef,
        promise: Callable[[], None] = lambda: None,
        gentle: bool = False,
    ) -> None:
        """So many bytes in all may be written for `ref`; others leave for it where they must, for
        a `gentle` one only what no task has needed of late: whoever creates tasks may have the
        network ask for anything.

        `promise` is called before anyone else may count. Raises `Refused` (QUOTA) when even that
        isn't enough.
        """
        with self.disk.lock(_LOCK):
            limit, used = self._limit_and_used(ref)
            if used + size > limit:
                self._give_up_leftovers(used + size - limit, ref)
                self._evict(size, ref, gentle)
                limit, used = self._limit_and_used(ref)
            if used + size > limit:
                raise Refused(
                    Rule.QUOTA,
                    f"{ref} needs {size} bytes; fetched models may take {max(limit, 0)} "
                    f"(models.quota_gb, the disk) and {used} of that can't be given up",
                )
            promise()

    def left(self) -> int:
        """Bytes that may yet come without another model leaving for them."""
        limit, used = self._limit_and_used(None)
        return max(limit - used, 0)

    def leftover(self) -> int:
        """Bytes that downloads which don't run now have left, for the next try."""
        return sum(self._leftovers(None).values())

    def tidy(self) -> None:
        """Remove what nobody will come back for. For the start of a process."""
        self.disk.prepare()
        self.disk.empty_trash()
        self._drop_stale()
        published = self.disk.keys()
        for key in published:
            with self.disk.try_lock(key) as free:
                if free and self.disk.manifest(key) is None:
                    self.disk.remove(key)
        self._drop_small()

    def _drop_small(self) -> None:
        """Anybody may name any number of models, and each leaves some."""
        disk, now = self.disk, self.clock()
        here = set(disk.keys())

        def drop(kind: str, stays: Callable[[str], bool]) -> None:
            disk.drop_small(kind, lambda f: _is_being_written(f, now) or stays(f.name))

        drop("uses", lambda key: key in here or disk.need(key, now)[0] >= _NEEDLESS)
        drop("refused", lambda key: disk.refusal(key, now) is not None)
        drop("progress", disk.is_locked)
        disk.drop_free_locks()

    def _evict(self, size: int, ref: ModelRef, gentle: bool) -> None:
        now = self.clock()
        manifests = self.disk.manifests()
        limit, used = self._limit_and_used(ref)
        residents = [
            Resident(key, each.size, max(each.seconds, 0.001), self._need(key, now), stays)
            for key, each in manifests.items()
            for stays in [self._stays(key, each) or (gentle and self._is_needed(key, now))]
        ]
        others = used - sum(each.size for each in manifests.values())
        for key in victims(residents, size, limit - others):
            with self.disk.try_lock(f"{key}.use") as free:
                if free:
                    self.disk.remove(key)
                    self.diary.write("evicted", manifests[key].ref, bytes=manifests[key].size)

    def _need(self, key: str, now: float) -> float:
        count, at = self.disk.need(key, now)
        return count + 1e-12 * at  # of two that nobody needs, the one that was used last stays

    def _is_needed(self, key: str, now: float) -> bool:
        return self.disk.need(key, now)[0] >= LEAST_NEED

    def _stays(self, key: str, manifest: Manifest) -> bool:
        return manifest.ref in self.pinned or self.disk.is_locked(f"{key}.use")

    def _drop_stale(self) -> None:
        for folder in _folders(self.disk.base / "partial"):
            with contextlib.suppress(OSError):
                if self.clock() - folder.stat().st_mtime >= STALE:
                    self._drop_leftover(folder)

    def _give_up_leftovers(self, size: int, ref: ModelRef) -> None:
        """So many bytes of them, the oldest first; not what somebody is trying to go on with."""
        found = self._leftovers(ref)
        for folder in sorted(found, key=_changed_at):
            if size <= 0:
                return
            if self._drop_leftover(folder):
                size -= found[folder]

    def _drop_leftover(self, folder: Path) -> bool:
        with self.disk.try_lock(folder.name) as free, contextlib.suppress(OSError):
            if free:
                shutil.rmtree(folder)
                return True
        return False

    def _leftovers(self, ref: ModelRef | None) -> dict[Path, int]:
        """Bytes of what is partly there, of other models than `ref` and those that come now."""
        own = {progress.ref.key for progress in self.disk.downloads()}
        if ref is not None:
            own.add(ref.key)
        folders = _folders(self.disk.base / "partial")
        return {folder: _bytes_in(folder) for folder in folders if folder.name not in own}

    def _limit_and_used(self, ref: ModelRef | None) -> tuple[int, int]:
        """What fetched models may take, and take now, with what other downloads than that of
        `ref` were promised, or have left."""
        here = sum(manifest.size for manifest in self.disk.manifests().values())
        others = [progress for progress in self.disk.downloads() if progress.ref != ref]
        promised = sum(max(each.total, each.done) for each in others)
        left = sum(self._leftovers(ref).values())
        arrived = 0 if ref is None else _bytes_in(self.disk.partial(ref.key))
        arrived += sum(_bytes_in(self.disk.partial(each.ref.key)) for each in others)
        free = shutil.disk_usage(_nearest(self.disk.base)).free
        by_disk = here + arrived + left + free - self.spare
        limit = by_disk if self.quota is None else min(self.quota, by_disk)
        return limit, here + promised + left


def _is_being_written(file: Path, now: float) -> bool:
    """By whoever gives it its own name in the next moment."""
    return file.name.endswith(WRITING) and now - _changed_at(file) < WRITING_SECONDS


def _changed_at(path: Path) -> float:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def _folders(folder: Path) -> list[Path]:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return sorted(path for path in folder.iterdir() if path.is_dir())
    return []


def _nearest(folder: Path) -> Path:
    """Itself, or what it would be made in."""
    return next((each for each in (folder, *folder.parents) if each.is_dir()), Path("/"))


def _bytes_in(folder: Path) -> int:
    total = 0
    with contextlib.suppress(OSError):
        for path in all_in(folder):
            with contextlib.suppress(OSError):
                total += path.stat().st_size
    return total
