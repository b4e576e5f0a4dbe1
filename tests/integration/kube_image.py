"""Images, as the containers find them: the shipped code in a folder of its own, and a version.

Two seams are sewn into each, where nothing else would let a test see or hold what happens: the gate
in front of every card, and a witness of every write to the journal, with the lease's epoch and the
process that wrote.
"""

from __future__ import annotations

import compileall
import functools
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SEAMS = "tests.integration.kube_image"
PACKAGES = ("cluster", "actors")


@dataclass(frozen=True, slots=True)
class Write:
    """`refused`: the lease had been followed by another."""

    epoch: int
    pid: str
    refused: bool


@dataclass(frozen=True, slots=True)
class Witness:
    """In the order of the writes: the journal lets one through at a time."""

    file: Path

    def all(self) -> list[Write]:
        if not self.file.exists():
            return []
        lines = (each.split() for each in self.file.read_text().splitlines())
        return [Write(int(epoch), pid, what == "refused") for epoch, pid, what in lines]


def make_image(folder: Path, version: str, seams: Path) -> Path:
    """`folder` goes before all else where Python looks; `seams` is where gate and witness are."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("*.pyc"))
    shutil.copy(ROOT / "serve_app.py", folder)
    _sew(
        folder / "cluster" / "__init__.py", '__version__ = "', f'__version__ = "{version}"  # was "'
    )
    engines = folder / "cluster" / "engines.py"
    _sew(engines, "def engine_factory(", "def plain_engine_factory(")
    _add(
        engines,
        f'import {SEAMS} as _seams\nengine_factory = _seams.gated(plain_engine_factory, "{seams}")',
    )
    lease = folder / "cluster" / "journal_lease.py"
    _add(lease, f'import {SEAMS} as _seams\ncheck = _seams.witnessed(check, "{seams / "writes"}")')
    compileall.compile_dir(str(folder), quiet=2)
    return folder


def _sew(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) == 1, f"{file}: {old}"
    file.write_text(text.replace(old, new))


def _add(file: Path, *lines: str) -> None:
    with file.open("a") as opened:
        opened.write("\n" + "\n".join(lines) + "\n")


# --- in the containers ----------------------------------------------------------------------------


def gated(plain: Callable[..., Any], folder: str) -> Callable[..., Any]:
    """`cluster.engines.engine_factory`, with the gate."""
    return functools.partial(_factory, plain, folder)


def _factory(plain: Callable[..., Any], folder: str, *given: Any) -> Callable[[], Any]:
    from tests.integration import operator_gate

    return functools.partial(operator_gate.make, operator_gate.Gate(Path(folder)), plain(*given))


def witnessed(check: Callable[..., None], file: str) -> Callable[..., None]:
    """`cluster.journal_lease.check`, which every write begins with, under the journal's lock."""

    def witness(connection: Any, lease: Any) -> None:
        try:
            check(connection, lease)
        except Exception:
            _note(file, lease.epoch, "refused")
            raise
        _note(file, lease.epoch, "wrote")

    return witness


def _note(file: str, epoch: int, what: str) -> None:
    # In a view of its own each container may have a process of this number.
    pid = os.readlink("/proc/self/ns/pid").strip("pid:[]") + f"/{os.getpid()}"
    with open(file, "a") as opened:
        opened.write(f"{epoch} {pid} {what}\n")
