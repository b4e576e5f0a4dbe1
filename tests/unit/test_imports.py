"""The arrows of design.md, "The house": who may import whom. Lazy and string imports count."""

from __future__ import annotations

import ast
import asyncio
import socket
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from pytest_socket import SocketBlockedError

ROOT = Path(__file__).parents[2]

# fmt: off
IMPURE = frozenset({
    "asyncio", "concurrent", "ctypes", "datetime", "http", "io", "logging",
    "multiprocessing", "os", "pathlib", "queue", "random", "sched", "secrets", "select",
    "selectors", "shutil", "signal", "socket", "socketserver", "sqlite3", "ssl",
    "subprocess", "tempfile", "threading", "time", "urllib", "uuid",
})
# fmt: on
RAY = ("ray",)
HEAVY = ("torch", "diffusers", "transformers")
MAKE_MODELS = (
    "devnet.models",
    "devnet.diffusion_models",
    "devnet.adapter_models",
    "devnet.full_size",
    "devnet.language_model",
)
SLOW = (*RAY, *HEAVY, "eth_account", "web3", "sqlalchemy", "fastapi", "boto3", "huggingface_hub")
"""Each takes half a second and more to import."""
OURS = ("cluster", "actors", "devnet", "serve_app")


@dataclass(frozen=True)
class Import:
    source: str
    target: str
    line: int
    lazy: bool


def within(module: str, *packages: str) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in packages)


def layer(module: str) -> tuple[int, str]:
    """Where a module stands; an arrow points to a lower number or stays within the same layer."""
    if within(module, "cluster.core"):
        return 0, "core"
    if within(module, "cluster.runtime", "cluster.assembly"):
        return 3, "runtime"
    if within(module, "cluster.cli"):
        return 4, "cli"
    if within(module, "serve_app"):
        return 4, "serve_app"
    if within(module, "actors"):
        return 2, "actors"
    return 1, "shells"


