"""The one who brings models: finds a source, waits for its turn, checks, publishes, makes room.

Any number of keepers in any number of processes share a store. Who wants a model takes its lock and
fetches; the others wait for the lock and find it there. What may follow from a failure is decided
here, once (protocol.md, "What a group does to a node"): only an id that no hub could have, and a
host that twice says 404 or 410 of what it alone would know, is the task's fault.
"""

from __future__ import annotations

import contextlib
import enum
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from random import random
from typing import Final

import structlog

from cluster.core.errors import ClusterError, ModelUnavailable, ModelUnavailableKind, TaskInvalid
from cluster.models.attempt import Attempt
from cluster.models.diary import Diary
from cluster.models.disk import Disk
from cluster.models.hearing import watched
from cluster.models.refs import ModelRef
from cluster.models.refusals import Refused, Rule
from cluster.models.room import Room
from cluster.models.settings import Limits
from cluster.models.sources import Absent, Changed, Denied, Source, SourceDown
from cluster.models.store import ModelStore, Spoilt
from cluster.models.transfer import Damaged
from cluster.models.waiting import LOOK_SECONDS, GiveWay, TooSlow, Watch
from cluster.models.waiting import Wanted as Wanted

_log = structlog.get_logger("models")

FIRST_PATIENCE, MOST_PATIENCE = 1.0, 60.0
SECOND_LOOK: Final = 3.0
"""Seconds before the same host is asked again whether a model exists."""
GIVE_SECONDS: Final = 10 * LOOK_SECONDS
"""In which a task that waits for the lock takes it."""
MOST_DAMAGED: Final = 2
MOST_CHANGED: Final = 2
"""Rounds after which a file that is another each time is read in one stream."""
REFUSED_SECONDS: Final = 3600.0
"""For which what was refused for what it is isn't fetched again."""
_FOR_GOOD: Final = frozenset({Rule.HEADER, Rule.ARCHIVE, Rule.FILE_KIND, Rule.CODE, Rule.LINK})
"""What nothing of ours may change."""


class Stays(enum.Enum):
    PINNED = "it is configured to stay (models.pin, models.preload)"
    NOT_FETCHED = "not among what was fetched there"
    IN_USE = "a task uses it"


