"""From parameters to what must be near the card: model folders, their parts, and adapters' files.

Everything here is looked up on this machine's disk, so every failure is `ModelUnavailable` or
`TaskUnsupported`; the one verdict on the task is the LoRA's family, and it is left to
`cluster.inference.lora`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from cluster.core.errors import ModelUnavailable, ModelUnavailableKind, TaskUnsupported
from cluster.inference.fitting import misfit, scale
from cluster.inference.llm_parameters import LLMParameters
from cluster.inference.parameters import SDParameters, base_key, pipeline_key
from cluster.inference.parts import LANGUAGE_MODEL, PartKey, PartSource, source
from cluster.models.store import INDEX, ModelStore, read_index, read_json

SD: Final = "StableDiffusionPipeline"
SDXL: Final = "StableDiffusionXLPipeline"
SDXL_REFINER: Final = "StableDiffusionXLImg2ImgPipeline"
_ROLES: Final = {
    SD: ("unet", "vae", "text_encoder", "safety_checker"),
    SDXL: ("unet", "vae", "text_encoder", "text_encoder_2"),
}
_BASE_ROLES: Final = frozenset({"unet", "vae", "text_encoder", "text_encoder_2"})
REFINER_UNET: Final = "refiner"
SCALE: Final = 8
"""Pixels along a latent's side, of every published VAE of these families."""
LANGUAGE_ROLE: Final = "model"
MOST_SCALE: Final = 1e4
"""Of a VAE's latents; published ones are below 1."""
REFINED_AGAIN: Final = 0.3
"""The share of its steps that a refiner goes over finished latents: its pipeline's own default."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """One task's models. `parts` are by role; `refiner` is the refiner's own UNet."""

    key: str
    base_key: str
    base: Path
    pipeline: str
    refiner: Path | None
    parts: Mapping[str, PartSource]
    lora: Path | None
    inversion: Path | None

    @property
    def is_xl(self) -> bool:
        return self.pipeline == SDXL

    def part_keys(self) -> frozenset[PartKey]:
        return frozenset(part.key for part in self.parts.values())

    def weights(self) -> tuple[Path, ...]:
        """All its files of weights that are safetensors."""
        parts = (file for part in self.parts.values() for file in part.files)
        added = (file for file in (self.lora, self.inversion) if file is not None)
        return tuple(file for file in (*added, *parts) if file.suffix == ".safetensors")

    def base_part_keys(self) -> frozenset[PartKey]:
        """Those that every task on this base needs."""
        return frozenset(part.key for role, part in self.parts.items() if role in _BASE_ROLES)


@dataclass(frozen=True, slots=True)
class LanguageRecipe:
    """A language task's one model."""

    key: str
    base_key: str
    model: PartSource

    @property
    def parts(self) -> Mapping[str, PartSource]:
        return {LANGUAGE_ROLE: self.model}

    def weights(self) -> tuple[Path, ...]:
        return self.model.files

    def part_keys(self) -> frozenset[PartKey]:
        return frozenset({self.model.key})

    base_part_keys = part_keys


def language_recipe_for(params: LLMParameters, store: ModelStore) -> LanguageRecipe:
    """Raises `ModelUnavailable`, or `TaskUnsupported` for what isn't run."""
    bits = params.quantize_bits
    if bits is not None and find_spec("bitsandbytes") is None:
        raise TaskUnsupported("quantize_bits: bitsandbytes isn't installed here")
    model = source(store.language_folder(params.model), LANGUAGE_MODEL, params.dtype, bits=bits)
    return LanguageRecipe(pipeline_key(params), base_key(params), model)


def dtype_of(params: SDParameters) -> str:
    """The network's rule: the fp16 variant is run in float16, `auto` means float32 otherwise."""
    if params.base_model.variant == "fp16":
        return "float16"
    return "float32" if params.dtype == "auto" else params.dtype


