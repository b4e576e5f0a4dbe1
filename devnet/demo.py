"""`make demo`: a devnet, an operator with simulated GPUs, and tasks from chain to paid.

The operator is a process of its own, started as an operator would (`crynux-cluster up`); the demo
talks to it only through its HTTP API. Whatever happens, everything started here is stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from pydantic import ValidationError
from rich.console import Console
from rich.live import Live

from cluster.core.errors import ClusterError, ConfigError
from cluster.core.types import TaskStatus
from cluster.status import Status
from devnet.anvil import die_with_parent
from devnet.application import TaskChange, TaskReport
from devnet.demo_tasks import demo_tasks
from devnet.network import MODELS, Devnet
from devnet.view import Board, gpu_names, plain_line

RUN = Path(".devnet/demo")
TASK_TIMEOUT = 170
"""No task of the demo should come near it: it is for machines that are slow and busy."""
OUTPUT = frozenset({"images", "operator.log", "summary.json"})
WIDTH = 118
"""Columns where there is no terminal to ask."""
READY_SECONDS = 300.0
CLOSE_SECONDS = 120.0
STOP_SECONDS = 60.0
POLL_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Operator:
    """The operator's process and where its API answers."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    async def status(self, http: httpx.AsyncClient) -> Status | None:
        """None while it doesn't answer as it should."""
        with contextlib.suppress(httpx.HTTPError, ValidationError):
            answer = await http.get(f"{self.url}/v1/status")
            if answer.is_success:
                return Status.model_validate(answer.json())
        return None


def main(output: Path, svg: Path | None = None) -> int:
    """Run the demo; 0 only if every task ended as it should and nothing was slashed."""
    began = time.time()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    _clear(output)
    board = Board(began, phase="starting the devnet")
    console.print("Starting the devnet: a chain, contracts, a relay, tiny models ...")
    with Devnet(RUN, task_timeout=TASK_TIMEOUT, models=MODELS) as devnet:
        console.print(f"Starting the operator; its log is {output / 'operator.log'}")
        with operator(devnet, output / "operator.log") as running:
            reports, status = asyncio.run(_watch(devnet, running, board, console, output))
    summary = summarise(reports, status, time.time() - began)
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    _conclude(console, board, reports, summary, output)
    if svg is not None:
        picture = Console(record=True, width=WIDTH, file=io.StringIO())
        _conclude(picture, board, reports, summary, output)
        drawn = picture.export_svg(title="make demo")
        # Without the fonts that it would have a reader's browser fetch.
        svg.write_text(re.sub(r"@font-face \{.*?\}", "", drawn, flags=re.DOTALL))
    return 0 if summary["ok"] else 1


def _clear(output: Path) -> None:
    """Make an empty folder of it; raises `ConfigError` for one with anything but a demo's files."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        found = {path.name for path in output.iterdir()}
        if not found <= OUTPUT:
            other = min(found - OUTPUT)
            raise ConfigError(
                f"--output {output}: it holds {other}, which no demo made; choose another"
            )
        for name in found:
            path = output / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    except OSError as error:
        raise ConfigError(f"--output {output}: {error.strerror}") from None


@contextlib.contextmanager
def operator(devnet: Devnet, log: Path) -> Iterator[Operator]:
    """`crynux-cluster up` as a child; asked to stop at the end, and made to if it doesn't."""
    command = [sys.executable, "-m", "cluster.cli", "up", "--config", str(devnet.config_file)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "RAY_DEDUP_LOGS": "0"}
    with log.open("wb") as file:
        process = subprocess.Popen(  # noqa: S603 - our own command line
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            preexec_fn=die_with_parent(signal.SIGTERM),
        )
    try:
        yield Operator(process, devnet.operator_url, log)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            # Its session is its own, so this reaches everything it started and nothing else.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


async def _watch(
    devnet: Devnet, operator: Operator, board: Board, console: Console, output: Path
) -> tuple[list[TaskReport], Status]:
    async with httpx.AsyncClient(timeout=5) as http, _shown(board, console) as show:
        board.phase = "waiting for the GPUs and for their accounts to join"
        async with _polled(board, operator, http):
            await _until(lambda: _joined(board.status), READY_SECONDS, operator, "is not ready")
            board.phase = "sending tasks"

            def on_change(change: TaskChange) -> None:
                board.note(change)
                show(change)

            application = devnet.application(output / "images")
            reports = await application.run(demo_tasks(), on_change)
            board.phase = "closing"
            # What no node was ever picked for, the operator never heard of.
            wanted = {report.commitment for report in reports if int(report.node, 16)}
            await _until(lambda: _closed(board.status, wanted), CLOSE_SECONDS, operator, "lags")
            board.phase = "done"
    if board.status is None:
        raise ClusterError(f"the operator stopped answering: see {operator.log}")
    return reports, board.status


