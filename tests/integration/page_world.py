"""The page over a source that says what a test wants, in a real browser on real HTTP."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from cluster.api.app import create_api
from cluster.api.guard import Access
from cluster.api.source import NotKnown, SourceAway
from cluster.core.types import GpuState
from cluster.status import (
    AccountStatus,
    ChainView,
    ClassStatus,
    DownloadView,
    EndpointStatus,
    FleetStatus,
    GpuClassView,
    GpuStatus,
    IdentityView,
    MemoryView,
    RelayView,
    Status,
    StoreStatus,
    TaskView,
    Totals,
    judged,
)
from tests.debian import program

PATIENCE_SECONDS = 120.0
"""How long anything is waited for; machines that run tests are slow and busy."""
NOW = 1_790_000_000.0
CNX = 10**18
PICTURES = 6
"""Of a result: as many as a task has that doesn't say how many."""
TASK = "0x" + "ab" * 32
FAILED = "0x" + "cd" * 32
HOSTILE = "<img src=x onerror=\"document.title='taken over'\">"
CARD = GpuClassView(name="NVIDIA GeForce RTX 4090+docker", vram=24)


def busy_status() -> Status:
    """A cluster in which there is something of everything."""
    states = (
        GpuState.BUSY,
        GpuState.READY,
        GpuState.QUARANTINED,
        GpuState.STARTING,
        GpuState.DRAINED,
        GpuState.UNREACHABLE,
        GpuState.READY,
    )
    return Status(
        version="1.2.3",
        config_digest="d",
        now=NOW,
        acting=True,
        epoch=3,
        identity=IdentityView(treasury="0x" + "71" * 20),
        chain=ChainView(
            reached=True,
            chain_id=31337,
            block=1_234_567,
            block_timestamp=NOW - 2.5,
            endpoints=(
                EndpointStatus(name="rpc-1.example", seconds=0.041, head=1_234_567),
                EndpointStatus(name="rpc-2.example", problem="timed out", head=1_234_501),
            ),
        ),
        relay=RelayView(reached=True),
        accounts=tuple(_account(index) for index in range(1, 6)),
        gpus=tuple(_gpu(index, state) for index, state in enumerate(states)),
        stores=(
            StoreStatus(
                ray_node="0123456789abcdef",
                models=12,
                used_bytes=310 * 10**9,
                quota_bytes=500 * 10**9,
                queued=2,
                downloads=(
                    DownloadView(
                        model="base:acme/large",
                        source="mirror",
                        done_bytes=1_500_000_000,
                        total_bytes=3_000_000_000,
                        bytes_per_second=250e6,
                        seconds_left=6.0,
                        background=False,
                    ),
                ),
                failed={"lora:gone": "no source has it"},
            ),
        ),
        tasks=(_task(TASK), _task(FAILED, done=False), *(_task(f"0x{n:064x}") for n in range(8))),
        totals=Totals(paid_wei=str(1234 * CNX), tasks={"EndSuccess": 1200, "EndAborted": 3}),
        problems=("GPU node-2: the canary's answer was another one",),
        fleet=FleetStatus(
            treasury=str(2_500 * CNX),
            stake=str(400 * CNX),
            plan=("join 0x0000000000000000000000000000000000000005",),
            classes=(ClassStatus(name=CARD.name, vram=24, slots=2, least=4),),
        ),
    )


