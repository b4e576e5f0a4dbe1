"""What the engine is measured against: a bare diffusers loop that does a task's work.

Prompts read by Compel, the pipeline's calls, each image written as a PNG file and hashed as the
network does. It runs in the benchmark's own process, under the engine's settings of torch, and once
more in a process of its own, where torch is as it comes:

    parent ── a line ──▶ child: one run ── {"seconds": …, "score": …} ──▶ parent

    python -m benchmarks.bare_loop TASK    (TASK: `BareTask` as JSON; the parent starts it)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
from compel import CompelForSD, CompelForSDXL  # type: ignore[import-untyped]
from diffusers import (
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

from cluster.inference.devices import SURROUNDINGS
from cluster.inference.diffusion import PNG_COMPRESSION
from cluster.inference.parts import quiet
from cluster.inference.scoring import score_images

PROMPT, NEGATIVE = "a photo++ of a cat in the forest", "bad, blurry"
SEED, CFG = 1, 5
OURS: Final = frozenset(
    {"CUBLAS_WORKSPACE_CONFIG", *(name for name in SURROUNDINGS if name.startswith("TORCH_"))}
)
"""What of the environment, which a child would inherit, is of the engine's making for torch."""


@dataclass(frozen=True, slots=True)
class BareTask:
    """Images of `side` pixels, made one after the other from the model in `folder`.

    `device` and `dtype` by torch's names.
    """

    folder: str
    is_xl: bool
    dtype: str
    device: str
    side: int
    steps: int
    images: int


def loop(task: BareTask) -> Callable[[], bytes]:
    """The loop, its pipeline loaded; a call gives the score."""
    quiet()
    pipe = _pipeline(task)
    schedulers: Any = DPMSolverMultistepScheduler
    own = pipe.scheduler.config

    @torch.inference_mode()
    def run() -> bytes:
        pipe.scheduler = schedulers.from_config(own)
        generator = torch.Generator("cpu").manual_seed(SEED)
        call = {
            **_conditions(pipe, task.is_xl),
            "width": task.side,
            "height": task.side,
            "num_inference_steps": task.steps,
            "guidance_scale": CFG,
            "generator": generator,
        }
        return score_images([_png(pipe(**call).images[0]) for _ in range(task.images)])

    return run


def _pipeline(task: BareTask) -> Any:
    make: Any = StableDiffusionXLPipeline if task.is_xl else StableDiffusionPipeline
    without = {"add_watermarker": False} if task.is_xl else {"safety_checker": None}
    dtype = getattr(torch, task.dtype)
    pipe = make.from_pretrained(task.folder, dtype=dtype, local_files_only=True, **without)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(task.device)


def _conditions(pipe: Any, is_xl: bool) -> dict[str, torch.Tensor]:
    read = (CompelForSDXL if is_xl else CompelForSD)(pipe)(PROMPT, negative_prompt=NEGATIVE)
    found = {"prompt_embeds": read.embeds, "negative_prompt_embeds": read.negative_embeds}
    if is_xl:
        found["pooled_prompt_embeds"] = read.pooled_embeds
        found["negative_pooled_prompt_embeds"] = read.negative_pooled_embeds
    return found


def _png(image: Any) -> bytes:
    with tempfile.SpooledTemporaryFile(max_size=2**26) as file:
        image.save(file, "PNG", compress_level=PNG_COMPRESSION)
        file.seek(0)
        return file.read()


# --- where torch is as it comes -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ran:
    seconds: float
    score: bytes


@contextmanager
def at_torchs_defaults(task: BareTask) -> Iterator[Callable[[], Ran]]:
    """The loop in another process, which has run it once; each call runs it again.

    Raises `RuntimeError` when that process ends, having said on standard error why.
    """
    command = [sys.executable, "-m", "benchmarks.bare_loop", json.dumps(asdict(task))]
    environment = {name: value for name, value in os.environ.items() if name not in OURS}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as child:
        asks, answers = child.stdin, child.stdout
        assert asks is not None and answers is not None  # noqa: S101 - both are pipes

        def run() -> Ran:
            try:
                print(file=asks, flush=True)
                said = answers.readline()
            except BrokenPipeError:
                said = ""
            if not said:
                raise RuntimeError("the bare loop in a process of its own has ended")
            ran = json.loads(said)
            return Ran(ran["seconds"], bytes.fromhex(ran["score"]))

        try:
            run()
            yield run
        finally:
            child.terminate()


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever the libraries have to say
    run = loop(BareTask(**json.loads(sys.argv[1])))
    for _ in sys.stdin:
        began = time.perf_counter()
        score = run()
        seconds = time.perf_counter() - began
        print(json.dumps({"seconds": seconds, "score": score.hex()}), file=answers, flush=True)


if __name__ == "__main__":
    main()
