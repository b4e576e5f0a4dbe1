"""How long a coordinator waits from one term of office to the next."""

from __future__ import annotations

LONGEST_SECONDS = 30.0
HELD_SECONDS = 60.0
"""A term that broke after so long says nothing of the next."""


class Patience:
    """Doubles with each term that broke soon; after any other it is `first` seconds again."""

    def __init__(self, first: float) -> None:
        self._first = self._next = first

    def after(self, broke: bool, lasted: float) -> float:
        """Seconds to wait after a term that lasted so many."""
        if not broke or lasted >= HELD_SECONDS:
            self._next = self._first
        pause = self._next
        if broke:
            self._next = min(pause * 2, LONGEST_SECONDS)
        return pause
