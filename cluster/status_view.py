"""A `Status` as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from decimal import Decimal

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.core.wording import printable
from cluster.status import (
    AccountStatus,
    GpuStatus,
    Status,
    StoreStatus,
    TaskView,
)

TASKS_SHOWN = 20
_WEI_PER_CNX = 10**18


def render(status: Status) -> RenderableType:
    """Readiness and problems, then everything: accounts, GPUs, the newest tasks and the totals."""
    return Group(
        headline(status),
        *problems(status),
        _accounts(status.accounts),
        gpus_table(status.gpus),
        *stores_table(status.stores),
        tasks_table(status),
        totals(status),
    )


def problems(status: Status) -> list[Text]:
    return [Text(f"problem: {printable(problem)}", style="yellow") for problem in status.problems]


def accounts_table(status: Status) -> RenderableType:
    return _accounts(status.accounts)


def tasks_table(status: Status, shown: int = TASKS_SHOWN) -> RenderableType:
    return _tasks(status.tasks, status.now, shown)


def cnx(wei: str) -> str:
    """Wei as CNX with at most four decimals."""
    amount = Decimal(wei) / _WEI_PER_CNX
    return f"{amount:,.4f}".rstrip("0").rstrip(".")


def headline(status: Status) -> Text:
    block = "?" if status.chain.block is None else status.chain.block
    line = Text(f"crynux-cluster {status.version}  ")
    line.append(
        "ready" if status.ready else "not ready", style="bold green" if status.ready else "bold red"
    )
    line.append(f"  chain {status.chain.chain_id} at block {block}")
    if status.identity.treasury:
        line.append(f"  treasury {printable(status.identity.treasury)}")
    for what in status.missing:
        line.append(f"\n  {printable(what)}", style="red")
    return line


def _accounts(accounts: Iterable[AccountStatus]) -> Table:
    table = table_of("Accounts", "#", "address", "status", "GPU class", "stake CNX", "QoS", "task")
    for account in accounts:
        kind = account.gpu_class
        row(
            table,
            str(account.index),
            account.address,
            account.status,
            "-" if kind is None else f"{kind.name} {kind.vram} GB",
            cnx(account.stake),
            str(account.qos),
            short(account.current_task),
        )
    return table


def gpus_table(gpus: Iterable[GpuStatus], title: str = "GPUs") -> Table:
    table = table_of(title, "id", "card", "state", "task", "step", "done", "warm")
    for gpu in gpus:
        step = "-" if gpu.step is None else f"{gpu.step}/{gpu.steps or '?'}"
        row(
            table,
            gpu.gpu_id,
            _card(gpu),
            gpu.state.value,
            short(gpu.task),
            step,
            str(gpu.tasks_done),
            ", ".join(gpu.warm) or "-",
        )
    return table


def cards_table(gpus: Iterable[GpuStatus]) -> Table:
    """Of every machine, with what a card's own report says."""
    table = table_of("GPUs", "id", "card", "state", "free", "°C", "done", "UUID", "problem")
    for gpu in gpus:
        free = "-" if gpu.memory is None else size(gpu.memory.free)
        row(
            table,
            gpu.gpu_id,
            _card(gpu),
            gpu.state.value,
            free,
            "-" if gpu.temperature is None else str(gpu.temperature),
            str(gpu.tasks_done),
            gpu.uuid or "-",
            gpu.problem or "-",
        )
    return table


def _card(gpu: GpuStatus) -> str:
    name = f"{gpu.name} {gpu.vram} GB" if gpu.vram else gpu.name
    return f"{name} (simulated)" if gpu.simulated else name


def stores_table(stores: Iterable[StoreStatus]) -> Iterable[RenderableType]:
    """Downloads that run and models that can't be had; nothing when there are none."""
    table = table_of("Models", "machine", "model", "from", "done", "left")
    for store in stores:
        for each in store.downloads:
            of = f" of {size(each.total_bytes)}" if each.total_bytes else ""
            left = "-" if each.seconds_left is None else f"{each.seconds_left:.0f} s"
            done = f"{size(each.done_bytes)}{of}, {size(each.bytes_per_second)}/s"
            row(table, store.ray_node[:8], each.model, each.source, done, left)
        if store.trouble:
            row(table, store.ray_node[:8], "-", "-", store.trouble, "-")
        for model, reason in store.failed.items():
            row(table, store.ray_node[:8], model, "-", reason, "-")
    return (table,) if table.row_count else ()


def size(count: float) -> str:
    """Bytes for a person."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _tasks(tasks: Iterable[TaskView], now: float, shown: int) -> Table:
    newest = sorted(tasks, key=lambda task: task.seen_at, reverse=True)
    title = "Tasks" if len(newest) <= shown else f"Tasks (newest {shown} of {len(newest)})"
    table = table_of(title, "task", "type", "network", "we", "doing", "GPU", "age s", "fee CNX")
    for task in newest[:shown]:
        age = (task.closed_at or now) - task.seen_at
        row(
            table,
            short(task.commitment),
            task.type,
            task.outcome or task.status or "-",
            task.progress,
            task.fault or task.action,
            task.gpu_id or "-",
            f"{max(age, 0.0):.1f}",
            cnx(task.fee),
        )
    return table


def totals(status: Status) -> Text:
    ended = ", ".join(f"{count} {name}" for name, count in status.totals.tasks.items() if count)
    slashed = status.totals.slashed
    line = Text(f"paid {cnx(status.totals.paid_wei)} CNX  tasks: {ended or 'none yet'}  ")
    line.append(f"slashed {slashed}", style="bold red" if slashed else "")
    return line


def short(commitment: str | None) -> str:
    return "-" if commitment is None else f"{commitment[:10]}…"


def table_of(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column)
    return table


def row(table: Table, *cells: str) -> None:
    """Whoever said what is in them: a terminal obeys nothing of it, and none of it is markup."""
    table.add_row(*(Text(printable(cell)) for cell in cells))
