"""Files before anything opens them: the header of safetensors, and text that goes with weights.

The format: eight bytes of length, little-endian; so many bytes of JSON; the tensors' data, without
a gap. What passes here the format's own reader takes; what it would read in another way does not.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cluster.models import strict_json
from cluster.models.refusals import Refused, Rule

MAX_HEADER: Final = 100_000_000
"""Bytes, as the format's own reader has it."""
MAX_TENSORS: Final = 100_000
MAX_RANK: Final = 16
MAX_NAME: Final = 1_000
BITS: Final = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")
_KEYS: Final = frozenset({"dtype", "shape", "data_offsets"})


@dataclass(frozen=True, slots=True)
class Tensor:
    """Its bytes are from `start` up to `end` in the file's data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class _Wrong(ValueError):
    pass


def check_file(file: Path) -> tuple[Tensor, ...]:
    """Reads the header only. Raises `Refused`."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        # One too long is found out below, without being read.
        stream.seek(0)
        head = stream.read(8 + min(length, MAX_HEADER))
    return check_header(head, size, file.name)


def check_header(head: bytes, file_size: int, name: str = "file") -> tuple[Tensor, ...]:
    """The tensors in order of their bytes; `head` begins the file and holds all of its header.

    Raises `Refused` (HEADER).
    """
    try:
        return _tensors(head, file_size)
    except _Wrong as error:
        raise Refused(Rule.HEADER, f"{name}: not safetensors: {error}") from None


def check_text(file: Path, most: int) -> None:
    """A configuration or a tokenizer: JSON, UTF-8 text, or sentencepiece's table as it is.

    Raises `Refused`.
    """
    size = file.stat().st_size
    if size > most:
        raise Refused(Rule.FILE_SIZE, f"{file.name}: {size} bytes, {most} at most")
    content = file.read_bytes()
    if file.suffix in {".model", ".spm"}:
        if content[:2] == b"PK" or content[:1] == b"\x80":
            raise Refused(Rule.FILE_KIND, f"{file.name}: a pickle or an archive, not a tokenizer")
        return
    try:
        text = content.decode("utf-8")
        if "\0" in text:
            raise ValueError
        if file.suffix == ".json":
            strict_json.loads(text)
    except ValueError:
        raise Refused(Rule.FILE_KIND, f"{file.name}: not what its name says") from None


def _tensors(head: bytes, file_size: int) -> tuple[Tensor, ...]:
    if len(head) < 8:
        raise _Wrong("shorter than a header's length")
    length = int.from_bytes(head[:8], "little")
    if length > MAX_HEADER:
        raise _Wrong(f"a header of {length} bytes")
    if 8 + length > file_size or 8 + length > len(head):
        raise _Wrong("shorter than its header")
    entries = _entries(head[8 : 8 + length])
    entries.pop("__metadata__", None)
    if len(entries) > MAX_TENSORS:
        raise _Wrong(f"{len(entries)} tensors")
    found = [_tensor(name, said) for name, said in entries.items()]
    found.sort(key=lambda tensor: (tensor.start, tensor.end))
    at = 0
    for tensor in found:
        if tensor.start != at:
            raise _Wrong("tensors that overlap or leave a gap")
        at = tensor.end
    if at != file_size - 8 - length:
        raise _Wrong("its data isn't as long as its tensors")
    return tuple(found)


def _entries(raw: bytes) -> dict[str, Any]:
    if not raw.startswith(b"{"):
        raise _Wrong("a header that doesn't begin with {")
    try:
        strict_json.loads(raw)  # not nested too deep for the next line
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_never)
    except _Wrong:
        raise
    except ValueError:
        raise _Wrong("a header that isn't JSON") from None
    if not isinstance(entries, dict):
        raise _Wrong("a header that isn't an object")
    metadata = entries.get("__metadata__", {})
    texts = isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    if not texts:
        raise _Wrong("metadata other than text")
    return entries


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise _Wrong("a name that stands twice")
    return made


def _never(_: str) -> None:
    raise _Wrong("a number that JSON doesn't have")


def _tensor(name: str, said: object) -> Tensor:
    if len(name) > MAX_NAME or _CONTROL.search(name) or not _is_text(name):
        raise _Wrong("a tensor's name that is none")
    if not isinstance(said, dict) or said.keys() != _KEYS:
        raise _Wrong("a tensor that isn't described by dtype, shape and data_offsets")
    dtype, shape, offsets = said["dtype"], said["shape"], said["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _Wrong("a type of number that isn't known")
    if not _are_sizes(shape) or len(shape) > MAX_RANK:
        raise _Wrong("a shape that is none")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise _Wrong("offsets that are none")
    bits = math.prod(shape) * BITS[dtype]
    if bits % 8 or bits >= 2**63 or offsets[1] - offsets[0] != bits // 8:
        raise _Wrong("a tensor whose bytes don't fit its shape")
    return Tensor(name, dtype, tuple(shape), offsets[0], offsets[1])


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _is_text(name: str) -> bool:
    """No halves of surrogate pairs, which JSON can spell and UTF-8 can't."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)
