"""A model's own settings that no card can compute with: never the card's fault, nor reported."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from cluster.core.errors import ModelUnavailable, ModelUnavailableKind, TaskUnsupported
from cluster.inference.engine import Engine
from devnet.models import LLM
from tests.integration.test_language import SAMPLED, _with_settings, fault, new_engine, order


@pytest.fixture
def store(tiny_models: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_models / LLM, tmp_path / "org" / "model")
    return tmp_path


@pytest.fixture(scope="module")
def engine(tiny_models: Path) -> Engine:
    return new_engine(tiny_models)


ROWS = SAMPLED | {"num_return_sequences": 2}


@pytest.mark.parametrize(
    ("setting", "asked"),
    [
        ({"num_beams": 100_000}, {"max_new_tokens": 4}),
        ({"num_beams": "3"}, {"max_new_tokens": 4}),
        ({"temperature": 1e-320}, {"do_sample": True}),
        ({"temperature": "hot"}, {"do_sample": True}),
        ({"pad_token_id": 10**9}, ROWS),
        ({"pad_token_id": -1}, ROWS),
        ({"forced_eos_token_id": 10**9}, {"max_new_tokens": 4}),
        ({"eos_token_id": []}, {"max_new_tokens": 4}),
        ({"exponential_decay_length_penalty": [1, 1e30]}, {"do_sample": True}),
        ({"exponential_decay_length_penalty": [2, "a"]}, {"do_sample": True}),
        ({"guidance_scale": 1e38}, {"do_sample": True}),
        ({"sequence_bias": [[[5], 1e38]], "temperature": 1e-3}, {"do_sample": True}),
        ({"sequence_bias": [[[10**9], 1.0]]}, {"do_sample": True}),
        ({"token_healing": True}, {"max_new_tokens": 4}),
        pytest.param({"suppress_tokens": [*range(400)]}, {"max_new_tokens": 4}, id="suppress all"),
        ({"num_beams": 1.5}, {"max_new_tokens": 4}),
        ({"pad_token_id": "0"}, ROWS),
    ],
    ids=str,
)
def test_what_no_card_can_compute_is_not_the_cards_fault(
    store: Path, setting: dict[str, object], asked: dict[str, object]
) -> None:
    _with_settings(store, **setting)
    found = fault(new_engine(store), model="org/model", generation_config=asked)
    assert isinstance(found, TaskUnsupported | ModelUnavailable), repr(found)


def test_a_zero_is_set_to_the_library(store: Path) -> None:
    settings = store / "org" / "model" / "generation_config.json"
    plain = settings.read_text()
    zeros: dict[str, object] = {
        "max_time": 0,
        "prompt_lookup_num_tokens": 0,
        "watermarking_config": {},
    }
    for name, zero in zeros.items():
        settings.write_text(plain)
        _with_settings(store, **{name: zero})
        found = fault(new_engine(store), model="org/model")
        assert isinstance(found, ModelUnavailable)
        assert found.kind is ModelUnavailableKind.REFUSED


def test_all_generators_are_seeded_before_the_first_token(engine: Engine) -> None:
    def drawn(seed: int) -> tuple[float, float]:
        seen: list[tuple[float, float]] = []

        def look(_step: int, steps: int) -> None:
            if steps:
                seen.append((random.random(), np.random.random()))  # noqa: S311

        engine.run(order(seed=seed), lambda: False, look)
        return seen[0]

    first = drawn(3)
    assert drawn(3) == first
    assert all(mine != theirs for mine, theirs in zip(drawn(4), first, strict=True))
