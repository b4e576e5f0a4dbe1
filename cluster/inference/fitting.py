"""Whether a task's models can compute together, as their configurations tell.

Whoever sends tasks may name any models, one's UNet beside another's VAE. Where their shapes can't
meet, every card fails once it has loaded them, and would be blamed for it. What is compared here is
what diffusers' pipelines (0.42) hand from one part to the next; what a configuration leaves out has
the libraries' defaults.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

Config = dict[str, object]

_UNET: Final[Config] = {
    "in_channels": 4,
    "out_channels": 4,
    "cross_attention_dim": 1280,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
}
"""The defaults, a ControlNet's too."""
_VAE: Final[Config] = {"out_channels": 3, "latent_channels": 4, "block_out_channels": [64]}
_HINT: Final[Config] = {
    "conditioning_channels": 3,
    "conditioning_embedding_out_channels": [16, 32, 96, 256],
}
_TEXT: Final[Config] = {"hidden_size": 512, "projection_dim": 512}
MOST: Final = 2**20
MOST_BLOCKS: Final = 32
_SHARED: Final = (
    "in_channels",
    "cross_attention_dim",
    "encoder_hid_dim",
    "block_out_channels",
    "layers_per_block",
    "addition_embed_type",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
)
"""What a ControlNet must have as its UNet has it, as it hands over what each block made."""
_SIZES: Final = 6
"""Numbers that SDXL's UNet is told beside the text: heights, widths and a corner. A refiner that is
told a score of beauty has one less."""


def misfit(configs: dict[str, Config], is_xl: bool, is_scored: bool) -> str:
    """Why the parts can't compute together, in words; empty where nothing is known against it.

    `configs` by the roles of `cluster.inference.recipes`; `is_scored`: the refiner is told a score.
    """
    vae, unet = _VAE | configs["vae"], _UNET | configs["unet"]
    texts = [_text(configs[role]) for role in ("text_encoder", "text_encoder_2") if role in configs]
    found = [
        "" if vae["out_channels"] == 3 else "vae: what it makes hasn't three channels",
        _unet_misfit("unet", unet, vae, texts, _SIZES if is_xl else 0),
    ]
    if "controlnet" in configs:
        found.append(_controlnet_misfit(_UNET | _HINT | configs["controlnet"], unet, vae))
    if "refiner" in configs:
        refiner = _UNET | configs["refiner"]
        found.append(_unet_misfit("refiner", refiner, vae, texts[-1:], _SIZES - is_scored))
    return next(filter(None, found), "")


def scale(vae: Config) -> int:
    """Pixels along the side of a latent; 0 for what can't be a VAE, or is one of no sane size."""
    return _doublings((_VAE | vae)["block_out_channels"])


def _doublings(blocks: object) -> int:
    blocks = blocks if isinstance(blocks, list) else []
    return 2 ** (len(blocks) - 1) if 0 < len(blocks) <= MOST_BLOCKS else 0


def _text(config: Config) -> Config:
    """A text encoder's own settings; published with a whole CLIP's, they are a part of those."""
    inner = config.get("text_config")
    if config.get("model_type") == "clip" and isinstance(inner, dict):
        return _TEXT | inner
    return _TEXT | config


def _unet_misfit(role: str, unet: Config, vae: Config, texts: list[Config], sizes: int) -> str:
    """`texts`: the encoders whose embeddings it reads side by side, the pooled one of the last."""
    latents = vae["latent_channels"]
    if not unet["in_channels"] == unet["out_channels"] == latents:
        channels = f"{_short(unet['in_channels'])} to {_short(unet['out_channels'])}"
        return f"{role}: it makes {channels} channels, the VAE's latents have {_short(latents)}"
    if unet.get("class_embed_type") is not None or unet.get("num_class_embeds") is not None:
        return f"{role}: it asks for a class, which no task names"
    if unet.get("encoder_hid_dim_type") not in (None, "text_proj"):
        return f"{role}: it reads more than text"
    widths = unet.get("encoder_hid_dim") or unet["cross_attention_dim"]
    text = _sum(each["hidden_size"] for each in texts)
    if any(width != text for width in (widths if isinstance(widths, list) else [widths])):
        return f"{role}: it reads text {_short(widths)} wide, the encoders write it {text} wide"
    return _added_misfit(role, unet, texts[-1]["projection_dim"], sizes)


def _added_misfit(role: str, unet: Config, pooled: object, sizes: int) -> str:
    """Beside the text, SDXL's is told sizes and the pooled embedding; SD's nothing."""
    kind = unet.get("addition_embed_type")
    if not sizes:
        return "" if kind in (None, "text") else f"{role}: it asks for more than a prompt"
    each = unet.get("addition_time_embed_dim")
    told = _sum([pooled, *[each] * sizes])
    if kind != "text_time" or unet.get("projection_class_embeddings_input_dim") != told:
        return f"{role}: it can't be told sizes and a text as SDXL's are"
    return ""


def _controlnet_misfit(controlnet: Config, unet: Config, vae: Config) -> str:
    for name in _SHARED:
        theirs, ours = controlnet.get(name), unet.get(name)
        if theirs != ours:
            return f"controlnet: its {name} is {_short(theirs)}, the UNet's is {_short(ours)}"
    if any(controlnet.get(name) is not None for name in ("class_embed_type", "num_class_embeds")):
        return "controlnet: it asks for a class, which no task names"
    if controlnet["conditioning_channels"] != 3:
        return "controlnet: it reads other images than coloured ones"
    if _doublings(controlnet["conditioning_embedding_out_channels"]) != scale(vae):
        return "controlnet: its image isn't scaled down as the VAE's is"
    return ""


def _sum(numbers: Iterable[object]) -> int | None:
    """None where one of them is no width: it equals none."""
    total = 0
    for number in numbers:
        if not isinstance(number, int) or number > MOST:
            return None
        total += number
    return total


def _short(value: object) -> str:
    return str(value)[:60]
