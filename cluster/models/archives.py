"""Archives of models, opened as what a stranger sent: plain files into one folder, or nothing.

Members are read in turn and counted as they are written; what an archive says of itself is never
believed.
"""

from __future__ import annotations

import re
import shutil
import tarfile
import tempfile
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from lzma import LZMAError
from pathlib import Path
from typing import IO, Final

from cluster.models.refusals import Refused, Rule

MOST_MEMBERS: Final = 10_000
MOST_DEPTH: Final = 16
CHUNK: Final = 2**20
_WANTED: Final = (".safetensors", ".json", ".txt", ".model", ".spm", ".jinja")
_WORD: Final = re.compile(r"(?!\.)[\w .()+,@=-]{1,150}")
_DAMAGE: Final = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    LZMAError,
    EOFError,
    NotImplementedError,
    RuntimeError,
    ValueError,
    UnicodeError,
    OverflowError,
)


@dataclass(frozen=True, slots=True)
class _Member:
    """`content` is None for a folder."""

    name: str
    content: IO[bytes] | None


def unpack(
    archive: Path, target: Path, most_bytes: int, most_files: int = MOST_MEMBERS
) -> tuple[Path, ...]:
    """The archive's files in `target`, which must not be there yet; what it is, its content says.

    Raises `Refused` (ARCHIVE), and then leaves nothing; `OSError` for our own disk.
    """
    room = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        names = _unpack_into(room, archive, most_bytes, most_files)
        room.rename(target)
    except BaseException:
        shutil.rmtree(room, ignore_errors=True)
        raise
    return tuple(target / name for name in names)


def _unpack_into(room: Path, archive: Path, most_bytes: int, most_files: int) -> list[str]:
    names: list[str] = []
    seen: set[str] = set()
    left = most_bytes
    with _damage_named(archive):
        for count, member in enumerate(_members(archive)):
            if count >= most_files:
                raise _refused(archive, f"more than {most_files} members")
            name = _plain_name(archive, member)
            if member.content is None:
                continue
            folded = unicodedata.normalize("NFKC", name).casefold()
            if folded in seen:
                raise _refused(archive, "two members of one name")
            seen.add(folded)
            if _is_wanted(archive, name):
                file = room / name
                file.parent.mkdir(parents=True, exist_ok=True)
                left = _copy(archive, member.content, file, left)
                names.append(name)
    return names


@contextmanager
def _damage_named(archive: Path) -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        raise _refused(archive, f"damaged ({type(error).__name__})") from error
    except (FileExistsError, NotADirectoryError) as error:
        raise _refused(archive, "one name for a file and a folder") from error
    except OSError as error:
        if error.errno is None:  # of a decompressor, not of the disk
            raise _refused(archive, "damaged") from error
        raise


def _members(archive: Path) -> Iterator[_Member]:
    if zipfile.is_zipfile(archive):
        yield from _zip_members(archive)
    elif tarfile.is_tarfile(archive):
        yield from _tar_members(archive)
    else:
        raise _refused(archive, "neither zip nor tar")


def _zip_members(archive: Path) -> Iterator[_Member]:
    with zipfile.ZipFile(archive) as zipped:
        for info in zipped.infolist():
            kind = (info.external_attr >> 16) & 0o170000
            if kind not in {0, 0o100000, 0o040000}:
                raise _refused(archive, "a member that is neither file nor folder")
            if info.flag_bits & 0x1:
                raise _refused(archive, "an encrypted member")
            if info.filename != info.orig_filename:
                raise _refused(archive, "a name that readers differ on")
            if info.is_dir() or kind == 0o040000:
                yield _Member(info.filename, None)
                continue
            with zipped.open(info) as content:
                yield _Member(info.filename, content)


def _tar_members(archive: Path) -> Iterator[_Member]:
    with tarfile.open(archive, "r:*") as packed:
        for info in packed:
            if info.isdir():
                yield _Member(info.name, None)
            elif info.isreg() and not info.issparse():
                content = packed.extractfile(info)
                yield _Member(info.name, content)
            else:
                raise _refused(archive, "a member that is neither file nor folder")


def _plain_name(archive: Path, member: _Member) -> str:
    is_folder = member.content is None
    name = member.name.removesuffix("/") if is_folder else member.name
    words = name.removeprefix("./").split("/")
    if is_folder and words in ([""], ["."]):
        return "."
    if len(words) > MOST_DEPTH or not all(map(_WORD.fullmatch, words)):
        raise _refused(archive, f"a member's name that is no plain path: {ascii(name[:80])}")
    return "/".join(words)


def _is_wanted(archive: Path, name: str) -> bool:
    last = name.rpartition("/")[2]
    if last.endswith(_WANTED):
        return True
    if last.endswith(".md") or last.startswith("LICENSE"):
        return False
    raise _refused(archive, f"{ascii(name[:80])} is neither weights nor configuration")


def _copy(archive: Path, content: IO[bytes], file: Path, left: int) -> int:
    """How many bytes may still come after it."""
    with file.open("xb") as out:
        while chunk := content.read(CHUNK):
            left -= len(chunk)
            if left < 0:
                raise _refused(archive, "unpacks to more bytes than are taken")
            out.write(chunk)
    return left


def _refused(archive: Path, what: str) -> Refused:
    return Refused(Rule.ARCHIVE, f"{archive.name}: {what}")
