"""Which of a repository's files a model needs: safetensors weights of one variant, and the
configuration and tokenizer that go with them. Nothing else is ever fetched.

Pure: from a listing of paths, never from their contents.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from typing import Final

from cluster.core.errors import ModelUnavailable, ModelUnavailableKind
from cluster.models.refs import ModelRef
from cluster.models.refusals import Refused, Rule
from cluster.models.store import ADAPTER, CONFIG, INDEX, INVERSION_FILE, LORA_FILE, guessed

MOST_FILES: Final = 500
"""Of one model: the largest published ones have some two hundred shards."""
_PARTS: Final = frozenset(
    {
        "feature_extractor",
        "image_processor",
        "safety_checker",
        "scheduler",
        "text_encoder",
        "text_encoder_2",
        "tokenizer",
        "tokenizer_2",
        "unet",
        "vae",
    }
)
_WEIGHTS: Final = re.compile(
    r"(?P<stem>diffusion_pytorch_model|model)(?P<variant>\.\w+)?(?P<shard>-\d{5}-of-\d{5})?"
    r"(?P<late>\.\w+)?\.safetensors",
    re.ASCII,
)
_TABLE: Final = re.compile(
    r"(diffusion_pytorch_model|model)(?P<variant>\.\w+)?\.safetensors\.index"
    r"(?P<late>\.\w+)?\.json",
    re.ASCII,
)
_COMPANIONS: Final = re.compile(
    r"(config|generation_config|scheduler_config|(pre)?processor_config|quantize_config"
    r"|tokenizer[\w-]*|special_tokens_map|added_tokens|[\w-]*vocab|merges|dict|emoji|byte_maps"
    r"|chat_template|spiece|sentencepiece(\.bpe)?|spm(_char)?|source|target|tiktoken)"
    r"\.(json|txt|model|jinja|spm)",
    re.ASCII,
)
"""What diffusers and transformers open. What else lies there may be of any kind."""
_LOADABLE_BY_CODE: Final = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


def needed(ref: ModelRef, paths: Collection[str]) -> tuple[str, ...]:
    """The paths to fetch, in order.

    Raises `ModelUnavailable` (NOT_HERE) where the repository lacks what the model needs, and
    `Refused` where it has it only in a form that could run code, or as a LoRA's file in the place
    of which other nodes take another one.
    """
    plain = sorted(path for path in paths if is_plain(path))
    chosen = _CHOICES[ref.kind](ref, plain)
    guess = guessed(paths) if ref.kind == "lora" and not ref.is_url else None
    if guess is not None and guess not in chosen:
        line = f"{ref}: other nodes take {guess[:100]!r} for {chosen[0]}"
        raise Refused(Rule.FILE_KIND, line)
    if len(chosen) > MOST_FILES:
        raise Refused(Rule.FILE_KIND, f"{ref} has {len(chosen)} files, {MOST_FILES} at most")
    return tuple(chosen)


def weights_of(paths: Sequence[str], variant: str) -> list[str]:
    """The weights of that variant in one folder, all shards and their table; none where there are
    none. Transformers reads the whole file where there is one, diffusers what the table names."""
    weights = [path for path in paths if _is_of(_WEIGHTS, _name(path), variant)]
    for path in weights:
        match = _WEIGHTS.fullmatch(_name(path))
        if match is not None and match["stem"] == "model" and not match["shard"]:
            return [path]
    tables = [path for path in paths if weights and _is_of(_TABLE, _name(path), variant)]
    return weights + tables


def _base(ref: ModelRef, paths: Sequence[str]) -> list[str]:
    if INDEX in paths:
        return _pipeline(ref, paths)
    if CONFIG in paths:
        return _in_one_folder(ref, paths, companions=True)
    raise _lacks(ref, f"{INDEX} or {CONFIG}", paths)


def _pipeline(ref: ModelRef, paths: Sequence[str]) -> list[str]:
    chosen = [INDEX]
    for part in sorted(_PARTS):
        inside = [path for path in paths if path.startswith(f"{part}/") and path.count("/") == 1]
        chosen += _companions(inside)
        weights = weights_of(inside, ref.variant)
        if not weights and _has_weights(inside):
            raise _lacks(
                ref, f"{part}'s weights of the variant {ref.variant or 'by default'}", inside
            )
        chosen += weights
    if not any(path.endswith(".safetensors") for path in chosen):
        raise _lacks(ref, "weights", paths)
    return chosen


def _in_one_folder(ref: ModelRef, paths: Sequence[str], companions: bool) -> list[str]:
    here = [path for path in paths if "/" not in path]
    weights = weights_of(here, ref.variant)
    if CONFIG not in here or not weights:
        raise _lacks(ref, f"{CONFIG} or weights", here)
    return (_companions(here) if companions else [CONFIG]) + weights


def _network(ref: ModelRef, paths: Sequence[str]) -> list[str]:
    return _in_one_folder(ref, paths, companions=False)


def _lora(ref: ModelRef, paths: Sequence[str]) -> list[str]:
    weights = [path for path in paths if "/" not in path and path.endswith(".safetensors")]
    if ref.file:
        if not ref.file.endswith(".safetensors"):
            raise Refused(Rule.FILE_KIND, f"{ref}: {ref.file} is not a safetensors file")
        wanted = [path for path in weights if path == ref.file]
    elif LORA_FILE in weights:
        wanted = [LORA_FILE]
    elif len(weights) > 1:
        raise Refused(Rule.FILE_KIND, f"{ref} has {len(weights)} weights files, none was named")
    else:
        wanted = weights
    if not wanted:
        raise _lacks(ref, ref.file or "weights", paths)
    return wanted


def _inversion(ref: ModelRef, paths: Sequence[str]) -> list[str]:
    if INVERSION_FILE not in paths:
        raise _lacks(ref, INVERSION_FILE, paths)
    return [INVERSION_FILE]


_CHOICES: Final[dict[str, Callable[[ModelRef, Sequence[str]], list[str]]]] = {
    "base": _base,
    "unet": _network,
    "vae": _network,
    "controlnet": _network,
    "lora": _lora,
    "textual_inversion": _inversion,
}


def _companions(paths: Sequence[str]) -> list[str]:
    """Configuration and tokenizer. Never what would have a library load another model, from
    wherever it says."""
    return [path for path in paths if _name(path) != ADAPTER and _COMPANIONS.fullmatch(_name(path))]


def _is_of(form: re.Pattern[str], name: str, variant: str) -> bool:
    match = form.fullmatch(name)
    if match is None:
        return False
    said = (match["variant"] or "") + (match["late"] or "")
    return said == (f".{variant}" if variant else "")


def _has_weights(paths: Sequence[str]) -> bool:
    return any(path.endswith((".safetensors", *_LOADABLE_BY_CODE)) for path in paths)


def is_plain(path: str) -> bool:
    """Nothing that could lead elsewhere: a listing is hostile."""
    words = path.split("/")
    return len(words) <= 2 and all(re.fullmatch(r"(?!\.)[\w.-]{1,150}", w, re.ASCII) for w in words)


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _lacks(ref: ModelRef, what: str, paths: Sequence[str]) -> ModelUnavailable:
    if any(path.endswith(_LOADABLE_BY_CODE) for path in paths):
        return Refused(Rule.FILE_KIND, f"{ref} has no safetensors for {what}")
    return ModelUnavailable(ModelUnavailableKind.NOT_HERE, f"{ref} has no {what}")
