"""Builds what is added to a tiny model: LoRAs, ControlNets and textual inversions.

The same LoRA comes in the three namings that are about: what diffusers writes today (PEFT's
`lora_A`), what it wrote before (`processor.to_q_lora.down`), and kohya's (`lora_unet_…`, with an
alpha, and for SDXL the block numbers of the original UNet).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from devnet.diffusion_models import (
    CLIP_G,
    CLIP_L,
    LAYERS_PER_BLOCK,
    Encoder,
    Shape,
    diffusers,
    seeded,
    text_encoder,
    unet,
    unet_settings,
    write_module,
)

LORA_FILE: Final = "pytorch_lora_weights.safetensors"
INVERSION_FILE: Final = "learned_embeds.safetensors"
RANK: Final = 4
PROJECTIONS: Final = re.compile(r"attn[12]\.(to_q|to_k|to_v|to_out\.0)$")
TEXT_PROJECTIONS: Final = re.compile(r"self_attn\.(q|k|v|out)_proj$")

TINY_STYLE: Final = "<tiny-style>"
"""The token of `write_inversion`'s file, by which a prompt calls for it."""


@dataclass(frozen=True, slots=True)
class Matrices:
    """One layer's update, `up @ down`: (out, rank) and (rank, in)."""

    down: Any
    up: Any


# --- LoRA -------------------------------------------------------------------------------------


def unet_lora(shape: Shape, seed: int) -> dict[str, Matrices]:
    """On all attention projections, strong enough to be seen."""
    return updates(unet(shape, seed=0), PROJECTIONS, seed, strength=0.3)


def text_lora(encoder: Encoder, seed: int) -> dict[str, Matrices]:
    return updates(text_encoder(encoder), TEXT_PROJECTIONS, seed, strength=0.1)


def updates(
    module: Any, pattern: re.Pattern[str], seed: int, strength: float, rank: int = RANK
) -> dict[str, Matrices]:
    """One for each layer of the module whose name the pattern finds; only sizes are read of it."""
    import torch

    def build() -> dict[str, Matrices]:
        return {
            name: Matrices(
                torch.randn(rank, layer.in_features) * strength,
                torch.randn(layer.out_features, rank) * strength,
            )
            for name, layer in module.named_modules()
            if pattern.search(name)
        }

    made: dict[str, Matrices] = seeded(seed, build)
    return made


def peft_names(layers: Mapping[str, Matrices]) -> dict[str, Any]:
    """As diffusers writes them today."""
    named = {}
    for name, layer in layers.items():
        named[f"unet.{name}.lora_A.weight"] = layer.down
        named[f"unet.{name}.lora_B.weight"] = layer.up
    return named


def older_names(layers: Mapping[str, Matrices]) -> dict[str, Any]:
    """As diffusers wrote them when LoRAs were attention processors."""
    named = {}
    for name, layer in layers.items():
        attention, projection = name.removesuffix(".0").rsplit(".", 1)
        stem = f"unet.{attention}.processor.{projection}_lora"
        named[f"{stem}.down.weight"] = layer.down
        named[f"{stem}.up.weight"] = layer.up
    return named


def kohya_names(prefix: str, layers: Mapping[str, Matrices]) -> dict[str, Any]:
    """`prefix`: `lora_unet`, `lora_te`, `lora_te1` or `lora_te2`. The alpha halves the update."""
    import torch

    named = {}
    for name, layer in layers.items():
        stem = f"{prefix}_{name.replace('.', '_')}"
        named[f"{stem}.lora_down.weight"] = layer.down
        named[f"{stem}.lora_up.weight"] = layer.up
        named[f"{stem}.alpha"] = torch.tensor(RANK / 2)
    return named


_DOWN: Final = re.compile(r"down_blocks\.(\d+)\.attentions\.(\d+)\.")
_UP: Final = re.compile(r"up_blocks\.(\d+)\.attentions\.(\d+)\.")


def original_blocks(layers: Mapping[str, Matrices]) -> dict[str, Matrices]:
    """Block numbers of the original SDXL UNet, which counts all layers through.

    On the way down a block is its layers and a downsampling, after one convolution; on the way up
    it is one layer more.
    """
    step = LAYERS_PER_BLOCK + 1

    def down(found: re.Match[str]) -> str:
        return f"input_blocks.{1 + int(found[1]) * step + int(found[2])}.1."

    def up(found: re.Match[str]) -> str:
        return f"output_blocks.{int(found[1]) * step + int(found[2])}.1."

    return {
        _UP.sub(up, _DOWN.sub(down, name)).replace(
            "mid_block.attentions.0.", "middle_block.1."
        ): layer
        for name, layer in layers.items()
    }


def write_lora(folder: Path, tensors: Mapping[str, Any]) -> None:
    _save(folder / LORA_FILE, tensors)


# --- ControlNet -------------------------------------------------------------------------------


def write_controlnet(folder: Path, shape: Shape, seed: int) -> None:
    write_module(seeded(seed, lambda: _controlnet(shape)), folder)


def _controlnet(shape: Shape) -> Any:
    """One whose image matters: fresh ones end in convolutions of zeros, which say nothing."""
    import torch

    net = diffusers().ControlNetModel(
        conditioning_embedding_out_channels=(8, 8, 16, 16), **unet_settings(shape)
    )
    image_reader = net.controlnet_cond_embedding
    outlets = [*net.controlnet_down_blocks, net.controlnet_mid_block]
    with torch.no_grad():
        image_reader.conv_out.weight.normal_()
        for layer in (image_reader.conv_in, *image_reader.blocks):
            layer.weight.mul_(3.0)
        for outlet in outlets:
            outlet.weight.normal_(std=0.5)
    return net


# --- textual inversion ------------------------------------------------------------------------


def write_inversion(folder: Path, seed: int) -> None:
    """One vector, in diffusers' format: the token is the key."""
    _save(folder / INVERSION_FILE, {TINY_STYLE: seeded(seed, _vectors(CLIP_L))})


def write_long_inversion(folder: Path, seed: int, count: int) -> None:
    """Several vectors, in the web UI's format, where a loader has to be told the token."""
    _save(folder / INVERSION_FILE, {"emb_params": seeded(seed, _vectors(CLIP_L, count))})


def write_xl_inversion(folder: Path, seed: int, count: int) -> None:
    """Vectors for both of SDXL's encoders; which token they stand for is told elsewhere."""

    def both() -> dict[str, Any]:
        return {"clip_l": _vectors(CLIP_L, count)(), "clip_g": _vectors(CLIP_G, count)()}

    _save(folder / INVERSION_FILE, seeded(seed, both))


def _vectors(width: int, count: int | None = None) -> Callable[[], Any]:
    """Much longer than a fresh encoder's (0.02 a number), so that they are seen."""
    import torch

    shape = (width,) if count is None else (count, width)
    return lambda: torch.randn(shape) * 0.3


def _save(file: Path, tensors: Mapping[str, Any]) -> None:
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True)
    save_file(dict(tensors), file, metadata={"format": "pt"})
