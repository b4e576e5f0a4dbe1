"""The whole operator through crashes, changes of the cluster, and tasks of every kind.

Everything is real: the chain, the relay, Ray, the pipelines. What is killed is killed with SIGKILL.
"""

from __future__ import annotations

import asyncio
import os
import signal

import pytest
import ray

from cluster.core.record import (
    AttemptFailed,
    AttemptStarted,
    Claim,
    Claimed,
    Closed,
    Fault,
    FaultFound,
    Outcome,
    ResultStored,
)
from cluster.core.types import GpuState
from cluster.status import GpuStatus, Status
from devnet.demo_tasks import ABORTED, GROUP, parameters
from devnet.models import SD15, SD15_LORA, SDXL_LORA
from tests.integration.operator_crashes import Point
from tests.integration.operator_start import late_node
from tests.integration.operator_world import (
    LATE_CARD,
    PATIENCE,
    TASK_TIMEOUT,
    TEST_SECONDS,
    OperatorWorld,
    answer_of,
    task,
)

pytestmark = pytest.mark.timeout(TEST_SECONDS)
SECOND = "coordinator-2"


@pytest.fixture(autouse=True)
async def serving(operator: OperatorWorld) -> None:
    await operator.until_serving()


# --- the coordinator is killed -------------------------------------------------------------------


@pytest.mark.parametrize("point", Point, ids=lambda point: point.name.lower())
async def test_coordinator_killed(operator: OperatorWorld, point: Point) -> None:
    before = await operator.until_status(lambda status: status.epoch, "a coordinator acts")
    operator.fuse.arm([point])
    if point is Point.COMPUTING:
        operator.gate.close()
    (report,) = await operator.send(task(f"crash-{point.name.lower()}")).ended()
    met = operator.fuse.met()
    assert list(met) == [point], "the coordinator was killed there, once"
    events = await operator.assert_paid_once(report)
    assert len([e for e in events if isinstance(e, AttemptStarted)]) == 1, "computed once"
    await operator.until_status(lambda s: (s.epoch or 0) > before or None, "it acts again")
    if met[point].startswith("0x"):
        (mined,) = operator.score_transactions(report.commitment)
        assert mined[0] == met[point], "the bytes that were stored before the crash were mined"


async def test_coordinator_killed_at_every_step(operator: OperatorWorld) -> None:
    operator.fuse.arm(list(Point))
    operator.gate.close()
    (report,) = await operator.send(task("crash-everywhere")).ended()
    assert set(operator.fuse.met()) == set(Point)
    events = await operator.assert_paid_once(report)
    assert len([e for e in events if isinstance(e, AttemptStarted)]) == 1


# --- a GPU's process is killed -------------------------------------------------------------------


async def test_inference_actor_killed(operator: OperatorWorld) -> None:
    operator.gate.close()
    sent = operator.send(task("gpu-killed"))
    gpu = await operator.computing(lambda: sent.commitments.get("gpu-killed"))
    pid = (await operator.gpu_report(gpu.gpu_id)).pid
    os.kill(pid, signal.SIGKILL)
    operator.gate.open()
    (report,) = await sent.ended()
    events = await operator.assert_paid_once(report)
    first, second = operator.gpus_of(events)
    assert first == gpu.gpu_id != second
    assert [e.fault for e in events if isinstance(e, AttemptFailed)] == [Fault.LOST]

    def back(status: Status) -> bool | None:
        return any(g.gpu_id == first and g.state is GpuState.READY for g in status.gpus) or None

    await operator.until_status(back, "the killed GPU actor is back")
    assert (await operator.gpu_report(first)).pid != pid


# --- two coordinators ----------------------------------------------------------------------------


async def test_second_coordinator_takes_over(operator: OperatorWorld) -> None:
    """The first goes for good in the middle of a task; the second ends it, and gives way again."""
    first = operator.coordinator()
    second = operator.start_coordinator(SECOND)
    try:
        waiting = operator.log().count("waiting_for_the_lease")

        def waits() -> bool:
            return operator.log().count("waiting_for_the_lease") >= waiting + 3

        await operator.until_true(
            waits, "the second coordinator has asked for the lease three times"
        )
        status = await operator.until_status(lambda s: s, "the second answers", SECOND)
        assert (status.acting, status.epoch, status.tasks) == (False, None, ())

        operator.gate.close()
        sent = operator.send(task("taken-over"))
        await operator.computing(lambda: sent.commitments.get("taken-over"))
        before = await operator.until_status(lambda s: s.epoch, "the first acts")
        assert not (await operator.until_status(lambda s: s, "it answers", SECOND)).acting
        ray.kill(first, no_restart=True)
        epoch = await operator.until_status(lambda s: s.epoch, "the second acts", SECOND)
        assert epoch == before + 1
        operator.gate.open()
        (report,) = await sent.ended()
        events = await operator.assert_paid_once(report)
        assert len(operator.gpus_of(events)) == 1
        await answer_of(second.stop.remote(), PATIENCE)
    finally:
        ray.kill(second, no_restart=True)
        operator.start_coordinator()
    after = await operator.until_status(lambda s: s.epoch, "a new first coordinator acts")
    assert after == before + 2, "the lease was given back, not waited for"


