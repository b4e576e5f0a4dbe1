"""What tests need from Debian: `python -m tests.debian` installs what is missing, or says what is.

CI and containers run as root; on anyone's own machine nothing is installed behind his back.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

PACKAGES = {"chromium": "chromium"}
"""Programs, and the package that each comes in."""


def missing() -> list[str]:
    return [package for program, package in PACKAGES.items() if shutil.which(program) is None]


def program(name: str) -> str:
    """Its path. Where it is missing, a test that needs it fails on CI and is left out elsewhere."""
    found = shutil.which(name)
    if found is not None:
        return found
    said = f"{name} is missing: apt-get install {PACKAGES[name]}"
    if os.environ.get("CI"):
        pytest.fail(said)
    pytest.skip(said)


def main() -> int:
    wanted = missing()
    if not wanted:
        return 0
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        print(f"==> tests that need {', '.join(wanted)} are left out: install them to run all")
        return 0
    print(f"==> installing {', '.join(wanted)} for the tests (Debian)", flush=True)
    quiet = {"env": os.environ | {"DEBIAN_FRONTEND": "noninteractive"}, "check": True}
    subprocess.run(["apt-get", "update", "-qq"], **quiet)  # type: ignore[call-overload]
    install = ["apt-get", "install", "-qq", "-y", "--no-install-recommends", *wanted]
    subprocess.run(install, stdout=subprocess.DEVNULL, **quiet)  # type: ignore[call-overload]
    return 0


if __name__ == "__main__":
    sys.exit(main())
