"""Weights of a prompt as Compel applies them, and whose fault it is where they leave no numbers."""

from __future__ import annotations

import gc
import json
import math
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cluster.core.errors import (
    Cancelled,
    DeviceFault,
    ModelUnavailable,
    ModelUnavailableKind,
    TaskUnsupported,
)
from cluster.core.types import TaskType
from cluster.inference import prompts
from cluster.inference.parameters import SDParameters, parse
from cluster.inference.parts import looking
from cluster.inference.referee import NoNumbers

LENGTH = 8
BEGIN, END, PAD = 1, 2, 0
WIDTH = 4
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32


def loudness(prompt: str, dtype: torch.dtype = torch.float64) -> float:
    return prompts.loudness(prompts._parsed(prompt), dtype)


@pytest.mark.parametrize(
    ("prompt", "weight"),
    [
        ("(a)3", 3.0),
        ("((a)1000)1000", 1e6),
        ("(a (b)1.5)1.5", 1.5**2),
        ("((a++)2)++", 1.1**4 * 2),
        ("(a)-", 0.9),
        ("a (b)0.5", 0.5),
        ('"a (b)3".attend(2)', 6.0),
        ("a (b.swap((c)900))3", 3.0),
    ],
)
def test_weights_of_nested_brackets_are_multiplied(prompt: str, weight: float) -> None:
    assert loudness(prompt) == pytest.approx(1 + weight * 2)


@pytest.mark.parametrize(
    ("prompt", "times"),
    [
        ("a cat", 1),
        ("", 1),
        ('("a", "b").blend(1, 1)', 1),
        ('("(a)3", "b").blend(1, 3)', 7 / 4 + 3 / 4),
        ('("a", "b").blend(3, -1)', 3 / 2 + 1 / 2),
        ('("a", "b").blend(40, 2, no_normalize)', 42),
        ('("(a)3", "b").and(1, 2)', 7),
        ('("(a)3", "b").and(2, 1)', 1 + 2 * (7 + 1)),
        ('("a", "b").blend(0, 0)', math.inf),
        ('("a", "b").blend(1, -1)', math.inf),
    ],
)
def test_shares_and_weights_of_prompts_come_on_top(prompt: str, times: float) -> None:
    assert loudness(prompt) == pytest.approx(times)


@pytest.mark.parametrize(
    ("weights", "dtype", "is_none"),
    [
        ("1, -0.9985", BRAIN, True),
        ("1, -0.9985", HALF, False),
        ("1, -0.9999", HALF, True),
        ("1, -0.9999", FULL, False),
        ("70000, 1", HALF, True),
        ("70000, 1", BRAIN, False),
    ],
)
def test_shares_are_those_of_the_dtype(weights: str, dtype: torch.dtype, is_none: bool) -> None:
    assert math.isinf(loudness(f'("a", "b").blend({weights})', dtype)) is is_none


# --- whose fault ------------------------------------------------------------------------------


class Tokenizer:
    """A number for each word."""

    bos_token_id, eos_token_id, pad_token_id = BEGIN, END, PAD
    model_max_length = LENGTH

    def __call__(self, texts: list[str], **_: object) -> dict[str, list[list[int]]]:
        return {"input_ids": [[BEGIN, *map(self._number, each.split()), END] for each in texts]}

    def _number(self, word: str) -> int:
        return 3 + ord(word[0]) % 20

    def convert_ids_to_tokens(self, numbers: list[int]) -> list[str]:
        return [chr(ord("a") + number) for number in numbers]


class Encoder:
    """Says `loud` at most, and something else to each token."""

    device = torch.device("cpu")
    config = SimpleNamespace(max_position_embeddings=LENGTH)
    words = 23

    def get_input_embeddings(self) -> SimpleNamespace:
        return SimpleNamespace(num_embeddings=self.words)

    def __init__(self, dtype: torch.dtype, loud: float) -> None:
        self.dtype = dtype
        self._loud = loud

    def __call__(self, tokens: torch.Tensor, _mask: object = None, **_: object) -> Any:
        turns = tokens[..., None] * torch.arange(1, WIDTH + 1)
        said = (torch.cos(turns.double()) * self._loud).to(self.dtype)
        return SimpleNamespace(last_hidden_state=said)


def params(prompt: str) -> SDParameters:
    read = parse(
        TaskType.SD, json.dumps({"base_model": "org/base", "prompt": prompt, "task_config": {}})
    )
    assert isinstance(read, SDParameters)
    return read


def read(prompt: str, dtype: torch.dtype, loud: float) -> torch.Tensor:
    reading = prompts._Reading("text_encoder", Tokenizer(), prompts._PLAIN)
    made: torch.Tensor = reading.of(Encoder(dtype, loud), params(prompt))
    return made


PROMPTS = (
    "a b c",
    "a (b)1.5 c",
    "a (b (c)900)1.5",
    "(a)0.2 b (c)0 d",
    "a (b)-- c",
    "a (b)30 c d e f g h i j k l m n",
    '("a (b)3", "c").blend(1, -0.5)',
    '("a", "c d").blend(1, -0.9985)',
    '("a", "c").blend(60000, 2, no_normalize)',
    '("(a)5", "b").and(1, 900)',
    "a.swap(b) (c)2",
)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("loud", [1.0, 20.0, 300.0, 6e4])
@pytest.mark.parametrize("dtype", [HALF, BRAIN, FULL])
def test_what_the_weights_do_is_never_the_cards(
    prompt: str, dtype: torch.dtype, loud: float
) -> None:
    """And no number is louder than they are thought to make it."""
    try:
        made = read(prompt, dtype, loud)
    except TaskUnsupported:
        return
    except NoNumbers as fault:
        assert not fault.makes_numbers(Encoder(dtype, loud)), "so says the CPU, and not the card"
        return
    most = loudness(prompt, dtype) * loud * 1.02
    assert float(made.abs().max()) <= most


