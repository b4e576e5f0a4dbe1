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
from inspect import signature
from pathlib import Path
from typing import Any, Final

import structlog
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
from cluster.inference.parts import bytes_of, look, quiet, reading
from cluster.inference.recipes import LANGUAGE_ROLE
from cluster.inference.referee import NoNumbers
from cluster.inference.rendering import Page, Renderer
from cluster.inference.seeds import seed_everything
from cluster.models.store import read_json

FILE: Final = "0.json"
MOST_READ_AGAIN: Final = 4 * 10**12
"""Bytes of weights times tokens for which the CPU is asked again: a minute or two of one thread."""
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
come to bear on. What a card raises is none of them, and what our own calls raise there is told
apart (`_Ours`)."""
_MOST_TOLD: Final = 256
_log = structlog.get_logger(__name__)
_told: set[str] = set()


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
    Raises `TaskUnsupported` where the settings are refused, `NoNumbers` for scores that aren't
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
    ours = _Ours()
    watch = _Watch(length, params.generation_config.max_new_tokens, room, on_step, ours)
    numbers = _Numbers(ours)
    seed_everything(params.seed)
    try:
        chosen = _settings(model, tokenizer, params)
        with ours:
            own_settings.check(chosen, _table(model))
        with _as_deterministic_as_can_be(), numbers.seen_as_given(model):
            made = model.generate(
                input_ids=prompt["input_ids"],
                attention_mask=prompt["attention_mask"],
                generation_config=chosen,
                stopping_criteria=StoppingCriteriaList([watch]),
                logits_processor=LogitsProcessorList([numbers]),
            )
    except _REFUSALS as error:
        if ours.raised(error):
            raise
        line = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        _tell_once(params.model, line)
        raise TaskUnsupported(f"generation_config: refused: {line}") from error
    sequences = [Generated(tuple(sequence)) for sequence in made.tolist()]
    if any(len(each.tokens) <= length for each in sequences):
        raise DeviceFault(DeviceFaultKind.BAD_RESULT, "a sequence without a new token")
    return counted, sequences


def _tell_once(model: str, line: str) -> None:
    """With the traceback: were it a bug and no refusal, nothing else would say where."""
    if f"{model} {line}" not in _told:
        _told.add(f"{model} {line}")
        _log.warning("settings_refused", model=model, exc_info=True)
    while len(_told) > _MOST_TOLD:
        _told.pop()


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
    """A copy of the model's own, with the task's on top. Raises one of `_REFUSALS` where they
    clash."""
    own = copy.deepcopy(model.generation_config)
    own.update(**params.generation_config.settings())
    own.max_length = None
    if own.pad_token_id is None:
        end = own.eos_token_id
        first_end = end[0] if isinstance(end, list) else end
        own.pad_token_id = first_end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return own


class _Ours:
    """Knows an error that our own calls have raised inside the library from one of its own.

    By its number: to hold it would hold its traceback, and by that the model, after the task.
    """

    def __init__(self) -> None:
        self._raised = 0

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if error is not None:
            self._raised = id(error)

    def raised(self, error: BaseException) -> bool:
        return id(error) == self._raised


class _Watch(StoppingCriteria):
    """Looks on after each token; never asks to stop, but what it calls may raise."""

    def __init__(
        self, length: int, most: int, room: int | None, on_step: OnStep, ours: _Ours
    ) -> None:
        self.made = 0
        self._length = length
        self._most = most
        self._room = room
        self._on_step = on_step
        self._ours = ours

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        with self._ours:
            length = input_ids.shape[1]
            self.made = length - self._length
            self._on_step(self.made, self._most)
            if self._room is not None and length > self._room and self.made < self._most:
                raise TaskUnsupported(f"max_new_tokens: the model has room for {self._room} tokens")
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class _Numbers(LogitsProcessor):
    """Lets scores pass as they are, if a token can be chosen by them.

    Some may be minus infinity, which rules a token out; the largest must be finite, and stay so
    when it is divided by a small temperature. The library calls this after most processors of its
    own, one of which makes numbers of what are none (`remove_invalid_values`), while others write
    over all they find. So the model's own scores are looked at as it gives them; and both are asked
    about at once, because for each answer the host waits for the card.

    The card is blamed for the model's own alone. Where these are fine, settings have spoilt them.
    """

    def __init__(self, ours: _Ours) -> None:
        self._ours = ours
        self._given: list[torch.Tensor] = []
        """The largest of each row, of each time that the model was asked for the next token."""

    @contextmanager
    def seen_as_given(self, model: Any) -> Iterator[None]:
        handle = model.register_forward_hook(self._look)
        try:
            yield
        finally:
            handle.remove()

    def _look(self, _model: Any, _inputs: Any, outputs: Any) -> None:
        with self._ours:
            if isinstance(logits := getattr(outputs, "logits", None), torch.Tensor):
                self._given.append(logits[:, -1].amax(dim=-1))

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        with self._ours:
            given = [each.to(scores.device, scores.dtype) for each in self._given]
            self._given.clear()
            fine = torch.cat([*given, scores.amax(dim=-1)]).abs() <= _LARGEST_SCORE
            if bool(fine.all()):
                return scores
            rows = len(input_ids)
            by_model = fine[:-rows] if given else fine
            if bool(by_model.all()):
                raise TaskUnsupported("generation_config: leaves no score to choose a token by")
            row = int(by_model.logical_not().nonzero()[0]) % rows
            raise NoNumbers(
                "scores that are not finite numbers", LANGUAGE_ROLE, _scored(input_ids[row])
            )


def _scored(tokens: torch.Tensor) -> Callable[[Any], bool]:
    """Whether another copy of the model scores what comes after `tokens`, or after the first of
    them where they are many: of numbers that are none, what follows is none either."""

    def ask(model: Any) -> bool:
        few = tokens[: max(MOST_READ_AGAIN // bytes_of(model), 1)].to("cpu")
        keeps = "logits_to_keep" in signature(model.forward).parameters
        last = {"logits_to_keep": 1} if keeps else {}
        scores = model(input_ids=few[None], use_cache=False, **last).logits[0, -1]
        return bool(scores.float().amax().abs() <= _LARGEST_SCORE)

    return ask


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
