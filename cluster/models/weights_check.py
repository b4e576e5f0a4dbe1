"""What a weights file or its companion says of itself, checked before anything else opens it.

A safetensors file is a header's length (u64, little-endian), the header (a JSON object) and the
tensors' data (https://github.com/huggingface/safetensors, "Format"). The header's grammar is far
smaller than JSON's, and only that grammar is read here: no nesting, no number beyond 20 digits and
nothing in a place where it has no business, so that a hostile header ends at its first wrong
character and takes neither the stack nor the memory. What passes here, the package opens.
"""

from __future__ import annotations

import json
import math
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cluster.models import strict_json
from cluster.models.refusals import Refused, Rule

MAX_HEADER: Final = 100 * 10**6
"""Bytes. The format's own reader takes no more."""
MAX_TENSORS: Final = 100_000
MAX_METADATA: Final = 100_000
MAX_NAME: Final = 1_000
MAX_RANK: Final = 16
MAX_DEPTH: Final = 100
"""Of a JSON companion. Python's own reader goes to about 1,000, less what is on the stack."""

BITS: Final = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "I8": 8, "U8": 8,
    "F8_E4M3": 8, "F8_E4M3FNUZ": 8, "F8_E5M2": 8, "F8_E5M2FNUZ": 8, "F8_E8M0": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
"""Of one element. The names are those that safetensors 0.8 knows."""

