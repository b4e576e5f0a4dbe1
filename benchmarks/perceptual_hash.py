"""The perceptual hash of a large image against a plain reading of the sheet, pixel by pixel.

The plain reading is the tests' reference: what anyone would write first from protocol.md section 4.
Both must give the same hash. The time is the process's own, so that a busy machine says the same,
and of several rounds the median.

    python -m benchmarks.perceptual_hash --json
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
from PIL import Image

from benchmarks.report import Figure, arguments, progress, publish
from cluster.inference.scoring import perceptual_hash
from tests.unit.phash_reference import reference


def picture(side: int, seed: int) -> Image.Image:
    """Smooth colours with some noise in them, as an RGB image."""
    rng = np.random.default_rng(seed)
    x, y = np.meshgrid(np.linspace(0, 1, side), np.linspace(0, 1, side))
    waves = [np.sin(a * x + b * y + c) for a, b, c in rng.normal(size=(3, 3)) * 4]
    values = 127.5 + 110 * np.stack(waves, axis=-1) + rng.normal(size=(side, side, 3)) * 5
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def seconds(compute: Callable[[Image.Image], bytes], image: Image.Image, rounds: int) -> float:
    spent = []
    for _ in range(rounds):
        began = time.process_time()
        compute(image)
        spent.append(time.process_time() - began)
    return statistics.median(spent)


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=1024, help="of the image, in pixels")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=7)
    asked = parser.parse_args()

    image = picture(asked.side, asked.seed)
    progress("the plain reading takes some seconds")
    if perceptual_hash(image) != reference(image):
        sys.exit("error: the two readings give different hashes")
    plain = seconds(reference, image, 1)
    ours = seconds(perceptual_hash, image, asked.rounds)
    figures: dict[str, Figure] = {
        "milliseconds": round(ours * 1000, 2),
        "milliseconds_plain": round(plain * 1000, 1),
        "ratio": round(ours / plain, 5),
        "side": asked.side,
        "rounds": asked.rounds,
    }
    publish("perceptual_hash", figures, "cpu", asked.json)


if __name__ == "__main__":
    main()
