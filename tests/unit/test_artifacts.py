from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from cluster.artifacts import FolderArtifacts
from cluster.core.errors import ClusterError
from cluster.core.ports import Artifacts
from cluster.core.types import Commitment, FileRef

TASK = Commitment("0x" + "ab" * 32)
FILES = (("0.png", b"first"), ("1.png", b"second"), ("2.png", b"first"))


async def test_what_is_put_is_got_in_order(tmp_path: Path) -> None:
    store: Artifacts = FolderArtifacts(tmp_path / "deep" / "down")
    refs = await store.put(TASK, FILES)
    assert [ref.name for ref in refs] == ["0.png", "1.png", "2.png"]
    assert refs[1] == FileRef("1.png", hashlib.sha256(b"second").hexdigest(), 6)
    # Another process, later.
    again = FolderArtifacts(tmp_path / "deep" / "down")
    assert await again.get(TASK, refs) == FILES


async def test_a_later_attempt_overwrites_nothing(tmp_path: Path) -> None:
    store = FolderArtifacts(tmp_path)
    refs = await store.put(TASK, FILES[:1])
    await store.put(TASK, [("0.png", b"other bytes")])
    assert await store.get(TASK, refs) == FILES[:1]


async def test_no_temporary_file_is_left(tmp_path: Path) -> None:
    await FolderArtifacts(tmp_path).put(TASK, FILES)
    assert len(os.listdir(tmp_path / TASK)) == 2


async def test_a_changed_or_missing_file_is_found_out(tmp_path: Path) -> None:
    store = FolderArtifacts(tmp_path)
    (ref,) = await store.put(TASK, FILES[:1])
    file = tmp_path / TASK / ref.sha256
    file.write_bytes(b"firsT")
    with pytest.raises(ClusterError, match="not what was stored"):
        await store.get(TASK, [ref])
    file.unlink()
    with pytest.raises(ClusterError, match="is gone"):
        await store.get(TASK, [ref])


async def test_dropping_is_for_that_task_only_and_idempotent(tmp_path: Path) -> None:
    store, other = FolderArtifacts(tmp_path), Commitment("0x" + "cd" * 32)
    await store.put(TASK, FILES)
    kept = await store.put(other, FILES)
    await store.drop(TASK)
    await store.drop(TASK)
    assert not (tmp_path / TASK).exists()
    assert await store.get(other, kept) == FILES


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", "/etc/passwd", ".hidden", "a\0b", "a\n"])
async def test_unsafe_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ClusterError, match="not a safe name"):
        await FolderArtifacts(tmp_path).put(TASK, [(name, b"")])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("task", ["", "..", "0x12", "0x" + "AB" * 32, "0x" + "ab" * 32 + "/.."])
async def test_only_commitments_have_folders(tmp_path: Path, task: str) -> None:
    store = FolderArtifacts(tmp_path)
    for call in (store.put(Commitment(task), FILES), store.drop(Commitment(task))):
        with pytest.raises(ClusterError, match="not a task commitment"):
            await call


async def test_a_forged_reference_reads_nothing_else(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="not a sha256"):
        await FolderArtifacts(tmp_path).get(TASK, [FileRef("0.png", "../../secret", 1)])


async def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ClusterError, match="can't store a result"):
        await FolderArtifacts(tmp_path / "file").put(TASK, FILES)
