"""Models of the real sizes: as large as published, and the engine takes what they make."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from cluster.config.schema import GpuConfig
from cluster.core.ports import Computed, Order
from cluster.core.types import AttemptId, Commitment, GigaBytes, TaskType
from cluster.inference.devices import simulated
from cluster.inference.engine import Engine, Limits
from cluster.inference.packing import Packing
from cluster.inference.parts import tensors
from cluster.models.store import ModelStore
from devnet.full_size import SD15, SDXL, FullSize, make_full, networks

DTYPE = "float16"


def narrow(size: FullSize) -> FullSize:
    """As deep as the real one, and a few numbers wide."""
    text = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    unet: dict[str, Any] = {"block_out_channels": (32, 64, 64, 64), "cross_attention_dim": 32}
    if size.text_2 is not None:
        unet = {"block_out_channels": (32, 64, 64), "attention_head_dim": (1, 2, 2)}
        unet |= {"cross_attention_dim": 32 + 64}
        unet |= {"projection_class_embeddings_input_dim": 6 * 256 + 64}
    return replace(
        size,
        unet={**size.unet, **unet},
        vae={**size.vae, "block_out_channels": (32, 32, 32, 32)},
        text={**size.text, **text, "projection_dim": 32},
        text_2=size.text_2 and {**size.text_2, **text, "hidden_size": 64, "projection_dim": 64},
    )


@pytest.mark.parametrize(
    ("size", "published"),
    [
        (SD15, {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}),
        (
            SDXL,
            {
                "unet": 2_567_463_684,
                "vae": 83_653_863,
                "text_encoder": 123_060_480,
                "text_encoder_2": 694_659_840,
            },
        ),
    ],
    ids=["sd15", "sdxl"],
)
def test_networks_have_as_many_weights_as_the_published(
    size: FullSize, published: dict[str, int]
) -> None:
    with torch.device("meta"):
        made = {name: make() for name, make in networks(size).items()}
    assert {name: sum(p.numel() for p in net.parameters()) for name, net in made.items()} == (
        published
    )


def test_an_sdxl_in_half_precision_waits_in_host_memory() -> None:
    """In what is pinned for it by default, a card's copies among little that is empty."""
    card, sizes, pinned = torch.device("cuda"), 0, 0
    with torch.device("meta"):
        for make in networks(SDXL).values():
            made = make().half()
            sizes += sum(tensor.nbytes for tensor in tensors(made))
            pinned += Packing.of(made, card).plan.size
    assert sizes < pinned < sizes * 1.02
    assert pinned < Limits().host_bytes == GpuConfig().host_memory_gb * 2**30


def images(root: Path, size: FullSize, **more: Any) -> Computed:
    """What the engine makes of it, having found nothing wrong."""
    device = simulated(0, "CPU+test", GigaBytes(8))
    engine = Engine(device, ModelStore(root), time.time, Limits(threads=1))
    config = {"image_width": 64, "image_height": 64, "steps": 4, "num_images": 1, "seed": 2}
    task = {"base_model": size.model(DTYPE), "dtype": DTYPE, "prompt": "a cat"}
    text = json.dumps(task | {"task_config": config} | more)
    order = Order(AttemptId("a"), Commitment("0x01"), TaskType.SD, text, None)
    return engine.run(order, lambda: False, lambda _step, _steps: None)


@pytest.mark.parametrize("size", [SD15, SDXL], ids=["sd15", "sdxl"])
def test_the_engine_takes_what_such_models_make(size: FullSize, tmp_path: Path) -> None:
    size = narrow(size)
    before = torch.get_default_dtype(), torch.random.get_rng_state()
    make_full(size, tmp_path, DTYPE, "cpu")
    assert torch.get_default_dtype() == before[0]
    assert torch.equal(torch.random.get_rng_state(), before[1])
    weights = tmp_path / size.model(DTYPE) / "unet" / "diffusion_pytorch_model.safetensors"
    with safe_open(weights, "pt") as file:
        assert {str(file.get_slice(name).get_dtype()) for name in file.keys()} == {"F16"}  # noqa: SIM118
    plain = images(tmp_path, size)
    assert images(tmp_path, size).score == plain.score
    assert images(tmp_path, size, prompt="a red castle").files != plain.files
    assert images(tmp_path, size, lora={"model": size.lora(DTYPE)}).files != plain.files

    made = weights.read_bytes(), weights.stat().st_ino
    make_full(size, tmp_path, DTYPE, "cpu")
    assert weights.stat().st_ino == made[1], "made once"
    (tmp_path / size.model(DTYPE) / "stamp").write_text("older")
    with weights.open("rb"):  # as long as it is, its number is given to no other file
        make_full(size, tmp_path, DTYPE, "cpu")
    assert weights.stat().st_ino != made[1], "made anew"
    assert weights.read_bytes() == made[0], "the same each time"
    assert {path.name for path in tmp_path.iterdir()} == {"crynux-full"}
