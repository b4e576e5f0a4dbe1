"""The models that a task needs on disk, as the store knows them."""

from __future__ import annotations

from cluster.inference.llm_parameters import LLMParameters
from cluster.inference.parameters import Parameters
from cluster.models.refs import ModelRef, ref


def refs_of(params: Parameters) -> tuple[ModelRef, ...]:
    """Each once, the base model first. Raises `TaskInvalid` for a name that no hub could have, and
    `ModelUnavailable` for one that is refused."""
    if isinstance(params, LLMParameters):
        return (ref("base", params.model),)
    base = params.base_model
    found = [ref("base", base.name, base.variant)]
    for kind, name in (
        ("unet", params.unet),
        ("vae", params.vae),
        ("textual_inversion", params.textual_inversion),
    ):
        if name:
            found.append(ref(kind, name))
    if params.lora is not None:
        found.append(ref("lora", params.lora.model, file=params.lora.weight_file_name))
    if params.controlnet is not None:
        found.append(ref("controlnet", params.controlnet.model, params.controlnet.variant))
    if params.refiner is not None:
        found.append(ref("base", params.refiner.model, params.refiner.variant))
    return tuple(dict.fromkeys(found))
