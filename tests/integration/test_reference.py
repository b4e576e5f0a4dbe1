"""The engine against the network's own order of calls, written with the libraries alone.

`Reference` and `_their_file` know nothing of the engine: they make protocol.md section 5's steps by
what diffusers, transformers and Compel offer to everybody, whole pipelines from their folders and
with the libraries' own way for whatever is added. Images must agree in every pixel, language
results in every byte. All in float32: there a part's own way to the device leaves no trace.
"""

from __future__ import annotations

import base64
import io
import json
import random
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import diffusers
import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers
from compel import Compel, ReturnedEmbeddingsType  # type: ignore[import-untyped]
from compel.convenience_wrappers import CompelForSDXL  # type: ignore[import-untyped]
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from cluster.core.ports import Order
from cluster.core.types import AttemptId, Commitment, GigaBytes, TaskType
from cluster.inference.devices import simulated
from cluster.inference.engine import Engine, Limits
from cluster.models.store import ModelStore
from devnet import models

Pixels = npt.NDArray[np.uint8]
Fields = Mapping[str, Any]
SD15: Final = models.SD15[0]
DEVICE: Final = simulated(0, "NVIDIA GeForce RTX 4090+docker", GigaBytes(24))


def new_engine(root: Path) -> Engine:
    return Engine(DEVICE, ModelStore(root), time.time, Limits(2**30, 2**30, threads=1))


def result(engine: Engine, kind: TaskType, task: Fields) -> tuple[bytes, ...]:
    order = Order(AttemptId("a"), Commitment("0x01"), kind, json.dumps(task), None)
    made = engine.run(order, lambda: False, lambda _step, _steps: None)
    return tuple(content for _name, content in made.files)


# --- images -----------------------------------------------------------------------------------


