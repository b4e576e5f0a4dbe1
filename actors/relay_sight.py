"""Whether the relay is reached, from what became of the calls for tasks, and of one that is made
when no task has called for a while."""

from __future__ import annotations

from cluster.core.errors import ClusterError, RelayBroken, RelayError, RelayRefused
from cluster.core.types import Commitment

FORGET_SECONDS = 300.0
"""After so long without a call nobody knows any more."""
QUIET_SECONDS = 60.0
"""After so long without a call the relay is asked whether it is there: the next task needs it."""
AWAY_SECONDS = 10.0
"""The same where it is away."""
ALONE = 1


class RelaySight:
    """A refusal is an answer too. What breaks the relay itself says nothing as long as it is one
    task's: of several it is the relay that is broken."""

    def __init__(self) -> None:
        self._failed: dict[Commitment, str] = {}
        self._away = ""
        self._at = self._called_at = float("-inf")
        self.calls = 0

    def is_quiet(self, now: float) -> bool:
        quiet = AWAY_SECONDS if self._away else QUIET_SECONDS
        return not 0.0 <= now - self._called_at < quiet

    def asked(self, away: str, now: float) -> None:
        """What came of asking whether it is there: why not, or nothing. That says nothing of what
        it makes of tasks."""
        self._called(now)
        self._away = away
        if away:
            self._at = now

    def heard(self, task: Commitment, error: ClusterError | None, now: float) -> None:
        """What came of a call for a task."""
        self._called(now)
        if not isinstance(error, RelayError) or isinstance(error, RelayRefused):
            self._failed.clear()
            self._away = ""
            return
        if self._is_old(now):
            self._failed.clear()
        self._failed[task] = str(error)
        self._away = "" if isinstance(error, RelayBroken) else str(error)
        self._at = now

    def error(self, now: float) -> str | None:
        """Why it isn't reached; None where it is, or where that isn't known."""
        if self._is_old(now):
            return None
        if self._away:
            return self._away
        return next(reversed(self._failed.values())) if len(self._failed) > ALONE else None

    def _called(self, now: float) -> None:
        self._called_at = now
        self.calls += 1

    def _is_old(self, now: float) -> bool:
        return now - self._at >= FORGET_SECONDS
