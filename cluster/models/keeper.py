"""The one who brings models: finds a source, waits for its turn, checks, publishes, makes room.

Any number of keepers in any number of processes share a store. Who wants a model takes its lock and
fetches; the others wait for the lock and find it there. What may follow from a failure is decided
here, once (protocol.md, "What a group does to a node"): only an id that no hub could have, and a
host that twice says 404 or 410 of what it alone would know, is the task's fault.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import random
from typing import Final

import structlog

from cluster.core.errors import (
    Cancelled,
    ClusterError,
    DeadlinePassed,
    ModelUnavailable,
    ModelUnavailableKind,
    TaskInvalid,
)
from cluster.models.archives import unpack
from cluster.models.diary import Diary
from cluster.models.disk import Disk, Manifest, Progress, Stored
from cluster.models.refs import ModelRef
from cluster.models.refusals import Refused, Rule
from cluster.models.room import Room
from cluster.models.selection import needed
from cluster.models.settings import Limits
from cluster.models.shards import is_index, missing_shards
from cluster.models.sources import Absent, Changed, Denied, Listing, Source, SourceDown
from cluster.models.store import ModelStore, Spoilt
from cluster.models.throttle import Throttle
from cluster.models.transfer import Damaged, Gate, Transfer, sha256_of
from cluster.models.weights_check import check_file, check_table, check_text

_log = structlog.get_logger("models")

LOOK_SECONDS: Final = 0.1
TELL_SECONDS: Final = 0.5
LOG_SECONDS: Final = 15.0
FIRST_PATIENCE, MOST_PATIENCE = 1.0, 60.0
SECOND_LOOK: Final = 3.0
"""Seconds before the same host is asked again whether a model exists."""
MOST_TEXT: Final = 64 * 2**20
FOREGROUND: Final = ".foreground"
CHECK_ROOM: Final = 16 * 2**20
"""Bytes of a file of unknown size, after which it is looked whether there is room for more."""
MOST_DAMAGED: Final = 2


@dataclass(frozen=True, slots=True)
class Wanted:
    """Who asks, and for how long. `alive` is called now and then while there is progress."""

    deadline: float | None = None
    cancelled: Callable[[], bool] = lambda: False
    alive: Callable[[], None] = lambda: None
    background: bool = False


@dataclass(slots=True)
class _Failures:
    """What the sources said so far."""

    denied: Denied | None = None
    absent: Absent | None = None
    down: SourceDown | None = None
    unfit: ModelUnavailable | None = None
    damaged: Damaged | None = None
    certainly_absent: bool = False
    progress: bool = False

    def verdict(self, ref: ModelRef) -> ClusterError:
        for unfit in (self.unfit, self.damaged):
            if unfit is not None:
                return unfit
        if self.denied is not None:
            return ModelUnavailable(ModelUnavailableKind.FORBIDDEN, str(self.denied))
        if self.down is not None:
            return ModelUnavailable(ModelUnavailableKind.UNREACHABLE, str(self.down))
        reason = str(self.absent) if self.absent else f"{ref}: no source is configured for it"
        return ModelUnavailable(ModelUnavailableKind.NOT_HERE, reason)


@dataclass
class Keeper:
    """`pinned` are never evicted. Times are unix times of `clock`."""

    store: ModelStore
    sources: Sequence[Source] = ()
    limits: Limits = Limits()  # noqa: RUF009 - frozen
    pinned: frozenset[ModelRef] = frozenset()
    clock: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep
    chance: Callable[[], float] = random  # noqa: S311 - jitter
    second_look: float = SECOND_LOOK
    diary: Diary = field(init=False)
    room: Room = field(init=False)

    def __post_init__(self) -> None:
        limits = self.limits
        self.diary = Diary(self.disk.base / "diary.jsonl", self.clock)
        self.room = Room(self.disk, self.diary, limits.quota, limits.spare, self.pinned, self.clock)

    @property
    def disk(self) -> Disk:
        return self.store.disk

    # --- what is here ----------------------------------------------------------------------------

    def has(self, ref: ModelRef) -> bool:
        """Whether it is here, whole and unchanged. Raises `ModelUnavailable` where it is here and
        can't be used."""
        try:
            self.store.find(ref)
        except Spoilt:
            return False
        except ModelUnavailable as error:
            if error.kind is not ModelUnavailableKind.NOT_HERE:
                raise
            return False
        return True

    def _drop_spoilt(self, ref: ModelRef) -> None:
        """Make way for what is to be fetched again; the model's lock is ours."""
        try:
            self.store.find(ref)
        except Spoilt as error:
            self.diary.write("damaged", ref, reason=str(error))
            self.disk.remove(ref.key)
        except ModelUnavailable:
            pass

    @contextlib.contextmanager
    def held(self, refs: Iterable[ModelRef], wanted: Wanted) -> Iterator[bool]:
        """The models, here and not to be evicted until the end; whether one had to be brought.
        Raises what `ensure` raises."""
        brought = False
        with ExitStack() as locks:
            for ref in refs:
                brought |= self.ensure(ref, wanted)
                if self.sources:
                    locks.enter_context(self.disk.lock(f"{ref.key}.use", shared=True))
                    # It may have been evicted between the two.
                    brought |= self.ensure(ref, wanted)
            yield brought

    def ensure(self, ref: ModelRef, wanted: Wanted) -> bool:
        """Bring the model here unless it is; whether it wasn't.

        Raises `TaskInvalid` where the model certainly doesn't exist, `ModelUnavailable` for
        everything else that stands against it, `Cancelled` or `DeadlinePassed`.
        """
        if self.has(ref):
            self._note_use(ref, wanted)
            return False
        if not any(source.serves(ref) for source in self.sources):
            raise ModelUnavailable(
                ModelUnavailableKind.NOT_HERE,
                f"{ref} is not on this machine, and no source is configured for it",
            )
        try:
            self.disk.prepare()
            self._fetch_in_turn(ref, wanted)
            self._note_use(ref, wanted)
            return True
        except OSError as error:
            reason = f"{ref}: the store can't be written: {error.strerror or error}"
            raise ModelUnavailable(ModelUnavailableKind.UNREACHABLE, reason) from error
        except ClusterError:
            raise
        except Exception as error:
            # A bug of ours, and still nothing that a card or a task is to blame for.
            _log.exception("fetching_broke", model=str(ref))
            reason = f"{ref}: {type(error).__name__} while it was fetched"
            raise ModelUnavailable(ModelUnavailableKind.UNREACHABLE, reason) from error

    def _note_use(self, ref: ModelRef, wanted: Wanted) -> None:
        """A task's; that the network asks for a model says little of whether it is needed."""
        if self.sources and not wanted.background:
            with contextlib.suppress(OSError):
                self.disk.used(ref.key, self.clock())

    # --- fetching --------------------------------------------------------------------------------

    def _fetch_in_turn(self, ref: ModelRef, wanted: Wanted) -> None:
        while True:
            self._check_wanted(wanted)
            with self.disk.try_lock(ref.key) as got, ExitStack() as foreground:
                if not wanted.background:
                    foreground.enter_context(self.disk.lock(FOREGROUND, shared=True))
                if got:
                    if not self.has(ref):
                        self._drop_spoilt(ref)
                        self._fetch(ref, wanted)
                    return
            # Somebody else fetches it: as long as that makes progress, we do.
            if self.disk.progress(ref.key) is not None:
                wanted.alive()
            with ExitStack() as waiting:
                if not wanted.background:
                    waiting.enter_context(self.disk.lock(f"{ref.key}.wait", shared=True))
                self.sleep(LOOK_SECONDS)

    def _fetch(self, ref: ModelRef, wanted: Wanted) -> None:
        """Try the sources in order, again and again; the lock is ours."""
        rounds, damaged, certain, patience = 0, 0, 0, FIRST_PATIENCE
        while True:
            failures = self._try_all(ref, wanted)
            if failures is None:
                return
            rounds, patience = (0, FIRST_PATIENCE) if failures.progress else (rounds + 1, patience)
            damaged += failures.damaged is not None
            certain = certain + 1 if failures.certainly_absent else 0
            if certain > 1:
                raise self._told(ref, TaskInvalid(f"{failures.absent}, asked twice"))
            if failures.down is None and not certain:
                raise self._told(ref, failures.verdict(ref))
            endless = wanted.deadline is None and rounds >= self.limits.rounds
            if endless or damaged >= MOST_DAMAGED:
                raise self._told(ref, failures.verdict(ref))
            pause = self.second_look
            if failures.down is not None:
                pause = max(patience, failures.down.retry_after or 0.0) * (0.5 + self.chance())
                patience = min(patience * 2, MOST_PATIENCE)
            self._pause(pause, wanted)

    def _try_all(self, ref: ModelRef, wanted: Wanted) -> _Failures | None:
        """One round; None when the model is here. Another source is tried at once."""
        failures = _Failures()
        for source in self.sources:
            if not source.serves(ref):
                continue
            try:
                self._from(source, ref, wanted, failures)
            except Absent as error:
                failures.absent = error
                failures.certainly_absent |= error.certain
            except Denied as error:
                failures.denied = error
            except (SourceDown, Changed, Damaged) as error:
                failures.damaged = error if isinstance(error, Damaged) else failures.damaged
                down = error if isinstance(error, SourceDown) else SourceDown(str(error))
                failures.down = _sooner(failures.down, down)
                event = "damaged" if isinstance(error, Damaged) else "broke"
                self.diary.write(event, ref, source=source.name, reason=str(error))
            except ModelUnavailable as error:
                failures.unfit = error
            else:
                return None
        # A host's certainty is worth nothing beside another that may yet have it.
        failures.certainly_absent &= not (failures.down or failures.denied or failures.unfit)
        return failures

    def _from(self, source: Source, ref: ModelRef, wanted: Wanted, failures: _Failures) -> None:
        began = self.clock()
        listing = source.list(ref)
        self._check_sizes(ref, listing)
        folder = self.disk.partial(ref.key)
        teller = _Teller(self, ref, listing, wanted)
        try:
            self.room.make(listing.size, ref, teller.tell, wanted.background)
            folder.mkdir(parents=True, exist_ok=True)
            _forget_other(folder, listing)
            gate = self._gate(ref, wanted, listing, teller)
            limits = self.limits
            transfer = Transfer(
                source,
                listing,
                limits.largest_file,
                gate,
                teller.gain,
                limits.part,
                limits.connections,
            )
            fetched = [transfer.fetch(file, folder) for file in listing.files]
            paths = self._unpacked(ref, fetched[0]) if listing.archive else fetched
            _check_all(folder, paths)
            files = tuple(_stored(folder, path) for path in paths)
            seconds = round(self.clock() - began, 3)
            manifest = Manifest(ref, source.name, listing.revision, files, self.clock(), seconds)
            self.disk.publish(ref.key, manifest)
        except Refused:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            failures.progress |= teller.fresh > 0
            self.disk.tell(ref.key, None)
        size = manifest.size
        self.diary.write("fetched", ref, source=source.name, bytes=size, seconds=seconds)

    def _check_sizes(self, ref: ModelRef, listing: Listing) -> None:
        most = self.limits.largest_file
        for file in listing.files:
            if file.size is not None and file.size > most:
                raise Refused(
                    Rule.FILE_SIZE,
                    f"{ref}: {file.path} has {file.size} bytes, at most {most} are fetched "
                    "(models.largest_file_gb)",
                )

    def _unpacked(self, ref: ModelRef, archive: Path) -> list[Path]:
        folder = archive.parent
        inside = folder / "unpacked"
        shutil.rmtree(inside, ignore_errors=True)
        room = self.limits.largest_file
        paths = unpack(archive, inside, room)
        archive.unlink()
        names = [path.relative_to(inside).as_posix() for path in paths]
        chosen = needed(ref, names)
        for name in chosen:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (inside / name).rename(folder / name)
        shutil.rmtree(inside)
        return [folder / name for name in chosen]

    def _gate(self, ref: ModelRef, wanted: Wanted, listing: Listing, teller: _Teller) -> Gate:
        throttle = Throttle(self.disk.base / "bandwidth", self.limits.rate)
        unknown = any(file.size is None for file in listing.files)

        def gate(size: int) -> None:
            self._check_wanted(wanted)
            while wanted.background and self._stands_back(ref):
                self.sleep(LOOK_SECONDS)
                self._check_wanted(wanted)
            fresh = teller.arrived(size)
            if unknown and fresh % CHECK_ROOM < size:
                self.room.make(fresh + CHECK_ROOM, ref, gentle=wanted.background)
            if (pause := throttle.take(size)) > 0:
                self._pause(pause, wanted)

        return gate

    def _stands_back(self, ref: ModelRef) -> bool:
        """Whether a task waits for another model, and none for this one."""
        return self.disk.is_locked(FOREGROUND) and not self.disk.is_locked(f"{ref.key}.wait")

    def _pause(self, seconds: float, wanted: Wanted) -> None:
        """Sleep, in steps that notice a cancel and say that we live."""
        until = self.clock() + seconds
        while (left := until - self.clock()) > 0:
            self._check_wanted(wanted)
            wanted.alive()
            self.sleep(min(left, 1.0))

    def _check_wanted(self, wanted: Wanted) -> None:
        if wanted.cancelled():
            raise Cancelled("cancelled while its models were fetched")
        if wanted.deadline is not None and self.clock() >= wanted.deadline:
            raise DeadlinePassed("ran into the deadline while its models were fetched")

    def _told(self, ref: ModelRef, error: ClusterError) -> ClusterError:
        rule = error.rule.value if isinstance(error, Refused) else ""
        self.diary.write("refused" if rule else "failed", ref, rule=rule, reason=str(error))
        return error


