"""Archives of models, unpacked into a fresh folder that takes its place only when all is in order.

Tar is read here and not by the standard library's `tarfile`, which trusts sizes (a name of
gigabytes is read whole), follows extended headers by recursion, and has looped for ever on damaged
ones (CVE-2025-8194). Archives of models are made of little: regular files, folders, long names.
Zip is read by `zipfile` through a view that bounds each read. Nothing is decompressed by more than
a piece at a time, and what counts is what comes out, not what a header says.
"""

from __future__ import annotations

import bz2
import gzip
import itertools
import lzma
import re
import stat
import struct
import tempfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Final

from cluster.models.refusals import Refused, Rule

WANTED: Final = (".safetensors", ".json", ".txt", ".model", ".spm", ".jinja")
MAX_DEPTH: Final = 16
MAX_NAME: Final = 1_000
"""Bytes of a path."""
MAX_PART: Final = 255
"""Bytes of one folder's or file's name: what Linux takes."""
MAX_EXTENDED: Final = 2**16
"""Bytes of a tar's extended header."""

_PIECE: Final = 2**18
_ZIP_READ: Final = 2**22
"""The longest of zipfile's reads is the list of members: 10,000 by 400 bytes."""
_XZ_MEMORY: Final = 2**28
_BLOCK: Final = 512
_MOST_FILL: Final = 2**20
_FORBIDDEN: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\\:]")
_RECORD: Final = re.compile(rb"([1-9][0-9]{0,6}) ")
_DIGITS: Final = re.compile(rb"[0-9]{1,18}")
_OCTAL: Final = re.compile(rb" *([0-7]{0,12})[ \0]*")
_EXTENDED: Final = frozenset({b"x", b"g", b"L"})
_PLACE: Final = frozenset({b"path", b"size"})
_ENCRYPTED: Final = 0x1 | 0x20 | 0x40 | 0x2000
"""Zip's flags of encrypted and patched members (APPNOTE 4.4.4)."""
_DAMAGE: Final = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error,
    EOFError, ValueError, OverflowError, LookupError, RuntimeError, MemoryError,
)  # fmt: skip
"""What the standard library's readers raise of bytes; NotImplementedError is a RuntimeError."""


def unpack(
    archive: Path,
    target: Path,
    most_bytes: int,
    most_files: int = 10_000,
    gate: Callable[[int], None] = lambda _size: None,
) -> tuple[Path, ...]:
    """The files that were written, by `target`, which is new or was an empty folder.

    `most_bytes` bounds what is unpacked, `most_files` the members (folders count); `gate` hears of
    each piece before it is written, and may raise. Raises `Refused` (`ARCHIVE`, or the gate's),
    what else the gate raises, and `OSError` of this machine's disk; `target` is then as it was
    before.
    """
    with tempfile.TemporaryDirectory(prefix=".unpack-", dir=target.parent) as temporary:
        fresh = Path(temporary) / "files"
        fresh.mkdir()
        members = _Members(fresh, most_bytes, most_files, gate)
        try:
            _read(archive, members)
            if not members.written:
                raise _refused("it holds no file of a model")
        except Refused as refused:
            raise Refused(refused.rule, f"{_line(archive)}: {refused}") from None
        except _DAMAGE as error:
            raise _refused(f"{_line(archive)}: damaged ({type(error).__name__})") from None
        except OSError as error:
            # gzip and bz2 raise it of damaged bytes as well, but then no system call has failed.
            if error.errno is not None:
                raise
            raise _refused(f"{_line(archive)}: damaged") from None
        fresh.rename(target)
    return tuple(target.joinpath(*parts) for parts in members.written)


def _read(archive: Path, members: _Members) -> None:
    if not stat.S_ISREG(archive.stat().st_mode):
        raise _refused("it is not a file")
    with archive.open("rb") as file:
        magic = file.read(6)
        file.seek(0)
        if magic.startswith(b"PK"):
            _read_zip(file, members)
        else:
            _read_tar(_Stream(_pieces(file, magic)), members)


