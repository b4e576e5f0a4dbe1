"""The engine against a bare diffusers loop, both warm, on the same work: SD 1.5 and SDXL (`_sdxl`).

The bare loop (`benchmarks.bare_loop`) is what the work can't do without. The engine does that as it
does for a task, with its checks and its progress. Rounds of both alternate, and each is counted by
its median: `ratio_seconds`. That loop runs under the engine's settings of torch; what these cost
shows against the same loop in a process of its own, where torch is as it comes:
`ratio_seconds_determinism` compares the two loops, and `ratio_seconds_default`, the product of both
ratios, the engine with the loop at torch's defaults.

Besides: what a change of model costs when it comes from disk (`seconds_load`, the files read before
by this process) and from host memory (`seconds_host_return`), and a LoRA that is put on
(`seconds_lora_switch`), each beyond a warm run. `seconds_first` is an engine's first task.

    python -m benchmarks.engine_overhead --device auto --json

Torch, and what takes it along (`benchmarks.engine_bench`), is imported after the card was claimed.
On a GPU the models are of the real sizes and in half precision (`--size full`), made on the spot.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.report import Figure, arguments, claimed, progress, publish
from cluster.inference.devices import Device
from devnet import full_size
from devnet.models import SD15, SD15_LORA, SDXL, SDXL_LORA, make_models

FOLDER: Final = {"tiny": Path(".devnet/models"), "full": Path(".devnet/full-models")}
DTYPES: Final = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True)
class Family:
    """Its tiny model and LoRA, its full ones, and an image's side in pixels with these."""

    tiny: str
    tiny_lora: str
    full: full_size.FullSize
    full_side: int


FAMILIES: Final = {
    "sd15": Family(SD15[0], SD15_LORA, full_size.SD15, 512),
    "sdxl": Family(SDXL, SDXL_LORA, full_size.SDXL, 1024),
}


@dataclass(frozen=True, slots=True)
class Chosen:
    """What is measured: options as given, or what the size and the device make of them."""

    size: str
    dtype: str
    root: Path
    steps: int
    images: int
    rounds: int


def chosen(asked: argparse.Namespace, device: Device) -> Chosen:
    size = asked.size or ("tiny" if device.torch_device == "cpu" else "full")
    full = size == "full"
    return Chosen(
        size,
        asked.dtype or ("float16" if full else "float32"),
        asked.models or FOLDER[size],
        asked.steps or (20 if full else 10),
        asked.images or (2 if full else 4),
        asked.rounds or (5 if full else 7),
    )


def options() -> argparse.ArgumentParser:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("tiny", "full"), help="full on a GPU, else tiny")
    parser.add_argument("--dtype", choices=DTYPES, help="float16 for full, else float32")
    parser.add_argument("--family", choices=sorted(FAMILIES), nargs="+", default=sorted(FAMILIES))
    parser.add_argument("--side", type=int, help="pixels: 256, with full ones 512, SDXL 1024")
    parser.add_argument("--steps", type=int, help="10, with full ones 20")
    parser.add_argument("--images", type=int, help="4, with full ones 2")
    parser.add_argument("--rounds", type=int, help="7, with full ones 5")
    parser.add_argument("--models", type=Path, help=f"{FOLDER['tiny']}, {FOLDER['full']}")
    return parser


def main() -> None:
    asked = options().parse_args()
    device = claimed(asked.device, os.environ)
    from benchmarks.engine_bench import measure, prepare
    from cluster.inference.determinism import make_deterministic

    make_deterministic(threads=None)  # before CUDA begins
    what = chosen(asked, device)
    progress("making the tiny models where they are missing")
    make_models(what.root)
    figures: dict[str, Figure] = {"size": what.size, "dtype": what.dtype, "rounds": what.rounds}
    for name in sorted(asked.family):
        bench = prepare(FAMILIES[name], what, device, asked.side)
        progress(f"{name}: images of {bench.bare.side} pixels, {what.steps} steps")
        suffix = "" if name == "sd15" else f"_{name}"
        found = measure(bench, what.rounds)
        figures |= {f"{figure}{suffix}": value for figure, value in found.items()}
    publish("engine_overhead", figures, device.torch_device, asked.json)


if __name__ == "__main__":
    main()
