"""What the acting coordinator writes down of itself, and what it keeps of a slash."""

from __future__ import annotations

import socket
from pathlib import Path

from cluster.core.types import NodeStatus, Stage, TaskStatus
from cluster.journal import HOST
from tests.unit.actor_fakes import DONE, SCORE, TASK, facts_of, until
from tests.unit.test_term import Office, serving


async def test_where_it_acts_is_written_down(tmp_path: Path) -> None:
    office = Office(tmp_path)
    async with serving(office):
        await office.acting()
        assert office.journal.cursor(HOST) == socket.gethostname()


async def test_where_a_slashed_tasks_files_are_is_shown_until_it_is_cleared(
    tmp_path: Path,
) -> None:
    office = Office(tmp_path)
    office.network.add(facts_of())
    office.pool.outcomes = [DONE]
    async with serving(office):
        await until(lambda: office.network.tasks[TASK].score == SCORE)
        office.network.node_status = NodeStatus.QUIT
        office.network.move(TASK, stage=Stage.ENDED, status=TaskStatus.END_INVALIDATED)
        await until(lambda: office.kinds()[-1:] == ["Closed"])
        where = str(tmp_path / "artifacts" / TASK)
        assert any(where in problem for problem in office.status.problems)
