"""The chain is away for longer than a task may take: what is lost is only what time took."""

from __future__ import annotations

import pytest

from cluster.core.record import Claim, Claimed, Closed, Outcome, ResultStored
from cluster.core.types import TaskStatus
from tests.integration.operator_world import (
    CARDS,
    TASK_TIMEOUT,
    TEST_SECONDS,
    OperatorWorld,
    task,
)

pytestmark = pytest.mark.timeout(TEST_SECONDS)
OUTAGE = 3600.0
ABORTED = frozenset({TaskStatus.END_ABORTED.label})


async def test_the_chain_is_away_for_longer_than_a_tasks_timeout(operator: OperatorWorld) -> None:
    await operator.until_serving()
    operator.gate.close()
    # Each is for a class of its own, so that neither waits for the other's account or card.
    small, large = CARDS
    first = task(
        "too-late",
        seed=71,
        expected_end=ABORTED,
        required_gpu=f"{small.name}+docker",
        required_gpu_vram=int(small.vram),
    )
    late = operator.send(first)
    await operator.computing(lambda: late.commitments.get("too-late"))
    spec = task(
        "in-time",
        seed=72,
        timeout=20 * TASK_TIMEOUT,
        required_gpu=f"{large.name}+docker",
        required_gpu_vram=int(large.vram),
    )
    kept = operator.send(spec)
    await operator.computing(lambda: kept.commitments.get("in-time"))

    operator.rpc.fail("drop", OUTAGE)
    await operator.hear("the chain is not reached: ")
    operator.gate.open()
    tasks = [late.commitments["too-late"], kept.commitments["in-time"]]

    def computed() -> bool:
        return all(
            any(isinstance(event, ResultStored) for event in operator.events(each))
            for each in tasks
        )

    await operator.until_true(computed, "what was being computed is computed to its end")
    operator.pass_time(TASK_TIMEOUT)
    (report,) = await late.ended()
    assert report.as_expected, report.problem

    operator.rpc.heal()
    await operator.hear_nothing_missing()
    (report,) = await kept.ended()
    events = await operator.assert_paid_once(report)
    assert len(operator.gpus_of(events)) == 1, "it was not computed again"
    events = await operator.closed(tasks[0])
    assert isinstance(events[-1], Closed)
    assert events[-1].outcome is Outcome.ABORTED
    assert Claimed(Claim.ERROR) not in events
    assert operator.score_transactions(tasks[0]) == []
    # Its account serves on.
    await operator.until_serving()
    (report,) = await operator.send(task("afterwards", seed=73)).ended()
    await operator.assert_paid_once(report)