@dataclass(slots=True)
class _Failures:
    """What the sources said so far."""

    denied: Denied | None = None
    absent: Absent | None = None
    down: SourceDown | None = None
    unfit: ModelUnavailable | None = None
    damaged: Damaged | None = None
    certainly_absent: bool = False
    changed: bool = False
    progress: bool = False

    def add(self, error: ClusterError) -> None:
        match error:
            case Absent():
                self.absent = error
                self.certainly_absent |= error.certain
            case Denied():
                self.denied = error
            case Damaged() | Changed() | SourceDown():
                self.damaged = error if isinstance(error, Damaged) else self.damaged
                self.changed |= isinstance(error, Changed)
                down = error if isinstance(error, SourceDown) else SourceDown(str(error))
                self.down = _sooner(self.down, down)
            case ModelUnavailable():
                self.unfit = error

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
    trouble: str = ""
    """Why nothing is fetched though it should be; then there are no sources."""
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

    def has(self, ref: ModelRef, look: Callable[[], None] = lambda: None) -> bool:
        """Whether it is here, whole and unchanged. Raises `ModelUnavailable` where it is here and
        can't be used, and what `look` raises, which is called now and then while that takes long.
        """
        try:
            replace(self.store, look=look).find(ref)
        except Spoilt:
            return False
        except ModelUnavailable as error:
            if error.kind is not ModelUnavailableKind.NOT_HERE:
                raise
            return False
        return True

    def _drop_spoilt(self, watch: Watch) -> None:
        """Make way for what is to be fetched again; the model's lock is ours."""
        ref = watch.ref
        try:
            replace(self.store, look=watch.look).find(ref)
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
                    with _nobodys_fault(ref):
                        locks.enter_context(self.disk.lock(f"{ref.key}.use", shared=True))
                    # It may have been evicted between the two.
                    brought |= self.ensure(ref, wanted)
            yield brought

    def ensure(self, ref: ModelRef, wanted: Wanted) -> bool:
        """Bring the model here unless it is; whether it wasn't.

        Raises `TaskInvalid` where the model certainly doesn't exist, `ModelUnavailable` for
        everything else that stands against it, `Cancelled` or `DeadlinePassed`.
        """
        with _nobodys_fault(ref):
            watch = Watch(self.disk, ref, wanted, self.clock, self.sleep)
            with self.telling(ref):
                is_here = self.has(ref, watch.look)
            if not is_here:
                self._check_can_come(ref)
                self._check_not_refused(ref, wanted)
                self.disk.prepare()
                self._fetch_in_turn(watch)
            self._note_use(ref, wanted)
            return not is_here

    def _check_can_come(self, ref: ModelRef) -> None:
        missing = f"{ref} is not on this machine"
        if self.trouble:
            kind = ModelUnavailableKind.UNREACHABLE
            raise ModelUnavailable(kind, f"{missing}, and {self.trouble}")
        if not any(source.serves(ref) for source in self.sources):
            kind = ModelUnavailableKind.NOT_HERE
            raise ModelUnavailable(kind, f"{missing}, and no source is configured for it")

    def _check_not_refused(self, ref: ModelRef, wanted: Wanted) -> None:
        """Not by whoever asks by hand: he may have mended it."""
        by_hand = wanted.deadline is None and not wanted.background
        if (said := self.disk.refusal(ref.key, self.clock())) is not None and not by_hand:
            raise Refused(Rule(said[0]), said[1])

    def _note_use(self, ref: ModelRef, wanted: Wanted) -> None:
        """A task's; that the network asks for a model says little of whether it is needed."""
        if self.sources and not wanted.background:
            with contextlib.suppress(OSError):
                self.disk.used(ref.key, self.clock())

    def drop(self, ref: ModelRef) -> Stays | None:
        """Remove what was fetched from the disk; why it stays, None when it is gone."""
        if ref in self.pinned:
            return Stays.PINNED
        if not self.disk.model(ref.key).is_dir():
            return Stays.NOT_FETCHED
        with self.disk.try_lock(f"{ref.key}.use") as free:
            if not free:
                return Stays.IN_USE
            self.disk.remove(ref.key)
        return None

    # --- fetching --------------------------------------------------------------------------------

    def _fetch_in_turn(self, watch: Watch) -> None:
        ref, wanted = watch.ref, watch.wanted
        while True:
            watch.check()
            pause = LOOK_SECONDS
            try:
                with self.disk.try_lock(ref.key) as got, watch.in_front():
                    if got:
                        if not self.has(ref, watch.look):
                            self._drop_spoilt(watch)
                            self._fetch(Watch(self.disk, ref, wanted, self.clock, self.sleep))
                        return
            except GiveWay:
                pause = GIVE_SECONDS
            # Somebody else has the lock or takes it now, and lives.
            wanted.alive()
            with watch.waiting():
                self.sleep(pause)

    def _fetch(self, watch: Watch) -> None:
        """Try the sources in order, again and again; the lock is ours."""
        try:
            self._try_again_and_again(watch)
        except TooSlow as error:
            raise self._told(watch.ref, error) from None

    def _try_again_and_again(self, watch: Watch) -> None:
        ref = watch.ref
        rounds, damaged, certain, patience = 0, 0, 0, FIRST_PATIENCE
        changed, refused = 0, dict[str, Refused]()
        while True:
            failures = self._try_all(watch, refused, changed >= MOST_CHANGED)
            if failures is None:
                return
            changed += failures.changed
            rounds, patience = (0, FIRST_PATIENCE) if failures.progress else (rounds + 1, patience)
            damaged += failures.damaged is not None
            certain = certain + 1 if failures.certainly_absent else 0
            if certain > 1:
                raise self._told(ref, TaskInvalid(f"{failures.absent}, asked twice"))
            if failures.down is None and not certain:
                raise self._told(ref, failures.verdict(ref))
            endless = watch.wanted.deadline is None and rounds >= self.limits.rounds
            if endless or damaged >= MOST_DAMAGED:
                raise self._told(ref, failures.verdict(ref))
            pause = self.second_look
            if failures.down is not None:
                # What was asked for is the least; only our own pauses are made shorter too.
                asked = failures.down.retry_after or 0.0
                pause = max(patience * (0.5 + self.chance()), asked + patience * self.chance())
                patience = min(patience * 2, MOST_PATIENCE)
            watch.pause_for_a_source(pause)

    def _try_all(self, watch: Watch, refused: dict[str, Refused], in_one: bool) -> _Failures | None:
        """One round; None when the model is here. Another source is tried at once, and one whose
        model was `refused` for what it is never again. `in_one`: see `Attempt`."""
        failures, ref = _Failures(), watch.ref
        for source in self.sources:
            if not source.serves(ref):
                continue
            if source.name in refused:
                failures.unfit = refused[source.name]
                continue
            attempt = Attempt(watch, self.store, source, self.room, self.limits, in_one)
            try:
                with watched(watch.look):
                    manifest = attempt.bring()
            except TooSlow:
                raise
            except (Absent, Denied, SourceDown, Changed, ModelUnavailable) as error:
                failures.add(error)
                failures.progress |= attempt.has_progressed
                self._tell(ref, source, error)
                if isinstance(error, Refused) and error.rule in _FOR_GOOD:
                    refused[source.name] = error
                continue
            self.disk.forget_refusal(ref.key)
            size, seconds = manifest.size, manifest.seconds
            self.diary.write("fetched", ref, source=source.name, bytes=size, seconds=seconds)
            return None
        # A host's certainty is worth nothing beside another that may yet have it.
        failures.certainly_absent &= not (failures.down or failures.denied or failures.unfit)
        return failures

    @contextlib.contextmanager
    def telling(self, what: ModelRef | str) -> Iterator[None]:
        """A refusal in here is written down, by its rule; `what` it was of."""
        try:
            yield
        except Refused as error:
            self.diary.write("refused", what, rule=error.rule.value, reason=str(error))
            raise

    def _tell(self, ref: ModelRef, source: Source, error: ClusterError) -> None:
        """What a source did, where that is more than not to have it."""
        reason = str(error)
        if isinstance(error, Refused):
            self.diary.write("refused", ref, rule=error.rule.value, reason=reason)
        elif isinstance(error, SourceDown | Changed | Damaged):
            event = "damaged" if isinstance(error, Damaged) else "broke"
            self.diary.write(event, ref, source=source.name, reason=reason)

    def _told(self, ref: ModelRef, error: ClusterError) -> ClusterError:
        """The end of it. A refusal was told when it came."""
        if not isinstance(error, Refused):
            self.diary.write("failed", ref, reason=str(error))
        elif error.rule in _FOR_GOOD:
            until = self.clock() + REFUSED_SECONDS
            self.disk.note_refusal(ref.key, error.rule.value, str(error), until)
        return error


@contextlib.contextmanager
def _nobodys_fault(ref: ModelRef) -> Iterator[None]:
    """Of the disk's trouble, and of a bug of ours, neither a card nor a task is to blame."""
    try:
        yield
    except ClusterError:
        raise
    except OSError as error:
        reason = f"{ref}: the store can't be written: {error.strerror or error}"
        raise ModelUnavailable(ModelUnavailableKind.UNREACHABLE, reason) from error
    except Exception as error:
        _log.exception("fetching_broke", model=str(ref))
        reason = f"{ref}: {type(error).__name__} while it was fetched"
        raise ModelUnavailable(ModelUnavailableKind.UNREACHABLE, reason) from error


def _sooner(one: SourceDown | None, other: SourceDown) -> SourceDown:
    """The failure after which all sources may be tried again the soonest."""
    if one is None:
        return other
    return min(one, other, key=lambda error: error.retry_after or 0.0)
