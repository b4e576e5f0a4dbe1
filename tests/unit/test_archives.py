"""Archives: what a model's are is unpacked, and whatever else there is in one refuses it whole.

`python -m tests.unit.test_archives` writes the corpus anew.
"""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import lzma
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.models.archives import unpack
from cluster.models.refusals import Refused, Rule

CORPUS = Path(__file__).parents[1] / "corpus" / "archives"
MOST: Final = 100_000

Member = tuple[str, bytes]
A: Final[Member] = ("a.json", b"{}")


def zipped(*members: Member, method: int = zipfile.ZIP_DEFLATED, mode: int = 0) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, content in members:
            info = zipfile.ZipInfo("x")
            info.filename = name
            info.external_attr = mode << 16
            info.compress_type = method
            archive.writestr(info, content)
    return out.getvalue()


def zip_changed(old: bytes, new: bytes, *members: Member) -> bytes:
    """Both of a member's headers changed: the writer refuses or mends some things."""
    made = zipped(*members, method=zipfile.ZIP_STORED)
    assert old in made
    return made.replace(old, new)


def zip_flagged(flags: int) -> bytes:
    made = bytearray(zipped(A))
    struct.pack_into("<H", made, made.index(b"PK\x01\x02") + 8, flags)
    return bytes(made)


def zip_claiming(size: int) -> bytes:
    """The list of members says another size than there is."""
    made = bytearray(zipped(("a.txt", b"x" * 1000)))
    struct.pack_into("<L", made, made.index(b"PK\x01\x02") + 24, size)
    return bytes(made)


def tarred(
    *members: Member, kind: bytes = tarfile.REGTYPE, form: int = tarfile.PAX_FORMAT, link: str = ""
) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(content), kind, link
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def block(name: bytes, size: int | bytes = 0, kind: bytes = b"0", data: bytes = b"") -> bytes:
    """One member by hand: what the library's writer doesn't write."""
    said = size if isinstance(size, bytes) else b"%011o\0" % size
    head = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + said + b"00000000000\0"
    head += b" " * 8 + kind + bytes(100) + b"ustar\x0000"
    head = head.ljust(512, b"\0")
    head = head[:148] + b"%06o\0 " % sum(head) + head[156:]
    return head + data + bytes(-len(data) % 512)


def record(key: str, value: str) -> bytes:
    body = f" {key}={value}\n".encode()
    length = len(body) + 1
    while len(str(length)) + len(body) != length:
        length += 1
    return str(length).encode() + body


def extended(data: bytes, kind: bytes = b"x") -> bytes:
    return block(b"extended", len(data), kind, data)


END: Final = bytes(1024)
PLAIN: Final = block(b"a.json", 2, data=b"{}")


