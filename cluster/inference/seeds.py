"""Every generator that a task may draw from, seeded alike."""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """`seed` from 0 to 2**32 - 1."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
