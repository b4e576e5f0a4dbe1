"""LoRAs: told apart by their files' headers, attached to a warm pipeline, and taken off again.

A LoRA is injected as layers beside the base's own, whose weights are never touched; taking it off
puts the base's own modules back, so the base's later results are the same bits as before.

Whether a LoRA can fit at all is read from its header before torch sees the file: the weights that
read the text (cross-attention keys and values) are as wide as the text embeddings of the family
they were trained on, 768 for SD 1.5 and 2048 for SDXL. Where every one of them has another width
than the base, no software can combine the two, and that alone is the task's fault.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError

from cluster.core.errors import ModelUnavailable, ModelUnavailableKind, TaskInvalid

MAX_HEADER: Final = 32 * 2**20
ADAPTER: Final = "task"

_READS_TEXT: Final = re.compile(
    r"attn2[._](?:processor[._])?to_[kv]"
    r"(?:[._]lora[._]down|\.lora_A(?:\.\w+)?|\.lora_linear_layer\.down)\.weight"
)


def text_widths(file: Path) -> frozenset[int]:
    """Widths of the text embeddings that the LoRA's cross-attention reads; empty if it has none.

    Knows the kohya (`lora_unet_…_attn2_to_k.lora_down`), diffusers (`….attn2.to_k.lora.down`, also
    with `processor`) and PEFT (`….attn2.to_k.lora_A`) names. Raises `ModelUnavailable`.
    """
    widths: set[int] = set()
    for name, shape in _shapes(file):
        if _READS_TEXT.search(name) and len(shape) >= 2:
            widths.add(shape[1])
    return frozenset(widths)


def check_family(file: Path, base_width: object, certain: bool) -> None:
    """Raises `TaskInvalid` when the LoRA can't belong to a base of that `cross_attention_dim`.

    `certain`: the file is the one that every node takes. Where it is only the one that lies here,
    others may have taken another one of the same model, so the error is `ModelUnavailable`.
    """
    widths = text_widths(file)
    if isinstance(base_width, int) and widths and base_width not in widths:
        line = f"made for text embeddings {min(widths)} wide, the base model's are {base_width}"
        if certain:
            raise TaskInvalid(f"lora: {line}")
        raise ModelUnavailable(ModelUnavailableKind.REFUSED, f"{file.name}, not named: {line}")


@contextmanager
def attached(pipe: Any, file: Path, weight: float) -> Iterator[None]:
    """The LoRA on the pipeline for as long as the context lasts.

    Raises `ModelUnavailable` when the file isn't a LoRA that can be loaded. After that, or any
    error, the pipeline's parts must be thrown away unless `is_bare` says that nothing stayed.
    """
    try:
        try:
            pipe.load_lora_weights(
                str(file.parent),
                weight_name=file.name,
                adapter_name=ADAPTER,
                local_files_only=True,
                use_safetensors=True,
            )
            pipe.set_adapters([ADAPTER], [weight])
        except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
            raise _damaged(
                f"{file.name} can't be loaded as a LoRA: {type(error).__name__}"
            ) from error
        yield
    finally:
        pipe.unload_lora_weights()


def is_bare(part: torch.nn.Module) -> bool:
    """Whether no LoRA layer is left anywhere in a pipeline's part."""
    return not any(isinstance(module, BaseTunerLayer) for module in part.modules())


def _shapes(file: Path) -> Iterator[tuple[str, list[int]]]:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= MAX_HEADER:
            raise _damaged(f"{file.name} has no safetensors header")
        text = stream.read(length)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise _damaged(f"{file.name} has a damaged safetensors header") from None
    if len(text) < length or not isinstance(header, dict):
        raise _damaged(f"{file.name} has a damaged safetensors header")
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if not isinstance(shape, list) or not all(isinstance(side, int) for side in shape):
            raise _damaged(f"{file.name} has a damaged safetensors header")
        yield name, shape


def _damaged(message: str) -> ModelUnavailable:
    return ModelUnavailable(ModelUnavailableKind.DAMAGED, message)
