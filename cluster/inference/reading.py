"""Hostile JSON: read within bounds, and judged only where every reader must agree.

Text that isn't one JSON object is nobody's proven fault: each node gets an upload of its own, and
what we have may be cut off, or an envelope of a kind that we don't know. So all of that is
`TaskUnsupported`, and only a well-formed object can fail a schema.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, Final

from pydantic import ValidationError

from cluster.core.errors import TaskInvalid, TaskUnsupported

MAX_TEXT: Final = 4 * 2**20
"""Characters; without images to be sent, parameters are some thousand."""
MAX_DEPTH: Final = 64
MAX_BRACKETS: Final = 100_000
_TOKENS: Final = re.compile(r'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)|[\[{\]}]', re.DOTALL)
"""A string, unended ones too (else each of its quotes would be tried), or a bracket."""
_STEPS: Final = {"[": 1, "{": 1, "]": -1, "}": -1}
MAX_DIGITS: Final = 18
"""Of a whole number; in the place of a fraction, the network's reader takes no longer ones."""
_ENVELOPE: Final = frozenset({"epk", "ct", "ciphertext", "encrypted_key", "protected"})
_PERHAPS_ENVELOPE: Final = frozenset({"alg", "nonce"})
"""Fields of an envelope that may be ignored beside parameters, but not in their place."""
_MODEL_KEYS: Final = frozenset({"base_model", "model"})


def read_object(text: str) -> dict[str, Any]:
    """The JSON object that `text` is. Raises `TaskUnsupported` for anything else."""
    if len(text) > MAX_TEXT:
        raise TaskUnsupported(f"the parameters are longer than {MAX_TEXT} characters")
    _check_nesting(text)
    try:
        data = json.loads(
            text,
            object_pairs_hook=_without_repeats,
            parse_constant=_not_in_the_standard,
            parse_float=_float,
            parse_int=_int,
        )
        json.dumps(data, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise TaskUnsupported(f"the parameters are not JSON: {error.msg} at {error.pos}") from None
    except UnicodeEncodeError:
        raise TaskUnsupported("JSON that readers disagree on: half a surrogate pair") from None
    if not isinstance(data, dict):
        raise TaskUnsupported("the parameters are not a JSON object")
    if _ENVELOPE & data.keys() or (
        _PERHAPS_ENVELOPE & data.keys() and not _MODEL_KEYS & data.keys()
    ):
        raise TaskUnsupported("the parameters look like an envelope of an unknown kind")
    return data


def _check_nesting(text: str) -> None:
    """Refuse what is nested too deep, before a recursive reader meets it.

    Python's own limit doesn't protect here: importing web3 lifts it so far that the C stack
    overflows first, and the process dies.
    """
    depth = count = 0
    for token in _TOKENS.finditer(text):
        step = _STEPS.get(token.group(), 0)
        depth += step
        count += step != 0
        if depth > MAX_DEPTH or count > MAX_BRACKETS:
            raise TaskUnsupported("the parameters are nested too deep, or have too many parts")


def _not_in_the_standard(constant: str) -> object:
    raise TaskUnsupported(f"JSON that readers disagree on: {constant}")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of a key that comes twice some readers take the first value, some the last, and the network's
    one or the other by where it stands."""
    data = dict(pairs)
    if len(data) < len(pairs):
        raise TaskUnsupported("JSON that readers disagree on: a key comes twice in one object")
    return data


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise TaskUnsupported("JSON that readers disagree on: a number beyond a float's range")
    return value


def _int(digits: str) -> int:
    if len(digits.removeprefix("-")) > MAX_DIGITS:
        raise TaskUnsupported(f"JSON that readers disagree on: more than {MAX_DIGITS} digits")
    return int(digits)


_UNCERTAIN: Final = frozenset({"string_unicode", "int_parsing_size", "recursion_loop"})
"""Failures of reading rather than of the schema: another reader may get past them."""


def verdict(error: ValidationError) -> TaskInvalid | TaskUnsupported:
    """What a failed schema means, in one line."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    first = next((p for p in problems if p["type"] not in _UNCERTAIN), None)
    problem = first or problems[0]
    place = ".".join(str(part) for part in problem["loc"]) or "parameters"
    line = " ".join(f"{place}: {problem['msg']}".split())[:300]
    return TaskUnsupported(line) if first is None else TaskInvalid(line)