def _account(index: int) -> AccountStatus:
    return AccountStatus(
        index=index,
        address=f"0x{index:040x}",
        status=("busy", "available", "available", "paused", "quit")[index - 1],
        gpu_class=CARD,
        stake=str(400 * CNX),
        balance=str(CNX // 7),
        qos=1_000,
        current_task=TASK if index == 1 else None,
    )


def _gpu(index: int, state: GpuState) -> GpuStatus:
    busy = state is GpuState.BUSY
    return GpuStatus(
        gpu_id=f"node-{index}",
        uuid=f"GPU-{index:08d}",
        ray_node="0123456789abcdef",
        name=CARD.name,
        vram=24,
        simulated=False,
        state=state,
        warm=("base:stabilityai/stable-diffusion-xl-base-1.0+fp16", f"lora:{HOSTILE}"),
        task=TASK if busy else None,
        step=11 if busy else None,
        steps=25 if busy else None,
        tasks_done=120 + index,
        memory=MemoryView(models=9 * 10**9, other=2 * 10**9, free=13 * 10**9),
        temperature=61 + index,
        busy_seconds=36_000.0,
        canary_at=NOW - 1_800.0,
        throttling=("power cap",) if index == 1 else (),
        problem="the canary's answer was another one" if state is GpuState.QUARANTINED else "",
    )


def _task(name: str, done: bool = True) -> TaskView:
    open_ = name == TASK
    return TaskView(
        commitment=name,
        account=f"0x{1:040x}",
        type="SD",
        stage="open",
        progress="computing" if open_ else "closed",
        action="Wait: computing" if open_ else "done",
        gpu_id="node-0",
        attempts=1,
        seen_at=NOW - 30.0,
        outcome=None if open_ else "EndSuccess" if done else "EndAborted",
        payment=str(CNX // 3) if done and not open_ else "0",
        fault=None if done else "ours",
        closed_at=None if open_ else NOW - 4.0,
    )


STORY: Mapping[str, Any] = {
    "commitment": TASK,
    "account": f"0x{1:040x}",
    "type": "SD",
    "models": ["base:stabilityai/stable-diffusion-xl-base-1.0+fp16", HOSTILE],
    "fee": str(CNX),
    "payment": "0",
    "progress": "computing",
    "outcome": None,
    "fault": None,
    "score": "ab" * 8,
    "tier": "gpu",
    "seen_at": NOW - 30.0,
    "closed_at": None,
    "stages": {"parameters": 0.4, "queue": 1.2, "load": 3.5, "compute": 11.0, "mined": 2.0},
    "events": [
        {"at": NOW - 30.0, "kind": "seen", "text": "the network gave it to us"},
        {"at": NOW - 20.0, "kind": "attempt_failed", "text": f"a1 failed: {HOSTILE}", "gpu": "n-1"},
    ],
    "attempts": [
        {
            "attempt": "a1",
            "gpu": "node-1",
            "started_at": NOW - 29.0,
            "ended_at": NOW - 20.0,
            "fault": "ours",
            "detail": "out of memory",
        },
        {"attempt": "a2", "gpu": "node-0", "started_at": NOW - 19.0},
    ],
    "transactions": [
        {
            "write": "score",
            "state": "mined",
            "account": f"0x{1:040x}",
            "nonce": 7,
            "tx_hash": "0x" + "ef" * 32,
            "block": 1_234_560,
            "cost": str(CNX // 10_000),
            "link": "https://explorer.example/tx/0x" + "ef" * 32,
        },
        {"write": "abort", "state": "new", "account": f"0x{1:040x}", "link": "javascript:alert(1)"},
    ],
    "files": [
        *(
            {"name": f"{n}.png", "sha256": "12" * 32, "size": 1_500_000, "kept": True}
            for n in range(PICTURES)
        ),
        {"name": "gone.png", "sha256": "13" * 32, "size": 1_500_000, "kept": False},
    ],
    "bundles": ["a1"],
}


@dataclass
class SaidSource:
    """`now` is what it says until a test changes it; `away` is why it says nothing."""

    now: Status = field(default_factory=busy_status)
    away: str | None = None
    orders: list[Mapping[str, Any]] = field(default_factory=list)

    def _say(self) -> None:
        if self.away is not None:
            raise SourceAway(self.away)

    async def status(self) -> Mapping[str, Any]:
        self._say()
        return judged(self.now).model_dump(mode="json")

    async def metrics_text(self) -> bytes:
        self._say()
        return b""

    async def story(self, name: str) -> Mapping[str, Any]:
        self._say()
        if not TASK.removeprefix("0x").startswith(name.removeprefix("0x")):
            raise NotKnown(f"{name}: no task is known by it")
        return STORY

    async def bundle(self, name: str) -> Mapping[str, Any]:
        return {"story": await self.story(name), "parameters": "{}", "attempts": []}

    async def file(self, name: str, file: str) -> bytes:
        await self.story(name)
        if file not in {f"{n}.png" for n in range(PICTURES)}:
            raise NotKnown(f"{name}: its result has no file {file}")
        data = io.BytesIO()
        Image.new("RGB", (64, 48), "seagreen").save(data, "PNG")
        return data.getvalue()

    async def shown(self, who: str, what: str, task: str) -> None:
        self._say()

    async def earnings(self, since: float, step: str) -> Mapping[str, Any]:
        self._say()
        length = 3_600 if step == "hour" else 86_400
        begin = NOW - NOW % length
        steps = [
            {"since": begin - length * n, "tasks": n, "paid": str(n * CNX), "gas": str(CNX // 9)}
            for n in range(24 if step == "hour" else 30)
        ]
        classes = [{"name": CARD.name, "vram": 24, "tasks": 9, "paid": str(276 * CNX), "gas": "1"}]
        sums = {"tasks": 276, "paid": str(276 * CNX), "gas": str(24 * CNX // 9)}
        return {"step": step, "since": since, "steps": steps[::-1], "classes": classes} | sums

    async def audit(self, limit: int) -> list[Mapping[str, Any]]:
        self._say()
        found: list[Mapping[str, Any]] = [
            {
                "at": NOW,
                "who": "local 127.0.0.1",
                "action": order["action"],
                "arguments": {key: value for key, value in order.items() if key != "action"},
                "outcome": "as asked",
            }
            for order in self.orders[::-1]
        ]
        return found[:limit]

    async def perform(self, order: Mapping[str, Any], who: str) -> Mapping[str, Any]:
        self._say()
        self.orders.append(order)
        return {"kind": "done", "text": f"{order['action']}: as asked"}


@contextlib.contextmanager
def serving(source: SaidSource, access: Access = Access()) -> Iterator[str]:  # noqa: B008 - frozen
    """The page's URL."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(
            create_api(source, access=access),
            log_level="error",
            lifespan="off",
            timeout_graceful_shutdown=1,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        server.should_exit = True
        thread.join(10.0)


class Wire:
    """What lies between a browser and a server: it can go silent without closing."""

    def __init__(self, url: str) -> None:
        self._port = int(url.rsplit(":", 1)[1].rstrip("/"))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._speaks = threading.Event()
        self._speaks.set()
        self._silences = 0
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/"
        threading.Thread(target=self._accept, daemon=True).start()

    def fall_silent(self) -> None:
        """Nothing comes through any more; of what is connected now, never again."""
        self._silences += 1
        self._speaks.clear()

    def speak(self) -> None:
        self._speaks.set()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                here, _ = self._listener.accept()
                there = socket.create_connection(("127.0.0.1", self._port))
                for ends in ((here, there), (there, here)):
                    threading.Thread(
                        target=self._carry, args=(*ends, self._silences), daemon=True
                    ).start()

    def _carry(self, source: socket.socket, sink: socket.socket, silences: int) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                self._speaks.wait()
                if silences == self._silences:
                    sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def wired(source: SaidSource) -> Iterator[Wire]:
    """A wire to the page."""
    with serving(source) as url:
        wire = Wire(url)
        yield wire
        wire.speak()
        wire.close()


@contextlib.contextmanager
def browsing() -> Iterator[Browser]:
    path = program("chromium")
    expect.set_options(timeout=PATIENCE_SECONDS * 1000)
    with sync_playwright() as playwright:
        # Containers and CI run as root, where Chromium has no sandbox.
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox"], timeout=PATIENCE_SECONDS * 1000
        )
        yield browser
        browser.close()


def keep_picture(page: Page, name: str) -> None:
    """For a person to look at, where `SCREENSHOTS` names a folder."""
    folder = os.environ.get("SCREENSHOTS")
    if folder:
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)