# --- a Ray node comes and goes -------------------------------------------------------------------


async def test_node_joins_and_leaves(operator: OperatorWorld) -> None:
    with late_node() as (node, vanish):

        def found(status: Status) -> GpuStatus | None:
            joined = any(
                account.gpu_class is not None
                and (account.gpu_class.name, account.status) == (LATE_CARD.name, "available")
                for account in status.accounts
            )
            for gpu in status.gpus:
                if gpu.ray_node == node and gpu.state is GpuState.READY and joined:
                    return gpu
            return None

        card = await operator.until_status(found, "the new node's card is ready, its account too")
        assert (card.name, card.vram) == (LATE_CARD.name, LATE_CARD.vram)
        spec = task(
            "on-the-new-node",
            required_gpu=LATE_CARD.name,
            required_gpu_vram=int(LATE_CARD.vram),
        )
        (report,) = await operator.send(spec).ended()
        events = await operator.assert_paid_once(report)
        assert operator.gpus_of(events) == [card.gpu_id]

        # It is warm now and the smallest, so the next task goes there too.
        operator.gate.close()
        sent = operator.send(task("moved"))
        gpu = await operator.computing(lambda: sent.commitments.get("moved"))
        assert gpu.gpu_id == card.gpu_id
        await asyncio.to_thread(vanish)
        operator.gate.open()
        (report,) = await sent.ended()
        events = await operator.assert_paid_once(report)
        assert operator.gpus_of(events)[0] == card.gpu_id
        assert operator.gpus_of(events)[-1] != card.gpu_id

        def gone(status: Status) -> bool | None:
            return all(gpu.ray_node != node for gpu in status.gpus) or None

        await operator.until_status(gone, "the node's card has left the status")


# --- tasks of every kind -------------------------------------------------------------------------


async def test_tasks_end_as_they_should(operator: OperatorWorld) -> None:
    base, other = SD15
    prompt = "a blue house by the river"
    wrong_lora = parameters(base, prompt, 1, lora={"model": SDXL_LORA})
    lora = parameters(base, prompt, 2, lora={"model": SD15_LORA, "weight": 80})
    reports = await operator.send(
        task("encrypted", seed=11),
        task("clear", seed=12, base=other, encrypted=False),
        task(
            "named-gpu",
            parameters=lora,
            model_ids=(f"base:{base}", f"lora:{SD15_LORA}"),
            required_gpu="NVIDIA A100-SXM4-80GB+docker",
            required_gpu_vram=80,
        ),
        task("bad-parameters", steps=1000, expected_end=ABORTED, expected_report=True),
        task(
            "wrong-lora",
            parameters=wrong_lora,
            model_ids=(f"base:{base}", f"lora:{SDXL_LORA}"),
            expected_end=ABORTED,
            expected_report=True,
        ),
        task("group", seed=13, base=other, group=True, expected_end=GROUP),
    ).ended()
    by_name = {report.name: report for report in reports}
    assert {r.name: (r.actual_end, r.problem) for r in reports if not r.as_expected} == {}

    for name in ("encrypted", "clear", "named-gpu"):
        events = await operator.assert_paid_once(by_name[name])
        if name == "named-gpu":
            (gpu,) = operator.gpus_of(events)
            assert (await operator.gpu_report(gpu)).gpu_class is not None
            status = await operator.until_status(lambda s: s, "it answers")
            (name_of,) = {each.name for each in status.gpus if each.gpu_id == gpu}
            assert name_of == "NVIDIA A100-SXM4-80GB+docker"

    for name in ("bad-parameters", "wrong-lora"):
        commitment = by_name[name].commitment
        events = await operator.closed(commitment)
        assert len([e for e in events if isinstance(e, FaultFound)]) == 1
        assert [e for e in events if isinstance(e, Claimed)] == [Claimed(Claim.ERROR)]
        assert isinstance(events[-1], Closed)
        assert events[-1].outcome is Outcome.ABORTED
        assert operator.score_transactions(commitment) == []

    group = [report for report in reports if report.name.startswith("group")]
    ends = sorted(report.actual_end for report in group)
    assert ends == ["EndGroupRefund", "EndGroupRefund", "EndGroupSuccess"]
    scores = set()
    for report in group:
        events = await operator.closed(report.commitment)
        scores |= {event.score for event in events if isinstance(event, ResultStored)}
        assert len(operator.score_transactions(report.commitment)) == 1
    assert len(scores) == 1, "three attempts, one score"


async def test_parameters_never_uploaded(operator: OperatorWorld) -> None:
    sent = operator.send(task("never-uploaded", upload=False, expected_end=ABORTED))

    def seen() -> bool:
        commitment = sent.commitments.get("never-uploaded")
        return commitment is not None and bool(operator.events(commitment))

    await operator.until_true(seen, "the operator has seen the task")
    operator.pass_time(TASK_TIMEOUT)
    (report,) = await sent.ended()
    assert report.as_expected, report.problem
    events = await operator.closed(report.commitment)
    assert isinstance(events[-1], Closed)
    assert events[-1].outcome is Outcome.ABORTED
    assert operator.score_transactions(report.commitment) == []
    assert Claimed(Claim.SCORE) not in events
    assert Claimed(Claim.ERROR) not in events
