"""Compile devnet/contracts into devnet/artifacts: ABI, creation code, and what the code came from.

`python -m devnet.compile` writes the artifacts, `--check` says whether they are current. The same
sources and the same compiler give the same bytes; nothing of the machine goes in.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.core.errors import ConfigError

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "contracts"
ARTIFACTS = HERE / "artifacts"
CONTRACTS = ("QOS", "Node", "VSSTask")


@dataclass(frozen=True, slots=True)
class Artifact:
    """A compiled contract; `abi` is the JSON ABI, `bytecode` hex with 0x."""

    name: str
    abi: list[dict[str, Any]]
    bytecode: str


def load(name: str) -> Artifact:
    """The checked-in artifact of a contract; needs no compiler."""
    data = json.loads((ARTIFACTS / f"{name}.json").read_text("utf-8"))
    return Artifact(name, data["abi"], data["bytecode"])


def sources_digest() -> str:
    """sha256 over all sources by name: the modules are part of every contract."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.glob("*.vy")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def compile_contract(name: str) -> str:
    """The artifact's text. Raises `ConfigError` where the compiler isn't installed."""
    try:
        from vyper import __version__ as version  # type: ignore[import-untyped]
        from vyper.cli.vyper_compile import compile_files  # type: ignore[import-untyped]
    except ImportError as error:
        raise ConfigError(
            "the contracts' compiler is missing: pip install 'crynux-cluster[devnet]'"
        ) from error
    path = SOURCES / f"{name}.vy"
    (output,) = compile_files(
        [str(path)],
        ["abi", "bytecode"],
        paths=[str(SOURCES)],
        include_sys_path=False,
        no_bytecode_metadata=True,
    ).values()
    document = {
        "contract": name,
        "compiler": f"vyper {version}",
        "sources_sha256": sources_digest(),
        "abi": output["abi"],
        "bytecode": output["bytecode"],
    }
    return json.dumps(document, indent=1) + "\n"


def outdated() -> tuple[str, ...]:
    """The contracts whose artifact isn't what their source compiles to now."""
    return tuple(
        name
        for name in CONTRACTS
        if not (path := ARTIFACTS / f"{name}.json").is_file()
        or path.read_text("utf-8") != compile_contract(name)
    )


def write() -> None:
    ARTIFACTS.mkdir(exist_ok=True)
    for name in CONTRACTS:
        (ARTIFACTS / f"{name}.json").write_text(compile_contract(name), "utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m devnet.compile", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if outdated")
    arguments = parser.parse_args(argv)
    try:
        if arguments.check:
            stale = outdated()
            for name in stale:
                print(
                    f"{name}: the artifact is not what the source gives: python -m devnet.compile"
                )
            return 1 if stale else 0
        write()
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
