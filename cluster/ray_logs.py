"""How a Ray that is begun here passes on what its processes log, said before Ray is imported.

By itself it puts an actor's name and colours before each line, which is no JSON then, and keeps
lines back that are alike. Its processes write to files: whether a person reads what is passed on,
only whoever begins them knows.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Final

from cluster.logs import READ_BY_A_PERSON, Format

ALL_LINES: Final = {"RAY_DEDUP_LOGS": "0"}
BARE: Final = {"RAY_DISABLE_WORKER_LOG_PREFIX": "1"}
NO_COLOURS: Final = {"RAY_COLOR_PREFIX": "0"}


def is_text(log_format: Format, on_terminal: bool) -> bool:
    return log_format == "console" or (log_format == "auto" and on_terminal)


def settle(log_format: Format, on_terminal: bool, environment: MutableMapping[str, str]) -> None:
    """What is said there already, stays."""
    wanted = dict(ALL_LINES)
    if not is_text(log_format, on_terminal):
        wanted |= BARE
    if not on_terminal:
        wanted |= NO_COLOURS
    if log_format == "auto" and on_terminal:
        wanted[READ_BY_A_PERSON] = "1"
    for name, value in wanted.items():
        environment.setdefault(name, value)
