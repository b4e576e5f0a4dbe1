"""Task parameters as the network defines them (protocol.md section 5), read from hostile text.

Three verdicts are possible, and the difference is money:

* `TaskInvalid`: the text fails the network's schema, whatever software reads it. Only this may be
  reported, so the schema here is no stricter than the network's: what a lenient reader takes (an
  unknown key, a number in quotes) is taken, what any reader must refuse is refused.
* `TaskUnsupported`: readers may differ here, so silence: a score against two error reports costs
  the stake as surely as an error report against two scores. Versions that we don't know, sizes
  beyond our bounds, fractions of a percent, JSON that readers disagree on.
* Parameters to run.

No torch here: the coordinator reads parameters too.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from cluster.core.errors import TaskUnsupported
from cluster.core.types import ModelId, TaskType, Work
from cluster.inference import llm_parameters
from cluster.inference.controlnet_parameters import Preprocess
from cluster.inference.llm_parameters import LLMParameters
from cluster.inference.reading import read_object, verdict

MAX_SIDE: Final = 4096
SIDE_STEP: Final = 8
"""Latents are an eighth of the image: other sides can't be made."""
MAX_PROMPT: Final = 8000
"""Characters; parsing the weights of a longer one takes seconds."""
VERSIONS: Final = frozenset({"1.0.0", "2.0.0", "2.1.0", "2.5.0", "3.0.0"})
"""Those the network's own schema is known to take."""

NonEmpty = Annotated[str, Field(min_length=1)]
Percent = Annotated[float, Field(gt=0, le=100)]
"""Whole numbers are hundredths; of fractions, and of 1, readers differ (`_check_percentages`)."""


