"""Models that only the hub has: fetched for tasks and for the network, declared when they came."""

from __future__ import annotations

import pytest

from cluster.core.record import AttemptFailed
from cluster.status import Status
from devnet.faulty_http import Fault
from devnet.models import SD15_LORA
from tests.integration.operator_world import (
    CARDS,
    HUB_BASE,
    HUB_LORA,
    PINNED,
    TEST_SECONDS,
    OperatorWorld,
    task,
)

HUB_LATE = "hub/late"

pytestmark = pytest.mark.timeout(TEST_SECONDS)


@pytest.fixture(autouse=True)
async def serving(operator: OperatorWorld) -> None:
    await operator.until_serving()


def joined(status: Status) -> list[str] | None:
    found = [each.address for each in status.accounts if each.status in {"available", "busy"}]
    return found if len(found) >= sum(cards.count for cards in CARDS) else None


async def test_what_is_configured_is_there_before_anyone_joins(operator: OperatorWorld) -> None:
    accounts = await operator.until_status(joined, "the accounts are joined")
    for account in accounts:
        assert PINNED in operator.declared(account)
    status = await operator.status()
    assert status is not None
    (store,) = status.stores
    assert store.models >= 1
    assert store.failed == {}


async def test_a_task_whose_models_are_on_no_disk_is_paid(operator: OperatorWorld) -> None:
    spec = task("from-the-hub", base=HUB_BASE, lora=HUB_LORA)
    (report,) = await operator.send(spec).ended()
    events = await operator.assert_paid_once(report)
    assert not [event for event in events if isinstance(event, AttemptFailed)]
    assert operator.hub.sent("cdn/hub/base") > 0
    # All cards are on one machine, and so is the model, once.
    weights = [seen for seen in operator.hub.requests("cdn/hub/base") if seen.status == 200]
    assert len({seen.path for seen in weights}) == len(weights)


async def test_what_the_network_asked_for_is_declared_once_it_is_there(
    operator: OperatorWorld,
) -> None:
    """The devnet asks all nodes that lack a task's model to get it, once one is given the task."""
    (report,) = await operator.send(task("asked-for", base=HUB_BASE)).ended()
    await operator.assert_paid_once(report)
    accounts = await operator.until_status(joined, "the accounts are joined")

    def declared() -> bool:
        return any(f"base:{HUB_BASE}" in operator.declared(account) for account in accounts)

    await operator.until_true(declared, "an account has declared the model that came")


async def test_a_hub_that_is_away_for_a_while_is_waited_for(operator: OperatorWorld) -> None:
    operator.hub.add(HUB_LATE, operator.config.models.root / SD15_LORA)
    operator.hub.fail(f"api/models/{HUB_LATE}", Fault(status=503), times=3)
    spec = task("late", lora=HUB_LATE)
    (report,) = await operator.send(spec).ended()
    events = await operator.assert_paid_once(report)
    assert not [event for event in events if isinstance(event, AttemptFailed)]
    assert len(operator.hub.requests(f"api/models/{HUB_LATE}")) == 4
