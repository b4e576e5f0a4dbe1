from __future__ import annotations

import re
from io import StringIO

import pytest
from rich.console import Console

from cluster import status_view, top_view
from cluster.core.types import GpuState, NodeStatus
from cluster.status import GpuClassView, Status, TaskView
from tests.unit.metric_fakes import CARD, account, gpu, large, snapshot

OTHER = GpuClassView(name="Other card", vram=80)


def shown(status: Status, height: int = 50, width: int = 120) -> list[str]:
    console = Console(file=StringIO(), height=height, width=width)
    with console.capture() as text:
        console.print(top_view.render(status, console))
    return text.get().splitlines()


def task(number: int) -> TaskView:
    return TaskView(
        commitment=f"0x{number:064x}",
        account="0x",
        type="SD",
        stage="answerable",
        progress="running",
        action="Wait",
        seen_at=float(number),
    )


def busy(cards: int, problems: int) -> Status:
    """A large operator, with as many cards that don't serve and as many problems."""
    broken = tuple(
        gpu(number, GpuState.UNREACHABLE).model_copy(update={"problem": "no CUDA"})
        for number in range(1000, 1000 + problems)
    )
    found = large(cards)
    lines = tuple(f"GPU n/{number}: no CUDA " + "x" * 300 for number in range(problems))
    tasks = tuple(map(task, range(300)))
    return found.model_copy(
        update={"gpus": (*found.gpus, *broken), "problems": lines, "tasks": tasks}
    )


@pytest.mark.parametrize("height", [24, 50, 80])
@pytest.mark.parametrize("problems", [0, 1, 40])
def test_a_large_operator_fits_on_the_screen(height: int, problems: int) -> None:
    lines = shown(busy(256, problems), height)
    assert len(lines) <= height
    assert "crynux-cluster 1" in lines[0]
    if problems:
        assert any("problem: GPU n/0: no CUDA" in line for line in lines[1:4])
        assert any("n/1000" in line for line in lines)


def test_what_has_no_room_is_counted() -> None:
    text = "\n".join(shown(busy(256, 40)))
    assert "more: crynux-cluster status" in text
    assert "of 40)" in text
    assert "of 300)" in text


def test_cards_and_accounts_are_counted_by_class_and_where_they_are() -> None:
    status = snapshot(
        (gpu(1, GpuState.READY), gpu(2, GpuState.DRAINED), gpu(3, GpuState.READY, OTHER)),
        (
            account(1, NodeStatus.BUSY),
            account(2, NodeStatus.BUSY),
            account(3, NodeStatus.QUIT, None),
        ),
    )
    text = "\n".join(shown(status))
    assert f"{CARD.name} 24 GB 2: 1 ready, 1 drained 2: 2 busy" in re.sub(r" +", " ", text)
    assert "Other card 80 GB" in text
    assert "1: 1 quit" in text
    assert "n/2" in text, "it doesn't serve"
    assert "n/1" not in text


def test_the_whole_status_has_problems_above_its_lists() -> None:
    console = Console(file=StringIO(), width=120)
    with console.capture() as text:
        console.print(status_view.render(busy(256, 3)))
    found = text.get()
    assert found.index("problem: ") < found.index("Accounts") < found.index("GPUs")
