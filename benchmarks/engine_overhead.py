"""The engine against a bare diffusers loop, both warm, on the same work.

The bare loop is what the work can't do without: prompts read by Compel, the pipeline's calls, each
image written as a PNG file and hashed as the network does. The engine does that as it does for a
task, with its checks and its progress. Rounds of both alternate, and each is counted by its median.

Besides: what a change of model costs when it comes from disk (`seconds_load`) and from host memory
(`seconds_host_return`), and a LoRA that is put on (`seconds_lora_switch`), each beyond a warm run.

Torch, and what takes it along, is imported after the card was claimed.

    python -m benchmarks.engine_overhead --device auto --json
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.report import arguments, claimed, progress, publish
from cluster.core.ports import Computed, Order
from cluster.core.types import AttemptId, Commitment, TaskType
from cluster.inference.devices import Device
from cluster.inference.scoring import score_images
from cluster.models.store import ModelStore
from devnet.models import SD15, SD15_LORA, make_models

if TYPE_CHECKING:
    from cluster.inference.engine import Engine

PROMPT, NEGATIVE = "a photo++ of a cat in the forest", "bad, blurry"


def task(side: int, steps: int, images: int) -> dict[str, Any]:
    config = {"image_width": side, "image_height": side, "steps": steps, "num_images": images}
    return {
        "base_model": SD15[0],
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "task_config": config | {"seed": 1, "cfg": 5},
    }


def bare(folder: Path, what: dict[str, Any], device: str) -> Callable[[], bytes]:
    """The loop, its pipeline loaded; a call gives the score."""
    import torch
    from compel import CompelForSD  # type: ignore[import-untyped]
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    from cluster.inference.diffusion import PNG_COMPRESSION

    make: Any = StableDiffusionPipeline
    pipe = make.from_pretrained(str(folder), safety_checker=None, local_files_only=True).to(device)
    pipe.set_progress_bar_config(disable=True)
    schedulers: Any = DPMSolverMultistepScheduler
    own = pipe.scheduler.config
    config = what["task_config"]

    @torch.inference_mode()
    def run() -> bytes:
        pipe.scheduler = schedulers.from_config(own)
        read = CompelForSD(pipe)(PROMPT, negative_prompt=NEGATIVE)
        generator = torch.Generator("cpu").manual_seed(config["seed"])
        files = []
        for _ in range(config["num_images"]):
            image = pipe(
                prompt_embeds=read.embeds,
                negative_prompt_embeds=read.negative_embeds,
                width=config["image_width"],
                height=config["image_height"],
                num_inference_steps=config["steps"],
                guidance_scale=config["cfg"],
                generator=generator,
            ).images[0]
            with tempfile.SpooledTemporaryFile(max_size=2**26) as file:
                image.save(file, "PNG", compress_level=PNG_COMPRESSION)
                file.seek(0)
                files.append(file.read())
        return score_images(files)

    return run


def run(engine: Engine, what: dict[str, Any]) -> Computed:
    order = Order(AttemptId("a"), Commitment("0x01"), TaskType.SD, json.dumps(what), None)
    return engine.run(order, lambda: False, lambda _step, _steps: None)


def changes(device: Device, root: Path, what: dict[str, Any], rounds: int) -> dict[str, float]:
    """Medians of what each kind of change costs beyond a warm run, in seconds."""
    from cluster.inference.engine import Engine, Limits

    what = what | {"task_config": what["task_config"] | {"num_images": 1, "steps": 1}}
    other, with_lora = what | {"base_model": SD15[1]}, what | {"lora": {"model": SD15_LORA}}
    store, one_model = ModelStore(root), Limits(device_bytes=1, threads=None)
    seconds: dict[str, list[float]] = {"load": [], "host_return": [], "lora_switch": []}
    for _ in range(rounds):
        engine = Engine(device, store, time.time, one_model)
        cold = timed(lambda: run(engine, what))  # noqa: B023 - called at once
        warm = timed(lambda: run(engine, what))  # noqa: B023
        lora = timed(lambda: run(engine, with_lora))  # noqa: B023
        run(engine, other)
        back = timed(lambda: run(engine, what))  # noqa: B023
        for name, took in (("load", cold), ("host_return", back), ("lora_switch", lora)):
            seconds[name].append(took - warm)
    return {f"seconds_{name}": round(statistics.median(s), 4) for name, s in seconds.items()}


def timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=256, help="pixels")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", type=Path, default=Path(".devnet/models"))
    asked = parser.parse_args()

    device = claimed(asked.device, os.environ)
    from cluster.inference.engine import Engine, Limits

    progress("making the tiny models where they are missing")
    make_models(asked.models)
    what = task(asked.side, asked.steps, asked.images)
    engine = Engine(device, ModelStore(asked.models), time.time, Limits(threads=None))

    def ours() -> Computed:
        return run(engine, what)

    theirs = bare(asked.models / SD15[0], what, device.torch_device)
    cold = timed(ours)
    same = ours().score == theirs()
    seconds: dict[str, list[float]] = {"engine": [], "bare": []}
    for number in range(asked.rounds):
        seconds["engine"].append(timed(ours))
        seconds["bare"].append(timed(theirs))
        progress(f"round {number + 1} of {asked.rounds}")
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    progress("changes of model")
    changed = changes(device, asked.models, what, asked.rounds)
    publish(
        "engine_overhead",
        {
            "ratio_seconds": round(medians["engine"] / medians["bare"], 4),
            "seconds_engine": round(medians["engine"], 4),
            "seconds_bare": round(medians["bare"], 4),
            "images_per_second": round(asked.images / medians["engine"], 3),
            "seconds_first": round(cold, 4),
            **changed,
            "same_score": same,
            "rounds": asked.rounds,
        },
        device.torch_device,
        asked.json,
    )


if __name__ == "__main__":
    main()
