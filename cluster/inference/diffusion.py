"""One SD task on a loaded pipeline: prompts, scheduler, draws in order, images checked.

As the network's own runner does it (protocol.md section 5): prompts are weighted by Compel and not
truncated, the scheduler is the named one on the model's settings and the task's arguments, and the
images are made one after the other, all drawing from one CPU generator, the refiner's too.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    LCMScheduler,
)
from PIL import Image

from cluster.core.errors import TaskUnsupported
from cluster.inference.conditioning import conditioning_image
from cluster.inference.parameters import SDParameters
from cluster.inference.parts import DTYPES
from cluster.inference.pipelines import Pipeline
from cluster.inference.prompts import conditions, refiner_conditions
from cluster.inference.recipes import dtype_of
from cluster.inference.scoring import perceptual_hash
from cluster.inference.seeds import seed_everything
from cluster.inference.witness import Blame, Witness, of_the_card

SCHEDULERS: Final[dict[str, Any]] = {
    "DPMSolverMultistepScheduler": DPMSolverMultistepScheduler,
    "EulerAncestralDiscreteScheduler": EulerAncestralDiscreteScheduler,
    "LCMScheduler": LCMScheduler,
}
PNG_COMPRESSION: Final = 4
MOST_TRIED: Final = 256
_FEW: Final = (1, 4, 8, 8)
"""The shape of latents on which a scheduler is tried."""

Pixels = npt.NDArray[np.uint8]
OnStep = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Made:
    """One image as made, (height, width, 3), and whether the safety checker blanked it. `blame`:
    whom for what is no picture."""

    pixels: Pixels
    blanked: bool
    blame: Blame = of_the_card


@torch.inference_mode()
def make_images(
    pipeline: Pipeline, params: SDParameters, on_step: OnStep, deliver: Callable[[Made], None]
) -> None:
    """Runs the task, giving each image to `deliver` as it is made.

    `on_step` gets (steps done, steps in all) and may raise to stop between steps. Raises
    `TaskInvalid` for a conditioning image that none can read, `TaskUnsupported` where the scheduler
    refuses its arguments, `DeviceFault` for numbers that aren't finite: `NoNumbers` where the CPU
    can be asked of the same.
    """
    base, refiner = pipeline.base, pipeline.refiner
    base.scheduler = make_scheduler(pipeline.scheduler_config, params)
    seed_everything(params.task_config.seed)
    generator = torch.Generator("cpu").manual_seed(params.task_config.seed)
    witness = Witness()
    steps = _Steps(params, on_step, witness)
    base_call = _base_call(pipeline, params, generator, steps)
    refiner_call = None if refiner is None else _refiner_call(pipeline, params, generator, steps)
    with witness.looking_at(pipeline):
        for index in range(params.task_config.num_images):
            witness.begin()
            steps.begin(index, refining=False)
            output = base(**base_call)
            if refiner_call is not None:
                steps.begin(index, refining=True)
                output = refiner(image=output.images, **refiner_call)
            flags, blame = getattr(output, "nsfw_content_detected", None), witness.seen().blame
            deliver(Made(_quantized(output.images, blame), bool(flags and flags[0]), blame))


def _base_call(
    pipeline: Pipeline, params: SDParameters, generator: torch.Generator, steps: _Steps
) -> dict[str, Any]:
    config = params.task_config
    call: dict[str, Any] = {
        "width": config.image_width,
        "height": config.image_height,
        "num_inference_steps": config.steps,
        "guidance_scale": config.cfg,
        "generator": generator,
        "output_type": "np" if params.refiner is None else "latent",
        "callback_on_step_end": steps,
        **conditions(pipeline.base, params),
    }
    if params.controlnet is not None:
        call["image"] = conditioning_image(
            params.controlnet, config.image_width, config.image_height
        )
        call["controlnet_conditioning_scale"] = params.controlnet.weight / 100
    elif params.refiner is not None:
        call["denoising_end"] = params.refiner.denoising_cutoff / 100
    return call


def _refiner_call(
    pipeline: Pipeline, params: SDParameters, generator: torch.Generator, steps: _Steps
) -> dict[str, Any]:
    """The refiner keeps its own scheduler and guidance scale, and draws from the same generator.

    After a ControlNet, whose pipeline can't stop early, it starts from the finished latents.
    """
    assert params.refiner is not None, "called for tasks with a refiner"  # noqa: S101
    call: dict[str, Any] = {
        "num_inference_steps": params.refiner.steps,
        "generator": generator,
        "output_type": "np",
        "callback_on_step_end": steps,
        **refiner_conditions(pipeline.refiner, params),
    }
    if params.controlnet is None:
        call["denoising_start"] = params.refiner.denoising_cutoff / 100
    return call


def make_scheduler(own_config: Mapping[str, Any], params: SDParameters) -> Any:
    """The task's scheduler on the model's own settings.

    What the arguments' types don't tell (`beta_schedule: "x"`), the installed scheduler does, which
    goes all its steps on a few numbers of the task's dtype first. Other nodes may have a newer one,
    so its refusal isn't the task's fault, and it certainly isn't the card's.
    """
    chosen = params.scheduler
    args = chosen.args.model_dump(exclude_none=True) if chosen.args is not None else {}
    kind, steps, dtype = SCHEDULERS[chosen.method], params.task_config.steps, dtype_of(params)
    try:
        scheduler = kind.from_config(own_config, **args)
        tried = f"{chosen.method} {steps} {dtype} {json.dumps(dict(scheduler.config), default=str)}"
        if tried not in _tried:
            _go_all_steps(scheduler, steps, DTYPES[dtype])
            _tried.add(tried)
    except Exception as error:
        line = " ".join(str(error).split())[:200]
        raise TaskUnsupported(
            f"scheduler: {chosen.method} refuses its arguments: {line}"
        ) from error
    while len(_tried) > MOST_TRIED:
        _tried.pop()
    return kind.from_config(own_config, **args)


_tried: set[str] = set()
"""Schedulers that have gone their steps well, with all their settings: it needn't be seen again."""


