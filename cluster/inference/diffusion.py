"""One SD task on a loaded pipeline: prompts, scheduler, draws in order, images checked.

As the network's own runner does it (protocol.md section 5): prompts are weighted by Compel and not
truncated, the scheduler is the named one on the model's settings and the task's arguments, and the
images are made one after the other, all drawing from one CPU generator.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable
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

from cluster.core.errors import DeviceFault, DeviceFaultKind, TaskUnsupported
from cluster.inference.parameters import SDParameters
from cluster.inference.pipelines import Pipeline
from cluster.inference.prompts import conditions
from cluster.inference.scoring import perceptual_hash

SCHEDULERS: Final[dict[str, Any]] = {
    "DPMSolverMultistepScheduler": DPMSolverMultistepScheduler,
    "EulerAncestralDiscreteScheduler": EulerAncestralDiscreteScheduler,
    "LCMScheduler": LCMScheduler,
}
PNG_COMPRESSION: Final = 4

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Made:
    """One image as made, (height, width, 3), and whether the safety checker blanked it."""

    pixels: Pixels
    blanked: bool


def seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@torch.inference_mode()
def make_images(
    pipeline: Pipeline, params: SDParameters, on_step: Callable[[int, int], None]
) -> list[Made]:
    """Runs the task; `on_step` gets (steps done, steps in all) and may raise to stop between steps.

    Raises `TaskUnsupported` where the scheduler refuses its arguments, `DeviceFault` for numbers
    that aren't finite.
    """
    pipe, config = pipeline.pipe, params.task_config
    pipe.scheduler = make_scheduler(pipeline, params)
    if not pipeline.is_xl:
        pipe.safety_checker = pipeline.safety_checker if config.safety_checker else None
    seed_everything(config.seed)
    prompts = conditions(pipeline, params)
    generator = torch.Generator("cpu").manual_seed(config.seed)
    made: list[Made] = []
    steps = _Steps(config.num_images, on_step)
    for index in range(config.num_images):
        steps.begin(index)
        output = pipe(
            width=config.image_width,
            height=config.image_height,
            num_inference_steps=config.steps,
            guidance_scale=config.cfg,
            generator=generator,
            output_type="np",
            callback_on_step_end=steps,
            **prompts,
        )
        flags = getattr(output, "nsfw_content_detected", None)
        made.append(Made(_quantized(output.images), bool(flags and flags[0])))
    return made


def make_scheduler(pipeline: Pipeline, params: SDParameters) -> Any:
    """The task's scheduler on the model's own settings.

    What the arguments' types don't tell (`beta_schedule: "x"`), the installed scheduler does; other
    nodes may have a newer one, so its refusal isn't the task's fault.
    """
    chosen = params.scheduler
    args = chosen.args.model_dump(exclude_none=True) if chosen.args is not None else {}
    try:
        scheduler = SCHEDULERS[chosen.method].from_config(pipeline.scheduler_config, **args)
        scheduler.set_timesteps(params.task_config.steps)
    except (ValueError, NotImplementedError, TypeError, IndexError, ZeroDivisionError) as error:
        line = " ".join(str(error).split())[:200]
        raise TaskUnsupported(
            f"scheduler: {chosen.method} refuses its arguments: {line}"
        ) from error
    return SCHEDULERS[chosen.method].from_config(pipeline.scheduler_config, **args)


class _Steps:
    """Diffusers' callback after each denoising step, counted over all images."""

    def __init__(self, images: int, on_step: Callable[[int, int], None]) -> None:
        self._images = images
        self._on_step = on_step
        self._index = 0

    def begin(self, index: int) -> None:
        self._index = index

    def __call__(self, pipe: Any, step: int, _timestep: Any, state: dict[str, Any]) -> Any:
        per_image = pipe.num_timesteps
        if step + 1 == per_image and not bool(torch.isfinite(state["latents"]).all()):
            raise DeviceFault(DeviceFaultKind.BAD_RESULT, "latents that are not finite numbers")
        self._on_step(self._index * per_image + step + 1, self._images * per_image)
        return state


def _quantized(images: npt.NDArray[np.float32]) -> Pixels:
    """One image of floats in 0..1, as diffusers makes it, to 8 bits as diffusers would."""
    image = images[0]
    if not np.isfinite(image).all():
        raise DeviceFault(DeviceFaultKind.BAD_RESULT, "pixels that are not finite numbers")
    return np.asarray((image * 255).round().astype(np.uint8))


def encode(made: Made, params: SDParameters) -> bytes:
    """The image as an 8-bit RGB PNG, proven to be what was made; else raises `DeviceFault`."""
    config, pixels = params.task_config, made.pixels
    if pixels.shape != (config.image_height, config.image_width, 3):
        raise _bad(f"an image of shape {pixels.shape}")
    if not made.blanked and bool((pixels == pixels[0, 0]).all()):
        raise _bad("an image of one colour")
    image = Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=PNG_COMPRESSION)
    read = Image.open(io.BytesIO(file.getvalue()), formats=["PNG"])
    if read.mode != "RGB" or not np.array_equal(np.asarray(read), pixels):
        raise _bad("a file that doesn't read back to the image")
    if perceptual_hash(read) != perceptual_hash(image):
        raise _bad("a file that doesn't read back to the same hash")
    return file.getvalue()


def _bad(what: str) -> DeviceFault:
    return DeviceFault(DeviceFaultKind.BAD_RESULT, f"the card made {what}")
