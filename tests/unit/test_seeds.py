"""Every generator that a model or a scheduler may draw from begins with the task's seed."""

from __future__ import annotations

import random

import numpy as np
import torch

from cluster.inference.seeds import seed_everything


def draws() -> dict[str, float]:
    return {
        "torch": float(torch.rand(())),
        "numpy": float(np.random.random()),
        "random": random.random(),  # noqa: S311
    }


def test_each_generator_is_seeded() -> None:
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        seed_everything(7)
        first = draws()
        assert all(value != first[name] for name, value in draws().items())
        seed_everything(7)
        assert draws() == first
        seed_everything(8)
        assert all(value != first[name] for name, value in draws().items())
        seed_everything(2**32 - 1)
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