def _named(node: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    match node:
        case ast.Import(names=names):
            yield from (alias.name for alias in names)
        case ast.ImportFrom(module=base, names=names, level=level):
            parents = module.split(".") if is_package else module.split(".")[:-1]
            up = parents[: len(parents) - level + 1] if level else []
            prefix = ".".join([*up, *([base] if base else [])])
            # Both, since `from package import name` may name a module.
            yield prefix
            yield from (f"{prefix}.{alias.name}" for alias in names)
        case ast.Call(func=func, args=[ast.Constant(value=str(name)), *_]):
            called = func.attr if isinstance(func, ast.Attribute) else getattr(func, "id", "")
            if called in {"import_module", "__import__"}:
                yield name


def _walk(node: ast.AST, module: str, is_package: bool, lazy: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        for target in _named(child, module, is_package):
            yield Import(module, target, getattr(child, "lineno", 0), lazy)
        inside = lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        inside = inside or (
            isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        )
        yield from _walk(child, module, is_package, inside)


def imports(root: Path) -> list[Import]:
    files = [
        path for name in OURS for path in (root / name).rglob("*.py") if "build" not in path.parts
    ]
    if (root / "serve_app.py").exists():
        files.append(root / "serve_app.py")
    found: list[Import] = []
    for path in sorted(files):
        parts = path.relative_to(root).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        module = ".".join(parts[:-1] if is_package else parts)
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        found += _walk(tree, module, is_package, lazy=False)
    return found


def _wrong(found: Import) -> str | None:
    source, target = found.source, found.target
    top = target.split(".")[0]
    if within(source, "cluster.core") and not within(target, "cluster", "cluster.core"):
        if top not in sys.stdlib_module_names:
            return "the core imports the standard library only"
        if top in IMPURE:
            return "the core is pure"
    if within(target, *RAY) and not within(
        source, "actors", "serve_app", "cluster.runtime", "cluster.assembly"
    ):
        return "ray is for actors, serve_app, cluster.runtime and cluster.assembly"
    if within(target, *HEAVY) and not within(source, "cluster.inference", *MAKE_MODELS):
        return "models are for cluster.inference and the modules that make some"
    if within(target, "devnet") and not within(source, "devnet"):
        verb = within(source, "cluster.cli") and found.lazy
        return None if verb else "devnet is for its own CLI verb, imported when it is called"
    if within(source, "devnet") or not within(target, *OURS) or target == "cluster":
        return None
    if within(source, "cluster.cli") and within(target, "serve_app") and found.lazy:
        return None  # the `up` verb puts the house together
    (low, mine), (high, theirs) = layer(source), layer(target)
    if high > low or (high == low and mine != theirs):
        return f"{mine} must not know {theirs}"
    return None


def violations(root: Path) -> list[str]:
    wrong = {
        (f.source, f.line, why): f.target for f in imports(root) if (why := _wrong(f)) is not None
    }
    return [
        f"{source}:{line} imports {target}: {why}" for (source, line, why), target in wrong.items()
    ]


def test_arrows_run_one_way() -> None:
    assert violations(ROOT) == []


def test_the_walk_sees_the_core() -> None:
    seen = {(found.source, found.target) for found in imports(ROOT)}
    assert ("cluster.core.lifecycle", "cluster.core.record") in seen


def at_start(module: str, found: Iterable[Import]) -> dict[str, str]:
    """What is imported as the module is, and by which one each was first."""
    eager: dict[str, list[str]] = defaultdict(list)
    for each in found:
        if not each.lazy:
            eager[each.source].append(each.target)
    first, todo = {module: ""}, [module]
    while todo:
        source = todo.pop()
        for target in eager[source]:
            parts = target.split(".")
            for name in (".".join(parts[: n + 1]) for n in range(len(parts))):
                if name not in first:
                    first[name] = source
                    todo.append(name)
    return first


def test_the_command_line_answers_at_once() -> None:
    """A shell's completion, `--help`, `status`: nobody waits for a library that isn't needed."""
    began = at_start("cluster.cli", imports(ROOT))
    assert {name: by for name, by in began.items() if within(name, *SLOW)} == {}
    assert {"click", "cluster.cli.look", "cluster.api_client"} < began.keys()


def test_what_is_imported_by_and_by_is_found(tmp_path: Path) -> None:
    _plant(tmp_path, "cluster/cli.py", "from cluster import a\ndef f():\n    import web3")
    _plant(tmp_path, "cluster/a.py", "if TYPE_CHECKING:\n    import ray\nimport cluster.b.c")
    _plant(tmp_path, "cluster/b/__init__.py", "import sqlalchemy.orm")
    _plant(tmp_path, "cluster/b/c.py", "")
    found = at_start("cluster.cli", imports(tmp_path)).items()
    slow = {name: by for name, by in found if within(name, *SLOW)}
    assert slow == {"sqlalchemy": "cluster.b", "sqlalchemy.orm": "cluster.b"}


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("cluster/core/bad.py", "import asyncio"),
        ("cluster/core/bad.py", "from time import monotonic"),
        ("cluster/core/bad.py", "import web3"),
        ("cluster/core/bad.py", "def f():\n    import os.path"),
        ("cluster/core/bad.py", "from cluster import journal"),
        ("cluster/core/bad.py", "from ..chain import rpc"),
        ("cluster/core/bad.py", "from cluster.journal import Journal"),
        ("cluster/core/__init__.py", "from ..journal import Journal"),
        ("cluster/journal.py", "import ray"),
        ("cluster/journal.py", "from ray import serve"),
        ("cluster/journal.py", "import importlib\nimportlib.import_module('ray.serve')"),
        ("cluster/journal.py", "from actors.coordinator import Coordinator"),
        ("cluster/journal.py", "from cluster.runtime import up"),
        ("cluster/journal.py", "import serve_app"),
        ("cluster/chain/rpc.py", "if True:\n    import torch.cuda"),
        ("cluster/chain/rpc.py", "from devnet import chain"),
        ("cluster/cli.py", "import devnet.up"),
        ("cluster/cli.py", "import serve_app"),
        ("cluster/runtime.py", "from cluster.cli import main"),
        ("actors/inference.py", "import torch"),
        ("actors/inference.py", "from cluster import runtime"),
        ("serve_app.py", "from cluster.cli import main"),
        ("devnet/chain.py", "import transformers"),
        ("devnet/chain.py", "import ray"),
    ],
)
def test_a_planted_violation_is_caught(tmp_path: Path, path: str, code: str) -> None:
    _plant(tmp_path, path, code)
    assert len(violations(tmp_path)) >= 1


@pytest.mark.parametrize(
    ("path", "code"),
    [
        (
            "cluster/core/good.py",
            "import enum\nfrom cluster.core import types\nfrom . import record",
        ),
        ("cluster/journal.py", "import sqlite3\nfrom cluster.core.ports import Journal"),
        (
            "cluster/cli.py",
            "def devnet():\n    from devnet.up import run\n    import cluster.runtime",
        ),
        (
            "cluster/runtime.py",
            "import ray\nfrom actors import coordinator\nimport cluster.journal",
        ),
        ("cluster/inference/diffusion.py", "import torch\nfrom cluster.inference import scoring"),
        ("actors/pool.py", "import ray\nfrom cluster.models import store\nfrom actors import gpu"),
        ("serve_app.py", "from ray import serve\nimport cluster.runtime\nimport actors.pool"),
        ("devnet/models.py", "import torch\nimport devnet.chain\nimport cluster.chain.abi"),
    ],
)
def test_what_is_allowed_passes(tmp_path: Path, path: str, code: str) -> None:
    _plant(tmp_path, path, code)
    assert violations(tmp_path) == []


def _plant(root: Path, path: str, code: str) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(code, encoding="utf-8")


@pytest.mark.filterwarnings("ignore:A test tried to use socket")
def test_unit_tests_reach_nothing() -> None:
    with pytest.raises(SocketBlockedError):
        socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    with pytest.raises(SocketBlockedError):
        socket.socket(socket.AF_UNIX).connect("/nowhere")


async def test_an_event_loop_works_all_the_same() -> None:
    await asyncio.sleep(0)
