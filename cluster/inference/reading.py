"""Hostile JSON: read within bounds, and judged only where every reader must agree.

Text that isn't one JSON object is nobody's proven fault: each node gets an upload of its own, and
what we have may be cut off, or an envelope of a kind that we don't know. So all of that is
`TaskUnsupported`, and only a well-formed object can fail a schema.
"""

from __future__ import annotations

import json
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
_ENVELOPE: Final = frozenset({"epk", "ct", "ciphertext", "encrypted_key", "protected"})


def read_object(text: str) -> dict[str, Any]:
    """The JSON object that `text` is. Raises `TaskUnsupported` for anything else."""
    if len(text) > MAX_TEXT:
        raise TaskUnsupported(f"the parameters are longer than {MAX_TEXT} characters")
    _check_nesting(text)
    try:
        data = json.loads(text, parse_constant=_not_in_the_standard)
    except json.JSONDecodeError as error:
        raise TaskUnsupported(f"the parameters are not JSON: {error.msg} at {error.pos}") from None
    except ValueError as error:  # a number too long
        raise TaskUnsupported(f"JSON that readers disagree on: {type(error).__name__}") from None
    if not isinstance(data, dict):
        raise TaskUnsupported("the parameters are not a JSON object")
    if _ENVELOPE & data.keys():
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
