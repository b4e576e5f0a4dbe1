"""`crynux-cluster up` with a keystore: who has its password and its key, and what a wrong one does.

The processes are searched while they run, the supervisor among them: only the coordinator may have
either. After a task the files are searched too, the API's answers, and what the terminal was shown:
nothing may have either. The terminal is a pseudo-terminal, and the process that holds it is not the
operator's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from cluster import keystore
from cluster.config import load
from cluster.core.record import Closed, Outcome
from cluster.identity import TREASURY, Identity
from cluster.journal import SqlJournal
from cluster.status import Status
from devnet.application import TaskReport
from devnet.network import Devnet, SimulatedCards
from tests.integration.operator_start import MODELS
from tests.integration.operator_world import PATIENCE, TEST_SECONDS, task
from tests.integration.process_memory import environment, in_answers, in_files, memory, secrets

pytestmark = pytest.mark.timeout(TEST_SECONDS)
WORD = "unmistakable-pass-word-9431"
CARD = SimulatedCards("NVIDIA L4", 8, 1)  # type: ignore[arg-type]
MEMORY = Path("/dev/shm")  # noqa: S108
TERMINAL = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"


class Terminal:
    """Where `crynux-cluster up` was typed."""

    def __init__(self, config: Path, **environment: str) -> None:
        command = [sys.executable, "-m", "cluster.cli", "up", "--config", str(config)]
        known = {key: value for key, value in os.environ.items() if key != keystore.PASSWORD}
        self._shell = subprocess.Popen(  # noqa: S603 - our own command
            [sys.executable, "-c", TERMINAL, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=known | {"PYTHONPATH": str(Path.cwd())} | environment,
        )
        self.said = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._shell.stdout is not None
        while piece := self._shell.stdout.read1(65_536):  # type: ignore[attr-defined]
            self.said += piece

    def type(self, line: str) -> None:
        assert self._shell.stdin is not None
        self._shell.stdin.write(f"{line}\n".encode())
        self._shell.stdin.flush()

    def until(self, holds: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not holds():
            assert self._shell.poll() is None, f"it ended: {self.text[-3000:]}"
            assert time.monotonic() < deadline, f"never so: {what}: {self.text[-3000:]}"
            time.sleep(0.2)

    @property
    def text(self) -> str:
        return self.said.decode(errors="replace")

    @property
    def supervisor(self) -> psutil.Process:
        (child,) = psutil.Process(self._shell.pid).children()
        return child

    def ended(self) -> int:
        code = self._shell.wait(PATIENCE)
        self._reader.join(10)
        return code

    def close(self) -> None:
        if self._shell.poll() is None:
            with contextlib.suppress(psutil.Error, ValueError):
                os.kill(self.supervisor.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._shell.wait(120)
        if self._shell.poll() is None:
            shell = psutil.Process(self._shell.pid)
            for process in [*shell.children(recursive=True), shell]:
                with contextlib.suppress(psutil.Error):
                    process.kill()


@pytest.fixture(scope="module")
def devnet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Devnet]:
    folder = tmp_path_factory.mktemp("devnet")
    with Devnet(folder, block_time=1.0, models=MODELS, cards=(CARD,)) as made:
        yield made


@pytest.fixture(scope="module")
def phrase(devnet: Devnet) -> str:
    return (devnet.directory / "seed").read_text().strip()


@pytest.fixture(scope="module")
def config(devnet: Devnet, phrase: str) -> Path:
    """As the devnet's, but for a keystore in the seed's place."""
    key = devnet.directory / "key.json"
    treasury = Identity.from_phrase(phrase).address(TREASURY)
    keystore.write_private(key, keystore.seal_phrase(phrase, WORD, treasury, 2**10))
    found = yaml.safe_load(devnet.config_file.read_text())
    found["identity"] = {"keystore_file": "key.json", "accounts": 1}
    file = devnet.directory / "sealed.yaml"
    file.write_text(yaml.safe_dump(found))
    return file


@pytest.fixture
def terminals() -> Iterator[list[Terminal]]:
    opened: list[Terminal] = []
    yield opened
    for each in opened:
        each.close()


def status(devnet: Devnet) -> Status | None:
    with contextlib.suppress(httpx.HTTPError, ValueError):
        return Status.model_validate_json(httpx.get(f"{devnet.operator_url}/v1/status").content)
    return None


def serves(devnet: Devnet, after: int = 0) -> bool:
    """It acts, in a term after that one, with a card that is ready and an account that serves."""
    found = status(devnet)
    return (
        found is not None
        and (found.epoch or 0) > after
        and any(gpu.state.value == "ready" for gpu in found.gpus)
        and any(account.status == "available" for account in found.accounts)
    )


def coordinator(supervisor: psutil.Process) -> psutil.Process:
    (found,) = (
        each
        for each in supervisor.children(recursive=True)
        if "CoordinatorActor" in " ".join(each.cmdline())
    )
    return found


def search(supervisor: psutil.Process, wanted: dict[str, bytes]) -> list[str]:
    """Who but the coordinator has any of it."""
    keeper = coordinator(supervisor)
    if not any(memory(keeper)):
        pytest.skip("this machine lets no process read another's memory")
    found, searched = [], 0
    for process in [supervisor, *supervisor.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            inherited = environment(process)
            found += [
                f"{name} in the environment of {process.name()}"
                for name, each in wanted.items()
                if each in inherited
            ]
            if process.pid == keeper.pid:
                continue
            for piece in memory(process):
                searched += len(piece)
                found += [f"{name} in {process.name()}" for name, s in wanted.items() if s in piece]
    assert searched > 50 * 2**20, "the processes' memory was read"
    kept = (piece for piece in memory(keeper) if any(s in piece for s in wanted.values()))
    assert next(kept, None), "where it is, it is found"
    return found


def session(supervisor: psutil.Process) -> Path:
    """Where the Ray that it began keeps its logs and what it is told."""
    option = "--session_dir="
    (found,) = {
        Path(word.removeprefix(option))
        for each in supervisor.children(recursive=True)
        if each.name() == "raylet"
        for word in each.cmdline()
        if word.startswith(option)
    }
    return found


def work(devnet: Devnet) -> None:
    """One task is done, its answer fetched, and the fee paid."""

    async def run() -> list[TaskReport]:
        async with asyncio.timeout(PATIENCE):
            return await devnet.application(devnet.directory / "images").run([task("secret")])

    (report,) = asyncio.run(run())
    assert report.as_expected, f"{report.actual_end} {report.problem}"
    with contextlib.closing(SqlJournal(load(devnet.config_file).journal.url)) as journal:
        deadline = time.monotonic() + PATIENCE
        while True:
            events = [event for event, _ in journal.story(report.commitment)]
            if events and isinstance(events[-1], Closed):
                break
            assert time.monotonic() < deadline, f"the operator never closed it: {events}"
            time.sleep(0.2)
    assert events[-1] == Closed(Outcome.SUCCESS, events[-1].payment)
    assert events[-1].payment > 0


def test_a_typed_password_reaches_the_coordinator_and_nobody_else(
    devnet: Devnet, config: Path, phrase: str, terminals: list[Terminal]
) -> None:
    wanted = secrets(phrase, 1) | {"the password": WORD.encode()}
    terminal = Terminal(config)
    terminals.append(terminal)
    terminal.until(lambda: "Password of" in terminal.text, "it asks")
    terminal.type(WORD)
    terminal.until(lambda: serves(devnet), "it serves")
    work(devnet)
    supervisor = terminal.supervisor
    (halves,) = MEMORY.glob(f"crynux-{supervisor.pid}-*")

    def nobody_else() -> None:
        assert search(supervisor, wanted) == []
        # The devnet's own file has the phrase, and the search finds it.
        places = (devnet.directory, session(supervisor), halves)
        assert in_files(wanted, *places) == {devnet.directory / "seed": ["the phrase"]}
        assert in_answers(wanted, devnet.operator_url) == []
        assert [name for name, each in wanted.items() if each in terminal.said] == []

    nobody_else()
    before = status(devnet)
    assert before is not None
    # One that crashes is begun anew, and nobody is asked again.
    asked = terminal.text.count("Password of")
    coordinator(supervisor).kill()
    terminal.until(lambda: serves(devnet, before.epoch or 0), "it serves again")
    assert terminal.text.count("Password of") == asked
    nobody_else()
    os.kill(supervisor.pid, signal.SIGINT)
    assert terminal.ended() == 0, terminal.text[-3000:]
    assert [name for name, each in wanted.items() if each in terminal.said] == []
    assert not halves.exists()


def test_a_password_from_the_environment_is_not_inherited(
    devnet: Devnet, config: Path, phrase: str, terminals: list[Terminal]
) -> None:
    wanted = secrets(phrase, 1)
    terminal = Terminal(config, CRYNUX_PASSWORD=WORD)
    terminals.append(terminal)
    terminal.until(lambda: serves(devnet), "it serves")
    supervisor = terminal.supervisor
    assert search(supervisor, wanted) == []
    heirs = supervisor.children(recursive=True)
    assert len(heirs) > 5
    assert [each.name() for each in heirs if WORD.encode() in environment(each)] == []
    keeper = coordinator(supervisor).pid
    others = [each for each in heirs if each.pid != keeper]
    assert [e.name() for e in others if any(WORD.encode() in piece for piece in memory(e))] == []


def test_a_wrong_password_is_one_line(config: Path, terminals: list[Terminal]) -> None:
    terminal = Terminal(config)
    terminals.append(terminal)
    terminal.until(lambda: "Password of" in terminal.text, "it asks")
    terminal.type("another password")
    assert terminal.ended() == 2, terminal.text[-3000:]
    said = [line for line in terminal.text.splitlines() if line.startswith("crynux-cluster: ")]
    assert len(said) == 1
    assert said[0].strip().endswith("key.json: the password doesn't open it")
    assert "Traceback" not in terminal.text
