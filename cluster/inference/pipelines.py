"""Diffusers pipelines put together from parts near the card: cheap, so made anew for each task.

What is small and stays the same (tokenizers, the model's own scheduler, the feature extractor) is
kept by model folder; the networks come from the pool. A pipeline is held by nobody after its task,
so nothing that a task sets on it can reach the next one.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import diffusers
import torch
import transformers
from diffusers import (
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)

from cluster.core.errors import ModelUnavailable, ModelUnavailableKind
from cluster.inference.language import load_tokenizer
from cluster.inference.parts import digest_of, quiet, reading
from cluster.inference.recipes import REFINER_UNET, Recipe
from cluster.models.store import read_index, read_json

KEPT_FITTINGS: Final = 64
_TOKENIZERS: Final = ("tokenizer", "tokenizer_2")
_TEXTS: Final = frozenset({".json", ".txt", ".jinja", ".model"})
_INDEX_FLAGS: Final = (
    "requires_safety_checker",
    "force_zeros_for_empty_prompt",
    "requires_aesthetics_score",
)


@dataclass(frozen=True, slots=True)
class Fittings:
    """What a model folder holds besides networks."""

    tokenizers: Mapping[str, Any]
    scheduler: Any
    feature_extractor: Any
    flags: Mapping[str, bool]


@dataclass(frozen=True, slots=True)
class Pipeline:
    """One task's pipelines. `base` makes images, or latents for the `refiner`."""

    base: Any
    refiner: Any
    is_xl: bool
    scheduler_config: Mapping[str, Any]

    @property
    def has_controlnet(self) -> bool:
        return "controlnet" in self.base.components


class FittingsShelf:
    """Fittings by the contents of a folder's small files, the least recently used leaving first."""

    def __init__(self) -> None:
        self._shelf: OrderedDict[bytes, Any] = OrderedDict()

    def of(self, folder: Path) -> Fittings:
        """Raises `ModelUnavailable` when the folder's small files can't be read."""
        fittings: Fittings = self._kept(_small_files(folder), lambda: _read_fittings(folder))
        return fittings

    def tokenizer(self, folder: Path) -> Any:
        """A language model's; raises `ModelUnavailable`."""
        texts = [file for file in folder.iterdir() if file.suffix in _TEXTS and file.is_file()]
        return self._kept(sorted(texts), lambda: load_tokenizer(folder))

    def _kept(self, files: Iterable[Path], read: Callable[[], Any]) -> Any:
        key = b"".join(file.name.encode() + b"\0" + digest_of(file) for file in files)
        if key not in self._shelf:
            self._shelf[key] = read()
        self._shelf.move_to_end(key)
        while len(self._shelf) > KEPT_FITTINGS:
            self._shelf.popitem(last=False)
        return self._shelf[key]


def _small_files(folder: Path) -> list[Path]:
    kinds = (*_TOKENIZERS, "scheduler", "feature_extractor")
    found = [file for kind in kinds for file in sorted((folder / kind).glob("*"))]
    return [folder / "model_index.json", *(file for file in found if file.is_file())]


def _read_fittings(folder: Path) -> Fittings:
    quiet()
    classes = read_index(folder).parts
    with reading(folder):
        return Fittings(
            {
                kind: getattr(transformers, classes[kind][1]).from_pretrained(
                    str(folder / kind), local_files_only=True, trust_remote_code=False
                )
                for kind in _TOKENIZERS
                if kind in classes and _is_tokenizer(classes[kind][1])
            },
            _scheduler(folder, classes["scheduler"][1]),
            _feature_extractor(folder) if "feature_extractor" in classes else None,
            {
                flag: value
                for flag in _INDEX_FLAGS
                if isinstance(value := read_json(folder / "model_index.json").get(flag), bool)
            },
        )


def _is_tokenizer(name: str) -> bool:
    if name.startswith("CLIPTokenizer"):
        return True
    raise ModelUnavailable(ModelUnavailableKind.REFUSED, f"a tokenizer of class {name[:80]}")


def _scheduler(folder: Path, name: str) -> Any:
    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise ModelUnavailable(ModelUnavailableKind.REFUSED, f"a scheduler of class {name[:80]}")
    made: Any = kind
    return made.from_pretrained(str(folder / "scheduler"), local_files_only=True)


def _feature_extractor(folder: Path) -> Any:
    # By name: the other one computes on torchvision where that is installed, and gives other bits.
    return transformers.CLIPImageProcessorPil.from_pretrained(
        str(folder / "feature_extractor"), local_files_only=True
    )


def assemble(
    recipe: Recipe, modules: Mapping[str, torch.nn.Module], shelf: FittingsShelf
) -> Pipeline:
    """The task's pipelines of `modules`, which hold the recipe's parts by role.

    Raises `ModelUnavailable` when the parts don't make one.
    """
    fittings = shelf.of(recipe.base)
    parts: dict[str, Any] = {
        role: module for role, module in modules.items() if role != REFINER_UNET
    }
    parts |= {kind: fittings.tokenizers.get(kind) for kind in _TOKENIZERS[: 1 + recipe.is_xl]}
    # One of its own: some pipelines write into its settings as they are made. The task's scheduler
    # is made of what is there then, as by the network's runner.
    parts["scheduler"] = copy.copy(fittings.scheduler)
    if not recipe.is_xl:
        checker = parts.setdefault("safety_checker", None)
        parts["feature_extractor"] = None if checker is None else fittings.feature_extractor
    with reading(recipe.base):
        base = _class_for(recipe)(**parts, **_options(fittings, recipe.is_xl, parts))
        refiner = None if recipe.refiner is None else _refiner(recipe, parts, modules, shelf)
    for pipe in (base, refiner):
        if pipe is not None:
            pipe.set_progress_bar_config(disable=True)
    return Pipeline(base, refiner, recipe.is_xl, base.scheduler.config)


def _class_for(recipe: Recipe) -> Any:
    if "controlnet" in recipe.parts:
        if recipe.is_xl:
            return StableDiffusionXLControlNetPipeline
        return StableDiffusionControlNetPipeline
    return StableDiffusionXLPipeline if recipe.is_xl else StableDiffusionPipeline


def _options(fittings: Fittings, is_xl: bool, parts: Mapping[str, Any]) -> dict[str, bool]:
    if is_xl:
        force = fittings.flags.get("force_zeros_for_empty_prompt", True)
        return {"force_zeros_for_empty_prompt": force, "add_watermarker": False}
    return {"requires_safety_checker": parts.get("safety_checker") is not None}


def _refiner(
    recipe: Recipe,
    parts: Mapping[str, Any],
    modules: Mapping[str, torch.nn.Module],
    shelf: FittingsShelf,
) -> Any:
    """As the network's runner has it: the base's second text encoder and VAE, a UNet of its own."""
    assert recipe.refiner is not None, "called for recipes with a refiner"  # noqa: S101
    fittings = shelf.of(recipe.refiner)
    make: Any = StableDiffusionXLImg2ImgPipeline
    return make(
        vae=parts["vae"],
        text_encoder=None,
        text_encoder_2=parts["text_encoder_2"],
        tokenizer=None,
        tokenizer_2=parts["tokenizer_2"],
        unet=modules[REFINER_UNET],
        # One of its own: some write into their settings as they are used.
        scheduler=type(fittings.scheduler).from_config(fittings.scheduler.config),
        requires_aesthetics_score=fittings.flags.get("requires_aesthetics_score", False),
        force_zeros_for_empty_prompt=fittings.flags.get("force_zeros_for_empty_prompt", True),
        add_watermarker=False,
    )
