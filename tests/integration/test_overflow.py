"""Numbers that overflow on any card are no card's fault; those that only one makes none of, its."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.core.errors import DeviceFault, DeviceFaultKind, TaskUnsupported
from devnet.models import SD15, SDXL
from tests.integration.engine_world import fault_of, files, new_engine, order

OVERFLOWING = {
    "text_encoder": ("text_encoder/model.safetensors", "layers.0.layer_norm1.weight"),
    "unet": ("unet/diffusion_pytorch_model.safetensors", "conv_in.weight"),
    "vae": ("vae/diffusion_pytorch_model.safetensors", "decoder.conv_in.weight"),
}


@pytest.mark.parametrize("role", OVERFLOWING)
def test_what_overflows_on_any_card_is_no_fault_of_the_card(
    tiny_models: Path, tmp_path: Path, role: str
) -> None:
    """Numbers all of them, and none are left: of two dtypes the task names the wrong one."""
    shutil.copytree(tiny_models / SD15[0], tmp_path / "org" / "model")
    file, name = OVERFLOWING[role]
    path = tmp_path / "org" / "model" / file
    tensors = load_file(path)
    (key,) = (each for each in tensors if each.endswith(name))
    tensors[key] = tensors[key].sign() * 6e4
    save_file(tensors, path, metadata={"format": "pt"})
    fresh = new_engine(tmp_path)
    fault = fault_of(fresh, order(base_model="org/model", dtype="float16"))
    assert isinstance(fault, TaskUnsupported), repr(fault)
    assert role in str(fault)
    assert not fresh.state().warm
    if role == "vae":
        assert files(fresh, base_model="org/model")


@pytest.mark.parametrize("base", [SD15[0], SDXL])
def test_a_vae_of_the_tasks_own_that_overflows_is_no_fault_of_the_card(
    tiny_models: Path, tmp_path: Path, base: str
) -> None:
    """Like that of SDXL, where it doesn't ask for single precision."""
    shutil.copytree(tiny_models, tmp_path / "store")
    folder = tmp_path / "store" / "org" / "loud"
    shutil.copytree(tmp_path / "store" / base / "vae", folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"force_upcast": False}))
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["decoder.conv_in.weight"] *= 1e6
    assert float(tensors["decoder.conv_in.weight"].abs().max()) > 65504
    tensors["decoder.conv_in.weight"].clamp_(-6e4, 6e4)
    save_file(tensors, file, metadata={"format": "pt"})
    fresh = new_engine(tmp_path / "store")
    fault = fault_of(fresh, order(base_model=base, vae="org/loud", dtype="float16"))
    assert isinstance(fault, TaskUnsupported), repr(fault)
    assert files(fresh, base_model=base, vae="org/loud")


@pytest.mark.parametrize("base", [SD15[0], SDXL])
def test_a_lora_that_overflows_is_no_fault_of_the_card(
    tiny_models: Path, tmp_path: Path, base: str
) -> None:
    shutil.copytree(tiny_models, tmp_path / "store")
    folder = tmp_path / "store" / "org" / "loud"
    folder.mkdir(parents=True)
    layer = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k"
    weights = {f"{layer}.lora_A.weight": torch.full((4, 64), 2e4).cumsum(0).clamp(-6e4, 6e4)}
    weights[f"{layer}.lora_A.weight"][:, ::2] *= -0.5
    weights[f"{layer}.lora_B.weight"] = torch.full((64, 4), 6e4)
    save_file(weights, folder / "loud.safetensors")
    fresh = new_engine(tmp_path / "store")
    named = {"model": "org/loud", "weight_file_name": "loud.safetensors"}
    fault = fault_of(fresh, order(base_model=base, dtype="float16", lora=named))
    assert isinstance(fault, TaskUnsupported), repr(fault)
    assert files(fresh, base_model=base, dtype="float16")


@pytest.mark.parametrize(
    ("base", "role", "value"),
    [
        *((SD15[0], role, value) for role in OVERFLOWING for value in (float("nan"), 6e4)),
        *((SDXL, role, float("nan")) for role in OVERFLOWING),
    ],
)
def test_a_card_on_which_sane_weights_overflow_is_at_fault(
    tiny_models: Path, base: str, role: str, value: float
) -> None:
    fresh = new_engine(tiny_models)
    whole = files(fresh, base_model=base, dtype="float16")
    for there in fresh._pool._parts.values():
        if there.source.folder.name == role:
            name = OVERFLOWING[role][1]
            (key,) = (each for each, _ in there.module.named_parameters() if each.endswith(name))
            weight = there.module.get_parameter(key).data
            weight.copy_(weight.sign() * value)
    fault = fault_of(fresh, order(base_model=base, dtype="float16"))
    assert isinstance(fault, DeviceFault), repr(fault)
    assert fault.kind is DeviceFaultKind.BAD_RESULT
    assert files(fresh, base_model=base, dtype="float16") == whole
