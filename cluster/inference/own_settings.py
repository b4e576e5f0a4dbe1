"""A model's own generation settings: which stand, which don't, and which aren't computed here.

They stand where the task sets none (protocol.md section 5), as far as they say what is generated.
What says how, compiled or not, with which kind of cache, is ours to choose, and so is the form of
the answer: none of it is meant to change a token. What makes the tokens depend on a clock, on a
second model or way of guessing ahead, or on a cache that forgets digits, is refused: versions of
the library differ on it, and two nodes must never.

Where the library reads code of a model's own (`custom_generate`), it needs to be allowed to, and
never is; older ways of generating that were moved there are refused by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from cluster.core.errors import ModelUnavailable, ModelUnavailableKind, TaskUnsupported
from cluster.inference.llm_parameters import LARGEST, MAX_BEAMS, SMALLEST
from cluster.models.store import read_json

FILE: Final = "generation_config.json"
_OURS: Final[Mapping[str, object]] = {
    "cache_implementation": None,
    "cache_config": None,
    "max_cache_len": None,
    "prefill_chunk_size": None,
    "compile_config": None,
    "disable_compile": True,
    "low_memory": None,
    "return_dict_in_generate": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_logits": False,
    "output_scores": False,
}
_REFUSED: Final = (
    "assistant_early_exit",
    "is_assistant",
    "max_time",
    "prompt_lookup_num_tokens",
    "speculation_type",
    "use_mtp",
    "watermarking_config",
)
_LOSSY: Final = "quantized"
_NESTED: Final = ("decoder", "generator", "text_config")
"""Where the library looks among the settings of an older model's network, too."""
_ROWS: Final = ("num_beams", "num_return_sequences")
_FRACTIONS: Final = ("temperature", "typical_p", "top_p", "repetition_penalty")


def refuse(folder: Path) -> None:
    """Raises `ModelUnavailable` for a model whose settings aren't run here. Older models have them
    among those of the network itself."""
    for name in (FILE, "config.json"):
        said = read_json(folder / name) if (folder / name).is_file() else {}
        inner = (said.get(key) for key in _NESTED) if name != FILE else ()
        for settings in (said, *(each for each in inner if isinstance(each, dict))):
            if (key := _refused(settings)) is not None:
                raise ModelUnavailable(
                    ModelUnavailableKind.REFUSED,
                    f"{folder.name} asks for {key} ({name}), which isn't computed here",
                )


def _refused(said: Mapping[str, object]) -> str | None:
    """Zeros and empty ones count: to the library they are set."""
    if said.get("cache_implementation") == _LOSSY:
        return "cache_implementation"
    return next((key for key in _REFUSED if _is_set(said.get(key))), None)


def _is_set(value: object) -> bool:
    return value is not None and value is not False


def check(chosen: Any, tokens: int) -> None:
    """What no card may be asked for, whoever asks: the bounds of a task's own settings, and tokens
    among the model's `tokens`, because to look up another costs a card its context.

    Raises `TaskUnsupported`.
    """
    rows = max(_whole(name, getattr(chosen, name) or 1) for name in _ROWS)
    if rows > MAX_BEAMS:
        raise TaskUnsupported(f"num_beams: {rows} are not within 1 to {MAX_BEAMS}")
    for name in _FRACTIONS:
        fraction = getattr(chosen, name) or 0
        if not isinstance(fraction, int | float):
            raise TaskUnsupported(f"{name}: no number")
        if fraction and not SMALLEST <= abs(fraction) <= LARGEST:
            raise TaskUnsupported(f"{name}: {fraction:g} is not within {SMALLEST:g} to {LARGEST:g}")
    looked_up = {"forced_bos_token_id", "forced_eos_token_id"}
    if rows > 1:  # rows that have ended go on with it
        looked_up.add("pad_token_id")
    if chosen.exponential_decay_length_penalty is not None:
        looked_up.add("eos_token_id")
    for name in sorted(looked_up):
        value = getattr(chosen, name)
        for token in value if isinstance(value, list) else () if value is None else (value,):
            if not 0 <= _whole(name, token) < tokens:
                raise TaskUnsupported(f"{name}: a token that the model doesn't have")


def _whole(name: str, value: object) -> int:
    if not isinstance(value, int):
        raise TaskUnsupported(f"{name}: no whole number")
    return value


def choose(own: Any) -> None:
    """Set what is ours in a loaded model's own: the library reads there what a call leaves open."""
    for key, value in _OURS.items():
        setattr(own, key, value)