@contextlib.asynccontextmanager
async def _shown(board: Board, console: Console) -> AsyncIterator[Callable[[TaskChange], None]]:
    """A live view on a terminal, else a line a change."""
    if not console.is_terminal:
        yield lambda change: console.print(
            plain_line(change, time.time() - board.began), highlight=False, soft_wrap=True
        )
        return
    with Live(console=console, auto_refresh=False, transient=True) as live:

        async def refresh() -> None:
            while True:
                live.update(board.render(time.time()), refresh=True)
                await asyncio.sleep(0.25)

        refreshing = asyncio.create_task(refresh())
        try:
            yield lambda _change: None
        finally:
            refreshing.cancel()


@contextlib.asynccontextmanager
async def _polled(board: Board, operator: Operator, http: httpx.AsyncClient) -> AsyncIterator[None]:
    async def poll() -> None:
        while True:
            board.status = await operator.status(http) or board.status
            await asyncio.sleep(POLL_SECONDS)

    polling = asyncio.create_task(poll())
    try:
        yield
    finally:
        polling.cancel()


async def _until(
    holds: Callable[[], bool], seconds: float, operator: Operator, problem: str
) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        if operator.process.poll() is not None:
            raise ClusterError(f"the operator ended by itself: see {operator.log}")
        if time.monotonic() > deadline:
            raise ClusterError(f"the operator {problem} after {seconds:.0f} s: see {operator.log}")
        await asyncio.sleep(0.2)


def _joined(status: Status | None) -> bool:
    return status is not None and all(
        account.status in ("available", "busy") for account in status.accounts
    )


def _closed(status: Status | None, wanted: set[Any]) -> bool:
    if status is None:
        return False
    closed = {task.commitment for task in status.tasks if task.outcome is not None}
    return wanted <= closed


def summarise(reports: Sequence[TaskReport], status: Status, wall_seconds: float) -> dict[str, Any]:
    """`summary.json`: amounts in wei, times in seconds."""
    ours = {task.commitment: task for task in status.tasks}
    names = gpu_names(status)
    expected = expected_ends(reports)
    tasks = []
    for report in reports:
        task = ours.get(report.commitment)
        gpu = None if task is None else task.gpu_id
        tasks.append(
            {
                "name": report.name,
                "commitment": report.commitment,
                "type": report.type.name,
                "expected_end": expected[report.commitment],
                "actual_end": report.actual_end,
                "error_reported": report.reported,
                "gpu": None if gpu is None else f"{gpu} {names.get(gpu, '')}".strip(),
                "seconds_to_score": report.seconds_to_score,
                "fee": report.fee,
                "payment": 0 if task is None else int(task.payment),
                "fault": None if task is None else task.fault,
                "problem": report.problem,
                "files": list(report.files),
            }
        )
    slashed = status.totals.slashed
    ended_well = all(
        report.as_expected and report.actual_end == expected[report.commitment]
        for report in reports
    )
    return {
        "ok": ended_well and slashed == 0,
        "tasks": tasks,
        "paid": int(status.totals.paid_wei),
        "slashed": slashed,
        "wall_seconds": round(wall_seconds, 1),
    }


def expected_ends(reports: Sequence[TaskReport]) -> dict[str, str]:
    """How each task should end, by commitment.

    Of a group one is paid for and uploads, the others are refunded; which one it is shows only in
    the end, so each member is matched with the end that it had as long as such ends are left.
    """
    expected: dict[str, str] = {
        r.commitment: next(iter(r.expected_end)) for r in reports if _alone(r)
    }
    ends = [TaskStatus.END_GROUP_SUCCESS.label, *2 * [TaskStatus.END_GROUP_REFUND.label]]
    members = [report for report in reports if not _alone(report)]
    left = (ends * ((len(members) + 2) // 3))[: len(members)]
    for report in sorted(members, key=lambda each: each.actual_end not in ends):
        end = report.actual_end if report.actual_end in left else left[0]
        left.remove(end)
        expected[report.commitment] = end
    return expected


def _alone(report: TaskReport) -> bool:
    return len(report.expected_end) == 1


def _conclude(
    console: Console,
    board: Board,
    reports: Sequence[TaskReport],
    summary: dict[str, Any],
    output: Path,
) -> None:
    console.print(board.render(board.began + summary["wall_seconds"]))
    bad = [task for task in summary["tasks"] if task["actual_end"] != task["expected_end"]]
    for task in bad:
        console.print(
            f"[red]{task['name']}: ended {task['actual_end']}, not {task['expected_end']} "
            f"{task['problem']}"
        )
    for report in reports:
        if report.problem:
            console.print(f"[red]{report.name}: {report.problem}")
        if report.reported is not report.expected_report:
            console.print(
                f"[red]{report.name}: an error report {'was' if report.reported else 'is'} "
                f"{'not expected' if report.reported else 'missing'}"
            )
    console.print(
        f"{len(reports) - len(bad)} of {len(reports)} tasks ended as they should, "
        f"{summary['paid'] / 10**18:.4f} CNX earned, {summary['slashed']} slashed, "
        f"{summary['wall_seconds']:.0f} s. Images and summary.json are in {output}/"
    )
