"""Weighted prompts (Compel), read from hostile text.

Compel's grammar takes exponential time over nested brackets, seventeen characters being enough to
hang a card for minutes, unless its parser remembers what it has tried (packrat), which changes no
result. What it can't parse, or weighs to infinity, is nobody's fault but the prompt's; yet other
versions may read it, so it is `TaskUnsupported` and neither reported nor held against the card.
"""

from __future__ import annotations

import functools
import math
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import pyparsing
import torch
from compel import Compel, ReturnedEmbeddingsType  # type: ignore[import-untyped]
from compel.prompt_parser import Blend, PromptParser  # type: ignore[import-untyped]

from cluster.core.errors import ModelUnavailable, ModelUnavailableKind, TaskUnsupported
from cluster.inference.parameters import SDParameters
from cluster.inference.parts import look
from cluster.inference.referee import NoNumbers

pyparsing.ParserElement.enable_packrat()

MAX_DEPTH = 32
MOST_READINGS: Final = 1024
"""How often a text encoder may read 75 tokens for a task: it reads all of a prompt once more for
each fragment of a weight below 1."""
NEARLY: Final = 0.9
"""The share of a dtype's largest number from which on roundings may have made infinity of it."""
_CHUNK: Final = 75
_LEAST_ROOM: Final = 3
"""Tokens: one between beginning and end."""
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

    Raises `TaskUnsupported` for a prompt that Compel can't read, or whose weights are beyond what
    numbers hold, `NoNumbers` where a prompt that it can read becomes no numbers.
    """
    tokenizer_2 = getattr(pipe, "tokenizer_2", None)
    if tokenizer_2 is None:
        plain = _Reading("text_encoder", pipe.tokenizer, _PLAIN)
        return _named(plain.of(pipe.text_encoder, params), None)
    first = _Reading("text_encoder", pipe.tokenizer, _XL).of(pipe.text_encoder, params)
    second, pooled = _second(pipe, params)
    if first.shape[1] != second.shape[1]:
        raise TaskUnsupported("prompt: the two text encoders read it as of different lengths")
    return _named(torch.cat([first, second], dim=-1), pooled)


def refiner_conditions(pipe: Any, params: SDParameters) -> dict[str, Any]:
    """The refiner call's prompt arguments: it has the second text encoder only."""
    return _named(*_second(pipe, params))


def _second(pipe: Any, params: SDParameters) -> tuple[torch.Tensor, torch.Tensor]:
    reading = _Reading("text_encoder_2", pipe.tokenizer_2, _XL, pooled=True)
    embeds, pooled = reading.of(pipe.text_encoder_2, params)
    return embeds, pooled


_PLAIN: Final = ReturnedEmbeddingsType.LAST_HIDDEN_STATES_NORMALIZED
_XL: Final = ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED


class _Reader(Compel):  # type: ignore[misc]
    """Compel, but a prompt that it reads for several text encoders is parsed once."""

    @classmethod
    def parse_prompt_string(cls, prompt_string: str) -> Any:
        return _parsed(prompt_string)


@contextmanager
def _watched(provider: Any, known: int) -> Iterator[None]:
    """Between its readings the task may be given up. A token that the text encoder doesn't have is
    never looked up: that costs a card its context."""
    tokens_of, encode = provider.get_token_ids, provider._encode_token_ids_to_embeddings

    def get_token_ids(*given: Any, **named: Any) -> Any:
        found = tokens_of(*given, **named)
        if max((token for tokens in found for token in tokens), default=0) >= known:
            raise TaskUnsupported("prompt: a token that the text encoder doesn't have")
        return found

    def encode_and_look(*given: Any, **named: Any) -> Any:
        look()
        return encode(*given, **named)

    provider.get_token_ids = get_token_ids
    provider._encode_token_ids_to_embeddings = encode_and_look
    try:
        yield
    finally:  # else it holds itself, and the text encoder, until Python looks for such
        del provider.get_token_ids, provider._encode_token_ids_to_embeddings


@functools.lru_cache(maxsize=16)
def _parsed(prompt: str) -> Any:
    try:
        return Compel.parse_prompt_string(prompt)
    finally:
        # It keeps what didn't match until the next prompt comes, with the frames of whoever asked,
        # and all that is in them: a text encoder that has left its card, somebody's prompt.
        pyparsing.ParserElement.reset_cache()


