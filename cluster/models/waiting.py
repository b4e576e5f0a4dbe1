"""Who wants a model, for how long, and what is looked at while one waits for it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Final

from cluster.core.errors import (
    Cancelled,
    ClusterError,
    DeadlinePassed,
    ModelUnavailable,
    ModelUnavailableKind,
)
from cluster.models.disk import Disk
from cluster.models.refs import ModelRef

LOOK_SECONDS: Final = 0.1
FOREGROUND: Final = ".foreground"
LEAST_SECONDS: Final = 3600.0
FAIR_RATE: Final = 256 * 2**10
"""Bytes a second. What isn't a task's is waited for an hour, and for what has come as long as it
takes at this rate: else one who drips would be fetched for ever, and nothing after him."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Who asks, and for how long. `alive` is called now and then until that ends."""

    deadline: float | None = None
    cancelled: Callable[[], bool] = lambda: False
    alive: Callable[[], None] = lambda: None
    background: bool = False


class TooSlow(ModelUnavailable):
    """It comes, and would take for ever."""

    def __init__(self, message: str) -> None:
        super().__init__(ModelUnavailableKind.UNREACHABLE, message)

    def __reduce__(self) -> tuple[type[TooSlow], tuple[str]]:  # type: ignore[override]
        return type(self), (str(self),)


class GiveWay(ClusterError):
    """A task wants the model that isn't fetched for one just now: it may fetch it itself."""


@dataclass(slots=True)
class Watch:
    """One model for one who wants it. Everything here raises `Cancelled`, `DeadlinePassed` or
    `TooSlow`. `most`: bytes of it that were on the disk at best; `waited`: seconds of our own
    choice, for a task or the bandwidth."""

    disk: Disk
    ref: ModelRef
    wanted: Wanted
    clock: Callable[[], float]
    sleep: Callable[[float], None]
    most: int = 0
    waited: float = 0.0
    began: float = field(init=False)

    def __post_init__(self) -> None:
        self.began = self.clock()

    def check(self) -> None:
        if self.wanted.cancelled():
            raise Cancelled("cancelled while its models were fetched")
        if self.wanted.deadline is not None and self.clock() >= self.wanted.deadline:
            raise DeadlinePassed("ran into the deadline while its models were fetched")
        if self.wanted.background and self.wanted.deadline is None:
            spent = self.clock() - self.began - self.waited
            if spent > LEAST_SECONDS + self.most / FAIR_RATE:
                raise TooSlow(f"{self.ref}: too slow, {self.most} bytes in {round(spent)} s")

    def look(self) -> None:
        """Between two pieces of what takes long on our own disk."""
        self.check()
        self.wanted.alive()

    def pause(self, seconds: float) -> None:
        """Sleep, in steps that notice a cancel and say that we live."""
        until = self.clock() + seconds
        while (left := until - self.clock()) > 0:
            self.look()
            self.sleep(min(left, 1.0))

    def pause_for_a_source(self, seconds: float) -> None:
        """As `pause`; raises `GiveWay` as soon as a task waits for what isn't fetched for one."""
        until = self.clock() + seconds
        while (left := until - self.clock()) > 0:
            if self.wanted.background and self.disk.is_locked(self._wait_lock):
                raise GiveWay("a task waits for it")
            self.pause(min(left, 1.0))

    def stand_back(self) -> None:
        """What isn't a task's waits while a task waits for another model, and none for this."""
        while self.wanted.background and self._is_in_the_way():
            self.sleep(LOOK_SECONDS)
            self.look()

    def in_front(self) -> AbstractContextManager[None]:
        """As long as a task fetches, what isn't a task's stands back."""
        return self._shared(FOREGROUND)

    def waiting(self) -> AbstractContextManager[None]:
        """As long as a task waits for this model, who fetches it doesn't stand back."""
        return self._shared(self._wait_lock)

    def _shared(self, lock: str) -> AbstractContextManager[None]:
        return nullcontext() if self.wanted.background else self.disk.lock(lock, shared=True)

    def _is_in_the_way(self) -> bool:
        return self.disk.is_locked(FOREGROUND) and not self.disk.is_locked(self._wait_lock)

    @property
    def _wait_lock(self) -> str:
        return f"{self.ref.key}.wait"
