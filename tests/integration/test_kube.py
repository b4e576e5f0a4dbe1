"""What the chart's containers run, run for real: a Ray head, a supervisor and workers as processes
of this machine, from what Helm renders; and what becomes of tasks when parts of it die.

The tests share one release and one devnet. Each brings the release to the values that it wants,
which costs nothing where it has them, so in their order they are fastest.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from cluster.config import digest
from cluster.core.types import GpuState
from cluster.status import Status
from devnet.anvil import free_port
from tests import redis_tools
from tests.chart import tools
from tests.integration.kube_image import Write
from tests.integration.kube_world import (
    CARD,
    COORDINATOR,
    NEW,
    OLD,
    REDIS_HOST,
    KubeWorld,
    kube_world,
)
from tests.integration.task_world import TEST_SECONDS, task

pytestmark = pytest.mark.timeout(TEST_SECONDS)
MAJOR = 4


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubeWorld]:
    tools.helm(MAJOR)
    with kube_world(tmp_path_factory.mktemp("kube"), free_port()) as world:
        yield world


@pytest.fixture(scope="module")
def redis(release: KubeWorld) -> Iterator[None]:
    with redis_tools.redis(release.folder, REDIS_HOST, release.redis_port, release.redis_password):
        yield


@pytest.fixture
def kube(release: KubeWorld) -> KubeWorld:
    release.begin()
    return release


async def installed(kube: KubeWorld, values: dict[str, Any] | None = None) -> Status:
    await asyncio.to_thread(kube.apply, kube.values() if values is None else values)
    return await kube.until_serving()


def assert_one_acted(writes: Sequence[Write]) -> None:
    """Never two at a time: who has written for a later lease is never followed by an earlier one,
    and each lease is one process'."""
    done = [each for each in writes if not each.refused]
    epochs = [each.epoch for each in done]
    assert epochs == sorted(epochs)
    writers = {each.epoch: each.pid for each in done}
    assert all(writers[each.epoch] == each.pid for each in done)


async def test_an_installed_release_has_its_tasks_paid(kube: KubeWorld) -> None:
    await installed(kube)
    await kube.until_ready()
    status = await kube.until_serving()
    assert (status.version, status.config_digest) == (OLD, digest(kube.config))
    reports = await kube.send(task("first"), task("second", seed=2)).ended()
    for report in reports:
        await kube.assert_paid_once(report)
    assert_one_acted(kube.witness.all())


async def test_a_killed_workers_task_is_paid_elsewhere(kube: KubeWorld) -> None:
    await installed(kube)
    kube.gate.close()
    sent = kube.send(task("survivor", seed=11))
    gpu = await kube.computing(lambda: sent.commitments.get("survivor"))
    (pod,) = (each for each in kube.workers if each.has(f"--node_id={gpu.ray_node}"))
    await asyncio.to_thread(kube.kill_worker, pod)
    kube.gate.open()
    (report,) = await sent.ended()
    events = await kube.assert_paid_once(report)
    first, *others = kube.gpus_of(events)
    assert first == gpu.gpu_id
    assert others, "it was computed again"
    assert gpu.gpu_id not in others
    # KubeRay makes another pod, and its card serves.
    kube.reconcile()
    await kube.until_serving()


async def test_without_redis_all_is_begun_anew_from_the_journal(kube: KubeWorld) -> None:
    await installed(kube)
    kube.gate.close()
    sent = kube.send(task("in-hand", seed=21))
    await kube.computing(lambda: sent.commitments.get("in-hand"))
    cards = {each.name: each.titled(CARD) for each in kube.workers}
    coordinators = kube.head.titled(COORDINATOR)
    before = len(kube.witness.all())
    await asyncio.to_thread(kube.kill_head)
    kube.gate.open()
    waiting = kube.send(task("while-it-was-away", seed=22))
    for each in (sent, waiting):
        (report,) = await each.ended()
        await kube.assert_paid_once(report)
    await kube.until_serving()
    assert all(each.titled(CARD).isdisjoint(cards[each.name]) for each in kube.workers)
    assert kube.head.titled(COORDINATOR).isdisjoint(coordinators)
    assert_one_acted(kube.witness.all()[before:])