def recipe_for(params: SDParameters, store: ModelStore) -> Recipe:
    """Raises `ModelUnavailable`, or `TaskUnsupported` for models that can't go together."""
    base = store.resolve("base", params.base_model.name, params.base_model.variant)
    pipeline = read_index(base).pipeline
    if pipeline not in _ROLES:
        raise TaskUnsupported(f"base_model: a {pipeline} makes no image from text alone")
    parts = _base_parts(base, pipeline, params)
    dtype = dtype_of(params)
    if params.unet:
        parts["unet"] = source(store.resolve("unet", params.unet), "UNet2DConditionModel", dtype)
        _check_family(parts["unet"].folder, base)
    if params.vae:
        parts["vae"] = source(store.resolve("vae", params.vae), "AutoencoderKL", dtype)
        _check_same_scale(parts["vae"].folder, base)
    lacking = sorted(_BASE_ROLES.intersection(_ROLES[pipeline]) - parts.keys())
    if lacking:
        line = f"{params.base_model.name} names no {lacking[0]}"
        raise ModelUnavailable(ModelUnavailableKind.DAMAGED, line)
    _check_scale(parts["vae"].folder)
    width = read_json(parts["unet"].folder / "config.json").get("cross_attention_dim")
    if params.controlnet is not None:
        parts["controlnet"] = _controlnet(params, store, width)
    refiner = _refiner(params, store, pipeline)
    if refiner is not None:
        variant = None if params.refiner is None else params.refiner.variant
        parts[REFINER_UNET] = source(refiner / "unet", "UNet2DConditionModel", dtype, variant)
    _check_fit(parts, params, pipeline, refiner)
    lora = params.lora
    return Recipe(
        pipeline_key(params),
        base_key(params),
        base,
        pipeline,
        refiner,
        parts,
        None if lora is None else store.lora_file(lora.model, lora.weight_file_name),
        store.inversion_file(params.textual_inversion) if params.textual_inversion else None,
    )


def _base_parts(base: Path, pipeline: str, params: SDParameters) -> dict[str, PartSource]:
    replaced = {"unet": bool(params.unet), "vae": bool(params.vae)}
    unwanted = {"safety_checker": not params.task_config.safety_checker}
    return {
        role: source(base / role, class_name, dtype_of(params), params.base_model.variant)
        for role, (_, class_name) in read_index(base).parts.items()
        if role in _ROLES[pipeline] and not replaced.get(role) and not unwanted.get(role)
    }


def _check_family(unet: Path, base: Path) -> None:
    if not (base / "unet" / "config.json").is_file():
        return
    theirs, ours = (read_json(folder / "config.json") for folder in (unet, base / "unet"))
    for name in ("cross_attention_dim", "addition_embed_type"):
        if theirs.get(name) != ours.get(name):
            raise TaskUnsupported(
                f"unet: its {name} is {str(theirs.get(name))[:40]}, "
                f"the base model's is {str(ours.get(name))[:40]}"
            )


def _check_same_scale(vae: Path, base: Path) -> None:
    """The network's runner sets a VAE on a pipeline that has taken the latents' size from the
    base's own, or from none: 8. Of another scale, it makes images of another size there."""
    own = base / "vae" / "config.json"
    expected = scale(read_json(own)) if own.is_file() else SCALE
    if scale(read_json(vae / "config.json")) != expected:
        raise TaskUnsupported("vae: its latents have another size than the base model's")


def _check_fit(
    parts: Mapping[str, PartSource], params: SDParameters, pipeline: str, refiner: Path | None
) -> None:
    configs = {role: read_json(part.folder / "config.json") for role, part in parts.items()}
    told = {} if refiner is None else read_json(refiner / INDEX)
    scored = told.get("requires_aesthetics_score") is True
    if line := misfit(configs, pipeline == SDXL, scored):
        raise TaskUnsupported(line)
    side, config = scale(configs["vae"]), params.task_config
    if not side or config.image_width % side or config.image_height % side:
        raise TaskUnsupported(f"task_config: sides are multiples of {side} with this VAE")


def _check_scale(vae: Path) -> None:
    """By it the latents are divided: without one, no card makes an image."""
    factor = read_json(vae / "config.json").get("scaling_factor", 1.0)
    if not isinstance(factor, int | float) or not 0 < abs(factor) <= MOST_SCALE:
        raise ModelUnavailable(ModelUnavailableKind.DAMAGED, "vae: its scaling_factor is no scale")


def _controlnet(params: SDParameters, store: ModelStore, width: object) -> PartSource:
    asked = params.controlnet
    assert asked is not None, "asked for by a task with a ControlNet"  # noqa: S101
    folder = store.resolve("controlnet", asked.model)
    theirs = read_json(folder / "config.json").get("cross_attention_dim")
    if theirs != width:
        raise TaskUnsupported(
            f"controlnet: made for text embeddings {theirs} wide, the base model's are {width}"
        )
    return source(folder, "ControlNetModel", dtype_of(params), asked.variant)


def _refiner(params: SDParameters, store: ModelStore, pipeline: str) -> Path | None:
    asked = params.refiner
    if asked is None:
        return None
    if pipeline != SDXL:
        raise TaskUnsupported("refiner: only an SDXL base model can be refined")
    if params.controlnet is not None and int(asked.steps * REFINED_AGAIN) < 1:
        raise TaskUnsupported(f"refiner: after a ControlNet, of {asked.steps} steps none is left")
    folder = store.resolve("base", asked.model, asked.variant)
    if read_index(folder).pipeline != SDXL_REFINER:
        raise TaskUnsupported(f"refiner: {asked.model} is not an SDXL refiner")
    return folder
