"""Archives from strangers: plain files in one folder, or nothing at all."""

from __future__ import annotations

import io
import stat
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.models.archives import unpack
from cluster.models.refusals import Refused, Rule

MOST = 10_000
GOOD = {"config.json": b"{}", "sub/model.safetensors": b"x" * 500}
CORPUS = Path(__file__).parents[1] / "corpus" / "archives"


def zipped(contents: Mapping[str, bytes], how: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", how) as packed:
        for name, content in contents.items():
            packed.writestr(zipfile.ZipInfo(name), content)
    return file.getvalue()


def tarred(contents: Mapping[str, bytes], mode: str = "w") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as packed:  # type: ignore[call-overload]
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            packed.addfile(info, io.BytesIO(content))
    return file.getvalue()


def tar_of(info: tarfile.TarInfo) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as packed:
        packed.addfile(info)
    return file.getvalue()


def special(kind: bytes, name: str = "a.json", target: str = "config.json") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return tar_of(info)


def zip_link() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as packed:
        info = zipfile.ZipInfo("a.json")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        packed.writestr(info, "/etc/passwd")
    return file.getvalue()


def encrypted() -> bytes:
    content = bytearray(zipped({"a.json": b"{}"}, zipfile.ZIP_STORED))
    for magic, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(magic) + offset] |= 1
    return bytes(content)


def take(tmp_path: Path, content: bytes, most: int = MOST) -> dict[str, bytes]:
    archive, target = tmp_path / "archive", tmp_path / "out"
    archive.write_bytes(content)
    paths = unpack(archive, target, most, 50)
    return {path.relative_to(target).as_posix(): path.read_bytes() for path in paths}


@pytest.mark.parametrize(
    "content",
    [
        zipped(GOOD),
        zipped(GOOD, zipfile.ZIP_STORED),
        zipped(GOOD, zipfile.ZIP_LZMA),
        *(tarred(GOOD, mode) for mode in ("w", "w:gz", "w:bz2", "w:xz")),
    ],
)
def test_every_kind_by_its_content(tmp_path: Path, content: bytes) -> None:
    assert take(tmp_path, content) == GOOD
    assert {path.name for path in tmp_path.iterdir()} == {"archive", "out"}


def test_what_may_be_left_out(tmp_path: Path) -> None:
    more = {"README.md": b"#", "LICENSE": b"x", "LICENSE.txt": b"x", "sub/": b""}
    taken = take(tmp_path, zipped(GOOD | more))
    assert taken == GOOD | {"LICENSE.txt": b"x"}


HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "nonsense": b"nonsense" * 100,
    "parent.zip": zipped({"../x.json": b"{}"}),
    "parent-inside.zip": zipped({"a/../../x.json": b"{}"}),
    "absolute.zip": zipped({"/etc/x.json": b"{}"}),
    "drive.zip": zipped({"C:x.json": b"{}"}),
    "backslash.zip": zipped({"a\\..\\..\\x.json": b"{}"}),
    "hidden.zip": zipped({".x.json": b"{}"}),
    "control.zip": zipped({"a\tb.json": b"{}"}),
    "empty-name.zip": zipped({"a//b.json": b"{}"}),
    "code.zip": zipped({"model.py": b"x"}),
    "pickle.zip": zipped({"model.bin": b"x"}),
    "case.zip": zipped({"a.json": b"{}", "A.json": b"{}"}),
    "normal-form.zip": zipped({"\u00e9.json": b"{}", "e\u0301.json": b"{}"}),
    "file-and-folder.zip": zipped({"a.json": b"{}", "a.json/b.json": b"{}"}),
    "deep.zip": zipped({"a/" * 20 + "b.json": b"{}"}),
    "many.zip": zipped({f"{i}.json": b"{}" for i in range(60)}),
    "bomb.zip": zipped({"a.json": b" " * (MOST + 1)}),
    "bomb-in-two.zip": zipped({"a.json": b" " * 6000, "b.json": b" " * 6000}),
    "link.zip": zip_link(),
    "encrypted.zip": encrypted(),
    "cut-off.zip": zipped(GOOD)[:-30],
    "parent.tar": tarred({"../x.json": b"{}"}),
    "absolute.tar": tarred({"/etc/x.json": b"{}"}),
    "code.tar": tarred({"model.py": b"x"}),
    "twice.tar": tarred({"a.json": b"{}"})[:1024] + tarred({"a.json": b"[]"}),
    "symlink.tar": special(tarfile.SYMTYPE, target="/etc/passwd"),
    "hardlink.tar": special(tarfile.LNKTYPE),
    "device.tar": special(tarfile.CHRTYPE),
    "fifo.tar": special(tarfile.FIFOTYPE),
    "bomb.tar.gz": tarred({"a.json": b" " * (MOST + 1)}, "w:gz"),
    "cut-off.tar.gz": tarred(GOOD, "w:gz")[:60],
    "cut-off.tar.bz2": tarred(GOOD, "w:bz2")[:60],
    "cut-off.tar.xz": tarred(GOOD, "w:xz")[:60],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives_leave_nothing(tmp_path: Path, name: str) -> None:
    with pytest.raises(Refused) as caught:
        take(tmp_path, HOSTILE[name])
    assert caught.value.rule is Rule.ARCHIVE
    assert [path.name for path in tmp_path.iterdir()] == ["archive"]


def test_the_corpus_is_refused(tmp_path: Path) -> None:
    """Files that stay as they are, whatever becomes of the table that they were made from."""
    files = sorted(CORPUS.iterdir())
    assert len(files) >= len(HOSTILE)
    for file in files:
        with pytest.raises(Refused):
            unpack(file, tmp_path / "out", MOST, 50)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("whole", [zipped(GOOD), tarred(GOOD), tarred(GOOD, "w:gz")])
@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(changes=st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=4)), max_size=4))
def test_damage_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory,
    whole: bytes,
    changes: list[tuple[float, bytes]],
) -> None:
    content = bytearray(whole)
    for where, new in changes:
        at = int(where * (len(content) - 1))
        content[at : at + len(new)] = new
    folder = tmp_path_factory.mktemp("damage")
    try:
        taken = take(folder, bytes(content))
    except Refused:
        assert [path.name for path in folder.iterdir()] == ["archive"]
        return
    assert sum(map(len, taken.values())) <= MOST
    assert {path.name for path in folder.iterdir()} == {"archive", "out"}
    assert not [path for path in folder.rglob("*") if path.is_symlink()]