async def test_a_coordinator_that_was_frozen_does_nothing_more(kube: KubeWorld) -> None:
    first = await installed(kube)
    kube.gate.close()
    sent = kube.send(task("of-two", seed=31))
    await kube.computing(lambda: sent.commitments.get("of-two"))
    frozen = await asyncio.to_thread(kube.cut_off_head)
    kube.gate.open()
    (report,) = await sent.ended()
    await kube.assert_paid_once(report)
    second = await kube.until_serving()
    assert (second.epoch or 0) > (first.epoch or 0)
    before = len(kube.witness.all())
    frozen.thaw()

    def refused() -> bool:
        return any(each.refused for each in kube.witness.all()[before:])

    await kube.until_true(refused, "the first has found that it may not write")
    # Both live on, side by side.
    (report,) = await kube.send(task("beside-it", seed=32)).ended()
    await kube.assert_paid_once(report)
    assert frozen.titled(COORDINATOR)
    done = [each for each in kube.witness.all()[before:] if not each.refused]
    assert {each.epoch for each in done} == {second.epoch}
    assert_one_acted(kube.witness.all())
    await asyncio.to_thread(kube.end_strays)


async def test_an_upgrade_runs_the_new_code_and_loses_no_task(kube: KubeWorld, redis: None) -> None:
    await installed(kube)
    kube.gate.close()
    sent = kube.send(task("begun-before", seed=41))
    await kube.computing(lambda: sent.commitments.get("begun-before"))
    old, pods = digest(kube.config), kube.pods
    before = len(kube.witness.all())
    upgrade = asyncio.create_task(asyncio.to_thread(kube.apply, renewed(kube)))
    await kube.until_status(leaving, "no card takes anything new")
    kube.gate.open()
    during = kube.send(task("sent-meanwhile", seed=42))
    await upgrade
    status = await kube.until_serving()
    assert (status.version, status.config_digest) == (NEW, digest(kube.config))
    assert status.config_digest != old
    for pod in pods:
        assert not pod.was_killed, f"{pod.name} ended within its grace"
    for each in (sent, during):
        (report,) = await each.ended()
        events = await kube.assert_paid_once(report)
        assert len(kube.gpus_of(events)) == 1, "no card was interrupted"
    assert_one_acted(kube.witness.all()[before:])


def leaving(status: Status) -> bool:
    return bool(status.gpus) and all(each.state is GpuState.DRAINED for each in status.gpus)


def renewed(kube: KubeWorld) -> dict[str, Any]:
    image = {"tag": NEW}
    values = kube.with_redis(image={"head": image, "worker": image})
    values["config"]["canary"] = {"interval_seconds": 7200}
    return values


async def test_with_redis_the_cards_go_on_when_the_head_dies(kube: KubeWorld, redis: None) -> None:
    await installed(kube, renewed(kube))
    kube.gate.close()
    sent = kube.send(task("carried-through", seed=51))
    await kube.computing(lambda: sent.commitments.get("carried-through"))
    cards = [each.titled(CARD) for each in kube.workers]
    assert all(cards)
    coordinators = kube.head.titled(COORDINATOR)
    before = len(kube.witness.all())
    await asyncio.to_thread(kube.kill_head)
    # The new coordinator finds the card in the middle of it.
    await kube.computing(lambda: sent.commitments.get("carried-through"))
    kube.gate.open()
    (report,) = await sent.ended()
    events = await kube.assert_paid_once(report)
    assert len(kube.gpus_of(events)) == 1, "the card went on with it"
    (report,) = await kube.send(task("after-the-head", seed=52)).ended()
    await kube.assert_paid_once(report)
    assert [each.titled(CARD) for each in kube.workers] == cards
    assert kube.head.titled(COORDINATOR).isdisjoint(coordinators)
    assert_one_acted(kube.witness.all()[before:])
