"""What the networks that make an image were given, so that the CPU can be asked of the same.

Nothing is asked of the card while it computes: what a UNet was given is held, which is small, and
whether its answer was any good lies on the card until an image has turned out to be none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.utils._pytree import tree_leaves, tree_map

from cluster.core.errors import DeviceFault, DeviceFaultKind
from cluster.inference.pipelines import Pipeline
from cluster.inference.recipes import REFINER_UNET
from cluster.inference.referee import NoNumbers

LOUDEST: Final = 1e2
"""Of latents and of the noise in them, which are around 1: from a larger number on, what is made of
it later is none."""
LOUDEST_TOLD: Final = 1e4
"""Of what a text encoder says, times a prompt's weights, and of sizes in pixels."""
Blame = Callable[[str], DeviceFault]


def of_the_card(what: str) -> DeviceFault:
    return DeviceFault(DeviceFaultKind.BAD_RESULT, what)


@dataclass(frozen=True, slots=True)
class _Call:
    """Of a UNet; `fine` lies on the card."""

    role: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    fine: torch.Tensor

    @property
    def is_sane(self) -> bool:
        """Whether numbers were asked for of numbers: what it was given is the card's as well."""
        given = (each for each in tree_leaves(self.kwargs) if isinstance(each, torch.Tensor))
        told = (each for each in given if each.is_floating_point())
        return bool(_is_fine(self.args[0])) and all(
            bool((each.abs() <= LOUDEST_TOLD).all()) for each in told
        )

    def ask(self, unet: Any) -> bool:
        args, kwargs = tree_map(_on_the_cpu, (self.args, dict(self.kwargs)))
        return bool(_is_fine(_first(unet(*args, **kwargs))))


@dataclass(frozen=True, slots=True)
class _Decoding:
    """What the VAE was given, and by what latents are multiplied to become that."""

    latents: torch.Tensor
    scale: float

    @property
    def is_sane(self) -> bool:
        """Whether there is a picture in it; else something was wrong before."""
        latents = self.latents.float()
        loudest = float(latents.abs().amax()) * abs(self.scale)
        return loudest <= LOUDEST and bool((latents != latents[..., :1, :1]).any())

    def ask(self, vae: Any) -> bool:
        latents = self.latents.to("cpu")
        image = vae.to(latents.dtype).decode(latents, return_dict=False)[0].float()
        shown = (image * 0.5 + 0.5).clamp(0, 1).mul(255).round()
        return bool(torch.isfinite(image).all()) and bool((shown != shown[..., :1, :1]).any())


@dataclass(frozen=True, slots=True)
class Seen:
    """All that one image was made of so far, in order."""

    calls: tuple[_Call, ...]
    decoding: _Decoding | None

    def blame(self, what: str) -> DeviceFault:
        """A bad result of the first that gave no good numbers, of whatever followed it, or of the
        card where there is none such."""
        for call in self.calls:
            if not bool(call.fine):
                return NoNumbers(what, call.role, call.ask) if call.is_sane else of_the_card(what)
        if self.decoding is not None and self.decoding.is_sane:
            return NoNumbers(what, "vae", self.decoding.ask)
        return of_the_card(what)


class Witness:
    """Looks on while a pipeline makes images, one after the other."""

    def __init__(self) -> None:
        self._calls: list[_Call] = []
        self._decoding: _Decoding | None = None

    def begin(self) -> None:
        """With the next image."""
        self._calls.clear()
        self._decoding = None

    def seen(self) -> Seen:
        return Seen(tuple(self._calls), self._decoding)

    @contextmanager
    def looking_at(self, pipeline: Pipeline) -> Iterator[None]:
        vae = pipeline.base.vae
        scale = float(vae.config.scaling_factor)
        entry = vae.decoder if vae.post_quant_conv is None else vae.post_quant_conv

        def decodes(_module: Any, args: tuple[Any, ...]) -> None:
            self._decoding = _Decoding(args[0], scale)

        hooks = [
            pipeline.base.unet.register_forward_hook(self._noting("unet"), with_kwargs=True),
            entry.register_forward_pre_hook(decodes),
        ]
        if pipeline.refiner is not None:
            noting = self._noting(REFINER_UNET)
            hooks.append(pipeline.refiner.unet.register_forward_hook(noting, with_kwargs=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _noting(self, role: str) -> Callable[..., None]:
        def note(_module: Any, args: Any, kwargs: Any, output: Any) -> None:
            # A ControlNet's share is as large as the UNet's own insides.
            if kwargs.get("down_block_additional_residuals") is None:
                self._calls.append(_Call(role, args, kwargs, _is_fine(_first(output))))

        return note


def _is_fine(answer: torch.Tensor) -> torch.Tensor:
    return (answer.abs() <= LOUDEST).all()


def _first(output: Any) -> torch.Tensor:
    first: torch.Tensor = output[0]
    return first


def _on_the_cpu(value: Any) -> Any:
    return value.to("cpu") if isinstance(value, torch.Tensor) else value
