"""Result files until the network has them.

A task's folder holds its files under their content's sha256, so a later attempt can never overwrite
what a stored result refers to. A file is written under a temporary name, flushed to the disk and
renamed: whatever stands under its hash is whole.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cluster.core.errors import ClusterError
from cluster.core.types import Commitment, FileRef

_TASK = re.compile(r"0x[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_HASH = re.compile(r"[0-9a-f]{64}")


class FolderArtifacts:
    """`cluster.core.ports.Artifacts` in a folder of the coordinator's machine."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def put(
        self, task: Commitment, files: Sequence[tuple[str, bytes]]
    ) -> tuple[FileRef, ...]:
        folder = self._folder(task)
        for name, _ in files:
            _check_name(task, name)
        return await asyncio.to_thread(_put, folder, tuple(files))

    async def get(
        self, task: Commitment, files: Sequence[FileRef]
    ) -> tuple[tuple[str, bytes], ...]:
        folder = self._folder(task)
        return await asyncio.to_thread(lambda: tuple((f.name, _read(folder, f)) for f in files))

    async def drop(self, task: Commitment) -> None:
        """Forget the task's files; dropping what isn't there is no error."""
        folder = self._folder(task)
        await asyncio.to_thread(_drop, folder)

    def kept(self, task: Commitment) -> frozenset[str]:
        """The sha256 of each of the task's files that is still there."""
        try:
            return frozenset(filter(_HASH.fullmatch, os.listdir(self._folder(task))))
        except OSError:
            return frozenset()

    def where(self, task: Commitment) -> str | None:
        """The task's folder; None when there is none."""
        folder = self._folder(task)
        return str(folder) if folder.is_dir() else None

    def _folder(self, task: Commitment) -> Path:
        if not _TASK.fullmatch(task):
            raise ClusterError(f"not a task commitment, so no folder for it: {task!r}")
        return self._path / task


def _check_name(task: Commitment, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ClusterError(f"{task}: not a safe name for a result file: {name!r}")


def _put(folder: Path, files: tuple[tuple[str, bytes], ...]) -> tuple[FileRef, ...]:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        refs = tuple(_write(folder, name, data) for name, data in files)
        _flush_folder(folder)
        _flush_folder(folder.parent)
    except OSError as error:
        raise ClusterError(f"{folder}: can't store a result: {error.strerror}") from error
    return refs


def _write(folder: Path, name: str, data: bytes) -> FileRef:
    ref = FileRef(name, hashlib.sha256(data).hexdigest(), len(data))
    descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=".writing-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).rename(folder / ref.sha256)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return ref


def _flush_folder(folder: Path) -> None:
    """Make renames and new entries in `folder` survive a crash."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(folder: Path, ref: FileRef) -> bytes:
    if not _HASH.fullmatch(ref.sha256):
        raise ClusterError(f"{folder.name}: not a sha256 for {ref.name}: {ref.sha256!r}")
    try:
        data = (folder / ref.sha256).read_bytes()
    except FileNotFoundError:
        raise ClusterError(f"{folder.name}: result file {ref.name} is gone") from None
    except OSError as error:
        raise ClusterError(
            f"{folder.name}: result file {ref.name} can't be read: {error.strerror}"
        ) from error
    if hashlib.sha256(data).hexdigest() != ref.sha256:
        raise ClusterError(f"{folder.name}: result file {ref.name} is not what was stored")
    return data


def _drop(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        raise ClusterError(f"{folder}: can't be dropped: {error.strerror}") from error