def gz(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


LINK = stat.S_IFLNK | 0o777
# name of the corpus's file: what it holds, and words of its refusal
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty-file": (b"", "cut off"),
    "no-archive": (b"\x80\x04\x95" + b"pickle" * 100, "neither a zip nor a tar"),
    "nothing.zip": (zipped(), "points out of itself"),
    "nothing.tar.gz": (gz(END), "no file of a model"),
    "only-skipped.zip": (zipped(("README.md", b"")), "no file of a model"),
    "symlink.zip": (zipped(("a.json", b"/etc/passwd"), mode=LINK), "a link"),
    "device.zip": (zipped(A, mode=stat.S_IFCHR), "a link, a device"),
    "folder-as-file.zip": (zipped(A, mode=stat.S_IFDIR), "a link, a device"),
    "folder-with-data.zip": (zipped(("a/", b"x"), A), "folder with data"),
    "absolute.zip": (zipped(("/a.json", b"")), "absolute"),
    "parent.zip": (zipped(("../a.json", b"")), "not a plain path"),
    "parent-inside.zip": (zipped(("a/../b.json", b"")), "not a plain path"),
    "parent-folder.zip": (zipped(("../", b""), A), "not a plain path"),
    "dot-inside.zip": (zipped(("a/./b.json", b"")), "not a plain path"),
    "two-slashes.zip": (zipped(("a//b.json", b"")), "not a plain path"),
    "drive.zip": (zipped(("C:a.json", b"")), "has a character"),
    "backslash.zip": (zipped(("..\\a.json", b"")), "has a character"),
    "newline.zip": (zipped(("a\n.json", b"")), "has a character"),
    "nul.zip": (zip_changed(b"a!.py", b"a\0.py", ("b/a!.py.json", b"")), "has a character"),
    "nul-hides-suffix.zip": (
        zip_changed(b".json!", b".json\0", ("a.json!.py", b"")),
        "has a character",
    ),
    "twice.zip": (zip_changed(b"b.json", b"a.json", A, ("b.json", b"")), "there twice"),
    "case.zip": (zipped(A, ("A.json", b"")), "but for case or form"),
    "folder-case.zip": (zipped(("a/a.json", b""), ("A/b.json", b"")), "but for case or form"),
    "normal-form.zip": (zipped(("é.json", b""), ("e\u0301.json", b"")), "but for case or form"),
    "file-and-folder.zip": (zipped(A, ("a.json/b.json", b"")), "there twice"),
    "folder-and-file.zip": (zipped(("a.json/b.json", b""), A), "there twice"),
    "encrypted.zip": (zip_flagged(0x1), "encrypted"),
    "encrypted-strongly.zip": (zip_flagged(0x41), "encrypted"),
    "lzma.zip": (zipped(A, method=zipfile.ZIP_LZMA), "uncommon method"),
    "code.zip": (zipped(A, ("model.py", b"import os")), "no kind of file"),
    "pickle.zip": (zipped(A, ("model.bin", b"")), "no kind of file"),
    "suffix-in-capitals.zip": (zipped(("A.JSON", b"{}")), "no kind of file"),
    "deep.zip": (zipped(("d/" * 16 + "a.json", b"")), "too deeply"),
    "long-part.zip": (zipped(("n" * 251 + ".json", b"")), "256 bytes"),
    "bomb.zip": (zipped(("a.txt", bytes(MOST + 1))), "unpacks to more"),
    "claims-less.zip": (zip_claiming(10), "damaged (BadZipFile)"),
    "claims-more.zip": (zip_claiming(2_000), "not the size that it claims"),
    "bad-checksum.zip": (zip_changed(b"ABC", b"ABD", ("a.txt", b"ABC")), "damaged (BadZipFile)"),
    "cut.zip": (zipped(A)[:-30], "damaged (BadZipFile)"),
    "list-beyond-file.zip": (
        zipped(A)[:-6] + struct.pack("<LH", 2**28, 0),
        "points out of itself",
    ),
    "symlink.tar.gz": (gz(tarred(("a.json", b""), kind=tarfile.SYMTYPE, link="/etc")), "a link"),
    "hardlink.tar.gz": (gz(tarred(A[:1] + (b"",), kind=tarfile.LNKTYPE, link="/x")), "a link"),
    "device.tar.gz": (gz(tarred(("a.json", b""), kind=tarfile.CHRTYPE)), "a device"),
    "fifo.tar.gz": (gz(tarred(("a.json", b""), kind=tarfile.FIFOTYPE)), "a device"),
    "sparse.tar.gz": (gz(block(b"a.json", kind=b"S") + END), "a device or the like"),
    "absolute.tar.gz": (gz(tarred(("/a.json", b""))), "absolute"),
    "parent.tar.gz": (gz(tarred(("a/../../b.json", b""))), "not a plain path"),
    "parent-by-pax.tar.gz": (gz(extended(record("path", "../a.json")) + PLAIN), "plain path"),
    "parent-by-prefix.tar.gz": (
        gz(tarred(("../" + "d" * 99 + "/a.json", b""), form=tarfile.USTAR_FORMAT)),
        "not a plain path",
    ),
    "parent-by-long-name.tar.gz": (gz(extended(b"../a.json\0", b"L") + PLAIN), "plain path"),
    "slash-at-end.tar.gz": (gz(block(b"a.json/") + END), "not a plain path"),
    "folder-with-data.tar.gz": (gz(block(b"a", 2, b"5", b"xx") + PLAIN + END), "with data"),
    "folder-twice.tar.gz": (gz(block(b"a", kind=b"5") + block(b"a/", kind=b"5")), "there twice"),
    "not-utf8.tar.gz": (gz(block(b"\xff.json") + END), "damaged (UnicodeDecodeError)"),
    "nul-by-pax.tar.gz": (gz(extended(record("path", "a\0.json")) + PLAIN), "has a character"),
    "twice.tar.gz": (gz(PLAIN + PLAIN + END), "there twice"),
    "code.tar.gz": (gz(tarred(A, ("setup.py", b""))), "no kind of file"),
    "bomb.tar.gz": (gz(tarred(("a.txt", bytes(MOST + 1)))), "unpacks to more"),
    "bomb-in-readme.tar.xz": (lzma.compress(tarred(("a.md", bytes(MOST + 1)))), "unpacks to more"),
    "claims-more.tar.gz": (gz(block(b"a.txt", 2**32) + END), "cut off"),
    "claims-2-to-80.tar.gz": (gz(block(b"a.txt", b"\x80" + bytes(1) + b"\1" * 10)), "cut off"),
    "negative-size.tar.gz": (gz(block(b"a.txt", b"\xff" * 12) + END), "neither"),
    "size-no-number.tar.gz": (gz(block(b"a.txt", b"0000000009z\0") + END), "neither"),
    "pax-of-gigabytes.tar.gz": (gz(block(b"p", 2**31, b"x") + END), "header that is too long"),
    "pax-upon-pax.tar.gz": (gz(extended(record("comment", "")) * 50 + PLAIN + END), "too long"),
    "pax-record-of-nought.tar.gz": (gz(extended(b"0 a=b\n") + PLAIN + END), "damaged extended"),
    "pax-record-unended.tar.gz": (gz(extended(b"6 a=bb") + PLAIN + END), "damaged extended"),
    "pax-record-too-short.tar.gz": (gz(extended(b"2 a=b\n") + PLAIN + END), "damaged extended"),
    "pax-record-too-long.tar.gz": (gz(extended(b"99 a=b\n") + PLAIN + END), "damaged extended"),
    "pax-size-negative.tar.gz": (gz(extended(record("size", "-1")) + PLAIN), "damaged extended"),
    "pax-size-long.tar.gz": (gz(extended(record("size", "9" * 5000)) + PLAIN), "damaged extended"),
    "pax-sparse.tar.gz": (gz(extended(record("GNU.sparse.major", "1")) + PLAIN), "GNU.sparse"),
    "pax-path-for-all.tar.gz": (gz(extended(record("path", "a"), b"g") + PLAIN), "b'path'"),
    "bad-checksum.tar.gz": (gz(PLAIN.replace(b"a.json", b"b.json") + END), "neither"),
    "noughts-without-end.tar.xz": (lzma.compress(PLAIN + bytes(2**21)), "something follows"),
    "long-name.tar.gz": (
        gz(extended(record("path", ("d" * 80 + "/") * 13 + "a.json")) + PLAIN + END),
        "1059 bytes",
    ),
    "no-end.tar.gz": (gz(PLAIN), "cut off"),
    "more-behind-end.tar.gz": (gz(PLAIN + END + PLAIN), "something follows"),
    "cut.tar.gz": (gz(PLAIN + END)[:-9], "damaged (EOFError)"),
    "bad-checksum-of-all.tar.gz": (gz(PLAIN + END)[:-8] + bytes(8), "damaged"),
    "cut.tar.bz2": (bz2.compress(PLAIN + END)[:-5], "damaged (EOFError)"),
    "damaged.tar.bz2": (bz2.compress(PLAIN + END)[:30] + bytes(50), "damaged"),
    "cut.tar.xz": (lzma.compress(PLAIN + END)[:-5], "cut off"),
    "damaged.tar.xz": (lzma.compress(PLAIN + END)[:30] + bytes(80), "damaged (LZMAError)"),
    "memory.tar.xz": (
        lzma.compress(PLAIN + END, filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 2**30}]),
        "damaged (LZMAError)",
    ),
}