def _go_all_steps(scheduler: Any, steps: int, dtype: torch.dtype) -> None:
    """Raises whatever it raises, and `ArithmeticError` for numbers that aren't finite."""
    generator = torch.Generator("cpu").manual_seed(0)
    scheduler.set_timesteps(steps)
    sample = torch.randn(_FEW, generator=generator, dtype=dtype) * float(scheduler.init_noise_sigma)
    for timestep in scheduler.timesteps:
        noise = torch.randn(_FEW, generator=generator, dtype=dtype)
        scheduler.scale_model_input(sample, timestep)
        sample = scheduler.step(noise, timestep, sample, generator=generator).prev_sample
        if not bool(torch.isfinite(sample).all()):
            raise ArithmeticError(f"not finite after step {int(timestep)}")


class _Steps:
    """Diffusers' callback after each denoising step, counted over all images and both pipelines.

    A pipeline may take fewer steps than the task names (it stops or starts part way): what was left
    out counts as done when the next begins.
    """

    def __init__(self, params: SDParameters, on_step: OnStep, witness: Witness) -> None:
        self._base = params.task_config.steps
        self._each = self._base + (params.refiner.steps if params.refiner else 0)
        self._all = self._each * params.task_config.num_images
        self._on_step = on_step
        self._witness = witness
        self._before = 0

    def begin(self, index: int, refining: bool) -> None:
        self._before = index * self._each + (self._base if refining else 0)

    def __call__(self, pipe: Any, step: int, _timestep: Any, state: dict[str, Any]) -> Any:
        if step + 1 == pipe.num_timesteps and not bool(torch.isfinite(state["latents"]).all()):
            raise self._witness.seen().blame("latents that are not finite numbers")
        self._on_step(self._before + step + 1, self._all)
        return state


def _quantized(images: npt.NDArray[np.float32], blame: Blame) -> Pixels:
    """One image of floats in 0..1, as diffusers makes it, to 8 bits as diffusers would."""
    image = images[0]
    if not np.isfinite(image).all():
        raise blame("pixels that are not finite numbers")
    return np.asarray((image * 255).round().astype(np.uint8))


def encode(made: Made, params: SDParameters) -> tuple[bytes, bytes]:
    """The image as an 8-bit RGB PNG, proven to be what was made, and its perceptual hash (8 bytes).

    Raises `DeviceFault` where it can't be what the task asked for.
    """
    config, pixels = params.task_config, made.pixels
    if pixels.shape != (config.image_height, config.image_width, 3):
        raise of_the_card(f"an image of shape {pixels.shape}")
    if not made.blanked and bool((pixels == pixels[0, 0]).all()):
        raise made.blame("an image of one colour")
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=PNG_COMPRESSION)
    read = Image.open(io.BytesIO(file.getvalue()), formats=["PNG"])
    if read.mode != "RGB" or not np.array_equal(np.asarray(read), pixels):
        raise of_the_card("a file that doesn't read back to the image")
    return file.getvalue(), perceptual_hash(read)
