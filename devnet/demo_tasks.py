"""The demo's tasks: what goes well, and each way in which it should not."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

from PIL import Image

from cluster.core.types import TaskStatus, TaskType
from devnet.models import (
    LLM,
    SD15,
    SD15_CONTROLNET,
    SD15_LORA,
    SDXL,
    SDXL_LORA,
    SDXL_REFINER,
)
from devnet.tasks import TaskSpec

ABORTED = frozenset({TaskStatus.END_ABORTED.label})
GROUP = frozenset({TaskStatus.END_GROUP_SUCCESS.label, TaskStatus.END_GROUP_REFUND.label})
FEE = 10**16
NEVER_SECONDS = 45
"""The timeout of the task that nobody uploads: the demo waits for it."""
NAMED_GPU = "NVIDIA A100-SXM4-80GB+docker"
NAMED_GPU_VRAM = 80
COMMON_GPU = "NVIDIA GeForce RTX 4090+docker"
COMMON_GPU_VRAM = 24

_PROMPTS = (
    "a red fox in the snow, detailed",
    "a blue house by the river",
    "a bright star over the mountain",
    "a cat++ on the moon",
    "an old tree in the light",
    "a dark forest, high quality",
    "the sea and the sky, style",
    "a small bird, best",
)


def parameters(base: str, prompt: str, seed: int, side: int = 256, **more: Any) -> dict[str, Any]:
    config: Mapping[str, Any] = {
        "image_width": side,
        "image_height": side,
        "steps": 6,
        "seed": seed,
        "num_images": 1,
        "cfg": 5,
        "safety_checker": False,
    }
    return {
        "version": "2.5.0",
        "base_model": {"name": base},
        "prompt": prompt,
        "negative_prompt": "ugly, low",
        "task_config": dict(config),
        **more,
    }


def _task(name: str, base: str, args: dict[str, Any] | str, **more: Any) -> TaskSpec:
    fields = {"model_ids": (f"base:{base}",), "min_vram": 8, "fee": FEE, **more}
    return TaskSpec(name=name, type=TaskType.SD, parameters=args, **fields)


def _picture() -> str:
    """A data URL of a small picture, for the ControlNet."""
    file = io.BytesIO()
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _richer_tasks() -> tuple[TaskSpec, ...]:
    """A ControlNet, a refiner, and a chat, which always names its GPU."""
    control = {"model": SD15_CONTROLNET, "image_dataurl": _picture(), "weight": 80}
    refiner = {"model": SDXL_REFINER, "denoising_cutoff": 60, "steps": 6}
    chat = [
        {"role": "system", "content": "you tell of the sea"},
        {"role": "user", "content": "what is the name of the moon?"},
    ]
    return (
        _task(
            "controlnet-canny",
            SD15[0],
            parameters(
                SD15[0],
                _PROMPTS[1],
                500,
                side=128,
                controlnet=control | {"preprocess": {"method": "canny"}},
            ),
            model_ids=(f"base:{SD15[0]}", f"controlnet:{SD15_CONTROLNET}"),
        ),
        _task(
            "refined",
            SDXL,
            parameters(SDXL, _PROMPTS[2], 600, side=128, refiner=refiner),
            model_ids=(f"base:{SDXL}", f"base:{SDXL_REFINER}"),
            min_vram=16,
            fee=3 * FEE,
        ),
        TaskSpec(
            name="chat",
            type=TaskType.LLM,
            model_ids=(f"base:{LLM}",),
            required_gpu=COMMON_GPU,
            required_gpu_vram=COMMON_GPU_VRAM,
            fee=FEE,
            parameters={
                "model": LLM,
                "messages": chat,
                "generation_config": {"max_new_tokens": 24, "do_sample": True, "temperature": 0.9},
                "seed": 7,
            },
        ),
    )


def demo_tasks() -> tuple[TaskSpec, ...]:
    """18, and the group's two followers, which come with its first."""
    a, b = SD15
    plain = [
        _task(
            f"sd15-{'ab'[index % 2]}-{index // 2 + 1}",
            SD15[index % 2],
            parameters(SD15[index % 2], prompt, seed=100 + index),
            encrypted=index % 4 != 3,
        )
        for index, prompt in enumerate(_PROMPTS)
    ]
    large = [
        _task(
            f"sdxl-{index + 1}",
            SDXL,
            parameters(SDXL, prompt, seed=200 + index),
            min_vram=16,
            fee=3 * FEE,
        )
        for index, prompt in enumerate(_PROMPTS[:2])
    ]
    return (
        _task(
            "never-uploaded",
            a,
            parameters(a, "nobody sends this", 1),
            upload=False,
            timeout=NEVER_SECONDS,
            # Its card's account is held until the timeout: not the only one of its kind, please.
            required_gpu=COMMON_GPU,
            required_gpu_vram=COMMON_GPU_VRAM,
            expected_end=ABORTED,
        ),
        *plain,
        *large,
        *_richer_tasks(),
        _task(
            "named-gpu-lora",
            a,
            parameters(a, _PROMPTS[3], 300, lora={"model": SD15_LORA, "weight": 80}),
            model_ids=(f"base:{a}", f"lora:{SD15_LORA}"),
            required_gpu=NAMED_GPU,
            required_gpu_vram=NAMED_GPU_VRAM,
            fee=2 * FEE,
        ),
        _task(
            "bad-parameters",
            b,
            {**parameters(b, "", 1), "task_config": {"steps": 1000}},
            encrypted=False,
            expected_end=ABORTED,
            expected_report=True,
        ),
        _task(
            "wrong-lora",
            a,
            parameters(a, _PROMPTS[0], 1, lora={"model": SDXL_LORA}),
            model_ids=(f"base:{a}", f"lora:{SDXL_LORA}"),
            expected_end=ABORTED,
            expected_report=True,
        ),
        _task("group", b, parameters(b, _PROMPTS[5], 400), group=True, expected_end=GROUP),
    )