def write_corpus(folder: Path) -> None:
    for name, (content, _) in HOSTILE.items():
        (folder / name).write_bytes(content)


def refusal(archive: Path, target: Path, most_bytes: int = MOST, most_files: int = 100) -> str:
    before = sorted(target.parent.iterdir())
    with pytest.raises(Refused) as caught:
        unpack(archive, target, most_bytes, most_files)
    assert caught.value.rule is Rule.ARCHIVE
    assert str(caught.value).isprintable()
    assert sorted(target.parent.iterdir()) == before, "something was left"
    return str(caught.value)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where archives are unpacked; the archive lies elsewhere."""
    (tmp_path / "store").mkdir()
    return tmp_path / "store" / "model"


def unpacked(content: bytes, place: Path, most: int = MOST) -> dict[str, bytes]:
    archive = place.parent.parent / "archive"
    archive.write_bytes(content)
    written = unpack(archive, place, most)
    assert sorted(written) == sorted(file for file in place.rglob("*") if file.is_file())
    assert list(place.parent.iterdir()) == [place]
    return {str(file.relative_to(place)): file.read_bytes() for file in written}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_is_refused_for_what_it_is(
    tmp_path: Path, place: Path, name: str
) -> None:
    content, words = HOSTILE[name]
    (tmp_path / "archive").write_bytes(content)
    said = refusal(tmp_path / "archive", place)
    assert said.startswith("archive: ")
    assert words in said


@pytest.mark.parametrize("file", sorted(CORPUS.iterdir()), ids=lambda file: file.name)
def test_the_corpus_is_refused(place: Path, file: Path) -> None:
    assert refusal(file, place).startswith(f"{file.name}: ")


def test_the_corpus_has_what_the_table_makes() -> None:
    """By name: another zlib may compress otherwise."""
    assert HOSTILE.keys() <= {file.name for file in CORPUS.iterdir()}
    assert max(file.stat().st_size for file in CORPUS.iterdir()) < 1024


MODEL: Final = (
    ("model.safetensors", bytes(range(256)) * 200),
    ("config.json", b"{}"),
    ("tokenizer/merges.txt", b"a b"),
    ("tokenizer/spiece.model", b"\x0a"),
    ("LICENSE", b"all rights"),
    ("README.md", b"#"),
    ("ü" * 60 + "/" + "d" * 90 + "/empty.jinja", b""),
)
UNPACKED: Final = {name: data for name, data in MODEL if name not in {"LICENSE", "README.md"}}


def streams(compress: Callable[[bytes], bytes], content: bytes) -> bytes:
    """As the tools that compress in parallel write."""
    return compress(content[:700]) + compress(content[700:])


@pytest.mark.parametrize(
    "content",
    [
        zipped(*MODEL),
        zipped(*MODEL, method=zipfile.ZIP_STORED, mode=stat.S_IFREG | 0o755),
        tarred(*MODEL),
        tarred(*MODEL, form=tarfile.GNU_FORMAT),
        gz(tarred(*MODEL)),
        bz2.compress(tarred(*MODEL)),
        lzma.compress(tarred(*MODEL)),
        streams(gz, tarred(*MODEL)),
        streams(bz2.compress, tarred(*MODEL)),
        streams(lzma.compress, tarred(*MODEL)) + bytes(8),
    ],
    ids=["zip", "stored", "pax", "gnu", "gz", "bz2", "xz", "gz2", "bz2-2", "xz2"],
)
def test_a_model_is_unpacked(place: Path, content: bytes) -> None:
    assert unpacked(content, place) == UNPACKED
    assert all(not file.stat().st_mode & 0o111 for file in place.rglob("*") if file.is_file())


def test_folders_and_dots(place: Path) -> None:
    content = (
        extended(record("comment", "c0ffee"), b"g")
        + block(b"./", kind=b"5")
        + block(b"./sub/", kind=b"5")
        + block(b"./sub/a.json", b"\x80" + bytes(10) + b"\2", data=b"{}")
        + extended(record("path", "b.txt") + record("size", "3") + record("mtime", "1.5"))
        + block(b"other", 0, data=b"abc")
        + block(b"empty", kind=b"5")
        + bytes(10240)
    )
    assert unpacked(content, place) == {"sub/a.json": b"{}", "b.txt": b"abc"}
    assert (place / "empty").is_dir()


def test_the_bounds_are_exact(tmp_path: Path, place: Path) -> None:
    members = ("a.txt", b"x" * 70), ("b.txt", b"x" * 30)
    for number, content in enumerate((zipped(*members), tarred(*members))):
        archive = tmp_path / "archive"
        archive.write_bytes(content)
        assert "more than 99 bytes" in refusal(archive, place, 99)
        assert "more than 1 members" in refusal(archive, place, 100, 1)
        assert len(unpack(archive, place.with_name(f"{number}"), 100, 2)) == 2


def test_folders_count_as_members(tmp_path: Path, place: Path) -> None:
    folders = b"".join(block(b"%d" % number, kind=b"5") for number in range(5))
    (tmp_path / "archive").write_bytes(folders + PLAIN + END)
    assert "more than 5 members" in refusal(tmp_path / "archive", place, MOST, 5)


def test_a_long_list_of_members_is_not_read(tmp_path: Path, place: Path) -> None:
    """Of a zip the list is read whole; here it claims 100 MB, and the (sparse) file has them."""
    archive = tmp_path / "archive"
    ending = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, 10**8, 100, 0)
    with archive.open("wb") as out:
        out.write(zipped(A)[:60])
        out.seek(10**8 + 100)
        out.write(ending)
    assert "list of members is too long" in refusal(archive, place)


def test_an_empty_folder_is_taken_and_a_full_one_is_left_alone(place: Path) -> None:
    place.mkdir()
    assert unpacked(zipped(A), place) == {"a.json": b"{}"}
    with pytest.raises(OSError) as caught:
        unpacked(zipped(("b.json", b"")), place)
    assert caught.value.errno == errno.ENOTEMPTY
    assert [file.name for file in place.iterdir()] == ["a.json"]
    assert list(place.parent.iterdir()) == [place]


def test_the_disk_s_errors_are_not_the_archive_s(tmp_path: Path, place: Path) -> None:
    with pytest.raises(FileNotFoundError):
        unpack(tmp_path / "none", place, MOST)
    assert list(place.parent.iterdir()) == []
    assert "not a file" in refusal(tmp_path, place)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archives")
    (folder / "store").mkdir()
    return folder


def refused_or_harmless(scratch: Path, content: bytes) -> None:
    archive, store = scratch / "archive", scratch / "store"
    archive.write_bytes(content)
    target = store / "model"
    try:
        written = unpack(archive, target, MOST, 20)
    except Refused as refused:
        assert refused.rule is Rule.ARCHIVE
        assert str(refused).isprintable()
        assert list(store.iterdir()) == []
        return
    assert list(store.iterdir()) == [target]
    for path in sorted(target.rglob("*"), reverse=True):
        assert not path.is_symlink()
        assert path.is_dir() or path in written
        path.rmdir() if path.is_dir() else path.unlink()
    target.rmdir()
    assert sorted(path.name for path in scratch.iterdir()) == ["archive", "store"]


SEEDS: Final = (
    zipped(A, ("d/b.txt", b"b" * 40)),
    zipped(A, ("d/b.txt", b"b" * 40), method=zipfile.ZIP_STORED),
    extended(record("path", "c/" + "d" * 99 + "/e.json")) + PLAIN + block(b"d", kind=b"5") + END,
    tarred(A, ("n" * 120 + ".txt", b"n"), form=tarfile.GNU_FORMAT)[:4096] + END,
    gz(PLAIN + END),
    bz2.compress(PLAIN + END),
    lzma.compress(PLAIN + END),
)


@settings(max_examples=100)
@given(
    st.sampled_from([b"", b"PK\x03\x04", b"PK\x05\x06", b"\x1f\x8b\x08\0", b"BZh9", b"\xfd7zXZ\0"]),
    st.binary(max_size=1100),
)
def test_random_bytes(scratch: Path, magic: bytes, content: bytes) -> None:
    refused_or_harmless(scratch, magic + content)


@settings(max_examples=400)
@given(st.sampled_from(SEEDS), st.data())
def test_mutated_archives(scratch: Path, seed: bytes, data: st.DataObject) -> None:
    content = bytearray(seed)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.sampled_from(["flip", "set", "put", "delete"])):
            case "flip":
                content[at] ^= 1 << data.draw(st.integers(0, 7))
            case "set":
                new = data.draw(
                    st.sampled_from([b"\xff" * 4, bytes(4), b"\xff", b"\0", b"/", b"7"])
                )
                content[at : at + len(new)] = new
            case "put":
                content[at:at] = data.draw(st.binary(min_size=1, max_size=3))
            case _:
                del content[at : at + data.draw(st.integers(1, 8))]
    refused_or_harmless(scratch, bytes(content))


fields = st.sampled_from([b"", b"\0", b"7777777", b"-1", b"\xff" * 12, b"\x80" + b"\xff" * 11])


@settings(max_examples=200)
@given(
    st.lists(
        st.builds(
            block,
            st.sampled_from([b"a.json", b"b/c.txt", b"..", b"/x", b"d/", b"\xc3\xa9.json"]),
            st.integers(0, 2000) | fields.map(lambda field: field.ljust(12, b"\0")[:12]),
            st.sampled_from([b"0", b"\0", b"5", b"x", b"g", b"L", b"1", b"2", b"S"]),
            st.binary(max_size=30) | st.just(record("path", "q.json")) | st.just(b"5 a=b\n"),
        ),
        max_size=6,
    )
)
def test_tars_of_any_blocks(scratch: Path, blocks: list[bytes]) -> None:
    refused_or_harmless(scratch, b"".join(blocks) + END)


if __name__ == "__main__":
    write_corpus(CORPUS)
