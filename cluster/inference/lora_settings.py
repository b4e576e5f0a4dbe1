"""What a LoRA's file says of itself, judged before a library believes it.

diffusers hands the JSON under `lora_adapter_metadata` in a safetensors file's header to PEFT as a
LoRA's configuration, and PEFT knows configurations that change the base's own weights for good (one
cuts them down at the first forward pass, another decomposes them), that copy whole layers, or that
look for layers with a regular expression of the author's. Names of tensors become such expressions
too. So a LoRA may say what makes it a LoRA, in bounds; anything else has to be what PEFT takes by
itself, which is what diffusers' own training scripts write.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any, Final

from peft import LoraConfig

KEY: Final = "lora_adapter_metadata"
_FORMAT: Final = "__metadata__"
MOST_RANK: Final = 4096
MOST_ALPHA: Final = 65504.0
"""What 16 bits hold: with more, any card makes no numbers of it."""
_NAME: Final = re.compile(r"[\w.\-/]*", re.ASCII)
"""Of tensors: no character of it means more than itself in a regular expression, but the dot."""
_LAYER: Final = re.compile(r"\^?[\w.\-]*\$?", re.ASCII)


def objection(header: Mapping[str, Any]) -> str:
    """Why such a file isn't taken, in words; empty where it may be. `header` is a safetensors
    file's."""
    for name in header:
        if not _NAME.fullmatch(name):
            return f"a tensor named {_shown(name)}"
    said = header.get(_FORMAT)
    text = said.get(KEY) if isinstance(said, dict) else None
    if not text:
        return ""
    try:
        settings = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return f"{KEY} is no JSON"
    if settings is None:
        return ""
    if not isinstance(settings, dict):
        return f"{KEY} is no JSON object"
    for name, value in settings.items():
        _part, _dot, setting = name.partition(".")
        if not _is_harmless(setting, value):
            return f"{KEY} sets {_shown(name)} to {_shown(value)}"
    return ""


def _is_harmless(setting: str, value: object) -> bool:
    judge = _JUDGES.get(setting)
    if judge is not None and judge(value):
        return True
    if value is None or setting not in _DEFAULTS:
        # Of what PEFT doesn't know, nothing but nothing is known to change nothing.
        return value is None
    default = _DEFAULTS[setting]
    return type(value) is type(default) and value == default


def _is_rank(value: object) -> bool:
    return type(value) is int and 0 < value <= MOST_RANK


def _is_alpha(value: object) -> bool:
    return isinstance(value, int | float) and not _is_flag(value) and abs(value) <= MOST_ALPHA


def _by_layer(judge: Callable[[object], bool]) -> Callable[[object], bool]:
    def judged(value: object) -> bool:
        return isinstance(value, dict) and all(
            _LAYER.fullmatch(layer) and judge(each) for layer, each in value.items()
        )

    return judged


def _are_layers(value: object) -> bool:
    """A list of names; a text is a regular expression for all of them."""
    return isinstance(value, list) and all(
        isinstance(each, str) and _LAYER.fullmatch(each) for each in value
    )


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


_JUDGES: Final[Mapping[str, Callable[[object], bool]]] = {
    "r": _is_rank,
    "rank_pattern": _by_layer(_is_rank),
    "lora_alpha": _is_alpha,
    "alpha_pattern": _by_layer(_is_alpha),
    "target_modules": _are_layers,
    "exclude_modules": _are_layers,
    "use_rslora": _is_flag,
    "use_dora": _is_flag,
    "lora_bias": _is_flag,
    "inference_mode": _is_flag,
    # How what is trained begins: all of it is replaced by what the file holds.
    "init_lora_weights": lambda value: isinstance(value, bool) or value == "gaussian",
    "lora_dropout": lambda value: type(value) in (int, float) and 0 <= value < 1,  # type: ignore[operator]
    "peft_type": lambda value: value == "LORA",
    "peft_version": lambda value: isinstance(value, str),
    "base_model_name_or_path": lambda value: isinstance(value, str),
    "revision": lambda value: isinstance(value, str),
    "task_type": lambda value: isinstance(value, str),
}


def _default(field: Any) -> object:
    if field.default is not MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not MISSING else None


_DEFAULTS: Final[Mapping[str, object]] = {
    field.name: _default(field) for field in fields(LoraConfig)
}


def _shown(value: object) -> str:
    return ascii(value)[:60]
