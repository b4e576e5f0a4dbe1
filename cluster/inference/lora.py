"""LoRAs: told apart by their files' headers, attached to a warm pipeline, and taken off again.

A LoRA is injected as layers beside the base's own, whose weights are never touched; taking it off
puts the base's own modules back, so the base's later results are the same bits as before.

Whether a LoRA that can't be attached is the task's fault is read from its header: the weights that
read the text (cross-attention keys and values) are as wide as the text embeddings of the family
they were trained on, 768 for SD 1.5 and 2048 for SDXL. Where all of those that belong to this
base's own layers have another width than these, no software can combine the two. What a LoRA holds
for layers that the base hasn't says nothing: the libraries pass over it.
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
from cluster.inference import lora_settings
from cluster.inference.parameters import SDParameters
from cluster.inference.parts import disk
from cluster.models.refs import ModelRef
from cluster.models.store import LORA_FILE, guessed_in

MAX_HEADER: Final = 32 * 2**20
ADAPTER: Final = "task"
_UNLOADABLE: Final = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
)
"""What the libraries' converters raise over names and shapes that they don't know."""
_OF_THE_CARD: Final = (torch.AcceleratorError, torch.OutOfMemoryError)

_READS_TEXT: Final = re.compile(
    r"(?P<layer>.*attn2[._])(?:processor[._])?(?P<part>to_[kv])"
    r"(?:[._]lora[._]down|\.lora_A(?:\.\w+)?|\.lora_linear_layer\.down)\.weight"
)
_PREFIXES: Final = ("unet.", "lora_unet_")


def misfit(file: Path, unet: torch.nn.Module) -> str:
    """Why the LoRA can't belong to this UNet, in words; empty where it may, or it can't be told.

    Knows the kohya (`lora_unet_…_attn2_to_k.lora_down`), diffusers (`….attn2.to_k.lora.down`, also
    with `processor`) and PEFT (`….attn2.to_k.lora_A`) names. Raises `ModelUnavailable`.
    """
    own = {
        name.replace(".", "_"): width
        for name, module in unet.named_modules()
        if isinstance(width := getattr(module, "in_features", None), int)
    }
    found = {
        (shape[1], own[layer])
        for name, shape in _shapes(file)
        if len(shape) >= 2 and (layer := _layer_of(name)) in own
    }
    if not found or any(theirs == ours for theirs, ours in found):
        return ""
    theirs, ours = min(found)
    return f"made for text embeddings {theirs} wide, the base model's are {ours}"


def _layer_of(name: str) -> str:
    """The layer that reads the text and that the weights are for, as the UNet names it, with
    underscores; empty for weights of another kind."""
    match = _READS_TEXT.fullmatch(name)
    if match is None:
        return ""
    layer = f"{match['layer']}{match['part']}"
    for prefix in _PREFIXES:
        layer = layer.removeprefix(prefix)
    return layer.replace(".", "_")


def is_certain(params: SDParameters, file: Path) -> bool:
    """Whether no node takes another file for the task's LoRA, `file` being what lies here for it.

    By a link each may get another one. In a repository it must be the one that nodes guess whatever
    is named (`cluster.models.store.guessed`), and be named or have the conventional name. Of what
    was fetched only the named file lies here: other files of its repository may keep nodes from
    guessing at all, and none from taking this one.
    """
    asked = params.lora
    if asked is None or ModelRef("lora", asked.model).is_url:
        return False
    plain = bool(asked.weight_file_name) or file.name == LORA_FILE
    with disk(file.parent):
        return plain and guessed_in(file.parent) == file.name


@contextmanager
def attached(pipe: Any, file: Path, weight: float, certain: bool) -> Iterator[None]:
    """The LoRA on the pipeline for as long as the context lasts.

    Raises `TaskInvalid` when it can't be attached because it belongs to another family, and
    `ModelUnavailable` for any other file that isn't a LoRA that can be loaded. `certain`: the file
    is the one that every node takes; where it is only the one that lies here, others may have taken
    another one of the same model. After that, or any error, the pipeline's parts must be thrown
    away unless `is_bare` says that nothing stayed.
    """
    if line := lora_settings.objection(_header(file)):
        raise ModelUnavailable(ModelUnavailableKind.REFUSED, f"{file.name}: {line}")
    asked = _gradients_asked(pipe)
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
            if layer := _unfilled(pipe):
                raise _damaged(f"{file.name} holds only a part of the layer {layer}")
        except _UNLOADABLE as error:
            if isinstance(error, _OF_THE_CARD):
                raise
            if line := misfit(file, pipe.unet):
                if certain:
                    raise TaskInvalid(f"lora: {line}") from error
                line = f"{file.name}, not named: {line}"
                raise ModelUnavailable(ModelUnavailableKind.REFUSED, line) from error
            raise _damaged(
                f"{file.name} can't be loaded as a LoRA: {type(error).__name__}"
            ) from error
        yield
    finally:
        pipe.unload_lora_weights()
        # A VAE that has decoded in single precision holds tensors that may be asked nowhere else.
        with torch.inference_mode():
            for tensor, was in asked:
                tensor.requires_grad_(was)


def _gradients_asked(pipe: Any) -> list[tuple[torch.Tensor, bool]]:
    """Attaching asks for none of the base's any more, and on a CPU torch picks kernels by it."""
    modules = (each for each in pipe.components.values() if isinstance(each, torch.nn.Module))
    return [(each, each.requires_grad) for module in modules for each in module.parameters()]


def _unfilled(pipe: Any) -> str:
    """A layer that got no weights of the LoRA, of which the libraries only warn; or none."""
    modules = (each for each in pipe.components.values() if isinstance(each, torch.nn.Module))
    return next(
        (name for each in modules for name, tensor in each.named_parameters() if tensor.is_meta), ""
    )


def is_bare(part: torch.nn.Module) -> bool:
    """Whether no LoRA layer is left anywhere in a pipeline's part."""
    return not any(isinstance(module, BaseTunerLayer) for module in part.modules())


def _header(file: Path) -> dict[str, Any]:
    with disk(file), file.open("rb") as stream:
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
    return header


def _shapes(file: Path) -> Iterator[tuple[str, list[int]]]:
    for name, entry in _header(file).items():
        if name == "__metadata__":
            continue
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if not isinstance(shape, list) or not all(isinstance(side, int) for side in shape):
            raise _damaged(f"{file.name} has a damaged safetensors header")
        yield name, shape


def _damaged(message: str) -> ModelUnavailable:
    return ModelUnavailable(ModelUnavailableKind.DAMAGED, message)
