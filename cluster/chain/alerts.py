"""What an operator has to see to, for as long as it lasts."""

from __future__ import annotations


class Alerts:
    """Lines by whose they are (a row's key) and of what kind; one that is noted anew takes the
    place of the one before."""

    def __init__(self) -> None:
        self._lines: dict[tuple[str, str], str] = {}

    def note(self, key: str, kind: str, line: str) -> None:
        self._lines[key, kind] = line

    def clear(self, key: str, kind: str | None = None) -> None:
        """It is over: of that kind, or all of it."""
        for each in [k for k in self._lines if k[0] == key and kind in {None, k[1]}]:
            del self._lines[each]

    def lines(self) -> tuple[str, ...]:
        return tuple(sorted(set(self._lines.values())))
