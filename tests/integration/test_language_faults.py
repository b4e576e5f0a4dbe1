"""Whose fault it is when a language model makes no scores, or an error comes out of the library."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from structlog.testing import capture_logs

from cluster.core.errors import (
    Cancelled,
    ClusterError,
    DeviceFault,
    DeviceFaultKind,
    TaskUnsupported,
)
from cluster.inference import language
from cluster.inference.engine import Engine
from tests.integration.test_language import _copy, _with_settings, fault, new_engine, order, run


@pytest.fixture(scope="module")
def engine(tiny_models: Path) -> Engine:
    return new_engine(tiny_models)


@pytest.mark.parametrize(
    ("dtype", "number"),
    [("float16", float("nan")), ("float16", 6e4), ("float32", float("nan")), ("float32", 3e38)],
)
def test_a_card_that_spoils_weights_is_at_fault(
    tiny_models: Path, dtype: str, number: float
) -> None:
    """As it is shown by the files, which the CPU reads anew: its own copy isn't asked."""
    fresh = new_engine(tiny_models)
    whole = run(fresh, dtype=dtype).files
    spoil(fresh, number)
    found = fault(fresh, dtype=dtype)
    assert isinstance(found, DeviceFault)
    assert found.kind is DeviceFaultKind.BAD_RESULT
    assert run(fresh, dtype=dtype).files == whole


def spoil(engine: Engine, number: float) -> None:
    """As a card whose memory fails."""
    (part,) = engine._pool._parts.values()
    part.module.get_parameter("model.norm.weight").data.fill_(number)


@pytest.mark.parametrize(
    "how",
    [
        {"remove_invalid_values": True},
        {"forced_eos_token_id": 1},
        {"repetition_penalty": 1.3, "remove_invalid_values": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("beams", [1, 2])
def test_settings_hide_no_card_that_makes_no_numbers(
    tiny_models: Path, tmp_path: Path, how: dict[str, object], beams: int
) -> None:
    store = _copy(tiny_models, tmp_path)
    _with_settings(store, **how)
    fresh = new_engine(store)
    asked = {"max_new_tokens": 1, "num_beams": beams}
    run(fresh, model="org/model", generation_config=asked)
    spoil(fresh, float("nan"))
    found = fault(fresh, model="org/model", generation_config=asked)
    assert isinstance(found, DeviceFault)
    assert found.kind is DeviceFaultKind.BAD_RESULT


def test_nothing_of_ours_stays_on_the_model(engine: Engine) -> None:
    seen: list[int] = []

    def on_step(_step: int, steps: int) -> None:
        if steps:
            seen.append(sum(len(module._forward_hooks) for module in held()))

    def held() -> list[torch.nn.Module]:
        return [part.module for part in engine._pool._parts.values()]

    with pytest.raises(Cancelled):
        engine.run(order(), lambda: len(seen) > 1, on_step)
    run(engine)
    assert seen == [1, 1]
    assert not any(module._forward_hooks for module in held())


# --- our own bugs -----------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("bug", [TypeError, KeyError, ZeroDivisionError])
def test_a_bug_of_ours_is_no_refusal(engine: Engine, bug: type[Exception], beams: int) -> None:
    def on_step(_step: int, steps: int) -> None:
        if steps:
            raise bug("ours")

    what = order(generation_config={"max_new_tokens": 4, "num_beams": beams})
    with pytest.raises(ClusterError) as caught:
        engine.run(what, lambda: False, on_step)
    assert isinstance(caught.value, DeviceFault)
    assert caught.value.kind is DeviceFaultKind.OTHER
    assert isinstance(caught.value.__cause__, bug)


def test_a_bug_where_scores_are_looked_at_is_no_refusal(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language, "_LARGEST_SCORE", "x")
    found = fault(engine)
    assert isinstance(found, DeviceFault)
    assert found.kind is DeviceFaultKind.OTHER


def test_a_refusal_is_told_once_with_where_it_was_made(tiny_models: Path, tmp_path: Path) -> None:
    store = _copy(tiny_models, tmp_path)
    (store / "org" / "model").rename(store / "org" / "told")
    fresh = new_engine(store)
    asked = {"do_sample": True, "temperature": -1.5}
    with capture_logs() as lines:
        for _ in range(2):
            refused = fault(fresh, model="org/told", generation_config=asked)
            assert isinstance(refused, TaskUnsupported)
    told = [line for line in lines if line["event"] == "settings_refused"]
    assert [(line["model"], line["exc_info"]) for line in told] == [("org/told", True)]
