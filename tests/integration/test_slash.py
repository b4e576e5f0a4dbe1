"""A card computes what nobody else does, its task is one of a group, and the account loses its
stake: with a whole operator, on a real chain.

Others count the operator's slashes (test_serve), so this comes after them.
"""

from __future__ import annotations

import pytest

from cluster.core.record import Closed, Outcome, ResultStored
from cluster.core.types import GigaBytes, GpuClass, GpuState
from cluster.status import AccountStatus, Status
from tests.integration.contracts_world import STAKE
from tests.integration.operator_world import CARDS, TEST_SECONDS, OperatorWorld, task
from tests.integration.test_operator_fleet import cli, restart

pytestmark = pytest.mark.timeout(TEST_SECONDS)
GROUP = frozenset({"EndGroupSuccess", "EndGroupRefund", "EndInvalidated"})
PAIR = GpuClass(f"{CARDS[0].name}+docker", GigaBytes(CARDS[0].vram))


def of_the_pair(status: Status) -> list[AccountStatus]:
    return [
        each
        for each in status.accounts
        if each.gpu_class is not None and each.gpu_class.name == PAIR.name
    ]


async def test_a_slashed_account_stays_out_until_it_is_cleared(operator: OperatorWorld) -> None:
    await operator.until_serving()
    status = await operator.until_status(lambda each: each, "it answers")
    odd = next(gpu.gpu_id for gpu in status.gpus if gpu.name == PAIR.name)
    serving = {each.address for each in of_the_pair(status) if each.status == "available"}
    assert len(serving) == 2

    # One of the group on each card.
    operator.gate.close()
    operator.oddity.of(odd)
    try:
        sent = operator.send(task("odd", seed=91, group=True, expected_end=GROUP))

        def all_compute(status: Status) -> bool:
            busy = [gpu for gpu in status.gpus if gpu.task is not None and (gpu.step or 0) > 0]
            return len(busy) == 3

        await operator.until_status(all_compute, "each card computes one of the three")
        operator.gate.open()
        reports = await sent.ended()
    finally:
        operator.gate.open()
        operator.oddity.end()
    ends = {report.actual_end: report for report in reports}
    assert set(ends) == GROUP
    lost = ends["EndInvalidated"]

    # Its stake is gone, its story and what it computed are kept, and it is told.
    events = await operator.closed(lost.commitment)
    assert events[-1] == Closed(Outcome.INVALIDATED, events[-1].payment)  # type: ignore[union-attr]
    assert operator.gpus_of(events) == [odd]
    assert any(isinstance(event, ResultStored) for event in events)

    def stopped(status: Status) -> str | None:
        """Its class rests: the other account of it has paused."""
        (there,) = (each for each in status.fleet.classes if each.name == PAIR.name)
        found = {each.status: each.address for each in status.accounts if each.address in serving}
        return found["quit"] if there.stopped and set(found) == {"paused", "quit"} else None

    account = await operator.until_status(stopped, "the account is out, and its class rests")
    status = await operator.until_status(lambda each: each, "it answers")
    assert status.totals.slashed == 1
    assert any(f"account {account} was slashed" in problem for problem in status.problems)
    (evidence,) = (each for each in status.problems if lost.commitment in each)
    assert "what it computed is in" in evidence
    assert not status.missing, "the other class serves"
    story = (await operator.get(f"/v1/tasks/{lost.commitment}")).json()
    assert story["outcome"] == "EndInvalidated"
    assert [each["gpu"] for each in story["attempts"]] == [odd]

    async def counted() -> bool:
        return "\ncrynux_slashes_total 1.0" in (await operator.get("/metrics")).text

    await operator.until(counted, "the metrics count it")

    # Neither applying the plan nor a new coordinator brings it back.
    code, out, error = await cli(operator, "fleet", "apply")
    assert code == 0, error
    code, out, error = await cli(operator, "fleet", "plan")
    assert code == 0, error
    assert f"{PAIR.name} ({PAIR.vram} GB): " in out
    assert ", stopped" in out
    await restart(operator)
    assert await operator.until_status(stopped, "it is as it was") == account

    code, out, error = await cli(operator, "fleet", "clear", account)
    assert code == 0, error
    assert f"{account} is cleared" in out
    await operator.until_serving()

    def well(status: Status) -> bool:
        found = of_the_pair(status)
        states = [gpu.state for gpu in status.gpus if gpu.name == PAIR.name]
        return (
            not status.problems
            and all(state is GpuState.READY for state in states)
            and sum(each.status == "available" and int(each.stake) >= STAKE for each in found) == 2
        )

    await operator.until_status(well, "both serve again, with a new stake")
    (report,) = await operator.send(task("after-it", seed=92)).ended()
    await operator.assert_paid_once(report)