class Reference:
    """Whole pipelines, loaded once for each set of models that a task may name."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._loaded: dict[str, tuple[Any, Any, Any]] = {}

    def images(self, task: Fields) -> list[Pixels]:
        """All images of a task, each (height, width, 3)."""
        config = task["task_config"]
        pipe, refiner, own_scheduler = self._pipelines(task)
        chosen = task.get("scheduler", {"method": "DPMSolverMultistepScheduler"})
        kind: Any = getattr(diffusers, chosen["method"])
        pipe.scheduler = kind.from_config(own_scheduler, **chosen.get("args", {}))
        torch.manual_seed(config["seed"])
        np.random.seed(config["seed"])
        random.seed(config["seed"])
        draws = torch.Generator("cpu").manual_seed(config["seed"])
        texts = (task["prompt"], task.get("negative_prompt", ""))
        call: dict[str, Any] = {
            "width": config["image_width"],
            "height": config["image_height"],
            "num_inference_steps": config["steps"],
            "guidance_scale": config["cfg"],
            "generator": draws,
            **(_read_for_xl(pipe, texts) if hasattr(pipe, "tokenizer_2") else _read(pipe, texts)),
        }
        controlnet, refining = task.get("controlnet"), task.get("refiner")
        second: dict[str, Any] = {}
        if controlnet is not None:
            data = controlnet["image_dataurl"].partition("base64,")[2]
            call["image"] = Image.open(io.BytesIO(base64.b64decode(data)))
            call["controlnet_conditioning_scale"] = controlnet.get("weight", 70) / 100
        if refining is not None:
            call["output_type"] = "latent"
            second = {"num_inference_steps": refining.get("steps", 20), "generator": draws}
            second |= _read_for_refiner(refiner, texts)
            if controlnet is None:
                share = refining.get("denoising_cutoff", 80) / 100
                call["denoising_end"] = second["denoising_start"] = share
        made = []
        for _ in range(config["num_images"]):
            images = pipe(**call).images
            if refiner is not None:
                images = refiner(image=images, **second).images
            made.append(np.asarray(images[0]))
        return made

    def _pipelines(self, task: Fields) -> tuple[Any, Any, Any]:
        """The base pipeline, the refiner's or None, and the base's own scheduler settings."""
        named = ("base_model", "dtype", "unet", "vae", "lora", "textual_inversion")
        added = [task.get(part, {}).get("model") for part in ("controlnet", "refiner")]
        checked = task["task_config"].get("safety_checker", True)
        key = json.dumps([*(task.get(part) for part in named), *added, checked])
        if key not in self._loaded:
            self._loaded[key] = self._load(task, checked)
        return self._loaded[key]

    def _load(self, task: Fields, checked: bool) -> tuple[Any, Any, Any]:
        parts: dict[str, Any] = {} if checked else {"safety_checker": None}
        kind = {"torch_dtype": getattr(torch, task.get("dtype", "float32"))}
        if "controlnet" in task:
            name = task["controlnet"]["model"]
            parts["controlnet"] = self._from(diffusers.ControlNetModel, name, **kind)
        if "unet" in task:
            parts["unet"] = self._from(diffusers.UNet2DConditionModel, task["unet"], **kind)
        whole: Any = diffusers.AutoPipelineForText2Image
        pipe = self._from(whole, task["base_model"], **parts, **kind)
        if "vae" in task:
            pipe.vae = self._from(diffusers.AutoencoderKL, task["vae"], **kind)
        if "lora" in task:
            pipe.load_lora_weights(
                str(self._root / task["lora"]["model"]),
                weight_name="pytorch_lora_weights.safetensors",
                local_files_only=True,
            )
        if "textual_inversion" in task:
            pipe.load_textual_inversion(str(self._root / task["textual_inversion"]))
        refiner = None
        if "refiner" in task:
            refiner = self._refiner(pipe, task["refiner"]["model"], **kind)
        for each in filter(None, (pipe, refiner)):
            each.set_progress_bar_config(disable=True)
            _out_of_the_files(each)
        return pipe, refiner, pipe.scheduler.config

    def _refiner(self, pipe: Any, name: str, **kind: Any) -> Any:
        parts = {part: getattr(pipe, part) for part in ("text_encoder_2", "tokenizer_2", "vae")}
        return self._from(diffusers.DiffusionPipeline, name, **parts, **kind)

    def _from(self, kind: Any, name: str, **parts: Any) -> Any:
        return kind.from_pretrained(str(self._root / name), local_files_only=True, **parts)


def _out_of_the_files(pipe: Any) -> None:
    """Tensors mapped from a file lie where they lie in it, and odd places are summed otherwise."""
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            for tensor in (*part.parameters(), *part.buffers()):
                tensor.data = tensor.data.clone()


def _read(pipe: Any, texts: tuple[str, str]) -> dict[str, Any]:
    reader = Compel(
        tokenizer=pipe.tokenizer, text_encoder=pipe.text_encoder, truncate_long_prompts=False
    )
    wanted, unwanted = reader(list(texts)).split(1)
    return {"prompt_embeds": wanted, "negative_prompt_embeds": unwanted}


def _read_for_xl(pipe: Any, texts: tuple[str, str]) -> dict[str, Any]:
    read = CompelForSDXL(pipe)(texts[0], negative_prompt=texts[1])
    return {
        "prompt_embeds": read.embeds,
        "pooled_prompt_embeds": read.pooled_embeds,
        "negative_prompt_embeds": read.negative_embeds,
        "negative_pooled_prompt_embeds": read.negative_pooled_embeds,
    }


def _read_for_refiner(refiner: Any, texts: tuple[str, str]) -> dict[str, Any]:
    layers = ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED
    reader = Compel(
        tokenizer=refiner.tokenizer_2,
        text_encoder=refiner.text_encoder_2,
        returned_embeddings_type=layers,
        requires_pooled=True,
        truncate_long_prompts=False,
    )
    (wanted, unwanted), (pooled, pooled_unwanted) = (each.split(1) for each in reader(list(texts)))
    return {
        "prompt_embeds": wanted,
        "pooled_prompt_embeds": pooled,
        "negative_prompt_embeds": unwanted,
        "negative_pooled_prompt_embeds": pooled_unwanted,
    }


def picture(width: int, height: int) -> str:
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


LONG: Final = "a cat by the river, a house in the forest, " * 12
"""Beyond what a text encoder reads at once."""
ANCESTRAL: Final = {"method": "EulerAncestralDiscreteScheduler"}
SDE: Final = {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}
XL: Final[Fields] = {"base_model": models.SDXL, "negative_prompt": "a dog, blurry"}
HALF: Final[Fields] = {"dtype": "float16"}
BRAIN: Final[Fields] = {"dtype": "bfloat16"}
EDGES: Final = {"model": models.SD15_CONTROLNET, "image_dataurl": picture(64, 64)}
XL_EDGES: Final = {"model": models.SDXL_CONTROLNET, "image_dataurl": picture(96, 64)}


def refined(cutoff: int, steps: int, **more: Any) -> dict[str, Any]:
    refiner = {"model": models.SDXL_REFINER, "steps": steps, "denoising_cutoff": cutoff}
    return {**XL, "refiner": refiner, "task_config": {"steps": 4, "num_images": 2}, **more}


PICTURES: Final[dict[str, Fields]] = {
    "sd15": {"task_config": {"num_images": 3}},
    "no guidance": {"task_config": {"cfg": 0, "image_width": 136, "image_height": 72}},
    "much guidance": {"task_config": {"cfg": 20}, "negative_prompt": "a dog"},
    "weights": {"prompt": "a (red cat)1.3 in the forest++, dog--", "negative_prompt": "moon+"},
    "blend": {"prompt": '("a cat", "a dog by the river").blend(0.7, 0.3)'},
    "long prompt": {"prompt": LONG, "negative_prompt": "a dog"},
    "long negative": {"negative_prompt": LONG},
    "ancestral": {"scheduler": ANCESTRAL, "task_config": {"num_images": 2}},
    "lcm": {"scheduler": {"method": "LCMScheduler", "args": {"timestep_spacing": "trailing"}}},
    "sde": {"scheduler": {"method": "DPMSolverMultistepScheduler", "args": SDE}},
    "lora": {"lora": {"model": models.SD15_LORA}},
    "lora of the text too": {"lora": {"model": models.SD15_LORA_KOHYA, "weight": 100}},
    "inversion": {
        "prompt": f"a {models.INVERSION_TOKEN} cat",
        "textual_inversion": models.SD15_INVERSION,
    },
    "vae": {"vae": models.SD15_VAE},
    "unet and vae": {"unet": models.SD15_UNET, "vae": models.SD15_VAE},
    "controlnet": {"controlnet": EDGES, "negative_prompt": "a dog"},
    "controlnet, weakly": {"controlnet": EDGES | {"weight": 33}, "scheduler": ANCESTRAL},
    "all flagged": {"base_model": models.SD15_FLAGS_ALL},
    "none flagged": {"base_model": models.SD15_FLAGS_NONE},
    "unchecked": {"base_model": models.SD15_FLAGS_ALL, "task_config": {"safety_checker": False}},
    "sd2": {"base_model": models.SD2, "negative_prompt": "a dog"},
    "sdxl": {**XL, "task_config": {"num_images": 2}},
    "sdxl, weights": {**XL, "prompt": "a (cat)1.4 by the river--", "negative_prompt": ""},
    "sdxl, long negative": {**XL, "negative_prompt": LONG},
    "sdxl, lora": {**XL, "lora": {"model": models.SDXL_LORA_KOHYA}},
    "sdxl, controlnet": {**XL, "controlnet": XL_EDGES},
    "turbo": {
        "base_model": models.SDXL_TURBO,
        "scheduler": ANCESTRAL | {"args": {"timestep_spacing": "trailing"}},
        "task_config": {"steps": 1, "cfg": 0, "num_images": 3},
    },
    "refiner from the half": refined(50, 4),
    "refiner from 74 %": refined(74, 20, task_config={"steps": 4}),
    "refiner from 80 %": refined(80, 10, prompt="a (cat)1.2 in the forest", scheduler=ANCESTRAL),
    "refiner from 30 %": refined(30, 5, task_config={"steps": 5, "num_images": 3}),
    "refiner after a controlnet": refined(50, 6, controlnet=XL_EDGES),
    "half": {**HALF, "negative_prompt": "a dog"},
    "half, lora": {**HALF, "lora": {"model": models.SD15_LORA}},
    "half, lora of the text too": {**HALF, "lora": {"model": models.SD15_LORA_KOHYA}},
    "half, long prompt": {**HALF, "prompt": LONG},
    "half, controlnet": {**HALF, "controlnet": EDGES},
    "half, sdxl": {**XL, **HALF},
    "half, sdxl, lora": {**XL, **HALF, "lora": {"model": models.SDXL_LORA_KOHYA}},
    "half, sdxl, long prompt": {**XL, **HALF, "prompt": LONG},
    "half, refiner": refined(50, 4, **HALF),
    "brain": {**BRAIN, "negative_prompt": "a dog"},
    "brain, lora of the text too": {**BRAIN, "lora": {"model": models.SD15_LORA_KOHYA}},
    "brain, long prompt": {**BRAIN, "prompt": LONG},
    "brain, sdxl, lora": {**XL, **BRAIN, "lora": {"model": models.SDXL_LORA_KOHYA}},
}


@pytest.fixture(scope="module")
def engine(tiny_models: Path) -> Engine:
    return new_engine(tiny_models)


@pytest.fixture(scope="module")
def reference(tiny_models: Path, engine: Engine) -> Reference:
    """After the engine, which makes torch compute in one thread, deterministically."""
    return Reference(tiny_models)


@pytest.mark.parametrize("fields", PICTURES.values(), ids=PICTURES.keys())
def test_every_pixel_is_the_networks(engine: Engine, reference: Reference, fields: Fields) -> None:
    config = {"image_width": 64, "image_height": 64, "steps": 3, "seed": 5, "cfg": 5}
    task = {"base_model": SD15, "prompt": "a photo of a cat", **fields}
    task["task_config"] = config | {"num_images": 1} | fields.get("task_config", {})
    theirs = reference.images(task)
    ours = [np.asarray(Image.open(io.BytesIO(png))) for png in result(engine, TaskType.SD, task)]
    assert len(ours) == len(theirs) == task["task_config"]["num_images"]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.shape == other.shape
        differs = int((mine != other).any(axis=-1).sum())
        assert not differs, f"{differs} of {mine[..., 0].size} pixels"


# --- language ---------------------------------------------------------------------------------

BEGIN: Final = "<|begin|>"
CHAT: Final = [{"role": "system", "content": "you tell"}, {"role": "user", "content": "a cat?"}]
TOOL: Final = {
    "type": "function",
    "function": {"name": "weather", "description": "é <b>", "parameters": {"type": "object"}},
}
CALLED: Final = [
    *CHAT,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "7", "type": "function", "function": {"name": "weather"}}],
    },
    {"role": "tool", "tool_call_id": "7", "content": "rain"},
]
SAMPLED: Final = {"do_sample": True, "temperature": 1.3, "top_k": 40, "max_new_tokens": 24}
SEVERAL: Final = SAMPLED | {"temperature": 5.0, "num_return_sequences": 4, "max_new_tokens": 70}
"""Some of them come to their end before the others, and are filled up with what pads."""

ANSWERS: Final[dict[str, Fields]] = {
    "greedy": {"generation_config": {"max_new_tokens": 30}},
    "sampled": {"generation_config": SAMPLED | {"top_p": 0.9}, "seed": 7},
    "beams": {
        "generation_config": {"max_new_tokens": 12, "num_beams": 3, "num_return_sequences": 2}
    },
    "several": {"generation_config": SEVERAL, "seed": 3},
    "tools": {"tools": [TOOL], "messages": CALLED, "generation_config": {"max_new_tokens": 16}},
    "the end in a message": {
        "messages": [{"role": "user", "content": "<|end|> кот <|turn|>"}],
        "generation_config": {"max_new_tokens": 16},
    },
    "a tokenizer that begins": {"model": "org/begins", "generation_config": SAMPLED},
    "a tokenizer that begins, tokens again": {
        "model": "org/begins",
        "messages": [{"role": "user", "content": "a a a a"}],
        "generation_config": SEVERAL,
    },
    "a token that pads": {"model": "org/pads", "generation_config": SEVERAL, "seed": 3},
    "settings of its own": {
        "model": "org/settled",
        "generation_config": {"max_new_tokens": 24},
        "seed": 11,
    },
    "half": {**HALF, "generation_config": SAMPLED | {"max_new_tokens": 60}, "seed": 5},
    "half, beams": {**HALF, "generation_config": {"max_new_tokens": 30, "num_beams": 3}},
    "brain": {**BRAIN, "generation_config": SAMPLED | {"max_new_tokens": 60}, "seed": 5},
    "brain, tools": {
        **BRAIN,
        "tools": [TOOL],
        "messages": CALLED,
        "generation_config": {"max_new_tokens": 40},
    },
}


@pytest.fixture(scope="module")
def language_models(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny language model, and the same with another tokenizer or settings."""
    root = tmp_path_factory.mktemp("language")
    for name in (models.LLM, "org/begins", "org/pads", "org/settled"):
        shutil.copytree(tiny_models / models.LLM, root / name)
    file = root / "org/begins/tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    begin = (BEGIN, tokenizer.token_to_id(BEGIN))
    tokenizer.post_processor = TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[begin])
    tokenizer.save(str(file))
    _add(root / "org/pads/tokenizer_config.json", pad_token="<|turn|>")
    _add(
        root / "org/settled/generation_config.json",
        do_sample=True,
        temperature=1.5,
        top_k=20,
        repetition_penalty=1.05,
        remove_invalid_values=True,
    )
    return root


