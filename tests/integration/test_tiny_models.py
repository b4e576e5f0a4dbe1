"""Each tiny model loads by diffusers' own means, and what is added to one changes its image."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DiffusionPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from cluster.inference.parts import quiet
from cluster.models.store import ModelStore
from devnet import models

SIDE = 64
Pixels = npt.NDArray[np.uint8]
XL = StableDiffusionXLPipeline


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    quiet()


def load(root: Path, name: str, kind: Any = DiffusionPipeline, **options: Any) -> Any:
    folder = str(root / name)
    if issubclass(kind, StableDiffusionXLPipeline | StableDiffusionXLImg2ImgPipeline):
        options["add_watermarker"] = False
    pipe = kind.from_pretrained(folder, local_files_only=True, use_safetensors=True, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image(pipe: Any, prompt: str = "a photo of a cat", **options: Any) -> Pixels:
    options = {"height": SIDE, "width": SIDE, "num_inference_steps": 2} | options
    generator = torch.Generator("cpu").manual_seed(5)
    made = pipe(prompt, generator=generator, output_type="np", **options)
    pixels = np.asarray((made.images[0] * 255).round().astype(np.uint8))
    assert np.isfinite(made.images).all()
    return pixels


def colours(pixels: Pixels) -> int:
    return len(np.unique(pixels.reshape(-1, 3), axis=0))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (models.SD15[0], StableDiffusionPipeline),
        (models.SD15[1], StableDiffusionPipeline),
        (models.SD15_FLAGS_NONE, StableDiffusionPipeline),
        (models.SD2, StableDiffusionPipeline),
        (models.SDXL, XL),
        (models.SDXL_TURBO, XL),
    ],
)
def test_base_models_make_images(tiny_models: Path, name: str, kind: type[Any]) -> None:
    pipe = load(tiny_models, name)
    assert type(pipe) is kind
    plain = image(pipe)
    assert plain.shape == (SIDE, SIDE, 3)
    assert colours(plain) > 100
    assert not np.array_equal(image(pipe, "a red dog in the forest"), plain)
    assert np.array_equal(image(pipe), plain)


def test_the_store_finds_them_all(tiny_models: Path) -> None:
    assert ModelStore(tiny_models).on_disk() == models.BASES


def test_shared_parts_are_the_same_bytes(tiny_models: Path) -> None:
    def content(name: str, part: str) -> bytes:
        return next((tiny_models / name / part).glob("*l.safetensors")).read_bytes()

    for part in ("text_encoder", "vae"):
        assert content(models.SD15[0], part) == content(models.SD15[1], part)
        assert content(models.SDXL, part) == content(models.SDXL_TURBO, part)
    assert content(models.SD15[0], "unet") != content(models.SD15[1], "unet")
    for part in ("text_encoder_2", "vae"):
        assert content(models.SDXL, part) == content(models.SDXL_REFINER, part)


def test_names_are_those_of_published_models(tiny_models: Path) -> None:
    def keys(name: str) -> list[str]:
        with safe_open(tiny_models / name, "pt") as file:
            return list(file.keys())

    assert all(
        key.startswith("text_model.")
        for key in keys(f"{models.SD15[0]}/text_encoder/model.safetensors")
    )
    checker = keys(f"{models.SD15_FLAGS_ALL}/safety_checker/model.safetensors")
    assert "vision_model.vision_model.embeddings.class_embedding" in checker
    for name, wanted in [
        (models.SD15_LORA, r"unet\.[\w.]+attn\d\.to_(q|k|v|out\.0)\.lora_[AB]\.weight"),
        (models.SD15_LORA_OLDER, r"[\w.]+attn\d\.processor\.to_\w+_lora\.(up|down)\.weight"),
        (models.SD15_LORA_KOHYA, r"lora_(unet|te)_\w+\.(alpha|lora_(up|down)\.weight)"),
        (models.SDXL_LORA_KOHYA, r"lora_(te[12]_|unet_(input|middle|output)_block)\w+\.[\w.]+"),
    ]:
        found = keys(f"{name}/pytorch_lora_weights.safetensors")
        assert found
        assert [key for key in found if not re.fullmatch(wanted, key)] == []


def test_the_half_precision_variant(tiny_models: Path) -> None:
    half = load(tiny_models, models.SD15[0], variant=models.FP16, dtype=torch.float16)
    full = load(tiny_models, models.SD15[0])
    assert {half.unet.dtype, half.vae.dtype, half.text_encoder.dtype} == {torch.float16}
    assert full.unet.dtype is torch.float32
    weights = zip(half.unet.parameters(), full.unet.parameters(), strict=True)
    assert all(torch.equal(mine, other.half()) for mine, other in weights)
    assert colours(image(half)) > 100


def test_the_second_generation_is_of_its_own_kind(tiny_models: Path) -> None:
    pipe = load(tiny_models, models.SD2)
    first = load(tiny_models, models.SD15[0])
    assert pipe.scheduler.config["prediction_type"] == "v_prediction"
    assert pipe.unet.config["use_linear_projection"]
    assert pipe.text_encoder.config.hidden_size != first.text_encoder.config.hidden_size
    assert (pipe.tokenizer.pad_token, first.tokenizer.pad_token) == ("!", "<|endoftext|>")
    padded = pipe.tokenizer("a cat", padding="max_length", max_length=77).input_ids
    assert padded[5:] == [0] * 72


def test_turbo(tiny_models: Path) -> None:
    pipe = load(tiny_models, models.SDXL_TURBO)
    assert type(pipe.scheduler).__name__ == "EulerAncestralDiscreteScheduler"
    assert pipe.scheduler.config["timestep_spacing"] == "trailing"
    assert colours(image(pipe, num_inference_steps=1, guidance_scale=0.0)) > 100


def test_the_refiner_goes_on_from_the_bases_latents(tiny_models: Path) -> None:
    base = load(tiny_models, models.SDXL)
    refiner = load(
        tiny_models,
        models.SDXL_REFINER,
        tokenizer_2=base.tokenizer_2,
        text_encoder_2=base.text_encoder_2,
        vae=base.vae,
    )
    assert type(refiner).__name__ == "StableDiffusionXLImg2ImgPipeline"
    assert (refiner.tokenizer, refiner.text_encoder) == (None, None)
    assert refiner.config["requires_aesthetics_score"]
    options: dict[str, Any] = {"height": SIDE, "width": SIDE, "num_inference_steps": 4}
    latents = base("a cat", **options, denoising_end=0.5, output_type="latent").images

    def refined(prompt: str) -> Pixels:
        made = refiner(
            prompt,
            image=latents,
            num_inference_steps=4,
            denoising_start=0.5,
            generator=torch.Generator("cpu").manual_seed(5),
        )
        return np.asarray(made.images[0])

    plain = refined("a cat")
    assert plain.shape == (SIDE, SIDE, 3)
    assert colours(plain) > 100
    assert difference(refined("a red dog in the forest"), plain) > 1


@pytest.mark.parametrize(
    ("base", "name", "kind"),
    [
        (models.SD15[0], models.SD15_CONTROLNET, StableDiffusionControlNetPipeline),
        (models.SDXL, models.SDXL_CONTROLNET, StableDiffusionXLControlNetPipeline),
    ],
)
def test_a_controlnets_image_matters(
    tiny_models: Path, base: str, name: str, kind: type[Any]
) -> None:
    controlnet: Any = ControlNetModel
    net = controlnet.from_pretrained(str(tiny_models / name), use_safetensors=True)
    bare = load(tiny_models, base)
    more = {"add_watermarker": False} if "XL" in kind.__name__ else {"safety_checker": None}
    pipe = kind.from_pipe(bare, controlnet=net, **more)
    pipe.set_progress_bar_config(disable=True)
    black_and_white = np.array([[[255]] * 4 + [[0]] * 4], np.uint8)
    stripes = Image.fromarray(np.tile(black_and_white, (SIDE, SIDE // 8, 3)))
    white = Image.new("RGB", (SIDE, SIDE), "white")
    made = [image(pipe, image=stripes), image(pipe, image=white), image(bare)]
    assert colours(made[0]) > 100
    assert difference(made[0], made[1]) > 5
    assert difference(made[0], made[2]) > 5
    assert difference(image(pipe, image=stripes, controlnet_conditioning_scale=0.0), made[2]) == 0


def difference(one: Pixels, other: Pixels) -> float:
    return float(np.abs(one.astype(int) - other.astype(int)).mean())


@pytest.mark.parametrize(
    ("base", "name"),
    [
        (models.SD15[0], models.SD15_LORA),
        (models.SD15[0], models.SD15_LORA_OLDER),
        (models.SD15[0], models.SD15_LORA_KOHYA),
        (models.SDXL, models.SDXL_LORA),
        (models.SDXL, models.SDXL_LORA_KOHYA),
    ],
)
def test_loras_load_in_full(tiny_models: Path, base: str, name: str) -> None:
    pipe = load(tiny_models, base)
    plain = image(pipe)
    pipe.load_lora_weights(str(tiny_models / name), local_files_only=True, use_safetensors=True)
    file = tiny_models / name / "pytorch_lora_weights.safetensors"
    wanted = [tensor for tensor in load_file(file).values() if tensor.dim() == 2]
    loaded = [
        parameter
        for part in (pipe.unet, pipe.text_encoder, getattr(pipe, "text_encoder_2", None))
        if part is not None
        for key, parameter in part.named_parameters()
        if "lora_" in key
    ]
    assert sums(wanted) == sums(loaded)
    assert difference(image(pipe), plain) > 1


def sums(tensors: list[torch.Tensor]) -> list[float]:
    return sorted(float(tensor.detach().double().sum()) for tensor in tensors)


def test_a_lora_is_the_same_by_either_of_diffusers_names(tiny_models: Path) -> None:
    made = []
    for name in (models.SD15_LORA, models.SD15_LORA_OLDER):
        pipe = load(tiny_models, models.SD15[0])
        pipe.load_lora_weights(str(tiny_models / name), local_files_only=True)
        made.append(image(pipe))
    assert np.array_equal(made[0], made[1])


@pytest.mark.parametrize(
    ("name", "token"),
    [(models.SD15_INVERSION, None), (models.SD15_LONG_INVERSION, "<long-style>")],
)
def test_inversions(tiny_models: Path, name: str, token: str | None) -> None:
    pipe = load(tiny_models, models.SD15[0])
    word = token or models.INVERSION_TOKEN
    before = image(pipe, f"a cat in {word} style")
    size = len(pipe.tokenizer)
    pipe.load_textual_inversion(str(tiny_models / name), token=token, local_files_only=True)
    vectors = 1 if token is None else models.INVERSION_LENGTH
    assert len(pipe.tokenizer) == size + vectors
    assert difference(image(pipe, f"a cat in {word} style"), before) > 1


def test_an_inversion_for_both_text_encoders(tiny_models: Path) -> None:
    pipe = load(tiny_models, models.SDXL)
    before = image(pipe, "a cat in <xl-style> style")
    vectors = load_file(tiny_models / models.SDXL_INVERSION / "learned_embeds.safetensors")
    assert vectors["clip_l"].shape[1] != vectors["clip_g"].shape[1]
    for key, tokenizer, encoder in [
        ("clip_l", pipe.tokenizer, pipe.text_encoder),
        ("clip_g", pipe.tokenizer_2, pipe.text_encoder_2),
    ]:
        pipe.load_textual_inversion(
            vectors[key], token="<xl-style>", tokenizer=tokenizer, text_encoder=encoder
        )
    assert difference(image(pipe, "a cat in <xl-style> style"), before) > 1


@pytest.mark.parametrize(
    ("name", "part", "kind"),
    [
        (models.SD15_VAE, "vae", AutoencoderKL),
        (models.SD15_UNET, "unet", UNet2DConditionModel),
    ],
)
def test_parts_of_their_own(tiny_models: Path, name: str, part: str, kind: Any) -> None:
    own = kind.from_pretrained(str(tiny_models / name), local_files_only=True)
    made = image(load(tiny_models, models.SD15[0], **{part: own}))
    assert colours(made) > 100
    assert difference(made, image(load(tiny_models, models.SD15[0]))) > 1


def test_safety_checkers_flag_all_or_none(tiny_models: Path) -> None:
    plain = image(load(tiny_models, models.SD15[0]))
    for name, flags in [(models.SD15_FLAGS_ALL, True), (models.SD15_FLAGS_NONE, False)]:
        pipe = load(tiny_models, name)
        expected = np.zeros_like(plain) if flags else plain
        assert np.array_equal(image(pipe), expected)
        pipe = load(tiny_models, name, safety_checker=None)
        assert np.array_equal(image(pipe), plain)
        index = json.loads((tiny_models / name / "model_index.json").read_text())
        assert index["feature_extractor"] == ["transformers", "CLIPImageProcessor"]


def test_they_are_made_once_and_again_when_they_are_others(
    tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def make(root: Path) -> None:
        (root / models.ORG).mkdir()
        made.append(1)

    monkeypatch.setattr(models, "_make_sd", make)
    for name in ("_make_sdxl", "_make_adapters"):
        monkeypatch.setattr(models, name, lambda _root: None)
    for root in (tiny_models, tmp_path, tmp_path):
        models.make_models(root)
    assert len(made) == 1
    (tmp_path / models.ORG / models.STAMP).write_text("older")
    models.make_models(tmp_path)
    assert len(made) == 2


def test_the_files_are_the_same_every_time(tiny_models: Path, tmp_path: Path) -> None:
    models.make_models(tmp_path)
    for file in sorted(tiny_models.rglob("*")):
        if file.is_file():
            assert (tmp_path / file.relative_to(tiny_models)).read_bytes() == file.read_bytes()


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert models.main([]) == 2
    assert "usage" in capsys.readouterr().err