@pytest.mark.parametrize(
    ("prompt", "dtype", "loud"),
    [
        ("a (b)99999 c", HALF, 100.0),
        ('("a", "c").blend(1, -0.9985)', BRAIN, 20.0),
        ('("a (b)900", "c").and(900, 1)', HALF, 20.0),
    ],
)
def test_weights_that_leave_no_numbers_are_the_prompts_doing(
    prompt: str, dtype: torch.dtype, loud: float
) -> None:
    with pytest.raises(TaskUnsupported, match="weights"):
        read(prompt, dtype, loud)


@pytest.mark.parametrize(
    ("prompt", "dtype", "loud"),
    [("a (b)999 c", HALF, 100.0), ("a (b)1.2 c", HALF, 6e4), ("a (b)1.2 c", FULL, 3e38)],
)
def test_a_card_that_makes_much_of_a_usual_weight_cant_acquit_itself(
    prompt: str, dtype: torch.dtype, loud: float
) -> None:
    """How loud a text encoder is isn't asked of the card."""
    with pytest.raises(NoNumbers) as caught:
        read(prompt, dtype, loud)
    assert caught.value.makes_numbers(Encoder(dtype, 1.0))
    assert not caught.value.makes_numbers(Encoder(dtype, loud))


class Provider:
    def get_token_ids(self) -> list[list[int]]:
        return [[1]]

    def _encode_token_ids_to_embeddings(self) -> None: ...


def test_what_is_watched_doesnt_hold_itself_afterwards() -> None:
    gc.disable()
    try:
        provider = Provider()
        with prompts._watched(provider, 2):
            assert provider.get_token_ids() == [[1]]
        held = weakref.ref(provider)
        del provider
        assert held() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("prompt", ["a b", "a (b)1.2", "a (b)900"])
@pytest.mark.parametrize("dtype", [HALF, BRAIN, FULL])
def test_numbers_that_are_none_without_weights_are_asked_of_another_copy(
    prompt: str, dtype: torch.dtype
) -> None:
    with pytest.raises(DeviceFault) as caught:
        read(prompt, dtype, math.nan)
    fault = caught.value
    assert isinstance(fault, NoNumbers)
    assert fault.role == "text_encoder"
    assert fault.makes_numbers(Encoder(dtype, 1.0))
    assert not fault.makes_numbers(Encoder(dtype, math.inf))


# --- models that would hang or kill a card ----------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("model_max_length", 1),
        ("model_max_length", 2),
        ("model_max_length", LENGTH + 1),
        ("model_max_length", int(1e30)),
        ("eos_token_id", None),
        ("bos_token_id", None),
        ("pad_token_id", None),
    ],
)
def test_a_tokenizer_that_does_not_go_with_its_text_encoder_is_refused(
    setting: str, value: int | None
) -> None:
    tokenizer = Tokenizer()
    setattr(tokenizer, setting, value)
    reading = prompts._Reading("text_encoder", tokenizer, prompts._PLAIN)
    with pytest.raises(ModelUnavailable, match="text_encoder reads 8 tokens") as caught:
        reading.of(Encoder(FULL, 1.0), params("a b"))
    assert caught.value.kind is ModelUnavailableKind.REFUSED


def test_a_token_beyond_the_text_encoders_table_is_never_looked_up() -> None:
    encoder = Encoder(FULL, 1.0)
    reading = prompts._Reading("text_encoder", Tokenizer(), prompts._PLAIN)
    known = 3 + ord("a") % 20 + 1
    encoder.words = known
    reading.of(encoder, params("a"))
    encoder.words = known - 1
    with pytest.raises(TaskUnsupported, match="a token that the text encoder doesn't have"):
        reading.of(encoder, params("a"))


def test_a_long_prompt_may_be_given_up_while_it_is_read() -> None:
    readings: list[int] = []

    def look() -> None:
        readings.append(1)
        if len(readings) == 3:
            raise Cancelled("not wanted any more")

    with looking(look), pytest.raises(Cancelled):
        read("a b c d e f g h i j k l m n o p", FULL, 1.0)
    assert len(readings) == 3


def test_readings_are_bounded_by_bytes_and_for_both_prompts_together() -> None:
    """A rare character may be four tokens."""
    light = "(x)0.5 y " * 9
    prompts.check(params(light + "x" * 7900))
    with pytest.raises(TaskUnsupported, match="too many fragments"):
        prompts.check(params(light + "\U00013000" * 7900))
    both = params(light + "x" * 7900).model_copy(update={"negative_prompt": light + "y" * 800})
    with pytest.raises(TaskUnsupported, match="too many fragments"):
        prompts.check(both)


@pytest.mark.parametrize(
    "prompt", ["a fox that nobody has read before", "((unread", "unread (b)1.5"]
)
def test_reading_a_prompt_holds_nothing_of_who_asked(prompt: str) -> None:
    class Tensors:
        pass

    def ask() -> weakref.ref[Tensors]:
        held = Tensors()
        loudness(prompt)
        return weakref.ref(held)

    held = ask()
    gc.collect()  # what did not match and its frames hold one another
    assert held() is None