class _Schema(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class BaseModelArgs(_Schema):
    name: NonEmpty
    variant: str | None = None


class TaskConfig(_Schema):
    image_width: int = 512
    image_height: int = 512
    steps: Annotated[int, Field(ge=1, le=100)] = 1
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    num_images: Annotated[int, Field(ge=1, le=10)] = 6
    safety_checker: bool = True
    cfg: Annotated[float, Field(ge=0, le=20)] = 5


class LoraArgs(_Schema):
    model: NonEmpty
    weight_file_name: str = ""
    weight: Percent = 100


class ControlnetArgs(_Schema):
    model: NonEmpty
    variant: str | None = None
    image_dataurl: str = ""
    weight: Percent = 70
    preprocess: Preprocess | None = None
    image: Any = None
    """Of the network's own use: an image that is open already, which no JSON can hold."""


class RefinerArgs(_Schema):
    model: NonEmpty
    variant: str | None = None
    denoising_cutoff: Percent = 80
    steps: Annotated[int, Field(ge=1, le=100)] = 20


class SchedulerArgs(_Schema):
    """What every scheduler takes; None leaves the model's own setting."""

    num_train_timesteps: int | None = None
    beta_start: float | None = None
    beta_end: float | None = None
    beta_schedule: str | None = None
    prediction_type: str | None = None
    timestep_spacing: str | None = None
    steps_offset: int | None = None
    rescale_betas_zero_snr: bool | None = None


class ThresholdingArgs(SchedulerArgs):
    thresholding: bool | None = None
    dynamic_thresholding_ratio: float | None = None
    sample_max_value: float | None = None


_AMBIGUOUS_ARGS: Final = frozenset(
    {"clip_sample", "clip_sample_range", "clip_samples", "clip_samples_range"}
)


class LCMArgs(ThresholdingArgs):
    original_inference_steps: int | None = None
    set_alpha_to_one: bool | None = None
    timestep_scaling: float | None = None


class DPMSolverMultistepArgs(ThresholdingArgs):
    solver_order: int | None = None
    algorithm_type: str | None = None
    solver_type: str | None = None
    lower_order_final: bool | None = None
    euler_at_final: bool | None = None
    use_karras_sigmas: bool | None = None
    use_lu_lambdas: bool | None = None
    final_sigmas_type: str | None = None
    lambda_min_clipped: float | None = None
    variance_type: str | None = None


class DPMSolverMultistep(_Schema):
    method: Literal["DPMSolverMultistepScheduler"] = "DPMSolverMultistepScheduler"
    args: DPMSolverMultistepArgs | None = None


class EulerAncestralDiscrete(_Schema):
    method: Literal["EulerAncestralDiscreteScheduler"] = "EulerAncestralDiscreteScheduler"
    args: SchedulerArgs | None = None


class LCM(_Schema):
    method: Literal["LCMScheduler"] = "LCMScheduler"
    args: LCMArgs | None = None


Scheduler = Annotated[
    DPMSolverMultistep | EulerAncestralDiscrete | LCM, Field(discriminator="method")
]


class SDParameters(_Schema):
    version: str = "2.5.0"
    base_model: BaseModelArgs
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    unet: str = ""
    vae: str = ""
    textual_inversion: str = ""
    prompt: NonEmpty
    negative_prompt: str = ""
    task_config: TaskConfig
    lora: LoraArgs | None = None
    controlnet: ControlnetArgs | None = None
    scheduler: Scheduler = DPMSolverMultistep()
    refiner: RefinerArgs | None = None

    @field_validator("base_model", mode="before")
    @classmethod
    def _name_alone(cls, value: object) -> object:
        return {"name": value} if isinstance(value, str) else value


Parameters = SDParameters | LLMParameters


def parse(task_type: TaskType, text: str) -> Parameters:
    """Parameters that can be run as they stand.

    Raises `TaskInvalid` or `TaskUnsupported`, as this file's head tells them apart.
    """
    if task_type not in {TaskType.SD, TaskType.LLM}:
        raise TaskUnsupported(f"{task_type.name} tasks are not run by this version")
    data = read_object(text)
    # First: what another version's schema takes and refuses isn't known here.
    _check_version(data)
    return llm_parameters.parse(data) if task_type is TaskType.LLM else _parse_sd(data)


def _parse_sd(data: dict[str, Any]) -> SDParameters:
    try:
        params = SDParameters.model_validate(data)
    except ValidationError as error:
        raise verdict(error) from None
    if params.controlnet is not None and params.controlnet.image is not None:
        raise TaskUnsupported("controlnet.image: nodes differ on what may stand there")
    _check_bounds(params)
    _check_percentages(params)
    _check_scheduler_names(data)
    return params


def base_key(params: Parameters) -> str:
    """The base model as in a model id, without the kind: `name[+variant]`."""
    if isinstance(params, LLMParameters):
        return params.model
    base = params.base_model
    return f"{base.name}+{base.variant}" if base.variant else base.name


def pipeline_key(params: Parameters) -> str:
    """What must be loaded for the task; not what is only attached to a warm pipeline, as a LoRA."""
    if isinstance(params, LLMParameters):
        return f"{params.model}|{params.dtype}|bits={params.quantize_bits or ''}"
    key = f"{base_key(params)}|{params.dtype}|unet={params.unet}|vae={params.vae}"
    if params.controlnet is not None:
        key += f"|controlnet={params.controlnet.model}+{params.controlnet.variant or ''}"
    if params.refiner is not None:
        key += f"|refiner={params.refiner.model}+{params.refiner.variant or ''}"
    return key


def model_ids(params: Parameters) -> tuple[ModelId, ...]:
    """The models that the task needs, as the network writes them (protocol.md section 2)."""
    ids = [ModelId(f"base:{base_key(params)}")]
    if isinstance(params, LLMParameters):
        return tuple(ids)
    if params.lora is not None:
        ids.append(ModelId(f"lora:{params.lora.model}"))
    if params.controlnet is not None:
        ids.append(_model_id("controlnet", params.controlnet.model, params.controlnet.variant))
    if params.refiner is not None:
        ids.append(_model_id("base", params.refiner.model, params.refiner.variant))
    return tuple(ids)


def work_of(params: Parameters) -> Work:
    """How much computing the task asks for: pixels times steps times images, or tokens."""
    if isinstance(params, LLMParameters):
        return Work("llm", params.tokens)
    config = params.task_config
    steps = config.steps + (params.refiner.steps if params.refiner else 0)
    pixels = config.image_width * config.image_height
    return Work("sd", float(pixels * steps * config.num_images))


def _model_id(kind: str, name: str, variant: str | None) -> ModelId:
    return ModelId(f"{kind}:{name}+{variant}" if variant else f"{kind}:{name}")


def _check_version(data: dict[str, Any]) -> None:
    version = data.get("version", "2.5.0")
    if not isinstance(version, str) or version not in VERSIONS:
        line = str(version)[:40]
        raise TaskUnsupported(f"version {line!r} is not one that this software knows")


def _check_percentages(params: SDParameters) -> None:
    percentages = {
        "lora.weight": params.lora.weight if params.lora else None,
        "controlnet.weight": params.controlnet.weight if params.controlnet else None,
        "refiner.denoising_cutoff": params.refiner.denoising_cutoff if params.refiner else None,
    }
    for name, value in percentages.items():
        if value is not None and (value <= 1 or value != int(value)):
            raise TaskUnsupported(f"{name}: nodes differ on what {value:g} percent is")


def _check_scheduler_names(data: dict[str, Any]) -> None:
    """Arguments that the network's schema and the scheduler spell differently: heeded by one reader
    and ignored by another. Null is heeded by none."""
    scheduler = data.get("scheduler")
    args = scheduler.get("args") if isinstance(scheduler, dict) else None
    if not isinstance(args, dict):
        return
    if odd := {name for name in _AMBIGUOUS_ARGS if args.get(name) is not None}:
        raise TaskUnsupported(f"scheduler.args.{min(odd)}: nodes differ on what it means")


def _check_bounds(params: SDParameters) -> None:
    """Our own bounds: the schema has none here, so crossing them is never the task's fault."""
    config = params.task_config
    for name, side in (("image_width", config.image_width), ("image_height", config.image_height)):
        if not SIDE_STEP <= side <= MAX_SIDE or side % SIDE_STEP:
            raise TaskUnsupported(
                f"task_config.{name}: {side} is not a multiple of {SIDE_STEP} up to {MAX_SIDE}"
            )
    for name, prompt in (("prompt", params.prompt), ("negative_prompt", params.negative_prompt)):
        if len(prompt) > MAX_PROMPT:
            raise TaskUnsupported(f"{name}: longer than {MAX_PROMPT} characters")
    args = params.scheduler.args
    if args is None:
        return
    for name, value in args.model_dump(exclude_none=True).items():
        if isinstance(value, int) and not 0 <= value <= 10_000:
            raise TaskUnsupported(f"scheduler.args.{name}: {value} is not within 0 to 10000")
