from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import pytest
import ray
from ray.actor import ActorHandle
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    OutOfMemoryError,
    OwnerDiedError,
    RayActorError,
    RaySystemError,
    RayTaskError,
)

from actors import pool as pool_module
from actors.inference import Engine, Health, Report
from actors.pool import UNKNOWN, RayGpuPool, Slot, parse_simulated, simulated_resource, slots_of
from cluster.core.errors import (
    AttemptLost,
    Cancelled,
    ClusterError,
    DeadlinePassed,
    DeviceFault,
    DeviceFaultKind,
    ModelUnavailable,
    ModelUnavailableKind,
    TaskInvalid,
    TaskUnsupported,
)
from cluster.core.ports import Order
from cluster.core.types import (
    AttemptId,
    CardUuid,
    GigaBytes,
    GpuClass,
    GpuId,
    GpuState,
    RayNodeId,
)
from tests.unit.actor_fakes import DONE, KIND, TASK

A = AttemptId("a")
ORDER = Order(A, TASK, 0, "{}", None)
RELEASE = "1+abc"
READY = Report(
    release=RELEASE,
    pid=1,
    health=Health.READY,
    gpu_class=KIND,
    problem="",
    attempt=None,
    task=None,
    step=0,
    steps=0,
    finished=0,
    warm=frozenset({"w"}),
    in_host_memory=frozenset({"h"}),
    on_disk=frozenset({"d"}),
)
DEAD = ActorDiedError()
UNAVAILABLE = ActorUnavailableError("restarting", None)
BUG = RayTaskError("report", "Traceback ...", ValueError("a bug"))  # type: ignore[no-untyped-call]
AWAY = RaySystemError("the control plane is away")  # type: ignore[no-untyped-call]
LOST = OwnerDiedError("00" * 28, None, "")


class Remote:
    """What a method of an actor handle is: `remote` gives something to await."""

    def __init__(self, actor: FakeActor, method: str) -> None:
        self._actor, self._method = actor, method

    async def remote(self, *args: object) -> object:
        self._actor.calls.append((self._method, *args))
        answers = self._actor.answers[self._method]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if answer is NEVER:
            await asyncio.Event().wait()
        # As with Ray, what ends the call is raised; what the method returned is returned.
        if isinstance(answer, BaseException) and not isinstance(answer, ClusterError):
            raise answer
        return answer


NEVER = object()


class FakeActor:
    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        self.calls: list[tuple[object, ...]] = []
        self.answers: dict[str, list[object]] = defaultdict(lambda: [None])
        self.answers["report"] = [READY]

    def __getattr__(self, method: str) -> Remote:
        return Remote(self, method)


class Pool(RayGpuPool):
    """The pool with fakes where it makes and kills actors."""

    def __init__(self, allow_simulated: bool = True) -> None:
        def no_engine(_: GpuClass | None) -> Callable[[], Engine]:
            raise AssertionError

        super().__init__(no_engine, RELEASE, allow_simulated, stall_seconds=300.0)
        self.made: list[FakeActor] = []
        self.killed: list[tuple[FakeActor, bool]] = []
        self.first_report: object = READY
        self.threads: set[int] = set()

    def _actor(self, slot: Slot) -> ActorHandle[Any]:
        self.threads.add(threading.get_ident())
        actor = FakeActor(slot)
        actor.answers["report"] = [self.first_report]
        self.made.append(actor)
        return cast("ActorHandle[Any]", actor)

    def _kill(self, member: Any, restart: bool) -> None:
        self.threads.add(threading.get_ident())
        self.killed.append((member.actor, restart))


