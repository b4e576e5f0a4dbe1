"""What an endpoint's answer means: pure.

An answer to what was asked is believed, also one that says no: a revert is the contract's word.
What the endpoint itself won't do (it has no such block yet, is asked too much, is out of order)
isn't: the next one is asked. Clients and providers have no common codes for it, so words are looked
at too; they decide only whom to ask next and how soon, never what becomes of a task.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from typing import Any, Final

from pydantic_core import from_json

from cluster.core.errors import ChainError

LOGS: Final = "eth_getLogs"
SEND: Final = "eth_sendRawTransaction"
MOST_PATIENCE: Final = 300.0
"""Seconds that an endpoint may have us wait."""
_NOT_HERE_YET: Final = frozenset({-32000, -32001, -32014, -39001})
"""Codes under which clients say that they don't have a block (yet)."""
_TOO_MUCH: Final = frozenset({429, -32029, -32097})
_LIMIT: Final = -32005
"""Of calls; but with logs, of how many there may be in an answer."""
_BUSY: Final = re.compile(
    r"rate.?limit|too many requests|request limit|daily request|quota|capacity|compute units"
    r"|throttl",
    re.IGNORECASE,
)
_BUSY_WITH_CALLS: Final = re.compile(
    r"rate.?limit|too many requests|request limit|daily request|compute units", re.IGNORECASE
)
"""Of a transaction that isn't taken: a pool has a capacity too."""
_NOT_LET_IN: Final = frozenset({401, 402, 403})


class TooLong(ChainError):
    """There is more in the answer than is read, or than the endpoint gives at once."""


class Throttled(ChainError):
    """The endpoint has too much to do; `retry_after` in seconds, where it says so."""

    def __init__(self, message: str, retry_after: float | None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Meaning(enum.Enum):
    ANSWER = "answer"
    """Also that the contract would not."""
    BEHIND = "behind"
    """It doesn't have the block yet that was asked about."""
    BUSY = "busy"
    REFUSED = "refused"


def meaning(method: str, answer: Mapping[str, Any]) -> Meaning:
    error = answer.get("error")
    if error is None or is_revert(error):
        return Meaning.ANSWER
    if not isinstance(error, Mapping):
        return Meaning.REFUSED
    code, words = error.get("code"), str(error.get("message", ""))
    busy = _BUSY_WITH_CALLS if method == SEND else _BUSY
    if code in _TOO_MUCH or (code == _LIMIT and method != LOGS) or busy.search(words):
        return Meaning.BUSY
    if code in _NOT_HERE_YET and _names_no_block(words.lower()):
        return Meaning.BEHIND
    return Meaning.REFUSED


def is_revert(error: object) -> bool:
    """Whether it is the contract that says no: by the code, what it returned, or the word."""
    if not isinstance(error, Mapping):
        return False
    data, words = error.get("data"), error.get("message")
    returned = isinstance(data, str) and data.startswith("0x") and len(data) > 2
    return error.get("code") == 3 or returned or "revert" in str(words).lower()


def _names_no_block(words: str) -> bool:
    return any(each in words for each in ("header not found", "unknown block", "block not found"))


def patience(answer: Mapping[str, Any]) -> float | None:
    """How long the endpoint asks us to wait, where its error says so."""
    found: object = answer.get("error")
    for key in ("data", "rate", "backoff_seconds"):
        found = found.get(key) if isinstance(found, Mapping) else None
    if not isinstance(found, int | float) or not 0 < found < float("inf"):
        return None
    return min(float(found), MOST_PATIENCE)


def read(method: str, number: int, status: int, body: bytes) -> Mapping[str, Any]:
    """The JSON-RPC answer in an HTTP one. Raises `ChainError` when there is none: whatever a proxy
    says in JSON, refusing us or broken, isn't one."""
    if status == 413:
        raise TooLong(f"{method}: HTTP 413")
    try:
        answer = from_json(body)
    except ValueError:
        answer = None
    ours = isinstance(answer, dict) and answer.get("id", number) in (number, None)
    error = answer.get("error") if ours else None
    if (status in _NOT_LET_IN or status >= 500) and not is_revert(error):
        raise ChainError(f"{method}: HTTP {status}")
    if not ours or ("result" not in answer and error is None):
        raise ChainError(f"{method}: HTTP {status}, and no JSON-RPC answer to what was asked")
    found: Mapping[str, Any] = answer
    return found
