"""Weighted prompts (Compel), read from hostile text.

Compel's grammar takes exponential time over nested brackets, seventeen characters being enough to
hang a card for minutes, unless its parser remembers what it has tried (packrat), which changes no
result. What it can't parse, or weighs to infinity, is nobody's fault but the prompt's; yet other
versions may read it, so it is `TaskUnsupported` and neither reported nor held against the card.
"""

from __future__ import annotations

from typing import Any

import pyparsing
import torch
from compel import Compel, CompelForSD, CompelForSDXL  # type: ignore[import-untyped]
from compel.prompt_parser import PromptParser  # type: ignore[import-untyped]

from cluster.core.errors import TaskUnsupported
from cluster.inference.parameters import SDParameters
from cluster.inference.pipelines import Pipeline

pyparsing.ParserElement.enable_packrat()

MAX_DEPTH = 32
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


def conditions(pipeline: Pipeline, params: SDParameters) -> dict[str, Any]:
    """The call's prompt arguments: embeddings of both prompts, padded to one length.

    Raises `TaskUnsupported` for a prompt that Compel can't read.
    """
    for prompt in (params.prompt, params.negative_prompt):
        _check(prompt)
    weigh: Any = (CompelForSDXL if pipeline.is_xl else CompelForSD)(pipeline.pipe)
    made = weigh(params.prompt, negative_prompt=params.negative_prompt)
    found = {"prompt_embeds": made.embeds, "negative_prompt_embeds": made.negative_embeds}
    if pipeline.is_xl:
        found["pooled_prompt_embeds"] = made.pooled_embeds
        found["negative_pooled_prompt_embeds"] = made.negative_pooled_embeds
    if not all(bool(torch.isfinite(tensor).all()) for tensor in found.values()):
        raise TaskUnsupported("prompt: weights beyond what numbers hold")
    return found


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
        Compel.parse_prompt_string(prompt)
    except _UNREADABLE as error:
        raise TaskUnsupported(f"prompt: can't be parsed ({type(error).__name__})") from None
