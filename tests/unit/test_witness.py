"""Whom an image that is none is held against: the first that made no good numbers of good ones."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from cluster.core.errors import DeviceFault
from cluster.inference.pipelines import Pipeline
from cluster.inference.referee import NoNumbers
from cluster.inference.witness import Seen, Witness

SANE = torch.linspace(-3, 3, 64).reshape(1, 4, 4, 4)


class Unet(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.answers = [SANE]

    def forward(self, sample: torch.Tensor, **_: object) -> tuple[torch.Tensor]:
        return (self.answers.pop(0),)


class Vae(torch.nn.Module):
    """Decodes to what it is told to."""

    def __init__(self, image: torch.Tensor) -> None:
        super().__init__()
        self.config = SimpleNamespace(scaling_factor=0.2)
        self.post_quant_conv = torch.nn.Identity()
        self.image = image

    def decode(self, latents: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        self.post_quant_conv(latents)
        return (self.image,)


NAN = torch.full((1, 3, 8, 8), float("nan"))
GREY = torch.zeros(1, 3, 8, 8)
PICTURE = torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8)


def seen(
    *answers: float, given: torch.Tensor = SANE, latents: torch.Tensor | None = None, **more: object
) -> Seen:
    """By answers of the UNet, times `SANE`, and then what the VAE was given."""
    unet, vae, witness = Unet(), Vae(NAN), Witness()
    base = SimpleNamespace(unet=unet, vae=vae)
    with witness.looking_at(Pipeline(base, None, False, {})):
        witness.begin()
        unet.answers = [SANE * each for each in answers]
        for _ in answers:
            unet(given, **more)
        if latents is not None:
            vae.decode(latents, return_dict=False)
    assert not unet._forward_hooks
    assert not vae.post_quant_conv._forward_pre_hooks
    return witness.seen()


def role_of(fault: DeviceFault) -> str:
    return fault.role if isinstance(fault, NoNumbers) else ""


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e4])
def test_a_unet_that_makes_none_is_asked_of_what_it_was_given(bad: float) -> None:
    fault = seen(1, 1, bad, 1, latents=SANE * 5).blame("no image")
    assert isinstance(fault, NoNumbers)
    assert (fault.role, str(fault)) == ("unet", "no image")
    copy = Unet()
    copy.answers = [SANE, SANE * bad]
    assert fault.makes_numbers(copy)
    assert not fault.makes_numbers(copy)


def test_a_vae_is_asked_if_the_unet_was_well() -> None:
    fault = seen(1, 1, latents=SANE * 5).blame("no image")
    assert isinstance(fault, NoNumbers)
    assert fault.role == "vae"
    assert fault.makes_numbers(Vae(PICTURE))
    for image in (NAN, GREY, GREY + 7):
        assert not fault.makes_numbers(Vae(image))


@pytest.mark.parametrize("latents", [SANE * float("nan"), SANE * 1e4, torch.zeros(1, 4, 4, 4)])
def test_a_vae_that_was_given_no_picture_is_not_asked(latents: torch.Tensor) -> None:
    assert role_of(seen(1, 1, latents=latents).blame("no image")) == ""


def test_a_unet_that_was_given_none_is_not_asked() -> None:
    assert role_of(seen(float("nan"), given=SANE * 1e4).blame("no image")) == ""


@pytest.mark.parametrize("told", [1e5, float("inf"), float("nan")])
def test_a_unet_that_was_told_no_text_is_not_asked(told: float) -> None:
    """The text encoder ran on the same card, which would acquit itself by it."""
    well = seen(float("nan"), encoder_hidden_states=SANE * 1000).blame("no image")
    assert role_of(well) == "unet"
    added = {"time_ids": torch.tensor([[1024.0]]), "text_embeds": SANE * told}
    assert role_of(seen(float("nan"), added_cond_kwargs=added).blame("no image")) == ""
    assert role_of(seen(float("nan"), encoder_hidden_states=SANE * told).blame("no image")) == ""


def test_what_a_controlnet_adds_is_not_held() -> None:
    found = seen(float("nan"), down_block_additional_residuals=(SANE,))
    assert not found.calls
    assert role_of(found.blame("no image")) == ""


def test_each_image_begins_anew() -> None:
    witness = Witness()
    base = SimpleNamespace(unet=Unet(), vae=Vae(NAN))
    base.unet.answers = [SANE * float("nan"), SANE]
    with witness.looking_at(Pipeline(base, None, False, {})):
        base.unet(SANE)
        first = witness.seen()
        witness.begin()
        base.unet(SANE)
    assert role_of(first.blame("no image")) == "unet"
    assert role_of(witness.seen().blame("no image")) == ""
