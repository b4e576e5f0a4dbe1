"""The same bits every time: how torch has to be set for the whole process."""

from __future__ import annotations

import os

import torch


def make_deterministic(threads: int | None) -> None:
    """This process's torch computes the same bits every time. Call before CUDA is first used."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":16:8"  # the network's, whatever it was
    if threads is not None:
        torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    # It makes a plan for each length of a text: slow first tokens, and no end of plans kept.
    torch.backends.cuda.enable_cudnn_sdp(False)
