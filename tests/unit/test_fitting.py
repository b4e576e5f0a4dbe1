"""Which models can compute together, by configurations as they are published."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.inference.fitting import Config, misfit, scale

VAE: Config = {"latent_channels": 4, "out_channels": 3, "block_out_channels": [128, 256, 512, 512]}
UNET: Config = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 768,
}
HINT: Config = {"conditioning_embedding_out_channels": [16, 32, 96, 256], "class_embed_type": None}
SD15: dict[str, Config] = {
    "unet": UNET,
    "vae": VAE,
    "text_encoder": {"hidden_size": 768, "projection_dim": 768},
    "controlnet": {key: UNET[key] for key in UNET if key != "out_channels"} | HINT,
}
XL: Config = UNET | {
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "class_embed_type": None,
    "num_class_embeds": None,
}
SDXL: dict[str, Config] = {
    "unet": XL,
    "vae": VAE,
    "text_encoder": {"hidden_size": 768, "projection_dim": 768},
    "text_encoder_2": {"hidden_size": 1280, "projection_dim": 1280},
    "controlnet": XL | HINT,
    "refiner": XL
    | {"cross_attention_dim": 1280, "projection_class_embeddings_input_dim": 2560}
    | {"block_out_channels": [384, 768, 1536, 1536]},
}


def without(role: str, *names: str) -> dict[str, Config]:
    return SD15 | {role: {key: value for key, value in SD15[role].items() if key not in names}}


def changed(role: str, **settings: Any) -> dict[str, Config]:
    of = SDXL if role == "refiner" else SD15
    return of | {role: of[role] | settings}


@pytest.mark.parametrize(
    "configs",
    [
        SD15,
        without("unet", "in_channels", "out_channels", "layers_per_block"),
        without("vae", "latent_channels", "out_channels"),
        without("controlnet", "in_channels", "conditioning_embedding_out_channels"),
        changed("unet", cross_attention_dim=[768, 768]) | {"controlnet": changed(
            "controlnet", cross_attention_dim=[768, 768])["controlnet"]},
        SD15 | {"text_encoder": {"model_type": "clip", "text_config": {"hidden_size": 768}}},
    ],
)  # fmt: skip
def test_what_fits_of_sd(configs: dict[str, Config]) -> None:
    assert misfit(configs, is_xl=False, is_scored=False) == ""


def test_what_fits_of_sdxl() -> None:
    assert misfit(SDXL, is_xl=True, is_scored=True) == ""
    unscored = {"projection_class_embeddings_input_dim": 2816}
    assert misfit(changed("refiner", **unscored), is_xl=True, is_scored=False) == ""
    turbo = {role: config for role, config in SDXL.items() if role not in ("controlnet", "refiner")}
    assert misfit(turbo, is_xl=True, is_scored=False) == ""


@pytest.mark.parametrize(
    ("role", "settings"),
    [
        ("unet", {"in_channels": 9}),
        ("unet", {"in_channels": 8}),
        ("unet", {"out_channels": 8}),
        ("vae", {"latent_channels": 16}),
        ("vae", {"out_channels": 4}),
        ("vae", {"block_out_channels": [128, 256, 512]}),
        ("unet", {"cross_attention_dim": 1024}),
        ("unet", {"cross_attention_dim": [768, 1024]}),
        ("unet", {"cross_attention_dim": "768"}),
        ("unet", {"encoder_hid_dim": 1024}),
        ("unet", {"encoder_hid_dim": 768, "encoder_hid_dim_type": "image_proj"}),
        ("unet", {"num_class_embeds": 1000}),
        ("unet", {"class_embed_type": "projection"}),
        ("unet", {"addition_embed_type": "text_time"}),
        ("unet", {"addition_embed_type": "image"}),
        ("text_encoder", {"hidden_size": 1024}),
        ("text_encoder", {"hidden_size": None}),
        ("text_encoder", {"hidden_size": 2**40}),
        ("controlnet", {"block_out_channels": [320, 640, 1280]}),
        ("controlnet", {"layers_per_block": 1}),
        ("controlnet", {"in_channels": 8}),
        ("controlnet", {"cross_attention_dim": 1024}),
        ("controlnet", {"class_embed_type": "timestep"}),
        ("controlnet", {"conditioning_channels": 1}),
        ("controlnet", {"conditioning_embedding_out_channels": [16, 32, 96]}),
        ("controlnet", {"conditioning_embedding_out_channels": None}),
        ("refiner", {"in_channels": 9}),
        ("refiner", {"cross_attention_dim": 2048}),
        ("refiner", {"projection_class_embeddings_input_dim": 2816}),
        ("refiner", {"addition_embed_type": None}),
        ("refiner", {"addition_time_embed_dim": None}),
    ],
    ids=str,
)
def test_what_cannot_compute_together(role: str, settings: dict[str, Any]) -> None:
    line = misfit(changed(role, **settings), is_xl=role == "refiner", is_scored=True)
    assert line
    assert "\n" not in line
    assert len(line) < 300


def test_sdxl_must_be_told_sizes() -> None:
    for settings in (
        {"addition_embed_type": None},
        {"projection_class_embeddings_input_dim": 2560},
        {"addition_time_embed_dim": 128},
    ):
        configs = SDXL | {"unet": XL | settings, "controlnet": XL | settings | HINT}
        assert "sizes" in misfit(configs, is_xl=True, is_scored=True)


@pytest.mark.parametrize(
    ("blocks", "side"),
    [([1] * 4, 8), ([1] * 3, 4), ([1], 1), ([], 0), ("abcd", 0), (None, 0), ([1] * 20_000, 0)],
)
def test_scale(blocks: object, side: int) -> None:
    assert scale({"block_out_channels": blocks}) == side
    assert scale({}) == 1
