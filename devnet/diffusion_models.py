"""Builds tiny diffusers pipelines on disk: their real layout and key names, random weights.

Each part of a model is a folder of its own, and `model_index.json` names them all. Every random
part has its own seed, so that two models made with one seed for a part hold the same bytes there.

Widths differ between the families, as they do in the real ones, so that nothing of one family
passes for another's by chance:

    family      text encoder(s)   what the UNet's cross-attention reads
    SD 1.5      64                64
    SD 2        80                80
    SDXL        64 and 96         160 (both, side by side)
    refiner     96                96  (the second alone)
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

CLIP_L: Final = 64
OPEN_CLIP: Final = 80
CLIP_G: Final = 96
EMBEDDED_TIME: Final = 8
"""Width of the embedding of each of SDXL's size numbers."""
LAYERS_PER_BLOCK: Final = 1
_WORD_LIST: Final = """
a an the of in on at with and under over by photo painting drawing portrait picture red green blue
yellow black white small large old new cat dog horse bird fish tree forest river lake sea mountain
city street house castle robot car ship star moon sun night day rain snow fire light dark bad blurry
ugly low high quality detailed style best
"""
WORDS: Final = tuple(_WORD_LIST.split())
START: Final = "<|startoftext|>"
END: Final = "<|endoftext|>"

Part = tuple[str, str, Callable[[Path], None]]
"""A part's library and class, as `model_index.json` names them, and what writes its folder."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a UNet. `cross`: width of the text embeddings that it reads.

    `size_numbers`: how many numbers (sizes, crops, an aesthetic score) are embedded beside the
    pooled text, as in SDXL; 0 for those without. `loudness` scales what the UNet answers.
    """

    cross: int
    size_numbers: int = 0
    linear: bool = False
    channels: tuple[int, ...] = (32, 64)
    loudness: float = 3.0


SD15_SHAPE: Final = Shape(CLIP_L)
SD2_SHAPE: Final = Shape(OPEN_CLIP, linear=True)
SDXL_SHAPE: Final = Shape(CLIP_L + CLIP_G, size_numbers=6, linear=True)
REFINER_SHAPE: Final = Shape(CLIP_G, size_numbers=5, linear=True, loudness=9.0)
"""Louder, as it has the last steps alone, in which little changes."""


@dataclass(frozen=True, slots=True)
class Encoder:
    """A CLIP text encoder; `projected` ones have the pooled output's projection, as in SDXL."""

    width: int
    seed: int
    projected: bool = False
    activation: str = "quick_gelu"


def diffusers() -> Any:
    """Imported late, as it takes seconds, and untyped, as it is."""
    import diffusers as library

    return library


def seeded(seed: int, build: Callable[[], Any]) -> Any:
    import torch

    torch.manual_seed(seed)
    return build()


# --- pipelines --------------------------------------------------------------------------------


def write_pipeline(
    folder: Path,
    pipeline: str,
    parts: Mapping[str, Part | None],
    **settings: object,
) -> None:
    """A part that is None is named as left out."""
    folder.mkdir(parents=True)
    index: dict[str, object] = {
        "_class_name": pipeline,
        "_diffusers_version": version("diffusers"),
        **settings,
    }
    for name, part in parts.items():
        index[name] = [None, None] if part is None else [part[0], part[1]]
        if part is not None:
            part[2](folder / name)
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def unet_part(shape: Shape, seed: int, variants: tuple[str, ...] = ()) -> Part:
    return (
        "diffusers",
        "UNet2DConditionModel",
        lambda folder: write_module(unet(shape, seed), folder, variants),
    )


def vae_part(seed: int, scaling: float, variants: tuple[str, ...] = ()) -> Part:
    return (
        "diffusers",
        "AutoencoderKL",
        lambda folder: write_module(vae(seed, scaling), folder, variants),
    )


def text_encoder_part(encoder: Encoder, variants: tuple[str, ...] = ()) -> Part:
    name = "CLIPTextModelWithProjection" if encoder.projected else "CLIPTextModel"
    return (
        "transformers",
        name,
        lambda folder: write_module(text_encoder(encoder), folder, variants),
    )


def tokenizer_part(pad: str = END) -> Part:
    return ("transformers", "CLIPTokenizer", lambda folder: write_tokenizer(folder, pad))


def scheduler_part(name: str, **settings: object) -> Part:
    def write(folder: Path) -> None:
        betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        getattr(diffusers(), name)(**betas, steps_offset=1, **settings).save_pretrained(folder)

    return ("diffusers", name, write)


def safety_checker_parts(flags_all: bool) -> dict[str, Part]:
    return {
        "safety_checker": (
            "stable_diffusion",
            "StableDiffusionSafetyChecker",
            lambda folder: write_module(safety_checker(flags_all), folder),
        ),
        "feature_extractor": ("transformers", "CLIPImageProcessor", write_feature_extractor),
    }


def write_module(module: Any, folder: Path, variants: tuple[str, ...] = ()) -> None:
    """The weights, and beside them those of each variant in half precision.

    transformers writes CLIP's names shorter than the models of the network have them.
    """
    for variant in variants:
        copy.deepcopy(module).half().save_pretrained(folder, variant=variant)
    module.save_pretrained(folder)
    for file in folder.glob("model*.safetensors"):
        _use_published_names(file, type(module).__name__)


