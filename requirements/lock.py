"""Writes the locks that the images are installed from: `make lock`, after dependencies changed.

`worker.txt` has everything that a machine with cards needs. The head computes nothing, so
`head.txt` is the same without the frameworks; a test holds that the head's modules import without
them. Both images run one version of Python: Ray refuses nodes that differ in that.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
PYTHON: Final = "3.11"
PLATFORM: Final = "x86_64-manylinux_2_28"
EXTRAS: Final = ("gpu", "postgres", "tracing")
FRAMEWORKS: Final = frozenset(
    {
        "accelerate",
        "bitsandbytes",
        "compel",
        "diffusers",
        "mpmath",
        "networkx",
        "nvidia-ml-py",
        "opencv-python-headless",
        "peft",
        "safetensors",
        "sympy",
        "tokenizers",
        "torch",
        "transformers",
        "triton",
    }
)
"""Not on the head; nor is what comes from NVIDIA."""
ITEM: Final = re.compile(r"^([a-z0-9_.-]+)==\S+ \\\n(?:    --hash=\S+(?: \\)?\n)+", re.MULTILINE)
HEAD_COMMENT: Final = "# Written by `make lock`, from pyproject.toml; for Python 3.11 on Linux.\n"


def resolve(uv: str) -> str:
    extras = [word for extra in EXTRAS for word in ("--extra", extra)]
    command = [uv, "pip", "compile", "pyproject.toml", *extras, "--generate-hashes", "--quiet"]
    target = ["--python-version", PYTHON, "--python-platform", PLATFORM]
    plain = ["--no-header", "--no-annotate", "--upgrade"]
    done = subprocess.run(  # noqa: S603 - ours
        [*command, *target, *plain], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"error: {done.stderr.strip()}")
    return done.stdout


def for_the_head(lock: str) -> str:
    return "".join(found[0] for found in ITEM.finditer(lock) if not is_framework(found[1]))


def is_framework(package: str) -> bool:
    return package in FRAMEWORKS or package.startswith(("nvidia-", "cuda-"))


def main() -> int:
    uv = shutil.which("uv")
    if uv is None:
        print("error: uv is missing: pip install uv", file=sys.stderr)
        return 2
    lock = resolve(uv)
    here = Path(__file__).parent
    (here / "worker.txt").write_text(HEAD_COMMENT + lock, encoding="utf-8")
    (here / "head.txt").write_text(HEAD_COMMENT + for_the_head(lock), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
