"""Pipelines that stay warm on one card, the least recently used leaving first.

Loaded from local folders only, safetensors only, no code but the libraries'. The model's own
scheduler settings are kept aside, because each task sets its scheduler anew from them.
"""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from cluster.core.errors import ModelUnavailable, ModelUnavailableKind
from cluster.inference.parameters import SDParameters, pipeline_key
from cluster.models.store import ModelStore, read_index, read_json

CLASSES: Final = {
    "StableDiffusionPipeline": StableDiffusionPipeline,
    "StableDiffusionXLPipeline": StableDiffusionXLPipeline,
}
DTYPES: Final = {
    "auto": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}


@dataclass(frozen=True, slots=True)
class Pipeline:
    """One set of loaded parts. `safety_checker` is the model's own, None if it has none."""

    key: str
    pipe: Any
    scheduler_config: Mapping[str, Any]
    safety_checker: Any
    size: int

    @property
    def is_xl(self) -> bool:
        return isinstance(self.pipe, StableDiffusionXLPipeline)


def cross_attention_width(folder: Path) -> object:
    """The base UNet's `cross_attention_dim`, from its configuration."""
    return read_json(folder / "unet" / "config.json").get("cross_attention_dim")


def dtype_of(params: SDParameters) -> torch.dtype:
    """The network's rule: the fp16 variant is run in float16, `auto` means float32 otherwise."""
    if params.base_model.variant == "fp16":
        return torch.float16
    return DTYPES[params.dtype]


def load(params: SDParameters, folder: Path, device: torch.device) -> Pipeline:
    """Raises `ModelUnavailable` when the folder's files don't make a pipeline."""
    quiet()
    options: dict[str, Any] = {}
    if read_index(folder).pipeline == "StableDiffusionXLPipeline":
        options["add_watermarker"] = False
    try:
        pipe: Any = CLASSES[read_index(folder).pipeline].from_pretrained(
            str(folder),
            dtype=dtype_of(params),
            variant=params.base_model.variant or None,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            **options,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ModelUnavailable(
            ModelUnavailableKind.DAMAGED,
            f"{params.base_model.name} can't be loaded: {type(error).__name__}",
        ) from error
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device)
    for part in _modules(pipe):
        part.eval().requires_grad_(False)
    checker = getattr(pipe, "safety_checker", None)
    return Pipeline(pipeline_key(params), pipe, pipe.scheduler.config, checker, _bytes(pipe))


def quiet() -> None:
    """No progress bars or advice from the libraries; what matters is raised."""
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


class Pool:
    """The warm pipelines of one card, at most `max_count` and `max_bytes` of them."""

    def __init__(
        self, store: ModelStore, device: torch.device, max_count: int, max_bytes: int
    ) -> None:
        self._store = store
        self._device = device
        self._max_count = max_count
        self._max_bytes = max_bytes
        self._warm: OrderedDict[str, Pipeline] = OrderedDict()
        self.loads = 0

    def keys(self) -> frozenset[str]:
        return frozenset(self._warm)

    def get(self, params: SDParameters) -> Pipeline:
        """The task's pipeline, loaded unless it is warm. Raises `ModelUnavailable`."""
        key = pipeline_key(params)
        pipeline = self._warm.get(key)
        if pipeline is None:
            base = params.base_model
            folder = self._store.resolve("base", base.name, base.variant)
            self._make_room(_weights_on_disk(folder))
            pipeline = load(params, folder, self._device)
            self._warm[key] = pipeline
            self.loads += 1
        self._warm.move_to_end(key)
        return pipeline

    def discard(self, pipeline: Pipeline) -> None:
        self._warm.pop(pipeline.key, None)
        release_memory()

    def clear(self) -> None:
        self._warm.clear()
        release_memory()

    def _make_room(self, size: int) -> None:
        while self._warm and (
            len(self._warm) >= self._max_count
            or size + sum(p.size for p in self._warm.values()) > self._max_bytes
        ):
            self._warm.popitem(last=False)
            release_memory()


def release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _modules(pipe: Any) -> list[torch.nn.Module]:
    return [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]


def _bytes(pipe: Any) -> int:
    return sum(
        tensor.numel() * tensor.element_size()
        for part in _modules(pipe)
        for tensor in (*part.parameters(), *part.buffers())
    )


def _weights_on_disk(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*/*.safetensors"))