class _Members:
    """Judges each member by its name and writes those that are wanted."""

    def __init__(
        self, root: Path, most_bytes: int, most_files: int, gate: Callable[[int], None]
    ) -> None:
        self._gate = gate
        self._root = root
        self._most_files = most_files
        self._most_bytes = most_bytes
        self.written: list[tuple[str, ...]] = []
        self._count = 0
        self._bytes = 0
        self._names: dict[str, tuple[tuple[str, ...], bool]] = {}
        self._folders: set[tuple[str, ...]] = set()

    def folder(self, name: str) -> None:
        self._one_more()
        parts = _parts(name.removesuffix("/"))
        if not parts:
            return
        if parts in self._folders:
            raise _refused(f"{name[:100]!r} is there twice")
        self._folders.add(parts)
        self._enter(parts, True)
        self._root.joinpath(*parts).mkdir(parents=True, exist_ok=True)

    def file(self, name: str, pieces: Iterable[bytes]) -> None:
        """`pieces` is read to its end where the file is wanted, and not at all where it isn't."""
        self._one_more()
        parts = _parts(name)
        if not parts:
            raise _refused("a file has no name")
        self._enter(parts, False)
        if not parts[-1].endswith(WANTED):
            if parts[-1].endswith(".md") or parts[-1].startswith("LICENSE"):
                return
            raise _refused(f"{name[:100]!r} is no kind of file that a model has")
        path = self._root.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as out:
            for piece in self.counted(pieces):
                out.write(piece)
        self.written.append(parts)

    def counted(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        for piece in pieces:
            self._bytes += len(piece)
            if self._bytes > self._most_bytes:
                raise _refused(f"it unpacks to more than {self._most_bytes} bytes")
            self._gate(len(piece))
            yield piece

    def _one_more(self) -> None:
        self._count += 1
        if self._count > self._most_files:
            raise _refused(f"it has more than {self._most_files} members")

    def _enter(self, parts: tuple[str, ...], is_folder: bool) -> None:
        """No two names may meet on a disk that knows neither case nor Unicode's forms."""
        for depth in range(1, len(parts) + 1):
            path, folder = parts[:depth], depth < len(parts) or is_folder
            folded = unicodedata.normalize("NFKC", "/".join(path)).casefold()
            folded = unicodedata.normalize("NFKC", folded)
            there = self._names.get(folded)
            if there is None:
                self._names[folded] = (path, folder)
            elif there[0] != path:
                raise _refused(f"{'/'.join(path)[:100]!r} is another's name but for case or form")
            elif not (there[1] and folder):
                raise _refused(f"{'/'.join(path)[:100]!r} is there twice")


def _parts(name: str) -> tuple[str, ...]:
    shown = repr(name[:100])
    if name.startswith("/"):
        raise _refused(f"{shown} is an absolute path")
    if len(name.encode()) > MAX_NAME:
        raise _refused(f"a name has {len(name.encode())} bytes")
    if _FORBIDDEN.search(name):
        raise _refused(f"{shown} has a character that no name here has")
    parts = name.split("/")
    if parts[0] == ".":  # what `tar c .` writes before each name
        del parts[0]
    for part in parts:
        if part in {"", ".", ".."}:
            raise _refused(f"{shown} is not a plain path")
        if len(part.encode()) > MAX_PART:
            raise _refused(f"{shown} has a part of {len(part.encode())} bytes")
    if len(parts) > MAX_DEPTH:
        raise _refused(f"{shown} is nested too deeply")
    return tuple(parts)


class _View:
    """A file as zipfile sees it: no long read, and no place before the beginning."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._size = file.seek(0, 2)
        file.seek(0)

    def read(self, size: int = -1, /) -> bytes:
        left = max(0, self._size - self._file.tell())
        size = left if size < 0 else min(size, left)
        if size > _ZIP_READ:
            raise _refused("its list of members is too long")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        place = offset + {0: 0, 1: self._file.tell(), 2: self._size}[whence]
        if not 0 <= place <= self._size:
            raise _refused("it points out of itself")
        return self._file.seek(place)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True


def _read_zip(file: BinaryIO, members: _Members) -> None:
    with zipfile.ZipFile(_View(file)) as source:
        for info in source.infolist():
            name = info.orig_filename  # zipfile cuts `filename` at a NUL
            _check_zip_member(info, name)
            if name.endswith("/"):
                members.folder(name)
            else:
                members.file(name, _zip_pieces(source, info))


def _check_zip_member(info: zipfile.ZipInfo, name: str) -> None:
    shown = repr(name[:100])
    if info.flag_bits & _ENCRYPTED:
        raise _refused(f"{shown} is encrypted")
    if info.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
        raise _refused(f"{shown} is compressed by an uncommon method")
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in {0, stat.S_IFDIR if name.endswith("/") else stat.S_IFREG}:
        raise _refused(f"{shown} is a link, a device or the like")
    if name.endswith("/") and info.file_size:
        raise _refused(f"{shown} is a folder with data")


def _zip_pieces(source: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[bytes]:
    total = 0
    with source.open(info) as data:
        while piece := data.read(_PIECE):
            total += len(piece)
            yield piece
    if total != info.file_size:
        raise _refused(f"{info.orig_filename[:100]!r} has not the size that it claims")


def _pieces(file: BinaryIO, magic: bytes) -> Iterator[bytes]:
    """The bytes of a tar, out of its compression if there is one."""
    if magic == b"\xfd7zXZ\0":
        return _xz_pieces(file)
    plain: BinaryIO | gzip.GzipFile | bz2.BZ2File = file
    if magic.startswith(b"\x1f\x8b"):
        plain = gzip.GzipFile(fileobj=file)
    elif magic.startswith(b"BZh"):
        plain = bz2.BZ2File(file)
    return iter(lambda: plain.read(_PIECE), b"")


def _xz_pieces(file: BinaryIO) -> Iterator[bytes]:
    """As `lzma.LZMAFile`, which can't be told how much memory to take at most."""
    machine: lzma.LZMADecompressor | None = None
    rest = b""
    while data := rest or file.read(_PIECE):
        rest = b""
        if machine is None:
            data = data.lstrip(b"\0")  # streams may have padding between them
            if not data:
                continue
            machine = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)
        yield machine.decompress(data, _PIECE)
        while not machine.eof and not machine.needs_input:
            yield machine.decompress(b"", _PIECE)
        if machine.eof:
            rest, machine = machine.unused_data, None
    if machine is not None:
        raise _refused("it is cut off")


