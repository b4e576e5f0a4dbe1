"""Weighted prompts (Compel), read from hostile text.

Compel's grammar takes exponential time over nested brackets, seventeen characters being enough to
hang a card for minutes, unless its parser remembers what it has tried (packrat), which changes no
result. What it can't parse, or weighs to infinity, is nobody's fault but the prompt's; yet other
versions may read it, so it is `TaskUnsupported` and neither reported nor held against the card.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, Final

import pyparsing
import torch
from compel import Compel, ReturnedEmbeddingsType  # type: ignore[import-untyped]
from compel.prompt_parser import PromptParser  # type: ignore[import-untyped]

from cluster.core.errors import DeviceFault, DeviceFaultKind, TaskUnsupported
from cluster.inference.parameters import SDParameters

pyparsing.ParserElement.enable_packrat()

MAX_DEPTH = 32
MOST_READINGS: Final = 1024
"""How often the text encoder may read 75 tokens for one prompt: it reads all of it once more for
each fragment of a weight below 1."""
MOST_WEIGHT: Final = 1000.0
"""Beyond it 16-bit numbers overflow: what isn't finite then is the prompt's doing."""
_CHUNK: Final = 75
_UNREADABLE = (
    PromptParser.ParsingException,
    pyparsing.ParseBaseException,
    RecursionError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
)


def conditions(pipe: Any, params: SDParameters) -> dict[str, Any]:
    """The base call's prompt arguments: embeddings of both prompts, padded to one length.

    Raises `TaskUnsupported` for a prompt that Compel can't read, `DeviceFault` where a prompt that
    it can read becomes no numbers.
    """
    tokenizer_2 = getattr(pipe, "tokenizer_2", None)
    if tokenizer_2 is None:
        return _named(params, _read(_reader(pipe.tokenizer, pipe.text_encoder), params), None)
    first = _read(_reader(pipe.tokenizer, pipe.text_encoder, _XL), params)
    second, pooled = _read(_reader(tokenizer_2, pipe.text_encoder_2, _XL, pooled=True), params)
    if first.shape[1] != second.shape[1]:
        raise TaskUnsupported("prompt: the two text encoders read it as of different lengths")
    return _named(params, torch.cat([first, second], dim=-1), pooled)


def refiner_conditions(pipe: Any, params: SDParameters) -> dict[str, Any]:
    """The refiner call's prompt arguments: it has the second text encoder only."""
    reader = _reader(pipe.tokenizer_2, pipe.text_encoder_2, _XL, pooled=True)
    return _named(params, *_read(reader, params))


_PLAIN: Final = ReturnedEmbeddingsType.LAST_HIDDEN_STATES_NORMALIZED
_XL: Final = ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED


class _Reader(Compel):  # type: ignore[misc]
    """Compel, but a prompt that it reads for several text encoders is parsed once."""

    @classmethod
    def parse_prompt_string(cls, prompt_string: str) -> Any:
        return _parsed(prompt_string)


@functools.lru_cache(maxsize=16)
def _parsed(prompt: str) -> Any:
    return Compel.parse_prompt_string(prompt)


def _reader(tokenizer: Any, encoder: Any, layers: Any = _PLAIN, pooled: bool = False) -> Any:
    return _Reader(
        tokenizer=tokenizer,
        text_encoder=encoder,
        returned_embeddings_type=layers,
        requires_pooled=pooled,
        truncate_long_prompts=False,
    )


def _read(reader: Any, params: SDParameters) -> Any:
    """Both prompts' embeddings, (2, tokens, width), and if asked the pooled ones, (2, width).

    What the grammar lets through but the reader can't read, as `()`, raises `TaskUnsupported`.
    """
    try:
        return reader([params.prompt, params.negative_prompt])
    except _UNREADABLE as error:
        raise TaskUnsupported(f"prompt: can't be read ({type(error).__name__})") from error


def _named(
    params: SDParameters, embeds: torch.Tensor, pooled: torch.Tensor | None
) -> dict[str, Any]:
    for tensor in (embeds, pooled):
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            if any(
                _heaviest(each) > MOST_WEIGHT for each in (params.prompt, params.negative_prompt)
            ):
                raise TaskUnsupported("prompt: weights beyond what numbers hold")
            raise DeviceFault(DeviceFaultKind.BAD_RESULT, "a prompt read as no finite numbers")
    found: dict[str, Any] = {
        "prompt_embeds": embeds[0:1],
        "negative_prompt_embeds": embeds[1:2],
    }
    if pooled is not None:
        found["pooled_prompt_embeds"] = pooled[0:1]
        found["negative_pooled_prompt_embeds"] = pooled[1:2]
    return found


def check(params: SDParameters) -> None:
    """Raises `TaskUnsupported` for prompts that can't be read; nothing is run for it."""
    for prompt in (params.prompt, params.negative_prompt):
        _check(prompt)


def _depth(prompt: str) -> int:
    """How deep its round brackets nest, the unclosed ones counted too.

    Python's own limit doesn't guard the parser: importing web3 lifts it so far that the C stack
    may overflow first.
    """
    depth = deepest = 0
    for character in prompt:
        depth = max(depth + (character == "(") - (character == ")"), 0)
        deepest = max(deepest, depth)
    return deepest


def _check(prompt: str) -> None:
    """Parse only, so that an error here can't be the card's; nothing runs on it yet."""
    if _depth(prompt) > MAX_DEPTH:
        raise TaskUnsupported(f"prompt: brackets nested deeper than {MAX_DEPTH}")
    try:
        parsed = _parsed(prompt)
    except _UNREADABLE as error:
        raise TaskUnsupported(f"prompt: can't be parsed ({type(error).__name__})") from None
    if not math.isfinite(_heaviest(prompt)):
        raise TaskUnsupported("prompt: weights beyond what numbers hold")
    lighter = sum(weight < 1 for weight in _weights(parsed))
    # A token is a character at least.
    if lighter * math.ceil(len(prompt) / _CHUNK) > MOST_READINGS:
        raise TaskUnsupported(f"prompt: {lighter} fragments of a weight below 1 in so long a one")


def _heaviest(prompt: str) -> float:
    parsed = _parsed(prompt)
    weights = (*_weights(parsed), *_shares(parsed))
    return max((abs(weight) for weight in weights), default=1.0)


def _shares(parsed: Any) -> Iterator[float]:
    """The weights of blends as Compel applies them, divided by their sum: infinity where it is
    nothing."""
    for blend in parsed.prompts:
        if getattr(blend, "normalize_weights", False):
            total = sum(blend.weights)
            yield from (weight / total if total else math.inf for weight in blend.weights)


def _weights(parsed: Any) -> Iterator[float]:
    """All weights in what Compel has read: of fragments, and of the prompts that are blended."""
    weight = getattr(parsed, "weight", None)
    if isinstance(weight, int | float):
        yield float(weight)
    for listed in ("weights", "prompts", "children", "original", "edited"):
        for each in getattr(parsed, listed, None) or ():
            if isinstance(each, int | float):
                yield float(each)
            else:
                yield from _weights(each)
