"""What parts make of their files: keys that can't be another's, and a disk's faults as such."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.core.errors import ModelUnavailable, ModelUnavailableKind
from cluster.inference import parts
from cluster.inference.parts import digest_of, load, reading, source

UNET = "UNet2DConditionModel"
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model" / "unet"
    made.mkdir(parents=True)
    (made / "config.json").write_text("{}")
    (made / "diffusion_pytorch_model.safetensors").write_bytes(b"one")
    return made


@pytest.mark.parametrize("name", ["config.json", "diffusion_pytorch_model.safetensors"])
@pytest.mark.parametrize("changes", ["contents", "whole file", "nothing", "gone"])
def test_what_changed_before_it_was_loaded_is_not_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, changes: str
) -> None:
    """It would lie under the key of what was there before."""
    file = folder / name

    class Network:
        @staticmethod
        def from_pretrained(*_: Any, **__: Any) -> tuple[torch.nn.Module, dict[str, Any]]:
            before = file.stat()
            if changes == "contents":
                file.write_bytes(b"two")
                os.utime(file, ns=(0, before.st_mtime_ns + 1))
            elif changes == "whole file":
                (file.parent / "other").write_bytes(b"two")
                (file.parent / "other").rename(file)
                os.utime(file, ns=(0, before.st_mtime_ns))
            elif changes == "gone":
                file.unlink()
            return torch.nn.Linear(1, 1), {"missing_keys": []}

    monkeypatch.setattr(parts, "CLASSES", {UNET: Network})
    part = source(folder, UNET, "float32")
    if changes == "nothing":
        load(part, CPU)
        return
    with pytest.raises(ModelUnavailable) as caught:
        load(part, CPU)
    assert caught.value.kind is ModelUnavailableKind.UNREACHABLE


@pytest.mark.parametrize("call", ["open", "stat", "glob"])
def test_a_disk_that_fails_is_no_fault_of_the_card(
    folder: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, call, fail)
    with pytest.raises(ModelUnavailable) as caught:
        source(folder, UNET, "float32")
    assert caught.value.kind is ModelUnavailableKind.UNREACHABLE
    assert str(caught.value) == "model/unet can't be read: Stale file handle"


def test_a_file_that_cannot_be_read_is_no_fault_of_the_card(folder: Path) -> None:
    with pytest.raises(ModelUnavailable) as caught:
        digest_of(folder / "gone.json")
    assert caught.value.kind is ModelUnavailableKind.UNREACHABLE


def test_only_so_many_digests_are_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "MOST_DIGESTS", 2)
    files = [folder / f"{number}.json" for number in range(3)]
    for file in files:
        file.write_text(file.name)
    digests = [digest_of(files[0]), digest_of(files[1]), digest_of(files[0]), digest_of(files[2])]
    assert len(parts._digests) == 2
    reads: list[None] = []
    with parts.looking(lambda: reads.append(None)):
        assert [digest_of(files[0]), digest_of(files[2])] == [digests[0], digests[3]]
        assert reads == [], "the least recently used has left"
        assert digest_of(files[1]) == digests[1]
        assert reads


@pytest.mark.parametrize(
    "kind", [ValueError, KeyError, IndexError, ZeroDivisionError, NotImplementedError, RuntimeError]
)
def test_what_the_libraries_raise_over_a_folder_is_its_fault(
    folder: Path, kind: type[Exception]
) -> None:
    with pytest.raises(ModelUnavailable) as caught, reading(folder):
        raise kind("x")
    assert caught.value.kind is ModelUnavailableKind.DAMAGED


def test_memory_that_runs_short_is_no_folders_fault(folder: Path) -> None:
    with pytest.raises(torch.OutOfMemoryError), reading(folder):
        raise torch.OutOfMemoryError
