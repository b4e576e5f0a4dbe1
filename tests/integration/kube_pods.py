"""Pods as processes of this machine, and what a kubelet does for them.

Each container is a session of its own. Where the machine lets us, each has its own view of the
processes too, as in Kubernetes: one for the whole pod with `shareProcessNamespace`, else one each.
Memory, network, users and the file system are the machine's.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from devnet.anvil import die_with_parent

TICK_SECONDS = 0.3
BACKOFF_SECONDS = 5.0
"""Between two starts of a container that ends again and again."""
UNSHARE = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child", "--")
PAUSE = ("bash", "-c", "trap : TERM; sleep infinity & wait")
"""The first process of a shared view: it takes in what others leave behind."""


@functools.cache
def own_views() -> bool:
    """Whether processes can be given views of their own here."""
    try:
        return subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@dataclass(frozen=True, slots=True)
class Stat:
    pid: int
    parent: int
    session: int
    state: str
    began: str


def processes() -> Iterator[Stat]:
    """All that are alive."""
    for entry in os.scandir("/proc"):
        if not entry.name.isdecimal():
            continue
        try:
            fields = Path(entry.path, "stat").read_text().rpartition(") ")[2].split()
        except OSError:
            continue
        if fields[0] not in "ZX":
            yield Stat(int(entry.name), int(fields[1]), int(fields[3]), fields[0], began=fields[19])


def title(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return ""
    return words.replace(b"\0", b" ").decode(errors="replace")


@dataclass
class Process:
    """A command in a pod: its own, or one that is executed there. `inside` is what shows it the
    pod's processes: a prefix of the command."""

    popen: subprocess.Popen[bytes]
    wrapped: bool
    _main: int = 0

    @property
    def session(self) -> int:
        return self.popen.pid

    @property
    def main(self) -> int:
        """The pid of the command itself."""
        while self.wrapped and not self._main and self.popen.poll() is None:
            inner = (each.pid for each in processes() if each.parent == self.popen.pid)
            self._main = next(inner, 0)
        return self._main or self.popen.pid


@dataclass
class Container:
    spec: Mapping[str, Any]
    env: Mapping[str, str]
    log: Path
    process: Process | None = None
    starts: int = 0
    began: float = 0.0
    probes: dict[str, Probe] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.spec["name"])

    def ended(self) -> int | None:
        return None if self.process is None else self.process.popen.poll()


@dataclass
class Probe:
    """An HTTP probe, as it is rendered."""

    url: str
    spec: Mapping[str, Any]
    looked: float = 0.0
    failed: int = 0
    passed: bool = False

    def due(self, now: float) -> bool:
        return now - self.looked >= float(self.spec["periodSeconds"])

    def look(self) -> None:
        try:
            good = httpx.get(self.url, timeout=self.spec["timeoutSeconds"]).status_code < 400
        except httpx.HTTPError:
            good = False
        self.looked = time.monotonic()
        self.failed = 0 if good else self.failed + 1
        self.passed = good or (self.passed and not self.exhausted)

    @property
    def exhausted(self) -> bool:
        return self.failed >= int(self.spec["failureThreshold"])


