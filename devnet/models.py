"""Tiny models for devnet and tests: real diffusers layout, random weights from fixed seeds.

`python -m devnet.models DIR` makes them under DIR, once: a stamp of the code that makes them and
the libraries' versions tells whether they are there already. Their pictures mean nothing, but the
text, the seed and whatever is added to a model all change them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import string
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Final

from devnet import adapter_models as adapters
from devnet import diffusion_models as build
from devnet.diffusion_models import CLIP_G, CLIP_L, OPEN_CLIP, Encoder
from devnet.language_model import make_language_model

ORG: Final = "crynux-devnet"
SD15: Final = (f"{ORG}/tiny-sd15-a", f"{ORG}/tiny-sd15-b")
"""Same text encoder and VAE, byte for byte; different UNets."""
FP16: Final = "fp16"
"""The variant that `SD15[0]` has beside the default."""
SD15_FLAGS_ALL: Final = f"{ORG}/tiny-sd15-flags-all"
SD15_FLAGS_NONE: Final = f"{ORG}/tiny-sd15-flags-none"
"""`SD15[0]` with a safety checker that flags every image, and with one that flags none."""
SD2: Final = f"{ORG}/tiny-sd2"
SDXL: Final = f"{ORG}/tiny-sdxl"
SDXL_TURBO: Final = f"{ORG}/tiny-sdxl-turbo"
SDXL_REFINER: Final = f"{ORG}/tiny-sdxl-refiner"
"""Both have the text encoders and VAE of `SDXL`, as far as they have them."""
LLM: Final = f"{ORG}/tiny-llm"
BASES: Final = frozenset(
    {*SD15, f"{SD15[0]}+{FP16}", SD15_FLAGS_ALL, SD15_FLAGS_NONE, SD2}
    | {SDXL, SDXL_TURBO, SDXL_REFINER, LLM}
)
"""All base models, with their variants."""

SD15_UNET: Final = f"{ORG}/tiny-sd15-unet"
SD15_VAE: Final = f"{ORG}/tiny-sd15-vae"
SD15_CONTROLNET: Final = f"{ORG}/tiny-sd15-controlnet"
SDXL_CONTROLNET: Final = f"{ORG}/tiny-sdxl-controlnet"
SD15_LORA: Final = f"{ORG}/tiny-sd15-lora"
SD15_LORA_OLDER: Final = f"{ORG}/tiny-sd15-lora-older"
"""The matrices of `SD15_LORA` by the names that diffusers gave them formerly."""
SD15_LORA_KOHYA: Final = f"{ORG}/tiny-sd15-lora-kohya"
SDXL_LORA: Final = f"{ORG}/tiny-sdxl-lora"
SDXL_LORA_KOHYA: Final = f"{ORG}/tiny-sdxl-lora-kohya"
"""Kohya's ones change the text encoders too."""
SD15_INVERSION: Final = f"{ORG}/tiny-sd15-inversion"
INVERSION_TOKEN: Final = adapters.TINY_STYLE
"""The word in a prompt that calls for `SD15_INVERSION`."""
SD15_LONG_INVERSION: Final = f"{ORG}/tiny-sd15-long-inversion"
SDXL_INVERSION: Final = f"{ORG}/tiny-sdxl-inversion"
INVERSION_LENGTH: Final = 3
"""Vectors in each of the last two."""
STAMP: Final = "stamp"

SD15_TEXT: Final = Encoder(CLIP_L, seed=1)
SD2_TEXT: Final = Encoder(OPEN_CLIP, seed=2, activation="gelu")
SDXL_TEXT: Final = Encoder(CLIP_L, seed=3)
SDXL_TEXT_2: Final = Encoder(CLIP_G, seed=4, projected=True, activation="gelu")
SD_SCALING: Final = 0.18215
SDXL_SCALING: Final = 0.13025


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
        _make_sd(Path(scratch))
        _make_sdxl(Path(scratch))
        _make_adapters(Path(scratch))
        make_language_model(Path(scratch) / LLM, seed=40)
        (made / STAMP).write_text(stamp)
        shutil.rmtree(home, ignore_errors=True)
        made.rename(home)


def _fingerprint() -> str:
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*model*.py")):
        digest.update(file.read_bytes())
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


