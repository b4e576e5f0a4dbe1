"""What any library or stranger said, as it may stand in a line for people: in a log, on a page."""

from __future__ import annotations

from typing import Final

MOST_SAID: Final = 300
"""Characters. Where all of it is wanted, a failed attempt's bundle has the whole."""
_UNPRINTABLE: Final = "\ufffd"


def printable(text: str) -> str:
    """In one line, and without what a terminal would obey or hide."""
    line = " ".join(text.split())
    return "".join(each if each.isprintable() else _UNPRINTABLE for each in line)


def brief(text: str, most: int = MOST_SAID) -> str:
    """As `printable`, and not longer than `most`."""
    line = printable(text[: 4 * most])
    return line if len(line) <= most else f"{line[: most - 1]}…"


def counted(count: int, noun: str) -> str:
    """ "1 card", "2 cards"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def times(count: int) -> str:
    """ "once", "2 times"."""
    return "once" if count == 1 else f"{count} times"


def named(error: BaseException) -> str:
    """An error of any kind: what it is called and what it says."""
    said = brief(str(error))
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
