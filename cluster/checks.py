"""What one look at an operator's surroundings found: a line, and how to mend it."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass


class Level(enum.Enum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Check:
    """`mend` says what to do; empty where nothing is to be done."""

    name: str
    level: Level
    found: str
    mend: str = ""

    def plain(self) -> Mapping[str, str]:
        return asdict(self) | {"level": self.level.value}


def ok(name: str, found: str) -> Check:
    return Check(name, Level.OK, found)


def fail(name: str, found: str, mend: str) -> Check:
    return Check(name, Level.FAIL, found, mend)


def warn(name: str, found: str, mend: str) -> Check:
    return Check(name, Level.WARN, found, mend)


def worst(checks: Iterable[Check]) -> Level:
    levels = {check.level for check in checks}
    return next((each for each in (Level.FAIL, Level.WARN) if each in levels), Level.OK)