_LENGTH: Final = 8
_METADATA: Final = "__metadata__"
_SPACE: Final = re.compile(r"[ \t\n\r]*")
_NUMBER: Final = re.compile(r"0|[1-9][0-9]{0,19}")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_SURROGATE: Final = re.compile(r"[\ud800-\udfff]")
_DECODER: Final = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class Tensor:
    """One entry of a header; `start` and `end` are bytes from the beginning of the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def check_file(file: Path) -> tuple[Tensor, ...]:
    """The file's tensors by their place in it; of the file only the header is read.

    Raises `Refused` (`HEADER`), and `OSError` where the disk fails.
    """
    said = file.stat()
    try:
        if not stat.S_ISREG(said.st_mode):
            raise _refused("it is not a file")
        with file.open("rb") as source:
            head = source.read(_LENGTH)
            head += source.read(_header_size(head, said.st_size))
        return check_header(head, said.st_size)
    except Refused as refused:
        raise Refused(refused.rule, f"{_line(file)}: {refused}") from None


def check_header(head: bytes, file_size: int) -> tuple[Tensor, ...]:
    """`head` begins the file and holds at least the length and the header; raises `Refused`."""
    size = _header_size(head, file_size)
    raw = head[_LENGTH : _LENGTH + size]
    if len(raw) < size:
        raise _refused("the header is cut off")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise _refused("the header is not UTF-8") from None
    tensors = sorted(_entries(text), key=lambda tensor: (tensor.start, tensor.end))
    end = 0
    for tensor in tensors:
        if tensor.start != end:
            what = "overlaps the tensor before it" if tensor.start < end else "leaves a gap"
            raise _refused(f"tensor {tensor.name[:100]!r} {what}")
        end = tensor.end
    data = file_size - _LENGTH - size
    if end != data:
        raise _refused(f"the tensors take {end} bytes and the file has {data} for them")
    return tuple(tensors)


def check_text(file: Path, most: int) -> None:
    """A configuration, a vocabulary or a template: UTF-8 of at most `most` bytes, without NUL.

    What is named `.json` parses, as Python reads JSON (the NaN and Infinity that transformers
    writes into configurations pass). Raises `Refused` (`FILE_SIZE`, `FILE_KIND`), and `OSError`
    where the disk fails.
    """
    if not stat.S_ISREG(file.stat().st_mode):
        raise Refused(Rule.FILE_KIND, f"{_line(file)}: it is not a file")
    with file.open("rb") as source:
        raw = source.read(most + 1)
    if len(raw) > most:
        raise Refused(Rule.FILE_SIZE, f"{_line(file)}: it has more than {most} bytes")
    if b"\0" in raw:
        raise Refused(Rule.FILE_KIND, f"{_line(file)}: it is not text")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise Refused(Rule.FILE_KIND, f"{_line(file)}: it is not UTF-8") from None
    if not file.name.endswith(".json"):
        return
    try:
        # Whoever reads it may mind the mark at its beginning; it does no harm.
        data: object = strict_json.loads(text.removeprefix("\ufeff"))
    except ValueError:
        raise Refused(Rule.FILE_KIND, f"{_line(file)}: it is not JSON") from None
    if _deeper(data, MAX_DEPTH):
        raise Refused(Rule.FILE_KIND, f"{_line(file)}: it is nested too deeply")


def check_table(file: Path, most: int) -> None:
    """A sentencepiece table (`.model`, `.spm`), which is protobuf: bounded, neither a pickle nor
    an archive under another name. Raises `Refused`, and `OSError` where the disk fails."""
    if file.stat().st_size > most:
        raise Refused(Rule.FILE_SIZE, f"{_line(file)}: it has more than {most} bytes")
    with file.open("rb") as source:
        head = source.read(4)
    if head.startswith((b"\x80", b"PK")):
        raise Refused(Rule.FILE_KIND, f"{_line(file)}: it is not a tokenizer's table")


def _header_size(head: bytes, file_size: int) -> int:
    if len(head) < _LENGTH:
        raise _refused("it is too short for a header's length")
    size = int.from_bytes(head[:_LENGTH], "little")
    if size > MAX_HEADER:
        raise _refused(f"a header of {size} bytes is too long")
    if size > file_size - _LENGTH:
        raise _refused(f"a header of {size} bytes is longer than the file")
    return size


def _entries(text: str) -> list[Tensor]:
    if not text.startswith("{"):
        raise _refused("the header does not begin with {")
    reader = _Reader(text)
    tensors: list[Tensor] = []
    for name in reader.members():
        if name == _METADATA:
            _skip_metadata(reader)
            continue
        if len(tensors) == MAX_TENSORS:
            raise _refused(f"it has more than {MAX_TENSORS} tensors")
        if len(name) > MAX_NAME:
            raise _refused(f"a tensor's name has {len(name)} characters")
        if _CONTROL.search(name):
            raise _refused(f"a tensor's name has a control character: {name[:100]!r}")
        tensors.append(_tensor(reader, name))
    if text[reader.at :].strip(" "):
        raise _refused("something follows the header's object")
    return tensors


def _skip_metadata(reader: _Reader) -> None:
    for count, _ in enumerate(reader.members()):
        if count == MAX_METADATA:
            raise _refused(f"{_METADATA} has more than {MAX_METADATA} entries")
        reader.string()


def _tensor(reader: _Reader, name: str) -> Tensor:
    dtype: str | None = None
    shape: tuple[int, ...] | None = None
    offsets: tuple[int, ...] | None = None
    shown = f"tensor {name[:100]!r}"
    for key in reader.members():
        if key == "dtype":
            dtype = reader.string()
        elif key == "shape":
            shape = reader.numbers(MAX_RANK)
        elif key == "data_offsets":
            offsets = reader.numbers(2)
        else:
            raise _refused(f"{shown} has a foreign key {key[:100]!r}")
    if dtype is None or shape is None or offsets is None:
        raise _refused(f"{shown} lacks its dtype, shape or data_offsets")
    if len(offsets) != 2:
        raise _refused(f"{shown} has {len(offsets)} offsets")
    size = _size(dtype, shape, shown)
    start, end = offsets
    if end - start != size:
        raise _refused(f"{shown} is {size} bytes by its shape and {end - start} by its offsets")
    return Tensor(name, dtype, shape, start, end)


def _size(dtype: str, shape: tuple[int, ...], shown: str) -> int:
    """Bytes."""
    bits = BITS.get(dtype)
    if bits is None:
        raise _refused(f"{shown} is of an unknown dtype {dtype[:100]!r}")
    # Without the zeros, since numpy and torch multiply so for their strides.
    if math.prod(length or 1 for length in shape) * bits >= 8 * 2**63:
        raise _refused(f"{shown} has a shape too large")
    size, left = divmod(math.prod(shape) * bits, 8)
    if left:
        raise _refused(f"{shown} does not end at a whole byte")
    return size


class _Reader:
    """The header's grammar: objects with keys that differ, strings, lists of whole numbers."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def members(self) -> Iterator[str]:
        """The keys of the object that begins here; each key's value is the caller's to read."""
        self._take("{")
        if self._next() == "}":
            self.at += 1
            return
        seen: set[str] = set()
        while True:
            key = self.string()
            if key in seen:
                raise _refused(f"the key {key[:100]!r} is there twice")
            seen.add(key)
            self._take(":")
            yield key
            if self._take(",}") == "}":
                return

    def string(self) -> str:
        if self._next() != '"':
            raise _refused(f"no string at character {self.at}")
        try:
            value, self.at = _DECODER.raw_decode(self.text, self.at)
        except ValueError:
            raise _refused(f"a damaged string at character {self.at}") from None
        # JSON can spell half a character, which no UTF-8 can hold.
        if not isinstance(value, str) or _SURROGATE.search(value):
            raise _refused(f"a string that is not Unicode before character {self.at}")
        return value

    def numbers(self, most: int) -> tuple[int, ...]:
        self._take("[")
        values: list[int] = []
        if self._next() == "]":
            self.at += 1
            return ()
        while True:
            self._next()
            match = _NUMBER.match(self.text, self.at)
            if match is None:
                raise _refused(f"no whole number at character {self.at}")
            if len(values) == most:
                raise _refused(f"a list of more than {most} numbers at character {self.at}")
            values.append(int(match[0]))
            self.at = match.end()
            if self._take(",]") == "]":
                return tuple(values)

    def _next(self) -> str:
        """The character that comes after white space, or nothing at the end."""
        match = _SPACE.match(self.text, self.at)
        if match is not None:
            self.at = match.end()
        return self.text[self.at : self.at + 1]

    def _take(self, wanted: str) -> str:
        found = self._next()
        if not found or found not in wanted:
            raise _refused(f"the header is not as the format says at character {self.at}")
        self.at += 1
        return found


def _deeper(data: object, most: int) -> bool:
    """Level by level, so that the depth costs no stack."""
    level = [data]
    for _ in range(most):
        below: list[object] = []
        for value in level:
            if isinstance(value, dict):
                below += [inner for inner in value.values() if isinstance(inner, dict | list)]
            elif isinstance(value, list):
                below += [inner for inner in value if isinstance(inner, dict | list)]
        if not below:
            return False
        level = below
    return True


def _refused(what: str) -> Refused:
    return Refused(Rule.HEADER, what)


def _line(file: Path) -> str:
    name = file.name[:100]
    return name if name.isprintable() else ascii(name)
