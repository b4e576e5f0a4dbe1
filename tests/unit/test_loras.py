"""Whose fault it is when a LoRA can't be attached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cluster.core.errors import ModelUnavailable, ModelUnavailableKind
from cluster.inference import lora
from cluster.inference.parameters import SDParameters
from cluster.models.store import LORA_FILE


def certain(folder: Path, taken: str, named: str = "", model: str = "org/lora") -> bool:
    fields = {"base_model": "o/m", "prompt": "a", "task_config": {}}
    asked = {"model": model, "weight_file_name": named}
    return lora.is_certain(SDParameters.model_validate(fields | {"lora": asked}), folder / taken)


def laid(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_the_only_file_is_what_every_node_takes(tmp_path: Path) -> None:
    laid(tmp_path, "a.safetensors", "README.md", "a.bin")
    assert certain(tmp_path, "a.safetensors", named="a.safetensors")
    assert not certain(tmp_path, "a.safetensors", named="")
    link = "https://host/a.safetensors"
    assert not certain(tmp_path, "a.safetensors", named="a.safetensors", model=link)


def test_the_only_file_by_its_conventional_name(tmp_path: Path) -> None:
    laid(tmp_path, LORA_FILE)
    assert certain(tmp_path, LORA_FILE)


@pytest.mark.parametrize("other", ["b.safetensors", "more/b.safetensors"])
def test_of_several_files_no_node_need_take_the_named_one(tmp_path: Path, other: str) -> None:
    laid(tmp_path, "a.safetensors", other)
    assert not certain(tmp_path, "a.safetensors", named="a.safetensors")


@pytest.mark.parametrize("name", ["checkpoint-1", "optimizer", "my_scheduler"])
def test_what_no_node_guesses_is_not_certain(tmp_path: Path, name: str) -> None:
    file = f"{name}.safetensors"
    laid(tmp_path, file)
    assert not certain(tmp_path, file, named=file)
    laid(tmp_path, "a.safetensors")
    assert not certain(tmp_path, file, named=file)
    assert certain(tmp_path, "a.safetensors", named="a.safetensors")


# --- what the libraries raise ------------------------------------------------------------------


class Pipe:
    """A pipeline whose LoRAs can't be loaded."""

    components: dict[str, Any] = {}  # noqa: RUF012
    unet = torch.nn.Linear(1, 1)

    def __init__(self, error: Exception) -> None:
        self._error = error

    def load_lora_weights(self, *_: object, **__: object) -> None:
        raise self._error

    def unload_lora_weights(self) -> None:
        pass


def attach(tmp_path: Path, error: Exception) -> None:
    file = tmp_path / LORA_FILE
    save_file({"x": torch.zeros(1)}, file)
    with lora.attached(Pipe(error), file, 1.0, certain=True):
        pass


@pytest.mark.parametrize(
    "kind",
    [
        ValueError, KeyError, TypeError, RuntimeError, NotImplementedError, AttributeError,
        AssertionError, NameError, ZeroDivisionError, RecursionError,
    ],
)  # fmt: skip
def test_what_the_converters_raise_is_the_files_fault(
    tmp_path: Path, kind: type[Exception]
) -> None:
    with pytest.raises(ModelUnavailable) as caught:
        attach(tmp_path, kind("x"))
    assert caught.value.kind is ModelUnavailableKind.DAMAGED


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("x"), torch.AcceleratorError("x"), MemoryError()], ids=repr
)
def test_what_the_card_raises_stays_the_cards(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)):
        attach(tmp_path, error)
