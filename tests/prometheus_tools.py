"""Prometheus and promtool, from Debian's package: `python -m tests.prometheus_tools` unpacks them
into .devnet/prometheus, if they aren't there yet. Nothing is installed on the machine, no daemon is
started.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import yaml

from devnet.anvil import HOST, NODE_FOLDER, die_with_parent, free_port

FOLDER = NODE_FOLDER.with_name("prometheus")
PACKAGE = "prometheus"
PROGRAMS = ("prometheus", "promtool")
START_SECONDS = 120.0
COMMAND_SECONDS = 240.0


def find(name: str) -> Path | None:
    unpacked = FOLDER / "usr" / "bin" / name
    if unpacked.is_file():
        return unpacked
    on_path = shutil.which(name)
    return None if on_path is None else Path(on_path)


def program(name: str) -> Path:
    """Where it is missing, a test that needs it fails on CI and is left out elsewhere."""
    found = find(name)
    if found is not None:
        return found
    said = f"{name} is missing: python -m tests.prometheus_tools, or install {PACKAGE}"
    if os.environ.get("CI"):
        pytest.fail(said)
    pytest.skip(said)


def unpack() -> str:
    """Why there is nothing unpacked; empty when all went well."""
    for needed in ("apt-get", "dpkg-deb"):
        if shutil.which(needed) is None:
            return f"there is no {needed}: this takes Debian's package"
    with tempfile.TemporaryDirectory() as folder:
        problem = _download(Path(folder))
        if problem and os.geteuid() == 0:  # the lists may be missing, or old
            _run("apt-get", "update", "-qq")
            problem = _download(Path(folder))
        found = sorted(Path(folder).glob(f"{PACKAGE}_*.deb"))
        if problem or not found:
            return problem or "apt-get downloaded nothing"
        FOLDER.parent.mkdir(parents=True, exist_ok=True)
        # Whole or not at all: a run that was cut off leaves nothing to be taken for it.
        with tempfile.TemporaryDirectory(dir=FOLDER.parent, prefix=".prometheus-") as beside:
            problem = _run("dpkg-deb", "-x", str(found[0]), beside)
            if problem:
                return problem
            shutil.rmtree(FOLDER, ignore_errors=True)
            shutil.copytree(beside, FOLDER, symlinks=True)
    return "" if all(map(find, PROGRAMS)) else f"{found[0].name} has no {' or '.join(PROGRAMS)}"


def _download(folder: Path) -> str:
    # As root it would else be fetched by a user who can't write there.
    plain = ("-o", "APT::Sandbox::User=root") if os.geteuid() == 0 else ()
    return _run("apt-get", *plain, "download", "-qq", PACKAGE, cwd=folder)


def _run(*command: str, cwd: Path | None = None) -> str:
    """What was said when it failed; empty when it didn't."""
    try:
        done = subprocess.run(
            command, cwd=cwd, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"{command[0]} took more than {COMMAND_SECONDS:.0f} s"
    said = (done.stderr or done.stdout).strip().splitlines()
    return "" if done.returncode == 0 else f"{' '.join(command)}: {' '.join(said[-2:])}"


def promtool(*arguments: str | Path, said: str | None = None) -> str:
    """What it says; fails with that when it finds a fault."""
    done = subprocess.run(
        [program("promtool"), *arguments],
        input=said,
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS,
        check=False,
    )
    told = done.stdout + done.stderr
    assert done.returncode == 0, told
    return told


class Prometheus:
    """One that runs: `query` as its HTTP API has it."""

    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **parameters: str) -> httpx.Response:
        return httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=60)

    def query(self, expression: str) -> httpx.Response:
        return self.get("query", query=expression)


@contextmanager
def prometheus(folder: Path, config: dict[str, object]) -> Iterator[Prometheus]:
    """One on a loopback port; its data, its configuration and its log are in `folder`."""
    file, port = folder / "prometheus.yaml", free_port()
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [str(program("prometheus")), f"--config.file={file}"]
    command += [f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={HOST}:{port}"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, preexec_fn=die_with_parent()
        )
    try:
        _wait_until_ready(process, f"http://{HOST}:{port}", folder / "prometheus.log")
        yield Prometheus(f"http://{HOST}:{port}")
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        ended = process.poll() is not None
        assert not ended and time.monotonic() < deadline, log.read_text(errors="replace")[-2000:]
        try:
            if httpx.get(f"{url}/-/ready", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)


def main() -> int:
    if all(map(find, PROGRAMS)):
        return 0
    print(f"==> unpacking Debian's {PACKAGE} into {FOLDER} for the tests", flush=True)
    problem = unpack()
    if not problem:
        return 0
    print(f"==> Prometheus is missing, and tests need it: {problem}", file=sys.stderr)
    return 1 if os.environ.get("CI") else 0


if __name__ == "__main__":
    sys.exit(main())