class _Teller:
    """Counts what arrives, and writes it down for those who watch."""

    def __init__(self, keeper: Keeper, ref: ModelRef, listing: Listing, wanted: Wanted) -> None:
        self._disk, self._clock, self._wanted = keeper.disk, keeper.clock, wanted
        self._progress = Progress(
            ref, listing.source, 0, listing.size, 0.0, keeper.clock(), wanted.background
        )
        self.fresh = 0
        self._told_at = 0.0
        self._logged_at = keeper.clock()
        self._lock = threading.Lock()

    def _log(self) -> None:
        told = self._progress
        _log.info(
            "model_arriving",
            model=str(told.ref),
            source=told.source,
            done_bytes=told.done,
            total_bytes=told.total,
            bytes_per_second=round(told.rate),
            seconds_left=None if told.seconds_left is None else round(told.seconds_left),
        )

    def tell(self) -> None:
        self._disk.tell(self._progress.ref.key, self._progress)

    def arrived(self, size: int) -> int:
        """So many bytes came over the wire; how many did in all."""
        with self._lock:
            self.fresh += size
            return self.fresh

    def gain(self, size: int) -> None:
        """So many bytes more are on the disk, or less when some are given up."""
        with self._lock:
            self._progress = replace(self._progress, done=max(self._progress.done + size, 0))
            now = self._clock()
            if now - self._told_at < TELL_SECONDS:
                return
            self._told_at = now
            rate = self.fresh / max(now - self._progress.started_at, 0.001)
            self._progress = replace(self._progress, rate=rate)
            self.tell()
            if now - self._logged_at >= LOG_SECONDS:
                self._logged_at = now
                self._log()
        self._wanted.alive()


