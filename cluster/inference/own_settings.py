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

from cluster.core.errors import ModelUnavailable, ModelUnavailableKind
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


def refuse(folder: Path) -> None:
    """Raises `ModelUnavailable` for a model whose settings aren't run here. Older models have them
    among those of the network itself."""
    for name in (FILE, "config.json"):
        said = read_json(folder / name) if (folder / name).is_file() else {}
        lossy = ("cache_implementation",) if said.get("cache_implementation") == _LOSSY else ()
        for key in (*lossy, *_REFUSED):
            if said.get(key):
                raise ModelUnavailable(
                    ModelUnavailableKind.REFUSED,
                    f"{folder.name} asks for {key} ({name}), which isn't computed here",
                )


def choose(own: Any) -> None:
    """Set what is ours in a loaded model's own: the library reads there what a call leaves open."""
    for key, value in _OURS.items():
        setattr(own, key, value)
