"""A task's pipelines with its adapters on: for the card, and once more on the CPU to be asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Final

import torch

from cluster.inference import lora, textual_inversion
from cluster.inference.parameters import SDParameters
from cluster.inference.parts import load
from cluster.inference.pipelines import FittingsShelf, Pipeline, assemble
from cluster.inference.recipes import Recipe

_ADAPTED: Final = frozenset({"unet", "text_encoder", "text_encoder_2"})


@contextmanager
def adapted(
    recipe: Recipe,
    params: SDParameters,
    shelf: FittingsShelf,
    full_loras: bool,
    modules: Mapping[str, torch.nn.Module],
) -> Iterator[Pipeline]:
    """The task's pipelines, of `modules` by role; the adapters are taken off in the end. Raises
    what `assemble` and the adapters' `attached` raise."""
    pipeline = assemble(recipe, modules, shelf)
    with ExitStack() as adapters:
        if recipe.lora is not None and params.lora is not None:
            weight = 1.0 if full_loras else params.lora.weight / 100
            certain = lora.is_certain(params, recipe.lora)
            adapters.enter_context(lora.attached(pipeline.base, recipe.lora, weight, certain))
        if recipe.inversion is not None:
            adapters.enter_context(textual_inversion.attached(pipeline.base, recipe.inversion))
        yield pipeline


@contextmanager
def copied(
    recipe: Recipe,
    params: SDParameters,
    shelf: FittingsShelf,
    full_loras: bool,
    role: str,
) -> Iterator[Any]:
    """Another copy of the part of that role on the CPU, read anew, with its adapters on; of the
    others no more is read than they are put on with."""
    cpu = torch.device("cpu")
    if role not in _ADAPTED or (recipe.lora is None and recipe.inversion is None):
        yield load(recipe.parts[role], cpu)
        return
    needed = {name: part for name, part in recipe.parts.items() if name in _ADAPTED | {"vae"}}
    alone = replace(recipe, parts=needed, refiner=None)
    modules = {name: load(part, cpu) for name, part in needed.items()}
    with adapted(alone, params, shelf, full_loras, modules) as pipeline:
        yield getattr(pipeline.base, role)