class Pod:
    """`spec` is a pod's, all of whose text is this machine's; `host` is where it is probed."""

    def __init__(
        self,
        name: str,
        spec: Mapping[str, Any],
        environments: Mapping[str, Mapping[str, str]],
        host: str,
        folder: Path,
        logs: Path,
    ) -> None:
        self.name = name
        self.host = host
        self._spec = spec
        self._folder = folder
        self._logs = logs
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._over = threading.Event()
        self._going = threading.Event()
        self._going.set()
        self._pause: Process | None = None
        self._sessions: set[int] = set()
        made = [
            Container(each, environments[each["name"]], logs / f"{name}-{each['name']}.log")
            for each in (*spec.get("initContainers", ()), *spec["containers"])
        ]
        count = len(spec.get("initContainers", ()))
        self._inits, self.containers = made[:count], made[count:]
        self._thread = threading.Thread(target=self._tend, name=f"kubelet {name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def ready(self) -> bool:
        return all(
            each.probes["readinessProbe"].passed if "readinessProbe" in each.probes else False
            for each in self.containers
        )

    # --- what a kubelet does ---------------------------------------------------------------------

    def _tend(self) -> None:
        """Lives as long as the pod: its processes die with the thread that began them."""
        with self._lock:
            if own_views() and self._spec.get("shareProcessNamespace"):
                log = self._logs / f"{self.name}.log"
                self._pause = self._begin((*UNSHARE, *PAUSE), {}, log, True)
        for container in self._inits:
            while self._go_on() and container.ended() != 0:
                self._keep(container)
        for container in self.containers:
            for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
                if kind in container.spec:
                    get = container.spec[kind]["httpGet"]
                    url = f"http://{self.host}:{get['port']}{get['path']}"
                    container.probes[kind] = Probe(url, container.spec[kind])
        while self._go_on():
            for container in self.containers:
                self._keep(container)
                self._probe(container)
        self._over.wait()

    def _go_on(self) -> bool:
        self._going.wait()
        return not self._stop.wait(TICK_SECONDS)

    def _keep(self, container: Container) -> None:
        """Begun, and begun anew whenever it ended."""
        if container.process is not None and container.ended() is None:
            return
        if container.starts > 1 and time.monotonic() - container.began < BACKOFF_SECONDS:
            return
        if container.process is not None:
            self._end_session(container.process)
        command = (*container.spec.get("command", ()), *container.spec.get("args", ()))
        with self._lock:
            if self._stop.is_set():
                return
            container.process = self._run(container, command)
        container.starts += 1
        container.began = time.monotonic()
        for probe in container.probes.values():
            probe.passed, probe.failed, probe.looked = False, 0, container.began

    def _probe(self, container: Container) -> None:
        now = time.monotonic()
        started = container.probes.get("startupProbe")
        if started is not None and not started.passed:
            if started.due(now):
                started.look()
                self._judge(container, started)
            return
        for kind in ("livenessProbe", "readinessProbe"):
            probe = container.probes.get(kind)
            if probe is None or not probe.due(now) or self._stop.is_set():
                continue
            probe.look()
            if kind == "livenessProbe":
                self._judge(container, probe)

    def _judge(self, container: Container, probe: Probe) -> None:
        if probe.exhausted and container.process is not None and self._going.is_set():
            self._end_session(container.process)

    def _end_session(self, process: Process) -> None:
        """All that a container has left behind, as a runtime does it."""
        _end(lambda: {process.session})
        process.popen.wait()

    # --- its processes ---------------------------------------------------------------------------

    def _run(self, container: Container, command: Sequence[str]) -> Process:
        if not own_views():
            return self._begin(command, container.env, container.log, False)
        if self._pause is not None:
            inside = ("nsenter", "--target", str(self._pause.main), "--pid", "--mount", "--")
            return self._begin((*inside, *command), container.env, container.log, True)
        return self._begin((*UNSHARE, *command), container.env, container.log, True)

    def _begin(
        self, command: Sequence[str], env: Mapping[str, str], log: Path, wrapped: bool
    ) -> Process:
        with log.open("ab") as out:
            popen = subprocess.Popen(
                command,
                env={"PATH": os.environ["PATH"], **env},
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                preexec_fn=die_with_parent(),
            )
        self._sessions.add(popen.pid)
        return Process(popen, wrapped)

    def execute(self, container: Container, command: Sequence[str], seconds: float) -> int | None:
        """As `kubectl exec` and hooks do it; None when it took too long, or there is nothing to
        execute it in."""
        if container.process is None or container.ended() is not None:
            return None
        inside: tuple[str, ...] = ()
        if own_views():
            inside = ("nsenter", "--target", str(container.process.main), "--pid", "--mount", "--")
        done = self._begin((*inside, *command), container.env, container.log, bool(inside))
        try:
            return done.popen.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            _end(lambda: {done.session})
            return None

    def members(self) -> list[Stat]:
        return [each for each in processes() if each.session in self._sessions]

    def titled(self, words: str) -> set[tuple[int, str]]:
        """Those of its processes whose title begins so: pid, and when it began."""
        return {
            (each.pid, each.began) for each in self.members() if title(each.pid).startswith(words)
        }

    @property
    def was_killed(self) -> bool:
        """A container didn't end by itself when it was asked to."""
        return any(
            each.ended() in {-signal.SIGKILL, 128 + signal.SIGKILL} for each in self.containers
        )

    def has(self, words: str) -> bool:
        """One of its processes was begun with them."""
        return any(words in title(each.pid) for each in self.members())

    # --- how it ends -----------------------------------------------------------------------------

    def delete(self) -> None:
        """It is asked to go: hooks, SIGTERM, and SIGKILL when its grace is over."""
        with self._lock:
            self._stop.set()
        until = time.monotonic() + self._spec["terminationGracePeriodSeconds"]
        with ThreadPoolExecutor(len(self.containers)) as pool:
            list(pool.map(lambda each: self._ask_to_go(each, until), self.containers))
        self.kill()

    def _ask_to_go(self, container: Container, until: float) -> None:
        hook = container.spec.get("lifecycle", {}).get("preStop")
        if hook is not None:
            self.execute(container, hook["exec"]["command"], max(0.0, until - time.monotonic()))
        if container.process is None or container.ended() is not None:
            return
        os.kill(container.process.main, signal.SIGTERM)
        try:
            container.process.popen.wait(timeout=max(2.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            return

    def kill(self) -> None:
        """Its machine is gone, and all of it at once."""
        with self._lock:
            self._stop.set()
        self._going.set()
        _end(lambda: self._sessions)
        self._over.set()
        self._thread.join()
        _end(lambda: self._sessions)

    def freeze(self) -> None:
        """Its machine stands still: every process, and the kubelet."""
        self._going.clear()
        while awake := [each for each in self.members() if each.state != "T"]:
            for each in awake:
                _signal(each.pid, signal.SIGSTOP)
            time.sleep(0.05)

    def thaw(self) -> None:
        for each in self.members():
            _signal(each.pid, signal.SIGCONT)
        self._going.set()


def _end(sessions: Any) -> None:
    while found := [each.pid for each in processes() if each.session in sessions()]:
        for pid in found:
            _signal(pid, signal.SIGKILL)
        time.sleep(0.02)


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
