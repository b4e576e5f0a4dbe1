"""Models of the real sizes, of random weights, to measure cards with: SD 1.5 and SDXL.

They are made on the spot, as nothing of such sizes can be carried about: each network with the
published configuration, so that a card has the published work and bytes to move, in the files and
formats that diffusers reads. Two things are not as published: the vocabulary (that of the tiny
models, in a table of the real size) and what the pictures show, which is nothing.

Weights are as the layers are made (uniform, scaled by their inputs), so that signals neither grow
nor die on the way, in half precision as well; cross-attention and the last layer are louder, as in
the tiny models. One seed, one kind of device and one version of torch give the same bytes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from devnet import adapter_models as adapters
from devnet import diffusion_models as build

ORG: Final = "crynux-full"
STAMP: Final = "stamp"
LOUDNESS: Final = 3.0
LORA_RANK: Final = 16
LORA_STRENGTH: Final = 0.05
"""A layer's update is about as large as the layer's own answer."""


@dataclass(frozen=True, slots=True)
class FullSize:
    """A pipeline's networks, each by its configuration; `text` and `text_2` are its encoders'."""

    name: str
    pipeline: str
    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    text: Mapping[str, Any]
    text_2: Mapping[str, Any] | None = None

    def model(self, dtype: str) -> str:
        """The base model's name in the store."""
        return f"{ORG}/{self.name}-{dtype}"

    def lora(self, dtype: str) -> str:
        return f"{ORG}/{self.name}-lora-{dtype}"


_VAE: Final = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "norm_num_groups": 32,
}
_CLIP: Final = {"vocab_size": 49408, "max_position_embeddings": 77}
_CLIP_L: Final = _CLIP | {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
_CLIP_G: Final = _CLIP | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
SD15: Final = FullSize(
    "sd15",
    "StableDiffusionPipeline",
    unet={
        "sample_size": 64,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 2,
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    vae=_VAE | {"sample_size": 512, "scaling_factor": 0.18215},
    text=_CLIP_L,
)
SDXL: Final = FullSize(
    "sdxl",
    "StableDiffusionXLPipeline",
    unet={
        "sample_size": 128,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 2,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 6 * 256 + 1280,
    },
    # In half precision its pipeline decodes in single, as the published one's overflows.
    vae=_VAE | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
    text=_CLIP_L,
    text_2=_CLIP_G,
)


def make_full(size: FullSize, root: Path, dtype: str, device: str) -> None:
    """The model and a LoRA for it under `root`, in that dtype; nothing where they are already.

    Made on `device`, torch's name for it: a GPU does in seconds what takes a CPU a minute.
    """
    # It warns about optional parts that nothing here uses.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    stamp, home = _fingerprint(size), root / size.model(dtype)
    if (home / STAMP).is_file() and (home / STAMP).read_text() == stamp:
        return
    root.mkdir(parents=True, exist_ok=True)
    for old in (home, root / size.lora(dtype)):
        shutil.rmtree(old, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".making-") as scratch:
        made = Path(scratch) / size.name
        with _making(dtype, device):
            build.write_pipeline(made, size.pipeline, _parts(size), **_settings(size))
            _write_lora(size, root / size.lora(dtype))
        (made / STAMP).write_text(stamp)
        home.parent.mkdir(exist_ok=True)
        made.rename(home)


def networks(size: FullSize) -> dict[str, Callable[[], Any]]:
    """What makes each of its networks, by its part's name, with torch's random numbers."""
    import transformers

    library = build.diffusers()

    def unet() -> Any:
        made = library.UNet2DConditionModel(**size.unet)
        build.enliven(made, LOUDNESS)
        return made

    # The tiny tokenizer's; the rows behind are never read.
    start, end = build.special_tokens()

    def encoder(kind: Any, settings: Mapping[str, Any]) -> Any:
        tokens: dict[str, Any] = {"bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
        return kind(transformers.CLIPTextConfig(**settings, **tokens))

    makers: dict[str, Callable[[], Any]] = {
        "vae": lambda: library.AutoencoderKL(**size.vae),
        "text_encoder": lambda: encoder(transformers.CLIPTextModel, size.text),
        "unet": unet,
    }
    if (second := size.text_2) is not None:
        projected = transformers.CLIPTextModelWithProjection
        makers["text_encoder_2"] = lambda: encoder(projected, second)
    return makers


def _parts(size: FullSize) -> dict[str, build.Part | None]:
    """One network is in memory at a time."""

    def written(make: Callable[[], Any], seed: int) -> Callable[[Path], None]:
        return lambda folder: build.write_module(build.seeded(seed, make), folder)

    kinds = {
        "vae": ("diffusers", "AutoencoderKL"),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
        "unet": ("diffusers", "UNet2DConditionModel"),
    }
    parts: dict[str, build.Part | None] = {
        name: (*kinds[name], written(make, seed))
        for seed, (name, make) in enumerate(networks(size).items(), start=100)
    }
    parts["tokenizer"] = build.tokenizer_part()
    if size.text_2 is not None:
        parts["tokenizer_2"] = build.tokenizer_part(pad="!")
        spacing = {"timestep_spacing": "leading"}
        return parts | {"scheduler": build.scheduler_part("EulerDiscreteScheduler", **spacing)}
    parts["scheduler"] = build.scheduler_part("PNDMScheduler", skip_prk_steps=True)
    return parts | {"safety_checker": None, "feature_extractor": None}


def _settings(size: FullSize) -> dict[str, bool]:
    if size.text_2 is not None:
        return {"force_zeros_for_empty_prompt": True}
    return {"requires_safety_checker": False}


def _write_lora(size: FullSize, folder: Path) -> None:
    import torch

    with torch.device("meta"):
        unet = build.diffusers().UNet2DConditionModel(**size.unet)
    layers = adapters.updates(unet, adapters.PROJECTIONS, 200, LORA_STRENGTH, LORA_RANK)
    adapters.write_lora(folder, adapters.peft_names(layers))


@contextmanager
def _making(dtype: str, device: str) -> Iterator[None]:
    """What is made has that dtype from the start, and is there. Torch is as before afterwards."""
    import torch

    from cluster.inference.parts import quiet

    quiet()
    before, there = torch.get_default_dtype(), torch.device(device)
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.random.fork_rng([there] if there.type == "cuda" else []), there:
            yield
    finally:
        torch.set_default_dtype(before)


def _fingerprint(size: FullSize) -> str:
    digest = hashlib.sha256(repr(size).encode())
    for module in (__file__, build.__file__, adapters.__file__):
        digest.update(Path(module).read_bytes())
    for package in ("torch", "diffusers", "transformers"):
        digest.update(f"{package}={version(package)}\n".encode())
    return digest.hexdigest()
