"""A task's story, earnings and the audit log as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from math import inf, isfinite
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.core.wording import printable
from cluster.earnings import Earnings
from cluster.status_view import cnx, row
from cluster.steering import ActionView

if TYPE_CHECKING:
    from cluster.story import TaskStory

BAR = 30
"""Characters of the longest bar."""


def problem(text: str) -> RenderableType:
    return Text(printable(text), style="bold red")


def when(at: float | None) -> str:
    """Unix time for a person, in UTC."""
    return "-" if at is None else f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S}"


def render(story: TaskStory) -> RenderableType:
    """What became of it, how long each stage took, its events, attempts and transactions."""
    head = Text(f"{printable(story.commitment)}\n", style="bold")
    head.append(printable(f"{story.type} for {story.account},"), style="not bold")
    head.append(f" {printable(story.outcome or story.progress)}", style="bold")
    head.append(f", fee {cnx(story.fee)} CNX, paid {cnx(story.payment)} CNX", style="not bold")
    if story.models:
        head.append(f"\nmodels {printable(', '.join(story.models))}", style="not bold")
    if story.fault:
        head.append(f"\n{printable(story.fault)}", style="red")
    return Group(head, _stages(story), _events(story), *_transactions(story))


def _stages(story: TaskStory) -> Table:
    table = _table("Stages", "stage", "seconds", "")
    longest = max(story.stages.values(), default=0.0) or 1.0
    for stage, seconds in story.stages.items():
        length = round(BAR * max(seconds, 0.0) / longest)
        row(table, stage.replace("_", " "), f"{seconds:.1f}", "▇" * length)
    return table


def _events(story: TaskStory) -> Table:
    table = _table("Events (UTC)", "at", "after s", "what")
    for event in story.events:
        after = event.at - story.seen_at
        row(table, when(event.at), f"{after:.1f}", event.text)
    return table


def _transactions(story: TaskStory) -> Iterable[RenderableType]:
    if not story.transactions:
        return
    table = _table("Transactions", "write", "state", "block", "gas CNX", "hash", "why")
    for each in story.transactions:
        row(
            table,
            each.write,
            each.state,
            "-" if each.block is None else str(each.block),
            cnx(each.cost),
            each.link or each.tx_hash or "-",
            each.reason,
        )
    yield table


def log_lines(story: TaskStory) -> list[dict[str, object]]:
    """One for each event and transaction, in order of time, with the ids that lead to the others. A
    transaction's is from when its state last changed."""
    ids = {"task": story.commitment, "account": story.account}
    lines: list[tuple[float, dict[str, object]]] = []
    for event in story.events:
        more = {"attempt": event.attempt, "gpu": event.gpu}
        said = {"event": event.kind, **ids, **_said(more), "text": event.text}
        lines.append((event.at, said))
    for each in story.transactions:
        told = {
            "write": each.write,
            "state": each.state,
            "tx_hash": each.tx_hash,
            "replaced": " ".join(each.replaced),
            "block": each.block,
            "reason": each.reason,
        }
        said = {"event": "transaction", **ids, **_said(told)}
        lines.append((inf if each.at is None else each.at, said))
    lines.sort(key=lambda line: line[0])
    return [
        {"timestamp": datetime.fromtimestamp(at, UTC).isoformat(), **said} if isfinite(at) else said
        for at, said in lines
    ]


def _said(told: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in told.items() if value not in {None, ""}}


def log_text(line: dict[str, object]) -> str:
    time, event = line.get("timestamp", ""), line["event"]
    rest = " ".join(
        f"{name}={value}"
        for name, value in line.items()
        if name not in {"timestamp", "event", "text"}
    )
    text = printable(str(line.get("text", "")))
    return f"{str(time)[:19]:19} {event!s:20} {text} {printable(rest)}".rstrip()


def earnings(found: Earnings) -> RenderableType:
    """A bar for each hour or day, the sums, and what each class of card brought in."""
    per = "hour" if found.step == "hour" else "day"
    table = _table(f"Earnings by the {per} (UTC)", "from", "tasks", "paid CNX", "gas CNX", "")
    most = max((int(each.paid) for each in found.steps), default=0) or 1
    for each in found.steps:
        begins = when(each.since)
        bar = "▇" * round(BAR * int(each.paid) / most)
        shown = begins[:16] if found.step == "hour" else begins[:10]
        row(table, shown, str(each.tasks), cnx(each.paid), cnx(each.gas), bar)
    classes = _table("By class", "class", "tasks", "paid CNX", "gas CNX")
    for kind in found.classes:
        name = f"{kind.name} {kind.vram} GB" if kind.name else "none (treasury)"
        row(classes, name, str(kind.tasks), cnx(kind.paid), cnx(kind.gas))
    total = f"{found.tasks} tasks, paid {cnx(found.paid)} CNX, gas {cnx(found.gas)} CNX"
    return Group(table, classes, Text(total, style="bold"))


def actions(found: Iterable[ActionView]) -> RenderableType:
    table = _table("Actions (UTC)", "at", "who", "what", "with", "came of it")
    for each in found:
        said = ", ".join(f"{name}={value}" for name, value in each.arguments.items() if value)
        row(table, when(each.at), each.who, each.action, said, each.outcome)
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
