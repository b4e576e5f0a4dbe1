"""A coordinator made of the shipped parts, which kills itself at a chosen point.

Each part that has a point of interest is subclassed here, and the coordinator's process gets the
subclasses from `assemble`, where Ray also finds them again after every restart. A point is armed in
a file beside the journal and disarmed before the kill, so it is met once.
"""

from __future__ import annotations

import asyncio
import enum
import functools
import json
import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.pool import EngineFactory, RayGpuPool
from actors.world import World
from cluster import assembly, engines, logs
from cluster.artifacts import FolderArtifacts
from cluster.chain.outbox import Outbox
from cluster.chain.outbox_rows import OutboxRow, RowState, Signed
from cluster.config import Config
from cluster.core.ports import Computed, Lease
from cluster.core.record import (
    AttemptStarted,
    Claim,
    Claimed,
    Event,
    ResultStored,
    ResultUploaded,
    Seen,
    TaskRecord,
)
from cluster.core.types import AttemptId, Commitment, FileRef, GpuId, Timestamp
from cluster.inference import canary
from cluster.journal import SqlJournal
from cluster.releases import release
from tests.integration import operator_gate, operator_odd
from tests.integration.operator_gate import Gate
from tests.integration.operator_odd import Oddity


class Point(enum.Enum):
    SEEN = "the task is known, nothing else"
    PLACED = "the attempt is stored, its GPU hasn't heard of it"
    COMPUTING = "the GPU is in the middle of it"
    SCORED = "score and files are stored, nothing claimed"
    CLAIMED = "the claim is stored, the outbox has no row"
    SIGNED = "the transaction is signed and stored, not sent"
    SENT_UNRECORDED = "the transaction is sent, its row doesn't say so"
    SENT = "the transaction is sent, its receipt not seen"
    VALIDATED = "the files are wanted, the upload hasn't begun"
    UPLOADED = "the relay has the files, the journal doesn't say so"


class Fuse:
    """Which points are armed, and which have been met, in files that outlive the process."""

    def __init__(self, folder: Path) -> None:
        self._armed = folder / "crash-at.json"
        self._met = folder / "crashed-at.txt"

    def arm(self, points: Sequence[Point]) -> None:
        self._met.unlink(missing_ok=True)
        self._write([point.name for point in points])

    def disarm(self) -> None:
        self._armed.unlink(missing_ok=True)

    def armed(self) -> frozenset[Point]:
        try:
            names = json.loads(self._armed.read_text())
        except FileNotFoundError:
            return frozenset()
        return frozenset(Point[name] for name in names)

    def met(self) -> dict[Point, str]:
        """The points where the process was killed, each with what was noted there."""
        try:
            lines = self._met.read_text().splitlines()
        except FileNotFoundError:
            return {}
        return {Point[name]: note for name, _, note in (line.partition(" ") for line in lines)}

    def meet(self, point: Point, note: str = "") -> None:
        """Kill this process if the point is armed."""
        armed = self.armed()
        if point not in armed:
            return
        self._write([other.name for other in armed - {point}])
        with self._met.open("a") as file:
            file.write(f"{point.name} {note}\n")
        os.kill(os.getpid(), signal.SIGKILL)

    def _write(self, names: Sequence[str]) -> None:
        scratch = self._armed.with_suffix(".new")
        scratch.write_text(json.dumps(names))
        scratch.replace(self._armed)


class CrashingJournal(SqlJournal):
    def __init__(self, url: str, fuse: Fuse) -> None:
        super().__init__(url)
        self._fuse = fuse

    def append(self, lease: Lease, task: Commitment, event: Event, at: Timestamp) -> TaskRecord:
        if isinstance(event, ResultUploaded):
            self._fuse.meet(Point.UPLOADED)
        record = super().append(lease, task, event, at)
        match event:
            case Seen():
                self._fuse.meet(Point.SEEN)
            case AttemptStarted():
                self._fuse.meet(Point.PLACED)
            case ResultStored():
                self._fuse.meet(Point.SCORED)
            case Claimed(Claim.SCORE):
                self._fuse.meet(Point.CLAIMED)
        return record


class CrashingOutbox(Outbox):
    """Notes the hash of the score's transaction, to be found again on the chain."""

    def __init__(self, fuse: Fuse, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._fuse = fuse

    def _store(self, row: OutboxRow, signed: Signed) -> OutboxRow:
        stored = super()._store(row, signed)
        self._meet(Point.SIGNED, stored)
        return stored

    async def _broadcast(self, row: OutboxRow) -> None:
        await super()._broadcast(row)
        self._meet(Point.SENT, row)

    def _put(self, row: OutboxRow) -> None:
        if row.state is RowState.SENT:
            self._meet(Point.SENT_UNRECORDED, row)
        super()._put(row)

    def _meet(self, point: Point, row: OutboxRow) -> None:
        if row.intent.claim is Claim.SCORE and row.signed is not None:
            self._fuse.meet(point, row.signed.tx_hash)


class CrashingArtifacts(FolderArtifacts):
    def __init__(self, path: Path, fuse: Fuse) -> None:
        super().__init__(path)
        self._fuse = fuse

    async def get(
        self, task: Commitment, files: Sequence[FileRef]
    ) -> tuple[tuple[str, bytes], ...]:
        self._fuse.meet(Point.VALIDATED)
        return await super().get(task, files)


class CrashingPool(RayGpuPool):
    """Whoever arms `COMPUTING` closes the gate too; it is opened just before the kill."""

    def __init__(self, fuse: Fuse, gate: Gate, make_engine: EngineFactory, release: str) -> None:
        super().__init__(make_engine, release, allow_simulated=True, stall_seconds=300.0)
        self._fuse = fuse
        self._gate = gate

    async def result(self, gpu: GpuId, attempt: AttemptId) -> Computed:
        while Point.COMPUTING in self._fuse.armed():
            report = await self._members[gpu].actor.report.remote()
            if report.attempt != attempt or report.task == canary.TASK:
                break
            if report.step > 0:
                self._gate.open()
                self._fuse.meet(Point.COMPUTING, attempt)
            await asyncio.sleep(0.1)
        return await super().result(gpu, attempt)


CONFIG = "operator-behind-the-proxy.yaml"


def assemble(config: Config, folder: Path) -> World:
    """`cluster.assembly.assemble` with the parts above, and a log of its own in `folder`."""
    world = assembly.assemble(config)
    log = (folder / "coordinator.log").open("a", buffering=1)
    logs.setup(config.logs.level, "console", log)
    identity = assembly.unlock(config)
    fuse = Fuse(folder)
    journal = CrashingJournal(config.journal.url, fuse)
    gate = Gate(folder)
    gated = functools.partial(operator_gate.engine_factory, gate, engines.EngineSettings.of(config))
    make_engine = functools.partial(operator_odd.engine_factory, Oddity(folder), gated)
    return replace(
        world,
        journal=journal,
        artifacts=CrashingArtifacts(config.artifacts.path, fuse),
        pool=CrashingPool(fuse, gate, make_engine, release(config)),
        open_network=functools.partial(
            assembly.open_network,
            config,
            identity,
            journal,
            make_outbox=functools.partial(CrashingOutbox, fuse),
            called=world.metrics.network.rpc_called,
            told=world.metrics,
        ),
        reload=assembly.Reloading(folder / CONFIG, config, world.accounts).again,
    )