def node(
    resources: Mapping[str, float], node_id: str = "n" * 56, alive: bool = True
) -> dict[str, Any]:
    return {"NodeID": node_id, "Alive": alive, "Resources": dict(resources)}


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `ray.nodes()` says: one machine with one card."""
    found = [node({"GPU": 1.0, "CPU": 8.0})]
    monkeypatch.setattr(ray, "nodes", lambda: found)
    monkeypatch.setattr(pool_module, "PING_SECONDS", 0.01)
    return found


async def pool_of(report: object = READY) -> tuple[Pool, FakeActor, GpuId]:
    pool = Pool()
    pool.first_report = report
    await pool.refresh()
    return pool, pool.made[0], pool.made[0].slot.gpu_id


# --- cards of the cluster -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        KIND,
        GpuClass("NVIDIA GeForce RTX 4090+docker", GigaBytes(24)),
        GpuClass("a|b|8", GigaBytes(80)),
    ],
)
def test_a_simulated_class_survives_its_resource(kind: GpuClass) -> None:
    assert parse_simulated(simulated_resource(kind)) == kind


@pytest.mark.parametrize(
    "resource",
    [
        "GPU",
        "CPU",
        "node:127.0.0.1",
        "crynux-sim|",
        "crynux-sim|8",
        "crynux-sim||8",
        "crynux-sim|Card|",
        "crynux-sim|Card|x",
        "crynux-sim|Card|-8",
        "crynux-sim|Card|8.5",
        "crynux-sim|Card|²",
        "xcrynux-sim|Card|8",
    ],
)
def test_other_resources_are_no_simulated_cards(resource: str) -> None:
    assert parse_simulated(resource) is None


def test_every_card_of_every_living_node_is_a_slot() -> None:
    sim = simulated_resource(KIND)
    found = slots_of(
        [
            node({"GPU": 2.0, "CPU": 4.0, sim: 1.0, "crynux-sim|bad": 3.0}, "aaaaaaaa1111"),
            node({"CPU": 4.0}, "bbbbbbbb2222"),
            node({"GPU": 8.0}, "cccccccc3333", alive=False),
        ],
        allow_simulated=True,
    )
    assert found == (
        Slot(GpuId("aaaaaaaa-0"), RayNodeId("aaaaaaaa1111"), "GPU", None),
        Slot(GpuId("aaaaaaaa-1"), RayNodeId("aaaaaaaa1111"), "GPU", None),
        Slot(GpuId("aaaaaaaa-2"), RayNodeId("aaaaaaaa1111"), sim, KIND, CardUuid(f"{sim}||0")),
    )


def test_simulated_cards_are_left_out_where_they_are_not_allowed() -> None:
    cards = [node({"GPU": 1.0, simulated_resource(KIND): 4.0})]
    assert [slot.resource for slot in slots_of(cards, allow_simulated=False)] == ["GPU"]


def test_a_dead_node_is_not_even_asked_for_its_resources() -> None:
    assert slots_of([{"NodeID": "x", "Alive": False}], allow_simulated=True) == ()


# --- what a card is like --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("health", "state"),
    [
        (Health.STARTING, GpuState.STARTING),
        (Health.READY, GpuState.READY),
        (Health.BUSY, GpuState.BUSY),
        (Health.BROKEN, GpuState.UNREACHABLE),
    ],
)
async def test_a_cards_state_is_what_its_actor_reports(
    nodes: list[dict[str, Any]], health: Health, state: GpuState
) -> None:
    pool, _, gpu_id = await pool_of(replace(READY, health=health))
    (gpu,) = pool.gpus()
    assert (gpu.gpu_id, gpu.state, gpu.gpu_class, gpu.simulated) == (gpu_id, state, KIND, False)
    assert (gpu.warm, gpu.in_host_memory, gpu.on_disk) == (
        READY.warm,
        READY.in_host_memory,
        READY.on_disk,
    )
    assert pool.report(gpu_id) is not None
    assert pool.report(GpuId("elsewhere")) is None


async def test_a_real_card_is_unknown_until_it_says_what_it_is(
    nodes: list[dict[str, Any]],
) -> None:
    pool, actor, _ = await pool_of(replace(READY, health=Health.STARTING, gpu_class=None))
    assert pool.gpus() == ()
    actor.answers["report"] = [READY]
    await pool.refresh()
    assert [gpu.state for gpu in pool.gpus()] == [GpuState.READY]
    # A restarted process has forgotten it for a while; we have not.
    actor.answers["report"] = [replace(READY, health=Health.STARTING, gpu_class=None)]
    await pool.refresh()
    assert [(gpu.state, gpu.gpu_class) for gpu in pool.gpus()] == [(GpuState.STARTING, KIND)]


async def test_a_real_card_that_never_comes_up_is_seen_with_what_is_wrong(
    nodes: list[dict[str, Any]],
) -> None:
    starting = replace(READY, health=Health.STARTING, gpu_class=None)
    pool, actor, gpu_id = await pool_of(starting)
    seen = [(gpu.gpu_id, gpu.gpu_class, gpu.state) for gpu in pool.unknown()]
    assert seen == [(gpu_id, UNKNOWN, GpuState.STARTING)]
    broken = replace(starting, health=Health.BROKEN, problem="no CUDA")
    actor.answers["report"] = [broken, starting]
    await pool.refresh()
    assert [gpu.state for gpu in pool.unknown()] == [GpuState.UNREACHABLE]
    # It is begun anew again and again: between two times it is no better.
    await pool.refresh()
    report = pool.report(gpu_id)
    assert report is not None
    assert (report.health, report.problem, pool.gpus()) == (Health.STARTING, "no CUDA", ())
    actor.answers["report"] = [READY]
    await pool.refresh()
    report = pool.report(gpu_id)
    assert report is not None
    assert (report.problem, pool.unknown(), len(pool.gpus())) == ("", (), 1)


async def test_a_simulated_card_is_known_before_it_answers(nodes: list[dict[str, Any]]) -> None:
    nodes[:] = [node({simulated_resource(KIND): 1.0})]
    pool, _, _ = await pool_of(UNAVAILABLE)
    (gpu,) = pool.gpus()
    assert (gpu.state, gpu.gpu_class, gpu.simulated) == (GpuState.STARTING, KIND, True)


@pytest.mark.parametrize("silence", [NEVER, DEAD, UNAVAILABLE, BUG, AWAY])
async def test_a_card_that_stops_answering_is_unreachable_and_the_look_goes_on(
    nodes: list[dict[str, Any]], silence: object
) -> None:
    nodes[:] = [node({"GPU": 1.0}, "aaaaaaaa"), node({"GPU": 1.0}, "bbbbbbbb")]
    pool, actor, _ = await pool_of()
    actor.answers["report"] = [silence]
    pool.first_report = silence
    await pool.refresh()
    assert [gpu.state for gpu in pool.gpus()] == [GpuState.UNREACHABLE, GpuState.READY]


def test_a_simulated_card_is_the_same_one_in_every_session() -> None:
    kinds = {simulated_resource(KIND): 2.0}
    first = slots_of([node(kinds, "aaaaaaaa") | {"NodeManagerHostname": "one"}], True)
    later = slots_of([node(kinds, "bbbbbbbb") | {"NodeManagerHostname": "one"}], True)
    other = slots_of([node(kinds, "bbbbbbbb") | {"NodeManagerHostname": "two"}], True)
    assert [slot.uuid for slot in first] == [slot.uuid for slot in later]
    assert len({slot.uuid for slot in (*first, *other)}) == 4


@pytest.mark.parametrize("resource", ["GPU", simulated_resource(KIND)])
async def test_a_result_says_which_card_computed_it_by_the_name_that_the_pool_has_for_it(
    nodes: list[dict[str, Any]], resource: str
) -> None:
    nodes[:] = [node({resource: 1.0})]
    pool, actor, gpu_id = await pool_of(replace(READY, uuid=CardUuid("GPU-1")))
    actor.answers["result"] = [replace(DONE, card=CardUuid("GPU-1"))]
    (gpu,) = pool.gpus()
    assert (await pool.result(gpu_id, A)).card == gpu.uuid


@pytest.mark.parametrize(
    ("before", "after", "starved"),
    [(3, 4, True), (3, 3, False), (None, 4, False), (3, None, False)],
)
async def test_a_process_that_its_machine_ended_for_want_of_memory_is_known(
    nodes: list[dict[str, Any]], before: int | None, after: int | None, starved: bool
) -> None:
    first = replace(READY, incarnation="p1", memory_kills=before)
    pool, actor, gpu_id = await pool_of(first)
    actor.answers["report"] = [replace(first, memory_kills=9), first]
    for _ in range(2):
        await pool.refresh()
        assert pool.starved(gpu_id) == "", "it is there: others were ended"
    actor.answers["report"] = [UNAVAILABLE, replace(first, incarnation="p2", memory_kills=after)]
    for _ in range(2):
        await pool.refresh()
    assert pool.starved(gpu_id) == ("p1" if starved else "")
    assert pool.starved(GpuId("elsewhere")) == ""


async def test_so_is_one_that_ray_ended_for_it(nodes: list[dict[str, Any]]) -> None:
    pool, actor, gpu_id = await pool_of(replace(READY, incarnation="p1"))
    full = OutOfMemoryError("95 % of memory is used")  # type: ignore[no-untyped-call]
    actor.answers["result"] = [full]
    with pytest.raises(AttemptLost, match="OutOfMemoryError"):
        await pool.result(gpu_id, A)
    assert pool.starved(gpu_id) == "p1"


async def test_a_card_in_quarantine_is_seen_as_such_and_by_its_uuid(
    nodes: list[dict[str, Any]],
) -> None:
    uuid = CardUuid("GPU-1")
    pool, actor, _ = await pool_of(replace(READY, uuid=uuid))
    assert [(gpu.uuid, gpu.state) for gpu in pool.gpus()] == [(uuid, GpuState.READY)]
    pool.quarantine(frozenset({uuid}))
    assert [gpu.state for gpu in pool.gpus()] == [GpuState.QUARANTINED]
    # A process that begins anew doesn't say which card it has until its engine is up.
    actor.answers["report"] = [replace(READY, health=Health.STARTING, uuid=CardUuid(""))]
    await pool.refresh()
    assert [(gpu.uuid, gpu.state) for gpu in pool.gpus()] == [(uuid, GpuState.QUARANTINED)]
    pool.quarantine(frozenset({CardUuid("GPU-2")}))
    assert [gpu.state for gpu in pool.gpus()] == [GpuState.STARTING]
    # Another card may sit there now.
    actor.answers["report"] = [replace(READY, uuid=CardUuid("GPU-2"))]
    await pool.refresh()
    assert [gpu.state for gpu in pool.gpus()] == [GpuState.QUARANTINED]


async def test_an_actor_dead_for_good_is_made_again(nodes: list[dict[str, Any]]) -> None:
    pool, actor, _ = await pool_of()
    actor.answers["report"] = [DEAD]
    await pool.refresh()
    await pool.refresh()
    assert len(pool.made) == 2
    assert [gpu.state for gpu in pool.gpus()] == [GpuState.READY]


async def test_an_actor_that_restarts_is_left_to_ray(nodes: list[dict[str, Any]]) -> None:
    pool, actor, _ = await pool_of()
    actor.answers["report"] = [UNAVAILABLE, READY]
    await pool.refresh()
    await pool.refresh()
    assert (len(pool.made), pool.killed) == (1, [])
    assert [gpu.state for gpu in pool.gpus()] == [GpuState.READY]


async def test_an_actor_of_another_release_is_replaced(nodes: list[dict[str, Any]]) -> None:
    pool, actor, _ = await pool_of()
    actor.answers["report"] = [replace(READY, release="0+old")]
    await pool.refresh()
    assert pool.killed == [(actor, False)]
    assert [gpu.state for gpu in pool.gpus()] == [GpuState.UNREACHABLE]
    await pool.refresh()
    assert (len(pool.made), len(pool.killed)) == (2, 1)
    assert [gpu.state for gpu in pool.gpus()] == [GpuState.READY]


async def test_a_node_that_leaves_takes_its_cards_with_it(nodes: list[dict[str, Any]]) -> None:
    pool, actor, gpu_id = await pool_of()
    nodes.clear()
    await pool.refresh()
    assert pool.gpus() == ()
    assert pool.killed == [(actor, False)]
    with pytest.raises(DeviceFault):
        await pool.start(gpu_id, ORDER)
    with pytest.raises(AttemptLost):
        await pool.result(gpu_id, A)
    await pool.cancel(gpu_id, A)
    assert [call for call in actor.calls if call[0] != "report"] == []


async def test_only_a_change_is_told(nodes: list[dict[str, Any]]) -> None:
    told: list[int] = []
    pool, actor, _ = await pool_of()
    pool.on_change(lambda: told.append(1))
    await pool.refresh()
    assert told == []
    actor.answers["report"] = [replace(READY, health=Health.BUSY)]
    await pool.refresh()
    assert told == [1]


async def test_a_cluster_that_cant_be_read_changes_nothing(
    nodes: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, _, _ = await pool_of()

    def unreadable() -> list[Mapping[str, Any]]:
        raise AWAY

    monkeypatch.setattr(ray, "nodes", unreadable)
    await pool.refresh()
    assert [gpu.state for gpu in pool.gpus()] == [GpuState.READY]
    assert pool.killed == []


# --- attempts -------------------------------------------------------------------------------------


async def test_start_hands_the_order_over(nodes: list[dict[str, Any]]) -> None:
    pool, actor, gpu_id = await pool_of()
    await pool.start(gpu_id, ORDER)
    assert actor.calls[-1] == ("start", ORDER)


@pytest.mark.parametrize("silence", [NEVER, RayActorError(), DEAD, UNAVAILABLE, BUG])
async def test_a_start_without_an_answer_is_the_cards_fault(
    nodes: list[dict[str, Any]], silence: object
) -> None:
    pool, actor, gpu_id = await pool_of()
    actor.answers["start"] = [silence]
    with pytest.raises(DeviceFault) as caught:
        await pool.start(gpu_id, ORDER)
    assert caught.value.kind is DeviceFaultKind.NOT_TAKEN


@pytest.mark.parametrize(("silence", "told"), [(NEVER, True), (UNAVAILABLE, True), (DEAD, False)])
async def test_an_order_that_wasnt_answered_is_taken_back(
    nodes: list[dict[str, Any]], silence: object, told: bool
) -> None:
    """It may run already, or as soon as the process is up: on a card that passes for free."""
    pool, actor, gpu_id = await pool_of()
    actor.answers["start"] = [silence]
    with pytest.raises(DeviceFault):
        await pool.start(gpu_id, ORDER)
    assert (("cancel", A) in actor.calls) is told


async def test_a_refused_start_raises_what_the_actor_said(nodes: list[dict[str, Any]]) -> None:
    pool, actor, gpu_id = await pool_of()
    refusal = DeviceFault(DeviceFaultKind.OTHER, "busy with another")
    actor.answers["start"] = [refusal]
    with pytest.raises(DeviceFault) as caught:
        await pool.start(gpu_id, ORDER)
    assert caught.value is refusal


async def test_a_result_is_what_the_actor_computed(nodes: list[dict[str, Any]]) -> None:
    pool, actor, gpu_id = await pool_of()
    actor.answers["result"] = [DONE]
    assert await pool.result(gpu_id, A) == DONE
    assert actor.calls[-1] == ("result", A)


@pytest.mark.parametrize("silence", [RayActorError(), DEAD, UNAVAILABLE, BUG, LOST])
async def test_a_result_that_ray_lost_is_a_lost_attempt(
    nodes: list[dict[str, Any]], silence: object
) -> None:
    pool, actor, gpu_id = await pool_of()
    actor.answers["result"] = [silence]
    with pytest.raises(AttemptLost):
        await pool.result(gpu_id, A)
    assert pool.killed == []


@pytest.mark.parametrize(
    ("error", "kills"),
    [
        (TaskInvalid("x"), False),
        (TaskUnsupported("x"), False),
        (Cancelled("x"), False),
        (DeadlinePassed("x"), False),
        (AttemptLost("x"), False),
        (ModelUnavailable(ModelUnavailableKind.DAMAGED, "x"), False),
        (DeviceFault(DeviceFaultKind.OUT_OF_MEMORY, "x"), False),
        (DeviceFault(DeviceFaultKind.BAD_RESULT, "x"), False),
        (DeviceFault(DeviceFaultKind.OTHER, "x"), False),
        (DeviceFault(DeviceFaultKind.CONTEXT_LOST, "x"), True),
        (DeviceFault(DeviceFaultKind.STALLED, "x"), True),
    ],
)
async def test_an_outcomes_error_is_raised_as_it_is_and_a_broken_process_dies(
    nodes: list[dict[str, Any]], error: ClusterError, kills: bool
) -> None:
    pool, actor, gpu_id = await pool_of()
    actor.answers["result"] = [error]
    with pytest.raises(type(error)) as caught:
        await pool.result(gpu_id, A)
    assert caught.value is error
    # Ray starts the process again: the card is not given up.
    assert pool.killed == ([(actor, True)] if kills else [])


@pytest.mark.parametrize("silence", [NEVER, RayActorError(), BUG])
async def test_a_cancel_without_an_answer_is_no_failure(
    nodes: list[dict[str, Any]], silence: object
) -> None:
    pool, actor, gpu_id = await pool_of()
    actor.answers["cancel"] = [silence]
    await pool.cancel(gpu_id, A)
    assert actor.calls[-1] == ("cancel", A)


@pytest.mark.usefixtures("nodes")
async def test_a_cancelled_attempt_that_goes_on_and_on_ends_its_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attempt = AttemptId("a1")
    pool, actor, gpu = await pool_of(replace(READY, health=Health.BUSY, attempt=attempt))
    await pool.cancel(gpu, attempt)
    await pool.refresh()
    assert pool.killed == []
    monkeypatch.setattr(pool_module, "HUNG_SECONDS", -1.0)
    await pool.refresh()
    assert pool.killed == [(actor, True)]
    await pool.refresh()
    assert len(pool.killed) == 1


@pytest.mark.usefixtures("nodes")
async def test_a_cancelled_attempt_that_ended_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "HUNG_SECONDS", -1.0)
    pool, actor, gpu = await pool_of()
    await pool.cancel(gpu, AttemptId("a1"))
    await pool.refresh()
    actor.answers["report"] = [replace(READY, health=Health.BUSY, attempt=AttemptId("a2"))]
    await pool.refresh()
    assert pool.killed == []


@pytest.mark.usefixtures("nodes")
async def test_a_broken_card_is_begun_anew_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, actor, _ = await pool_of(replace(READY, health=Health.BROKEN, problem="no driver"))
    await pool.refresh()
    assert pool.killed == []
    monkeypatch.setattr(pool_module, "MEND_SECONDS", -1.0)
    await pool.refresh()
    assert pool.killed == [(actor, True)]


STALLED_REPORT = replace(READY, health=Health.BUSY, attempt=A, quiet_seconds=301.0)


@pytest.mark.usefixtures("nodes")
async def test_an_attempt_that_makes_no_step_ends_its_process_once() -> None:
    pool, actor, _ = await pool_of(replace(STALLED_REPORT, quiet_seconds=299.0))
    await pool.refresh()
    assert pool.killed == []
    actor.answers["report"] = [STALLED_REPORT]
    await pool.refresh()
    assert pool.killed == [(actor, True)]
    # Dying may take it a while: the process that follows must not be hit.
    await pool.refresh()
    assert len(pool.killed) == 1


@pytest.mark.parametrize("lost", [DEAD, UNAVAILABLE, AttemptLost("not known here")])
@pytest.mark.usefixtures("nodes")
async def test_the_result_of_an_attempt_that_stalled_says_so(lost: BaseException) -> None:
    pool, actor, gpu = await pool_of(STALLED_REPORT)
    actor.answers["result"] = [lost]
    with pytest.raises(DeviceFault) as caught:
        await pool.result(gpu, A)
    assert caught.value.kind is DeviceFaultKind.STALLED
    assert len(pool.killed) == 1
    with pytest.raises(AttemptLost):
        await pool.result(gpu, AttemptId("another"))


@pytest.mark.usefixtures("nodes")
async def test_an_attempt_that_stalled_and_ended_well_after_all_has_its_result() -> None:
    pool, actor, gpu = await pool_of(STALLED_REPORT)
    actor.answers["result"] = [DONE]
    assert await pool.result(gpu, A) == DONE


@pytest.mark.parametrize("silence", [NEVER, UNAVAILABLE, BUG, AWAY])
@pytest.mark.usefixtures("nodes")
async def test_a_process_that_is_silent_for_long_is_ended(
    monkeypatch: pytest.MonkeyPatch, silence: object
) -> None:
    pool, actor, _ = await pool_of()
    actor.answers["report"] = [silence]
    await pool.refresh()
    await pool.refresh()
    assert pool.killed == []
    monkeypatch.setattr(pool_module, "HUNG_SECONDS", -1.0)
    await pool.refresh()
    assert pool.killed == [(actor, True)]
    # What begins anew has as long again.
    await pool.refresh()
    assert len(pool.killed) == 1


@pytest.mark.usefixtures("nodes")
async def test_a_silence_that_was_broken_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "HUNG_SECONDS", -1.0)
    pool, actor, _ = await pool_of()
    for _ in range(2):
        actor.answers["report"] = [UNAVAILABLE]
        await pool.refresh()
        actor.answers["report"] = [READY]
        await pool.refresh()
    assert pool.killed == []


async def test_actors_are_begun_and_ended_off_the_loop(nodes: list[dict[str, Any]]) -> None:
    """What Ray does for it waits for the head's answer, and would hold up every task."""
    pool, actor, gpu = await pool_of()
    actor.answers["report"] = [replace(READY, release="0+old")]
    await pool.refresh()
    pool.made[-1].answers["result"] = [DeviceFault(DeviceFaultKind.CONTEXT_LOST, "x")]
    with pytest.raises(DeviceFault):
        await pool.result(gpu, A)
    nodes.clear()
    await pool.refresh()
    assert (len(pool.made), len(pool.killed)) == (2, 3)
    assert threading.get_ident() not in pool.threads


async def test_an_end_that_ray_refuses_ends_no_look(nodes: list[dict[str, Any]]) -> None:
    class Refusing(Pool):
        def _kill(self, member: Any, restart: bool) -> None:
            raise AWAY

    pool = Refusing()
    await pool.refresh()
    nodes.clear()
    await pool.refresh()
    assert pool.gpus() == ()
