"""One language task on a loaded model: the chat as a prompt, tokens, and the response to the byte.

As the network's own runner does it (protocol.md sections 4 and 5): the chat template makes the
prompt, which is read with the tokenizer's special tokens, those of the template notwithstanding,
and counted without; the model's own generation settings stand where the task sets none; everything
is seeded right before. The response's key order and JSON form are hashed, so they are part of the
protocol.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoTokenizer
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from cluster.core.errors import (
    DeviceFault,
    DeviceFaultKind,
    ModelUnavailable,
    ModelUnavailableKind,
    TaskUnsupported,
)
from cluster.inference import own_settings
from cluster.inference.llm_parameters import LLMParameters
from cluster.inference.parts import look, quiet, reading
from cluster.inference.rendering import Page, Renderer
from cluster.inference.seeds import seed_everything
from cluster.models.store import read_json

FILE: Final = "0.json"
_LARGEST_SCORE: Final = 1e20
OnStep = Callable[[int, int], None]
_RENDERER: Final = Renderer()
_REFUSALS: Final = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    ImportError,
    NotImplementedError,
)
"""How the libraries refuse settings, the model's own among them: at once, or at the token that they
come to bear on. What a card raises is none of them."""


@dataclass(frozen=True, slots=True)
class Generated:
    """One returned sequence, the prompt's tokens included."""

    tokens: tuple[int, ...]


def load_tokenizer(folder: Path) -> Any:
    """Raises `ModelUnavailable`; no code but the libraries' is ever run."""
    quiet()
    with reading(folder):
        made: Any = AutoTokenizer
        return made.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)


def refuse_code(folder: Path) -> None:
    """A model that needs code of its own; others may run it, so it is never the task's fault."""
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).is_file() and "auto_map" in read_json(folder / name):
            raise ModelUnavailable(
                ModelUnavailableKind.REFUSED, f"{folder.name} comes with code of its own ({name})"
            )


def prompt_of(tokenizer: Any, params: LLMParameters) -> str:
    """The chat as the model's own template writes it; without one, the contents line by line.

    Raises `TaskUnsupported` for a chat that the template can't write: another version of it may.
    """
    chat = [message.as_given() for message in params.messages]
    if getattr(tokenizer, "chat_template", None) is None:
        return "\n".join(str(message.get("content") or "") for message in chat)
    try:
        template = tokenizer.get_chat_template(None, params.tools)
    except ValueError as error:
        raise TaskUnsupported(
            "messages: the model has templates, and none for all chats"
        ) from error
    page = Page(template, chat, params.tools, tokenizer.special_tokens_map)
    return _RENDERER.render(page, look)


@torch.inference_mode()
def generate(
    model: Any, tokenizer: Any, params: LLMParameters, on_step: OnStep
) -> tuple[Sequence[int], Sequence[Generated]]:
    """The prompt's tokens without special ones, as they are counted, and the sequences made.

    `on_step` gets (tokens made, most tokens) after each, and may raise to stop between tokens.
    Raises `TaskUnsupported` where the settings are refused, `DeviceFault` for numbers that aren't
    finite.
    """
    text = prompt_of(tokenizer, params)
    counted: list[int] = tokenizer.encode(text, add_special_tokens=False)
    prompt = tokenizer(text, return_tensors="pt").to(model.device)
    length = prompt["input_ids"].shape[1]
    if not counted:
        raise TaskUnsupported("messages: an empty prompt")
    room = _room(model)
    _check_prompt(model, prompt["input_ids"], room)
    watch = _Watch(length, params.generation_config.max_new_tokens, room, on_step)
    seed_everything(params.seed)
    try:
        chosen = _settings(model, tokenizer, params)
        with _as_deterministic_as_can_be():
            made = model.generate(
                input_ids=prompt["input_ids"],
                attention_mask=prompt["attention_mask"],
                generation_config=chosen,
                stopping_criteria=StoppingCriteriaList([watch]),
                logits_processor=LogitsProcessorList([_Numbers(chosen)]),
            )
    except _REFUSALS as error:
        line = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise TaskUnsupported(f"generation_config: refused: {line}") from error
    sequences = [Generated(tuple(sequence)) for sequence in made.tolist()]
    if any(len(each.tokens) <= length for each in sequences):
        raise DeviceFault(DeviceFaultKind.BAD_RESULT, "a sequence without a new token")
    return counted, sequences