class _Stream:
    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._left = memoryview(b"")

    def pieces(self, size: int) -> Iterator[bytes]:
        """The next `size` bytes, neither more nor fewer."""
        while size > 0:
            if not self._left:
                piece = next(self._pieces, None)
                if piece is None:
                    raise _refused("it is cut off")
                self._left = memoryview(piece)
            taken, self._left = self._left[:size], self._left[size:]
            size -= len(taken)
            yield bytes(taken)

    def take(self, size: int) -> bytes:
        return b"".join(self.pieces(size))

    def end(self) -> None:
        """What tar fills its last record with, and no more."""
        filled = 0
        for piece in itertools.chain([bytes(self._left)], self._pieces):
            filled += len(piece)
            if piece.strip(b"\0") or filled > _MOST_FILL:
                raise _refused("something follows its end")


def _read_tar(stream: _Stream, members: _Members) -> None:
    said: dict[bytes, bytes] = {}
    extended = 0
    while (block := stream.take(_BLOCK)).strip(b"\0"):
        name, kind, size = _tar_header(block)
        if kind in _EXTENDED:
            extended += 1
            if size > MAX_EXTENDED or extended > len(_EXTENDED):
                raise _refused("it has an extended header that is too long")
            data = stream.take(size)
            stream.take(-size % _BLOCK)
            said |= {b"path": data.split(b"\0")[0]} if kind == b"L" else _tar_records(data, kind)
            continue
        name = said.get(b"path", name)
        size = int(said.get(b"size", size))
        said, extended = {}, 0
        _tar_member(stream, members, name.decode("utf-8"), kind, size)
    stream.end()


def _tar_member(stream: _Stream, members: _Members, name: str, kind: bytes, size: int) -> None:
    if kind == b"5":
        if size:
            raise _refused(f"{name[:100]!r} is a folder with data")
        members.folder(name)
    elif kind in {b"0", b"\0"}:
        data = stream.pieces(size)
        members.file(name, data)
        for _ in members.counted(data):  # what was not wanted
            pass
        stream.take(-size % _BLOCK)
    else:
        raise _refused(f"{name[:100]!r} is a link, a device or the like")


def _tar_header(block: bytes) -> tuple[bytes, bytes, int]:
    """Name, kind and size (POSIX.1-2017, pax, "ustar Interchange Format")."""
    checksum = sum(block[:148]) + 8 * ord(" ") + sum(block[156:])
    if _tar_number(block[148:156]) != checksum:
        raise _refused("it is neither a zip nor a tar, or damaged")
    name = block[:100].split(b"\0")[0]
    prefix = block[345:500].split(b"\0")[0]
    if prefix and block[257:263] == b"ustar\0":
        name = prefix + b"/" + name
    return name, block[156:157], _tar_number(block[124:136])


def _tar_number(field: bytes) -> int:
    if field[0] == 0x80:  # GNU's way with more than 8 GiB
        return int.from_bytes(field[1:], "big")
    match = _OCTAL.fullmatch(field)
    if match is None:
        raise _refused("it is neither a zip nor a tar, or damaged")
    return int(match[1] or b"0", 8)


def _tar_records(data: bytes, kind: bytes) -> dict[bytes, bytes]:
    """Of a pax header those records that say where the next member is and how long."""
    records: dict[bytes, bytes] = {}
    at = 0
    while at < len(data):
        match = _RECORD.match(data, at)
        end = at + int(match[1]) if match else 0
        key, equals, value = data[match.end() : end].partition(b"=") if match else (b"", b"", b"")
        if end > len(data) or not equals or not value.endswith(b"\n"):
            raise _refused("it has a damaged extended header")
        records[key] = value[:-1]
        at = end
    for key in records:
        if key.startswith(b"GNU.sparse") or (kind == b"g" and key in _PLACE):
            raise _refused(f"it has an extended header of {key[:100]!r}")
    if not _DIGITS.fullmatch(records.get(b"size", b"0")):
        raise _refused("it has a damaged extended header")
    return {key: records[key] for key in _PLACE if key in records}


def _refused(what: str) -> Refused:
    return Refused(Rule.ARCHIVE, what)


def _line(file: Path) -> str:
    name = file.name[:100]
    return name if name.isprintable() else ascii(name)
