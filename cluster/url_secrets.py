"""What in a URL may be a credential: a text that holds URLs, without it.

A user and password, a query's value under a name that speaks of secrets, and what looks like a key
among the parts of a path, where providers of chain endpoints put theirs (`/v3/KEY`). A part that is
a name, a number, a `0x` hash or a commit stays: it tells more than it gives away.
"""

from __future__ import annotations

import re

_USER = re.compile(
    r"(?<=://)(?:[^/\s@:\"'<>]{0,200}+:(?!\d{1,5}[/?#])[^\s@\"'<>]{0,300}@)?"
    r"(?:[^/?#\s\"'<>]{0,300}@)?"
)
"""The password may hold what belongs to a path, as SQLAlchemy reads it; after a port it doesn't.
Lengths are bounded here and below because texts may be hostile, and long."""
_QUERY = re.compile(
    r"(?P<name>[?&#;][\w.%-]{0,40}(?:key(?!word)|token|secret|signature|passw|credential|auth)"
    r"[\w.%-]{0,40}="
    r"|[?&#;](?:sig|pwd|pass)=)[^\s&#;\"'<>]+",
    re.IGNORECASE | re.ASCII,
)
_PATH = re.compile(r"(?<=://)(?P<host>[^/?#\s\"'<>]+)(?P<path>/[^?#\s\"'<>]+)")
_VERSION = re.compile(r"v\d+", re.ASCII)
_AFTER_VERSION = re.compile(r"(?=.*\d)(?=.*[A-Za-z])(?!0x)[\w-]{20,200}", re.ASCII)
_HEX = re.compile(r"[0-9a-fA-F]{32,}")
_UUID = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_LONG = re.compile(r"[\w-]{24,200}", re.ASCII)
_MIXED = re.compile(r"(?=[A-Za-z]*\d)(?=[a-z\d]*[A-Z])(?=[A-Z\d]*[a-z])[A-Za-z\d]{12,}")
"""No word of a name is like that."""
_A_COMMIT_FOLLOWS = frozenset({"resolve", "revision", "commit", "commits", "tree", "blob", "raw"})


def hide(text: str, instead: str) -> str:
    """`text` with `instead` in the place of each credential."""
    if "://" in text:
        text = _USER.sub(lambda found: f"{instead}@" if found.group() else "", text)
        text = _PATH.sub(lambda found: found["host"] + _hide_keys(found["path"], instead), text)
    return _QUERY.sub(lambda found: f"{found['name']}{instead}", text)


def _hide_keys(path: str, instead: str) -> str:
    parts = path.split("/")
    return "/".join(
        _hidden(part, before, instead) for before, part in zip(["", *parts], parts, strict=False)
    )


def _hidden(part: str, before: str, instead: str) -> str:
    # What follows a URL in a sentence, or a list, is none of it.
    bare = part.rstrip(".,:;)]}")
    return instead + part[len(bare) :] if _is_key(bare, before) else part


def _is_key(part: str, before: str) -> bool:
    if _VERSION.fullmatch(before) and _AFTER_VERSION.fullmatch(part):
        return True
    if _HEX.fullmatch(part) or _UUID.fullmatch(part):
        return before not in _A_COMMIT_FOLLOWS
    return bool(_LONG.fullmatch(part) and _MIXED.search(part))