def _make_sd(root: Path) -> None:
    def sd15(
        name: str,
        unet: int,
        variants: tuple[str, ...] = (),
        checker: Mapping[str, build.Part] | None = None,
    ) -> None:
        parts: dict[str, build.Part | None] = {
            "vae": build.vae_part(11, SD_SCALING, variants),
            "text_encoder": build.text_encoder_part(SD15_TEXT, variants),
            "tokenizer": build.tokenizer_part(),
            "unet": build.unet_part(build.SD15_SHAPE, unet, variants),
            "scheduler": build.scheduler_part("PNDMScheduler", skip_prk_steps=True),
            "safety_checker": None,
            "feature_extractor": None,
        }
        build.write_pipeline(
            root / name,
            "StableDiffusionPipeline",
            {**parts, **(checker or {})},
            requires_safety_checker=checker is not None,
        )

    sd15(SD15[0], unet=15, variants=(FP16,))
    sd15(SD15[1], unet=16)
    sd15(SD15_FLAGS_ALL, unet=15, checker=build.safety_checker_parts(flags_all=True))
    sd15(SD15_FLAGS_NONE, unet=15, checker=build.safety_checker_parts(flags_all=False))
    build.write_pipeline(
        root / SD2,
        "StableDiffusionPipeline",
        {
            "vae": build.vae_part(12, SD_SCALING),
            "text_encoder": build.text_encoder_part(SD2_TEXT),
            "tokenizer": build.tokenizer_part(pad="!"),
            "unet": build.unet_part(build.SD2_SHAPE, 20),
            "scheduler": build.scheduler_part(
                "DDIMScheduler",
                prediction_type="v_prediction",
                clip_sample=False,
                set_alpha_to_one=False,
            ),
            "safety_checker": None,
            "feature_extractor": None,
        },
        requires_safety_checker=False,
    )
    build.write_module(build.vae(17, SD_SCALING), root / SD15_VAE)
    build.write_module(build.unet(build.SD15_SHAPE, 18), root / SD15_UNET)


def _make_sdxl(root: Path) -> None:
    def sdxl(name: str, unet: int, scheduler: build.Part) -> None:
        parts = {
            "vae": build.vae_part(13, SDXL_SCALING),
            "text_encoder": build.text_encoder_part(SDXL_TEXT),
            "text_encoder_2": build.text_encoder_part(SDXL_TEXT_2),
            "tokenizer": build.tokenizer_part(),
            "tokenizer_2": build.tokenizer_part(pad="!"),
            "unet": build.unet_part(build.SDXL_SHAPE, unet),
            "scheduler": scheduler,
        }
        build.write_pipeline(
            root / name, "StableDiffusionXLPipeline", parts, force_zeros_for_empty_prompt=True
        )

    sdxl(SDXL, 30, build.scheduler_part("EulerDiscreteScheduler", timestep_spacing="leading"))
    trailing = build.scheduler_part("EulerAncestralDiscreteScheduler", timestep_spacing="trailing")
    sdxl(SDXL_TURBO, 31, trailing)
    build.write_pipeline(
        root / SDXL_REFINER,
        "StableDiffusionXLImg2ImgPipeline",
        {
            "vae": build.vae_part(13, SDXL_SCALING),
            "text_encoder": None,
            "text_encoder_2": build.text_encoder_part(SDXL_TEXT_2),
            "tokenizer": None,
            "tokenizer_2": build.tokenizer_part(pad="!"),
            "unet": build.unet_part(build.REFINER_SHAPE, 32),
            "scheduler": build.scheduler_part("EulerDiscreteScheduler", timestep_spacing="leading"),
        },
        force_zeros_for_empty_prompt=False,
        requires_aesthetics_score=True,
    )


def _make_adapters(root: Path) -> None:
    lora = adapters.unet_lora(build.SD15_SHAPE, seed=1)
    adapters.write_lora(root / SD15_LORA, adapters.peft_names(lora))
    adapters.write_lora(root / SD15_LORA_OLDER, adapters.older_names(lora))
    adapters.write_lora(
        root / SD15_LORA_KOHYA,
        adapters.kohya_names("lora_unet", adapters.unet_lora(build.SD15_SHAPE, seed=3))
        | adapters.kohya_names("lora_te", adapters.text_lora(SD15_TEXT, seed=4)),
    )
    xl = adapters.unet_lora(build.SDXL_SHAPE, seed=2)
    adapters.write_lora(root / SDXL_LORA, adapters.peft_names(xl))
    xl = adapters.unet_lora(build.SDXL_SHAPE, seed=5)
    adapters.write_lora(
        root / SDXL_LORA_KOHYA,
        adapters.kohya_names("lora_unet", adapters.original_blocks(xl))
        | adapters.kohya_names("lora_te1", adapters.text_lora(SDXL_TEXT, seed=6))
        | adapters.kohya_names("lora_te2", adapters.text_lora(SDXL_TEXT_2, seed=7)),
    )
    adapters.write_controlnet(root / SD15_CONTROLNET, build.SD15_SHAPE, seed=1)
    adapters.write_controlnet(root / SDXL_CONTROLNET, build.SDXL_SHAPE, seed=2)
    adapters.write_inversion(root / SD15_INVERSION, seed=1)
    adapters.write_long_inversion(root / SD15_LONG_INVERSION, seed=2, count=INVERSION_LENGTH)
    adapters.write_xl_inversion(root / SDXL_INVERSION, seed=3, count=INVERSION_LENGTH)


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or set(arguments[0]) <= set(string.whitespace):
        print("usage: python -m devnet.models DIR", file=sys.stderr)
        return 2
    make_models(Path(arguments[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
