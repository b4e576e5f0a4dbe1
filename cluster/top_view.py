"""A `Status` on one screen, whatever its size: first what is wrong, then counts, then what fits.

The whole lists are `crynux-cluster status`, `accounts` and `tasks`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.text import Text

from cluster.core.types import GpuState
from cluster.status import SERVING, AccountStatus, GpuClassView, GpuStatus, Status
from cluster.status_view import (
    gpus_table,
    headline,
    problems,
    row,
    stores_table,
    table_of,
    tasks_table,
    totals,
)

_FRAME = 5
"""Lines of a table without rows: title, head, rule, and what is left free."""
_NO_CLASS = GpuClassView(name="no class", vram=0)


def render(status: Status, console: Console) -> RenderableType:
    """As much as the console's height has room for."""
    fixed = [headline(status), classes(status, max(2, console.height // 4)), totals(status)]
    left = console.height - sum(_lines(console, each) for each in fixed)
    troubles = _cut(problems(status), max(1, left // 3))
    left -= len(troubles)
    unwell = [gpu for gpu in status.gpus if gpu.state not in SERVING or gpu.problem]
    shown = unwell[: max(1, left // 2 - _FRAME) if left > _FRAME else 0]
    parts: list[RenderableType] = [fixed[0], *troubles, fixed[1]]
    if shown:
        words = f"{len(shown)} of {len(unwell)}" if len(shown) < len(unwell) else str(len(unwell))
        parts.append(gpus_table(shown, f"GPUs that don't serve or have a problem ({words})"))
        left -= _lines(console, parts[-1])
    for table in stores_table(status.stores):
        height = _lines(console, table)
        if height <= left // 2:
            parts.append(table)
            left -= height
    if status.tasks and left > _FRAME:
        parts.append(tasks_table(status, left - _FRAME))
    return Group(*parts, fixed[2])


def classes(status: Status, most: int) -> RenderableType:
    """Cards and accounts of each class, by where they are."""
    cards: dict[GpuClassView, list[GpuStatus]] = {}
    for gpu in status.gpus:
        cards.setdefault(GpuClassView(name=gpu.name, vram=gpu.vram), []).append(gpu)
    nodes: dict[GpuClassView, list[AccountStatus]] = {}
    for account in status.accounts:
        nodes.setdefault(account.gpu_class or _NO_CLASS, []).append(account)
    table = table_of("Classes", "GPU class", "GPUs", "accounts")
    kinds = sorted({*cards, *nodes}, key=lambda each: (-each.vram, each.name))
    for kind in kinds if len(kinds) <= most else kinds[: most - 1]:
        name = f"{kind.name} {kind.vram} GB" if kind.vram else kind.name
        found = Counter(gpu.state for gpu in cards.get(kind, ()))
        states = [(state.value, found[state]) for state in GpuState]
        counted = Counter(account.status for account in nodes.get(kind, ()))
        row(table, name, _counts(states), _counts(sorted(counted.items())))
    if len(kinds) > most:
        row(table, f"and {len(kinds) - most + 1} more", "", "")
    return table


def _counts(found: Sequence[tuple[str, int]]) -> str:
    words = ", ".join(f"{count} {name}" for name, count in found if count)
    total = sum(count for _, count in found)
    return f"{total}: {words}" if words else "-"


def _cut(lines: list[Text], most: int) -> list[Text]:
    """One line each, and how many there are beyond."""
    for line in lines:
        line.no_wrap, line.overflow = True, "ellipsis"
    if len(lines) <= most:
        return lines
    more = Text(f"and {len(lines) - most + 1} more: crynux-cluster status", style="yellow")
    return [*lines[: most - 1], more]


def _lines(console: Console, part: RenderableType) -> int:
    return len(console.render_lines(part, pad=False))
