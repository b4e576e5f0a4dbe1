"""URLs that hold a credential, kept in files: the configuration itself then holds no secret.

Where a section has `X_file` beside `X`, what the file says takes the place of `X` as the
configuration is read. What a file says is never part of a complaint about it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

MOST: Final = 64 * 1024
"""Characters of such a file."""


def put_in(
    values: object,
    keys: Mapping[str, tuple[str, str | None]],
    path_of: Callable[[object], Path],
) -> object:
    """A section's `values` with what its files say. `keys`: the key that names a file, the one
    that its first line is for, and the list that further lines are for, if there may be any.
    Raises `ValueError`."""
    if not isinstance(values, dict):
        return values
    found = dict(values)
    for named, (key, more) in keys.items():
        if found.get(named) is None:
            continue
        if found.get(key) is not None:
            raise ValueError(f"{key} and {named}: it is said twice; keep one of them")
        found[key], *rest = _read(named, path_of(found[named]))
        if not rest:
            continue
        if more is None:
            raise ValueError(f"{named}: the file has {len(rest) + 1} URLs, and one is expected")
        found[more] = [*rest, *(found.get(more) or ())]
    return found


def _read(key: str, file: Path) -> list[str]:
    """Its lines, at least one, without blank ones and comments."""
    try:
        with file.open(encoding="utf-8") as opened:
            text = opened.read(MOST + 1)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise ValueError(f"{key}: {file} can't be read: {reason}") from None
    if len(text) > MOST:
        raise ValueError(f"{key}: {file} is too long for URLs")
    lines = [line.strip() for line in text.splitlines()]
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise ValueError(f"{key}: {file} is empty; a URL is expected")
    return found