_PREFIXES: Final = {
    "CLIPTextModel": ("", "text_model."),
    "StableDiffusionSafetyChecker": ("vision_model.", "vision_model.vision_model."),
}


def _use_published_names(file: Path, name: str) -> None:
    from safetensors.torch import load_file, save_file

    if name not in _PREFIXES:
        return
    old, new = _PREFIXES[name]
    tensors = load_file(file)
    renamed = {
        new + key.removeprefix(old) if key.startswith(old) else key: tensor
        for key, tensor in tensors.items()
    }
    save_file(renamed, file, metadata={"format": "pt"})


# --- networks ---------------------------------------------------------------------------------


def unet_settings(shape: Shape) -> dict[str, Any]:
    """What a UNet and a ControlNet of that shape have in common."""
    settings: dict[str, Any] = {
        "in_channels": 4,
        "layers_per_block": LAYERS_PER_BLOCK,
        "block_out_channels": shape.channels,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "cross_attention_dim": shape.cross,
        "attention_head_dim": 8,
        "norm_num_groups": 8,
        "use_linear_projection": shape.linear,
    }
    if shape.size_numbers:
        settings |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": EMBEDDED_TIME,
            "projection_class_embeddings_input_dim": shape.size_numbers * EMBEDDED_TIME + CLIP_G,
        }
    return settings


def unet(shape: Shape, seed: int) -> Any:
    """Residual and attention blocks of the real kinds, enlivened."""

    def build() -> Any:
        made: Any = diffusers().UNet2DConditionModel(
            sample_size=32,
            out_channels=4,
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            **unet_settings(shape),
        )
        enliven(made, shape.loudness)
        return made

    return seeded(seed, build)


def enliven(net: Any, loudness: float) -> None:
    """A fresh net hardly hears the text, and hardly answers: louder cross-attention and output."""
    import torch

    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if ".attn2." in name and name.endswith("weight"):
                parameter.mul_(4.0)
        net.conv_out.weight.mul_(loudness)


def vae(seed: int, scaling: float) -> Any:
    """Eight pixels a latent, as the real ones have; `scaling` is the latents' factor."""
    kinds = 4
    return seeded(
        seed,
        lambda: diffusers().AutoencoderKL(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * kinds,
            up_block_types=("UpDecoderBlock2D",) * kinds,
            block_out_channels=(8, 16, 16, 16),
            layers_per_block=1,
            norm_num_groups=4,
            sample_size=256,
            scaling_factor=scaling,
        ),
    )


def text_encoder(encoder: Encoder) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    size = len(_vocabulary())
    config = CLIPTextConfig(
        vocab_size=size,
        hidden_size=encoder.width,
        intermediate_size=2 * encoder.width,
        projection_dim=encoder.width,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=77,
        hidden_act=encoder.activation,
        initializer_factor=1.0,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=size - 1,
    )
    kind = CLIPTextModelWithProjection if encoder.projected else CLIPTextModel
    return seeded(encoder.seed, lambda: kind(config))


def safety_checker(flags_all: bool) -> Any:
    """Flags every image, or none: no cosine is below -2 or above 2."""
    from transformers import CLIPConfig

    checker = diffusers().pipelines.stable_diffusion.StableDiffusionSafetyChecker
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "projection_dim": 8}
    vision = sizes | {"image_size": 32, "patch_size": 16}
    config = CLIPConfig(vision_config=vision, text_config=sizes, projection_dim=8)
    made = seeded(7, lambda: checker(config))
    threshold = -2.0 if flags_all else 2.0
    made.concept_embeds_weights.data.fill_(threshold)
    made.special_care_embeds_weights.data.fill_(threshold)
    return made


def write_feature_extractor(folder: Path) -> None:
    """As published: the library writes another name where it lacks torchvision."""
    folder.mkdir()
    settings = {
        "crop_size": {"height": 32, "width": 32},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "CLIPImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"shortest_edge": 32},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")


# --- tokenizer --------------------------------------------------------------------------------


def write_tokenizer(folder: Path, pad: str = END) -> None:
    """A real CLIP tokenizer's files. SD 1.5 pads with the end token, the later ones with `!`."""
    folder.mkdir()
    numbered = {token: number for number, token in enumerate(_vocabulary())}
    (folder / "vocab.json").write_text(json.dumps(numbered, ensure_ascii=False), "utf-8")
    lines = ["#version: 0.2", *(f"{first} {second}" for first, second in _merges())]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    settings = special | {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "do_lower_case": True,
        "add_prefix_space": False,
    }
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def special_tokens() -> tuple[int, int]:
    """The numbers of the tokens that begin and end a text."""
    size = len(_vocabulary())
    return size - 2, size - 1


def _byte_symbols() -> list[str]:
    """The printable stand-ins for the 256 byte values in byte-level BPE (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) for byte in plain] + [chr(256 + place) for place in range(len(rest))]


def _merges() -> list[tuple[str, str]]:
    """Merges that make one token of most of `WORDS`, from left to right."""
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        symbols = [*word[:-1], word[-1] + "</w>"]
        while len(symbols) > 1:
            merges[symbols[0], symbols[1]] = None
            symbols[:2] = [symbols[0] + symbols[1]]
    return list(merges)


def _vocabulary() -> list[str]:
    symbols = _byte_symbols()
    merged = dict.fromkeys(first + second for first, second in _merges())
    tokens = dict.fromkeys([*symbols, *(f"{symbol}</w>" for symbol in symbols), *merged])
    return [*tokens, START, END]