def _forget_other(folder: Path, listing: Listing) -> None:
    """Whole files of another revision or source; those under way know what they are of."""
    mark, of = folder / ".of", f"{listing.source} {listing.revision}"
    if mark.is_file() and mark.read_text(encoding="utf-8") == of:
        return
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        if path.suffix not in {".part", ".parts"}:
            path.unlink()
    mark.write_text(of, encoding="utf-8")


def _check_all(folder: Path, paths: Sequence[Path]) -> None:
    """Raises `Refused`; what isn't the model's goes."""
    for path in paths:
        if path.suffix == ".safetensors":
            check_file(path)
        elif path.suffix in {".model", ".spm"}:
            check_table(path, MOST_TEXT)
        else:
            check_text(path, MOST_TEXT)
        if is_index(path.name) and (missing := missing_shards(path)):
            raise Refused(Rule.FILE_KIND, f"{path.name}: {missing[0]}, which it names, isn't there")
    keep = {*paths, *(parent for path in paths for parent in path.parents)}
    for path in sorted(folder.rglob("*"), reverse=True):
        if path not in keep:
            path.rmdir() if path.is_dir() else path.unlink()


def _sooner(one: SourceDown | None, other: SourceDown) -> SourceDown:
    """The failure after which all sources may be tried again the soonest."""
    if one is None:
        return other
    return min(one, other, key=lambda error: error.retry_after or 0.0)


def _stored(folder: Path, path: Path) -> Stored:
    stat = path.stat()
    name = path.relative_to(folder).as_posix()
    return Stored(name, stat.st_size, sha256_of(path), stat.st_mtime_ns)