@dataclass(frozen=True, slots=True)
class _Reading:
    """How the text encoder of a role is read with Compel."""

    role: str
    tokenizer: Any
    layers: Any
    pooled: bool = False

    def of(self, encoder: Any, params: SDParameters) -> Any:
        """Both prompts' embeddings, (2, tokens, width), and if asked the pooled ones, (2, width).

        What the grammar lets through but the reader can't read, as `()`, raises `TaskUnsupported`.
        """
        texts = [params.prompt, params.negative_prompt]
        self._check(encoder)
        try:
            read = self._read(encoder, texts)
        except _UNREADABLE as error:
            raise TaskUnsupported(f"prompt: can't be read ({type(error).__name__})") from error
        if not _are_numbers(read):
            if any(_is_too_loud(each, encoder.dtype) for each in texts):
                raise TaskUnsupported("prompt: weights beyond what numbers hold")
            raise NoNumbers(
                "a prompt read as no finite numbers",
                self.role,
                lambda other: _are_numbers(self._read(other, texts)),
            )
        return read

    def _check(self, encoder: Any) -> None:
        """Compel divides prompts into as many tokens as the tokenizer says that the text encoder
        reads at a time, with a beginning and an end; with other numbers it never ends."""
        most, room = self.tokenizer.model_max_length, encoder.config.max_position_embeddings
        tokenizer = self.tokenizer
        marks = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        if not _LEAST_ROOM <= most <= room or not all(isinstance(each, int) for each in marks):
            raise ModelUnavailable(
                ModelUnavailableKind.REFUSED,
                f"{self.role} reads {room} tokens at a time, its tokenizer gives {most}, and of"
                f" beginning, end and filling it has {marks}",
            )

    def _read(self, encoder: Any, texts: list[str]) -> Any:
        reader = _Reader(
            tokenizer=self.tokenizer,
            text_encoder=encoder,
            returned_embeddings_type=self.layers,
            requires_pooled=self.pooled,
            truncate_long_prompts=False,
        )
        known = encoder.get_input_embeddings().num_embeddings
        with _watched(reader.conditioning_provider, known):
            return reader(texts)


def _is_too_loud(text: str, dtype: torch.dtype) -> bool:
    """Whether its weights alone make more than the dtype holds of whatever a text encoder says."""
    return loudness(_parsed(text), dtype) >= NEARLY * torch.finfo(dtype).max


def _are_numbers(read: Any) -> bool:
    tensors = read if isinstance(read, tuple) else (read,)
    return all(bool(torch.isfinite(each).all()) for each in tensors)


def _named(embeds: torch.Tensor, pooled: torch.Tensor | None) -> dict[str, Any]:
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
    readings = sum(_checked(prompt) for prompt in (params.prompt, params.negative_prompt))
    if readings > MOST_READINGS:
        raise TaskUnsupported("prompt: too many fragments of a weight below 1 in so long a one")


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


def _checked(prompt: str) -> int:
    """How often at most it is read for its fragments of a weight below 1.

    It is parsed only, so that an error here can't be the card's; nothing runs on it yet.
    """
    if _depth(prompt) > MAX_DEPTH:
        raise TaskUnsupported(f"prompt: brackets nested deeper than {MAX_DEPTH}")
    try:
        parsed = _parsed(prompt)
    except _UNREADABLE as error:
        raise TaskUnsupported(f"prompt: can't be parsed ({type(error).__name__})") from None
    if not math.isfinite(loudness(parsed, torch.float64)):
        raise TaskUnsupported("prompt: weights beyond what numbers hold")
    lighter = sum(weight < 1 for weight in _weights(parsed))
    # A token is a byte at least, of the text as the tokenizer writes it.
    tokens = len(unicodedata.normalize("NFC", prompt).encode("utf-8", "replace"))
    return lighter * math.ceil(tokens / _CHUNK)


def loudness(parsed: Any, dtype: torch.dtype) -> float:
    """How many times as large as the text encoder's own numbers those of a parsed prompt may be, as
    Compel makes them in that dtype: all on the way to the end counted, and signs left aside.

    A fragment's weight, into which the parser has multiplied those of the brackets around it, is
    applied to the difference from an empty prompt; what is read of several prompts is added up by
    their shares in the blend, and a conjunction's weight applied to that like a fragment's. Weights
    below 1 mix two readings besides, which makes none larger.
    """
    return max(
        (
            _louder(_blended(each, dtype), weight)
            for each, weight in zip(parsed.prompts, parsed.weights, strict=True)
        ),
        default=1.0,
    )


def _louder(times: float, weight: float) -> float:
    return times if weight == 1 else 1 + abs(weight) * (times + 1)


def _blended(prompt: Any, dtype: torch.dtype) -> float:
    if not isinstance(prompt, Blend):
        return max((_louder(1.0, each.weight) for each in _applied(prompt)), default=1.0)
    shares = torch.tensor(prompt.weights, dtype=dtype)
    if prompt.normalize_weights:
        shares = shares / shares.sum()
    each = zip(shares.tolist(), prompt.prompts, strict=True)
    total = sum(abs(share) * _blended(inner, dtype) for share, inner in each)
    return total if math.isfinite(total) else math.inf


def _applied(prompt: Any) -> Iterator[Any]:
    """The fragments that are read in the end: what stands first where one is swapped for another,
    as nothing is swapped while an image is made."""
    for each in prompt.children:
        yield from getattr(each, "original", None) or (each,)


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
