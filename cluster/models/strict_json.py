"""JSON of strangers. Not `json.loads`: py_ecc, which web3 brings, lifts Python's recursion limit so
far that deep nesting would end the process; this reader counts, and ends at 200 levels."""

from __future__ import annotations

from typing import Any

from pydantic_core import from_json


def loads(raw: bytes | str) -> Any:
    """Raises `ValueError` for what isn't JSON, or is nested too deep. NaN and Infinity pass, which
    some models' configurations have."""
    return from_json(raw)
