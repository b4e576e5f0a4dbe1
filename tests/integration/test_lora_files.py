"""LoRA files by hostile authors: none changes the warm base, hangs the card or is blamed on it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cluster.core.errors import ModelUnavailable, ModelUnavailableKind
from cluster.core.ports import Order
from cluster.inference import lora_settings
from cluster.inference.engine import Engine
from tests.integration.engine_world import fault_of, files, new_engine, order, run

LAYER = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k"
OTHER = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
RANK = {"unet.r": 4, "unet.lora_alpha": 4, "unet.target_modules": ["attn1.to_k"]}


@pytest.fixture(scope="module")
def root(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("store") / "models"
    shutil.copytree(tiny_models, store)
    return store


@pytest.fixture(scope="module")
def engine(root: Path) -> Engine:
    return new_engine(root)


def layer(name: str) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(7)
    return {
        f"{name}.lora_A.weight": torch.randn(4, 64, generator=made),
        f"{name}.lora_B.weight": torch.randn(64, 4, generator=made),
    }


def with_lora(
    root: Path, tensors: dict[str, torch.Tensor], settings: dict[str, Any] | str | None = None
) -> Order:
    """`settings` as the file's own, or the text that stands for them."""
    folder = root / "org" / "hostile"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    text = settings if isinstance(settings, str | None) else json.dumps(settings)
    said = None if text is None else {lora_settings.KEY: text}
    save_file(tensors, folder / "hostile.safetensors", metadata=said)
    named = {"model": "org/hostile", "weight_file_name": "hostile.safetensors"}
    return order(lora=named)


@pytest.mark.parametrize(
    "more",
    [
        {"unet.kasa_config": {"beta": 1e-4}},
        {"unet.kasa_config": {}},
        {"unet.init_lora_weights": "pissa"},
        {"unet.init_lora_weights": "olora"},
        {"unet.init_lora_weights": 5},
        {"unet.bias": "all"},
        {"unet.modules_to_save": ["conv_in"]},
        {"unet.layer_replication": [[0, 1]]},
        {"unet.target_modules": "([a-z_.0-9]+)+!"},
        {"unet.rank_pattern": {"([a-z_.0-9]+)+!": 4}},
        {"unet.lora_alpha": 1e30},
        {"unet.lora_alpha": 10**400},
        {"unet.lora_alpha": True},
        {"text_encoder.kasa_config": {}},
    ],
    ids=lambda more: json.dumps(more)[:40],
)
def test_a_lora_that_would_do_more_than_stand_beside_the_base_is_refused(
    engine: Engine, root: Path, more: dict[str, Any]
) -> None:
    plain = files(engine)
    fault = fault_of(engine, with_lora(root, layer(LAYER), RANK | more))
    assert isinstance(fault, ModelUnavailable)
    assert fault.kind is ModelUnavailableKind.REFUSED
    assert next(iter(more)) in str(fault)
    assert files(engine) == plain


@pytest.mark.parametrize("written", ["[1]", '"x"', '{"r": {}}', '{"unet.r": {}}', "{"])
def test_odd_notes_of_itself_are_the_files_fault(engine: Engine, root: Path, written: str) -> None:
    fault = fault_of(engine, with_lora(root, layer(LAYER), written))
    assert isinstance(fault, ModelUnavailable)


def test_a_tensor_named_as_a_search_without_end_is_refused(engine: Engine, root: Path) -> None:
    """Of the ranks that are not the most common, the layers' names are searched for."""
    hostile = {
        f"unet.([a-z_.0-9]+)+!.lora_{side}.weight": torch.ones(size)
        for side, size in (("A", (2, 64)), ("B", (64, 2)))
    }
    fault = fault_of(engine, with_lora(root, layer(LAYER) | layer(OTHER) | hostile))
    assert isinstance(fault, ModelUnavailable)
    assert fault.kind is ModelUnavailableKind.REFUSED


def test_a_layer_without_its_second_half_is_the_files_fault(engine: Engine, root: Path) -> None:
    plain = files(engine)
    half = layer(OTHER)
    del half[f"{OTHER}.lora_B.weight"]
    fault = fault_of(engine, with_lora(root, layer(LAYER) | half))
    assert isinstance(fault, ModelUnavailable)
    assert fault.kind is ModelUnavailableKind.DAMAGED
    assert files(engine) == plain


def test_what_diffusers_own_scripts_write_is_taken(engine: Engine, root: Path) -> None:
    """All of PEFT's settings, as a dictionary; and half the alpha is half the update."""
    from peft import LoraConfig

    def written(alpha: int) -> dict[str, Any]:
        config: Any = LoraConfig(
            r=4, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=["to_k", "to_q"]
        )
        said = {f"unet.{name}": value for name, value in config.to_dict().items()}
        return {k: list(v) if isinstance(v, set) else v for k, v in said.items()}

    plain = files(engine)
    whole = run(engine, with_lora(root, layer(LAYER), written(4))).files
    half = run(engine, with_lora(root, layer(LAYER), written(2))).files
    assert whole == run(engine, with_lora(root, layer(LAYER))).files
    assert len({plain, whole, half}) == 3
    assert files(engine) == plain
