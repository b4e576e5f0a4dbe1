"""What a person watches while the demo runs: tasks, GPUs, money."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.core.types import ENDED, TaskStatus
from cluster.status import GpuStatus, Status, TaskView
from devnet.application import TaskChange

CNX = 10**18
_COLOURS = {
    TaskStatus.END_SUCCESS: "green",
    TaskStatus.END_GROUP_SUCCESS: "green",
    TaskStatus.END_GROUP_REFUND: "green",
    TaskStatus.END_ABORTED: "yellow",
    TaskStatus.ERROR_REPORTED: "yellow",
    TaskStatus.END_INVALIDATED: "bold red",
    TaskStatus.QUEUED: "dim",
}


@dataclass(slots=True)
class Line:
    """A task as the application follows it."""

    name: str
    commitment: str
    status: TaskStatus
    node: str
    began: float
    ended: float | None = None


@dataclass(slots=True)
class Board:
    """Everything the view shows; `note` and `status` are kept up to date by others."""

    began: float
    lines: dict[str, Line] = field(default_factory=dict)
    status: Status | None = None
    phase: str = ""

    def note(self, change: TaskChange) -> None:
        line = self.lines.get(change.commitment)
        if line is None:
            line = Line(change.name, change.commitment, change.status, change.node, change.at)
            self.lines[change.commitment] = line
        line.status, line.node = change.status, change.node
        if change.status in ENDED:
            line.ended = change.at

    def render(self, now: float) -> RenderableType:
        return Group(self._headline(now), self._tasks(now), self._gpus())

    def _headline(self, now: float) -> Text:
        status = self.status
        text = Text(f" {now - self.began:5.0f} s  ", style="bold")
        text.append(self.phase, style="cyan")
        if status is not None:
            text.append(f"   block {status.chain.block or '-'}", style="dim")
            joined = sum(account.status in ("available", "busy") for account in status.accounts)
            text.append(f"   accounts joined {joined}/{len(status.accounts)}")
            text.append(f"   earned {earned(status):.4f} CNX", style="bold green")
            text.append(
                f"   slashed {status.totals.slashed}",
                style="bold red" if status.totals.slashed else "dim",
            )
        return text

    def _tasks(self, now: float) -> Table:
        table = Table(title="Tasks", title_justify="left", expand=True)
        for column in ("task", "state on chain"):
            table.add_column(column, no_wrap=True, min_width=15)
        table.add_column("the operator", no_wrap=True, overflow="ellipsis", ratio=1)
        table.add_column("GPU", no_wrap=True, min_width=27)
        table.add_column("elapsed", no_wrap=True, justify="right", min_width=7)
        table.add_column("paid CNX", no_wrap=True, justify="right", min_width=8)
        ours = {task.commitment: task for task in self.status.tasks} if self.status else {}
        gpus = {gpu.gpu_id: gpu for gpu in self.status.gpus} if self.status else {}
        for line in self.lines.values():
            task = ours.get(line.commitment)
            paid = int(task.payment) / CNX if task is not None else 0.0
            table.add_row(
                line.name,
                Text(line.status.label, style=_COLOURS.get(line.status, "cyan")),
                _operator(task),
                _short(gpus.get(task.gpu_id)) if task is not None and task.gpu_id else "",
                f"{(line.ended or now) - line.began:.0f} s",
                f"{paid:.4f}" if paid else "",
            )
        return table

    def _gpus(self) -> Table:
        table = Table(title="GPUs", title_justify="left", expand=True)
        for column in ("GPU", "class", "state", "done"):
            table.add_column(column, no_wrap=True)
        table.add_column("warm pipelines", ratio=1)
        for gpu in self.status.gpus if self.status else ():
            table.add_row(
                gpu.gpu_id,
                f"{gpu.name} {gpu.vram} GB{' (simulated)' if gpu.simulated else ''}",
                _state(gpu),
                str(gpu.tasks_done),
                ", ".join(sorted({_base(key) for key in gpu.warm})),
            )
        return table


def earned(status: Status) -> float:
    """CNX that the operator's closed tasks paid."""
    return int(status.totals.paid_wei) / CNX


def plain_line(change: TaskChange, since: float) -> str:
    """For where there is no terminal: one line a change."""
    node = f" on {change.node}" if change.node else ""
    return f"{since:6.1f} s  {change.name:16} {change.status.label}{node}"


def _operator(task: TaskView | None) -> str:
    if task is None:
        return ""
    if task.fault is not None:
        return f"faulty: {task.fault}"
    return task.action if task.outcome is None else task.progress


def _state(gpu: GpuStatus) -> Text:
    if gpu.steps:
        return Text(f"step {gpu.step}/{gpu.steps}", style="bold cyan")
    return Text(gpu.state.value, style="green" if gpu.state.value == "ready" else "yellow")


def _short(gpu: GpuStatus | None) -> str:
    return "" if gpu is None else f"{gpu.gpu_id} {gpu.name.split('+')[0].removeprefix('NVIDIA ')}"


def _base(key: str) -> str:
    """The base model's short name from a pipeline key, for reading only."""
    return next((part.rsplit("/", 1)[-1] for part in key.split("|") if "/" in part), key)


def gpu_names(status: Status) -> Mapping[str, str]:
    return {gpu.gpu_id: gpu.name for gpu in status.gpus}
