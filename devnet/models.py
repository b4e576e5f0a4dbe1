"""Tiny models for devnet and tests: real diffusers layout, random weights from a fixed seed.

`python -m devnet.models DIR` makes them under DIR, once: a stamp of this file's contents and the
libraries' versions tells whether they are there already. Their pictures mean nothing, but the text,
the seed and the LoRA all change them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import string
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

ORG: Final = "crynux-devnet"
SD15: Final = (f"{ORG}/tiny-sd15-a", f"{ORG}/tiny-sd15-b")
SDXL: Final = f"{ORG}/tiny-sdxl"
SD15_LORA: Final = f"{ORG}/tiny-sd15-lora"
SDXL_LORA: Final = f"{ORG}/tiny-sdxl-lora"
STAMP: Final = "stamp"

TEXT_WIDTH: Final = 64
LORA_RANK: Final = 4
_WORD_LIST: Final = """
a an the of in on at with and under over by photo painting drawing portrait picture red green blue
yellow black white small large old new cat dog horse bird fish tree forest river lake sea mountain
city street house castle robot car ship star moon sun night day rain snow fire light dark bad blurry
ugly low high quality detailed style best
"""
WORDS: Final = tuple(_WORD_LIST.split())


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a tiny pipeline; `cross` is the width of the text embeddings its UNet reads."""

    channels: tuple[int, ...]
    cross: int
    is_xl: bool


SD15_SHAPE: Final = Shape((32, 64), TEXT_WIDTH, is_xl=False)
SDXL_SHAPE: Final = Shape((32, 64), 2 * TEXT_WIDTH, is_xl=True)


def make_models(root: Path) -> None:
    """All tiny models under `root/crynux-devnet/`; nothing is done when they are there already."""
    # It warns about optional parts that nothing here uses.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    stamp = _fingerprint()
    home = root / ORG
    if (home / STAMP).is_file() and (home / STAMP).read_text() == stamp:
        return
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".making-") as scratch, _quietly():
        made = Path(scratch) / ORG
        for index, name in enumerate(SD15):
            _make_pipeline(Path(scratch) / name, SD15_SHAPE, seed=15 + index)
        _make_pipeline(Path(scratch) / SDXL, SDXL_SHAPE, seed=30)
        _make_lora(Path(scratch) / SD15_LORA, SD15_SHAPE, seed=1)
        _make_lora(Path(scratch) / SDXL_LORA, SDXL_SHAPE, seed=2)
        (made / STAMP).write_text(stamp)
        shutil.rmtree(home, ignore_errors=True)
        made.rename(home)


def _fingerprint() -> str:
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for package in ("torch", "diffusers", "transformers"):
        digest.update(f"{package}={version(package)}\n".encode())
    return digest.hexdigest()


@contextmanager
def _quietly() -> Iterator[None]:
    """Torch's generator is put back afterwards, and the libraries say nothing meanwhile."""
    import torch

    from cluster.inference.parts import quiet

    quiet()
    with torch.random.fork_rng(devices=[]):
        yield


def _make_pipeline(folder: Path, shape: Shape, seed: int) -> None:
    import torch

    diffusers = _diffusers()
    torch.manual_seed(seed)
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    )
    parts: dict[str, Any] = {
        "vae": _vae(),
        "text_encoder": _text_encoder(projected=False),
        "tokenizer": _tokenizer(folder.parent),
        "unet": _unet(shape),
        "scheduler": scheduler,
    }
    if shape.is_xl:
        second = {
            "text_encoder_2": _text_encoder(projected=True),
            "tokenizer_2": parts["tokenizer"],
        }
        pipe = diffusers.StableDiffusionXLPipeline(**parts, **second, add_watermarker=False)
    else:
        pipe = diffusers.StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipe.save_pretrained(folder, safe_serialization=True)


def _diffusers() -> Any:
    """Imported late, as it takes seconds, and untyped, as it is."""
    import diffusers

    return diffusers


def _unet(shape: Shape) -> Any:
    """Residual and attention blocks of the real kinds, enlivened."""
    xl: dict[str, Any] = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + TEXT_WIDTH,
        "use_linear_projection": True,
    }
    unet: Any = _diffusers().UNet2DConditionModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=shape.channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=shape.cross,
        attention_head_dim=8,
        norm_num_groups=8,
        **(xl if shape.is_xl else {}),
    )
    _enliven(unet)
    return unet


def _enliven(unet: Any) -> None:
    """A fresh net hardly hears the text, and hardly answers: louder cross-attention and output."""
    import torch

    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if ".attn2." in name and name.endswith("weight"):
                parameter.mul_(4.0)
        unet.conv_out.weight.mul_(3.0)


def _vae() -> Any:
    kinds = 4
    return _diffusers().AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * kinds,
        up_block_types=("UpDecoderBlock2D",) * kinds,
        block_out_channels=(8, 16, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=256,
    )


def _text_encoder(projected: bool) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    bos, eos = _vocabulary_size() - 2, _vocabulary_size() - 1
    config = CLIPTextConfig(
        vocab_size=_vocabulary_size(),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=77,
        initializer_factor=1.0,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def _byte_symbols() -> list[str]:
    """The printable stand-ins for the 256 byte values in byte-level BPE (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) for byte in plain] + [chr(256 + place) for place in range(len(rest))]


def _merges() -> list[tuple[str, str]]:
    """Merges that make one token of each of `WORDS`, from left to right."""
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
    return [*tokens, "<|startoftext|>", "<|endoftext|>"]


def _vocabulary_size() -> int:
    return len(_vocabulary())


def _tokenizer(scratch: Path) -> Any:
    """A real CLIP tokenizer, read from the files that CLIP's own come in."""
    from transformers import CLIPTokenizer

    folder = scratch / ".tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    numbered = {token: number for number, token in enumerate(_vocabulary())}
    (folder / "vocab.json").write_text(json.dumps(numbered, ensure_ascii=False), "utf-8")
    lines = ["#version: 0.2", *(f"{first} {second}" for first, second in _merges())]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    tokenizer = CLIPTokenizer.from_pretrained(str(folder), model_max_length=77)
    shutil.rmtree(folder)
    return tokenizer


def _make_lora(folder: Path, shape: Shape, seed: int) -> None:
    """A LoRA on all attention projections, strong enough to be seen."""
    import torch
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(seed)
    unet = _unet(shape)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=targets))
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    name = "StableDiffusionXLPipeline" if shape.is_xl else "StableDiffusionPipeline"
    getattr(_diffusers(), name).save_lora_weights(
        folder, unet_lora_layers=get_peft_model_state_dict(unet), safe_serialization=True
    )


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or set(arguments[0]) <= set(string.whitespace):
        print("usage: python -m devnet.models DIR", file=sys.stderr)
        return 2
    make_models(Path(arguments[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