def _room(model: Any) -> int | None:
    """How many positions the model was made for: to look up one beyond costs a card its context."""
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return room if isinstance(room, int) and room > 0 else None


def _check_prompt(model: Any, tokens: torch.Tensor, room: int | None) -> None:
    """What the model couldn't look up, before a card tries."""
    length = tokens.shape[1]
    if room is not None and length > room:
        raise TaskUnsupported(f"messages: {length} tokens, and the model has room for {room}")
    if int(tokens.max()) >= _table(model):
        raise TaskUnsupported("messages: a token that the model doesn't have")


def _table(model: Any) -> int:
    """How many tokens the model has."""
    return int(model.get_input_embeddings().weight.shape[0])


@contextmanager
def _as_deterministic_as_can_be() -> Iterator[None]:
    """Deterministic algorithms, and no error where a step of a model has none, as in the network's
    runner: it would be the same error on every card, and one after the other would be blamed.

    Where there is a deterministic one it is taken all the same. Nor does it bring back cuDNN's
    attention: that is off for the whole process.
    """
    wanted = torch.are_deterministic_algorithms_enabled()
    lenient = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(wanted, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(wanted, warn_only=lenient)


def _settings(model: Any, tokenizer: Any, params: LLMParameters) -> Any:
    """A copy of the model's own, with the task's on top. Raises `TaskUnsupported`, or one of
    `_REFUSALS` where they clash."""
    own = copy.deepcopy(model.generation_config)
    own.update(**params.generation_config.settings())
    own.max_length = None
    if own.pad_token_id is None:
        end = own.eos_token_id
        first_end = end[0] if isinstance(end, list) else end
        own.pad_token_id = first_end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    own_settings.check(own, _table(model))
    return own


class _Watch(StoppingCriteria):
    """Looks on after each token; never asks to stop, but what it calls may raise."""

    def __init__(self, length: int, most: int, room: int | None, on_step: OnStep) -> None:
        self.made = 0
        self._length = length
        self._most = most
        self._room = room
        self._on_step = on_step

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        length = input_ids.shape[1]
        self.made = length - self._length
        self._on_step(self.made, self._most)
        if self._room is not None and length > self._room and self.made < self._most:
            raise TaskUnsupported(f"max_new_tokens: the model has room for {self._room} tokens")
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class _Numbers(LogitsProcessor):
    """Lets the model's scores pass as they are, if one can be chosen by them.

    Some may be minus infinity, which rules a token out; the largest must be finite, and stay so
    when it is divided by a small temperature. A card is blamed if nothing but the model made them.
    """

    def __init__(self, chosen: Any) -> None:
        self._shifted = own_settings.shift_scores(chosen)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if bool((scores.amax(dim=-1).abs() <= _LARGEST_SCORE).all()):
            return scores
        if self._shifted:
            raise TaskUnsupported("generation_config: the model's own makes scores without bounds")
        raise DeviceFault(DeviceFaultKind.BAD_RESULT, "scores that are not finite numbers")


def response(
    tokenizer: Any, params: LLMParameters, prompt: Sequence[int], made: Sequence[Generated]
) -> dict[str, Any]:
    """The response, its keys in the order that is hashed."""
    read = _prompt_length(prompt, made[0].tokens)
    choices = [
        {
            "finish_reason": "stop" if each.tokens[-1] == tokenizer.eos_token_id else "length",
            "message": {"role": "assistant", "content": _text(tokenizer, each.tokens[read:])},
            "index": index,
        }
        for index, each in enumerate(made)
    ]
    completion = sum(len(each.tokens) - read for each in made)
    return {
        "model": params.model,
        "choices": choices,
        "usage": {
            "prompt_tokens": read,
            "completion_tokens": completion,
            "total_tokens": read + completion,
        },
    }


def _prompt_length(prompt: Sequence[int], sequence: Sequence[int]) -> int:
    """Where the network's runner sees the prompt end: behind the first occurrence of its last token
    that leaves room for it all, counted from the first occurrence of its first; 0 without one."""
    try:
        start = sequence.index(prompt[0])
        return sequence.index(prompt[-1], start + len(prompt) - 1) + 1
    except ValueError:
        return 0


def _text(tokenizer: Any, tokens: Sequence[int]) -> str:
    written: str = tokenizer.decode(
        list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=True
    )
    return written.strip()


def result_file(answer: dict[str, Any]) -> bytes:
    """The response as the file that is hashed: Python's JSON with its defaults."""
    return json.dumps(answer).encode("ascii")
