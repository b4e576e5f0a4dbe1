"""Scores are looked at as the model gives them, and the card is waited for once a token."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from cluster.core.errors import TaskUnsupported
from cluster.inference.language import _Numbers, _Ours
from cluster.inference.referee import NoNumbers

TOKENS = torch.tensor([[5, 6, 7], [5, 6, 8]])
GOOD = torch.tensor([[[0.0, 1.0], [2.0, -3.0]]]).expand(2, 2, 2)
NONE = float("nan")


class Model(torch.nn.Module):
    def forward(self, logits: torch.Tensor) -> Any:
        return SimpleNamespace(logits=logits)


def chosen(*given: torch.Tensor, scores: torch.Tensor, ours: _Ours | None = None) -> torch.Tensor:
    model, numbers = Model(), _Numbers(ours or _Ours())
    with numbers.seen_as_given(model):
        for each in given:
            model(each)
        found: torch.Tensor = numbers(TOKENS, scores)
    assert not model._forward_hooks
    return found


def row(number: float, at: int) -> torch.Tensor:
    logits = GOOD.clone()
    logits[at, -1, 0] = number
    return logits


def test_good_scores_pass_as_they_are() -> None:
    scores = torch.tensor([[0.0, -torch.inf], [3.0, 1.0]])
    assert chosen(GOOD, scores=scores) is scores
    assert chosen(row(-torch.inf, 1), scores=scores) is scores
    # Of other places of the text nothing is chosen.
    elsewhere = GOOD.clone()
    elsewhere[:, 0] = NONE
    assert chosen(elsewhere, scores=scores) is scores


@pytest.mark.parametrize("number", [NONE, torch.inf, 1e30])
@pytest.mark.parametrize("at", [0, 1])
def test_what_was_made_of_them_since_hides_none_of_the_models_own(number: float, at: int) -> None:
    for given in ([row(number, at)], [row(number, at), GOOD], [GOOD, row(number, at)]):
        with pytest.raises(NoNumbers) as caught:
            chosen(*given, scores=torch.zeros(2, 2))
        asked: list[list[int]] = []

        def again(input_ids: torch.Tensor, asked: list[list[int]] = asked, **_: Any) -> Any:
            asked.append(input_ids[0].tolist())
            return SimpleNamespace(logits=GOOD)

        model = Model()
        model.forward = again  # type: ignore[assignment]
        model.weight = torch.nn.Parameter(torch.zeros(1))
        assert caught.value.makes_numbers(model)
        assert asked == [TOKENS[at].tolist()]


@pytest.mark.parametrize("number", [NONE, torch.inf, -torch.inf, 1e30])
def test_settings_that_spoil_good_scores_are_no_cards_fault(number: float) -> None:
    with pytest.raises(TaskUnsupported):
        chosen(GOOD, scores=torch.full((2, 2), number))


def test_a_model_that_does_not_show_its_own_is_judged_by_what_there_is() -> None:
    with pytest.raises(NoNumbers):
        chosen(scores=torch.full((2, 2), NONE))


def test_one_token_is_not_held_against_the_next() -> None:
    model, numbers = Model(), _Numbers(_Ours())
    with numbers.seen_as_given(model):
        model(row(NONE, 0))
        with pytest.raises(NoNumbers):
            numbers(TOKENS, torch.zeros(2, 2))
        model(GOOD)
        numbers(TOKENS, torch.zeros(2, 2))


def test_the_card_is_waited_for_once() -> None:
    waits: list[str] = []

    class Waits(TorchFunctionMode):
        def __torch_function__(
            self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            name = getattr(func, "__name__", "")
            if name in {"__bool__", "__int__", "__float__", "item", "tolist", "nonzero", "cpu"}:
                waits.append(name)
            return func(*args, **(kwargs or {}))

    with Waits():
        chosen(GOOD, GOOD, scores=torch.zeros(2, 2))
    assert waits == ["__bool__"]


def test_our_own_errors_are_known_from_the_librarys() -> None:
    ours = _Ours()
    with pytest.raises(ValueError, match="ours") as own, ours:
        raise ValueError("ours")
    assert ours.raised(own.value)
    assert not ours.raised(ValueError("ours"))