def _add(file: Path, **settings: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.fixture(scope="module")
def language_engine(language_models: Path) -> Engine:
    return new_engine(language_models)


@pytest.fixture(scope="module")
def theirs(language_models: Path, language_engine: Engine) -> dict[str, bytes]:
    """By case, the file that the library's pipeline leads to."""
    return {name: _their_file(language_models, language_task(name)) for name in ANSWERS}


def language_task(name: str) -> dict[str, Any]:
    return {"model": models.LLM, "messages": CHAT, "seed": 0, **ANSWERS[name]}


def _their_file(root: Path, task: Fields) -> bytes:
    folder, make = str(root / task["model"]), transformers.AutoTokenizer
    tokenizer: Any = make.from_pretrained(folder)
    new_pipeline: Any = transformers.pipeline
    pipe = new_pipeline(
        "text-generation",
        model=folder,
        tokenizer=tokenizer,
        device="cpu",
        dtype=getattr(torch, task.get("dtype", "float32")),
    )
    tools = {"tools": task["tools"]} if "tools" in task else {}
    text = tokenizer.apply_chat_template(
        task["messages"], tokenize=False, add_generation_prompt=True, **tools
    )
    own = pipe.model.generation_config.to_diff_dict()
    # Without the first two the pipeline has defaults of its own, which the network's never sees.
    plain = {"do_sample": False, "temperature": 1.0} | {
        key: own[key] for key in ("do_sample", "temperature") if key in own
    }
    transformers.set_seed(task["seed"])
    made = pipe(text, return_tensors=True, **(plain | task["generation_config"]))
    sequences = [each["generated_token_ids"] for each in made]
    length = _length(tokenizer.encode(text, add_special_tokens=False), sequences[0])
    choices = []
    for index, tokens in enumerate(sequences):
        said = tokenizer.decode(
            tokens[length:], skip_special_tokens=True, clean_up_tokenization_spaces=True
        )
        choices.append(
            {
                "finish_reason": "stop" if tokens[-1] == tokenizer.eos_token_id else "length",
                "message": {"role": "assistant", "content": said.strip()},
                "index": index,
            }
        )
    new = sum(len(tokens[length:]) for tokens in sequences)
    usage = {"prompt_tokens": length, "completion_tokens": new, "total_tokens": length + new}
    return json.dumps({"model": task["model"], "choices": choices, "usage": usage}).encode()


def _length(counted: list[int], sequence: list[int]) -> int:
    """Through the first place of the prompt's last token that has room for the prompt before it."""
    first = sequence.index(counted[0])
    for place in range(first + len(counted) - 1, len(sequence)):
        if sequence[place] == counted[-1]:
            return place + 1
    return 0


@pytest.mark.parametrize("name", ANSWERS)
def test_every_byte_is_the_networks(
    language_engine: Engine, theirs: Mapping[str, bytes], name: str
) -> None:
    (ours,) = result(language_engine, TaskType.LLM, language_task(name))
    assert ours == theirs[name]


def test_the_answers_tell_the_rules_apart(theirs: Mapping[str, bytes]) -> None:
    """Cases that all end alike, or are counted alike, would agree by whatever rule."""
    read = {name: json.loads(content) for name, content in theirs.items()}
    ends = {
        name: [each["finish_reason"] for each in read[name]["choices"]]
        for name in ("greedy", "several", "a token that pads", "the end in a message")
    }
    assert ends["greedy"] == ends["the end in a message"] == ["length"]
    assert "stop" in ends["several"]
    assert ends["a token that pads"].count("stop") < ends["several"].count("stop")
    tokenizers = ("sampled", "a tokenizer that begins")
    plain, begun = (read[name]["usage"]["prompt_tokens"] for name in tokenizers)
    assert begun > plain, "a special token of the tokenizer's is counted"
