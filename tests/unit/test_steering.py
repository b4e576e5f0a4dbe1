"""What operators have done: carried out, answered in a line, and written down."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from structlog.testing import capture_logs

from actors import coordinator as module
from actors import fleet as fleet_module
from actors import term as term_module
from actors.inference import Health, Report
from actors.keeping import DROPPED
from actors.readers import AGAIN_SECONDS, MOST_REMEMBERED, Readers
from actors.stores import RayStores
from cluster import assembly
from cluster.config import load
from cluster.core.errors import ConfigError, DeviceFault, DeviceFaultKind, LeaseLost
from cluster.core.strikes import Limit
from cluster.core.types import GpuState, RayNodeId, Timestamp
from cluster.models.keeper import Stays
from cluster.steering import (
    ORDERS,
    ActionView,
    ApplyFleet,
    ClearAccount,
    Done,
    Drain,
    DropModel,
    EndDrain,
    ForgetCanary,
    Order,
    PreloadModel,
    ReloadConfig,
    SetLogLevel,
)
from tests.unit.actor_fakes import ALICE, CARD, CARD_2, DONE, KIND, TASK, facts_of, gpu_of, until
from tests.unit.test_config import MINIMAL
from tests.unit.test_term import Office, serving

WHO = "a test"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SWEEP_SECONDS", "BUSY_LOOK_SECONDS", "POOL_SECONDS"):
        monkeypatch.setattr(term_module, name, 0.01)
    monkeypatch.setattr(module, "BETWEEN_TERMS_SECONDS", 0.01)
    monkeypatch.setattr(fleet_module, "FLEET_SECONDS", 0.01)


@pytest.fixture
def office(tmp_path: Path) -> Iterator[Office]:
    yield Office(tmp_path)


async def told(office: Office, order: Order) -> Done:
    plain = await office.coordinator.perform(order.model_dump(mode="json"), WHO)
    return Done.model_validate(plain)


async def audit(office: Office) -> list[ActionView]:
    return [ActionView.model_validate(each) for each in await office.coordinator.audit(100)]


async def test_nothing_is_done_while_another_acts(office: Office) -> None:
    with capture_logs() as logs:
        assert (await told(office, Drain())).kind == "refused"
    # The journal is another's to write: the log has it.
    assert await audit(office) == []
    (line,) = logs
    assert (line["event"], line["by"]) == ("order_refused", WHO)
    assert line["order"]["action"] == "drain"


async def test_an_order_that_breaks_is_in_the_log(office: Office) -> None:
    async with serving(office):
        await office.acting()
        assert office.coordinator._term is not None
        lost = replace(office.coordinator._term._ledger.lease, epoch=0)
        with capture_logs() as logs, pytest.raises(LeaseLost):
            # Another took the lease since: what was done can't be written down.
            office.coordinator._term._ledger.lease = lost
            await told(office, EndDrain())
    line = next(each for each in logs if each["event"] == "order_broke")
    assert (line["by"], line["order"]["action"]) == (WHO, "resume")
    assert "LeaseLost" in line["error"]


async def test_who_was_shown_somebodys_prompt_is_written_down_once_in_a_while(
    office: Office,
) -> None:
    with capture_logs() as logs:
        office.coordinator.shown(WHO, "bundle", "0xaa")
        assert [each["event"] for each in logs] == ["shown"]
        async with serving(office):
            await office.acting()
            for _ in range(6):
                office.coordinator.shown(WHO, "result", "0xaa")
            office.coordinator.shown("another", "result", "0xaa")
            found = [(each.action, each.who, each.arguments) for each in await audit(office)]
    assert found == [
        ("show_result", "another", {"task": "0xaa"}),
        ("show_result", WHO, {"task": "0xaa"}),
    ]


def test_after_a_while_it_is_told_again_and_not_everything_is_remembered() -> None:
    readers = Readers()
    moments = (0.0, 1.0, AGAIN_SECONDS, AGAIN_SECONDS + 1)
    told = [readers.is_news("me", "bundle", "0xaa", Timestamp(each)) for each in moments]
    assert told == [True, False, True, False]
    for n in range(MOST_REMEMBERED):
        assert readers.is_news("me", "bundle", str(n), Timestamp(0.0))
    assert readers.is_news("me", "bundle", "0xaa", Timestamp(AGAIN_SECONDS + 2))


@pytest.mark.parametrize(("machines", "words"), [(1, "1 machine,"), (2, "2 machines,")])
async def test_a_model_is_preloaded_where_there_are_stores(
    office: Office, monkeypatch: pytest.MonkeyPatch, machines: int, words: str
) -> None:
    monkeypatch.setattr(RayStores, "want", lambda *_: machines)
    async with serving(office):
        await office.acting()
        done = await told(office, PreloadModel(model="base:a/b"))
    assert (done.kind, words in done.text) == ("done", True), done


async def test_a_machine_that_has_no_store_is_not_said_to_fetch(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    office.pool.cards.append(replace(gpu_of(CARD_2), ray_node=RayNodeId("other")))
    monkeypatch.setattr(RayStores, "want", lambda *_: 1)
    async with serving(office):
        await office.acting()
        done = await told(office, PreloadModel(model="base:a/b"))
    assert "fetched by 1 of 2 machines," in done.text


ABSENT, IN_USE, SILENT = Stays.NOT_FETCHED.value, Stays.IN_USE.value, "no answer (TimeoutError)"


@pytest.mark.parametrize(
    ("found", "kind", "said"),
    [
        ((DROPPED, DROPPED), "done", "a: dropped; b: dropped"),
        ((DROPPED, ABSENT), "done", f"a: dropped; b: {ABSENT}"),
        ((DROPPED, SILENT), "refused", f"not everywhere: a: dropped; b: {SILENT}"),
        ((DROPPED, IN_USE), "refused", f"not everywhere: a: dropped; b: {IN_USE}"),
        ((ABSENT, IN_USE), "refused", f"a: {ABSENT}; b: {IN_USE}"),
        ((ABSENT, ABSENT), "refused", f"a: {ABSENT}; b: {ABSENT}"),
    ],
)
async def test_a_model_is_dropped_only_when_no_machine_has_it(
    office: Office,
    monkeypatch: pytest.MonkeyPatch,
    found: tuple[str, str],
    kind: str,
    said: str,
) -> None:
    async def drop(_stores: object, _model: str) -> dict[str, str]:  # noqa: RUF029
        return dict(zip("ab", found, strict=True))

    monkeypatch.setattr(RayStores, "drop", drop)
    async with serving(office):
        await office.acting()
        done = await told(office, DropModel(model="base:x/y"))
        (written,) = await audit(office)
    assert (done.kind, done.text) == (kind, f"base:x/y: {said}")
    assert written.outcome == done.text


async def test_everything_that_is_asked_is_written_down(office: Office) -> None:
    async with serving(office):
        await office.acting()
        orders: list[tuple[Order, str, str]] = [
            (EndDrain(), "nothing", "nothing was drained"),
            (Drain(what="card", name="nobody"), "unknown", "no card is known as nobody"),
            (Drain(what="node", name="nobody"), "unknown", "no node is known as nobody"),
            (Drain(what="card", name=str(CARD)), "done", f"card {CARD} is being drained"),
            (EndDrain(), "done", "the drain has ended"),
            (ForgetCanary(gpu_class="nothing+docker"), "unknown", "no class is known as nothing"),
            (ForgetCanary(gpu_class=KIND.name), "nothing", "no canary was answered"),
            (ForgetCanary(), "nothing", "no canary was answered"),
            (ClearAccount(account="0x" + "77" * 20), "unknown", "none of the node accounts"),
            (ClearAccount(account=ALICE.lower()), "nothing", f"nothing stops {ALICE}"),
            (PreloadModel(model="nonsense"), "unknown", "expected kind:name"),
            (PreloadModel(model="base:a/b"), "refused", "no machine has a model store"),
            (DropModel(model="nonsense"), "refused", "nonsense"),
            (DropModel(model="base:a/b"), "refused", "no machine has a model store"),
            (ApplyFleet(), "done", "the plan is carried out"),
            (ReloadConfig(), "refused", "came from no file"),
            (SetLogLevel(level="debug"), "done", "logs from debug on"),
        ]
        with capture_logs() as entries:
            for order, kind, text in orders:
                done = await told(office, order)
                assert (done.kind, text in done.text) == (kind, True), (order, done)
                assert "\n" not in done.text
        logged = [entry for entry in entries if entry["event"] == "steered"]
        found = (await audit(office))[::-1]
    assert logged[-1]["arguments"] == {"level": "debug"}, "not the line's own level"
    assert [each.action for each in found] == [order.action for order, _, _ in orders]
    assert {each.who for each in found} == {WHO}
    assert found[3].arguments == {"what": "card", "name": str(CARD), "now": False}
    assert found[1].outcome.startswith("no card is known as nobody")


async def test_what_is_drained_gets_nothing_and_says_what_is_left(office: Office) -> None:
    office.pool.cards.append(replace(gpu_of(CARD_2), ray_node=RayNodeId("other")))
    office.network.add(facts_of())
    async with serving(office):
        await until(lambda: bool(office.pool.orders))
        ((card, order),) = office.pool.orders
        node = next(gpu.ray_node for gpu in office.pool.cards if gpu.gpu_id == card)
        assert (await told(office, Drain(what="node", name=node))).kind == "done"
        await until(lambda: "1 tasks are computed there" in office.status.drain.left)
        assert not office.status.drain.done
        office.pool.finish(order.attempt_id, DONE)
        await until(lambda: not any("computed" in each for each in office.status.drain.left))
        states = {gpu.gpu_id: gpu.state for gpu in office.pool.gpus()}
        assert states[card] is GpuState.DRAINED


# --- what a failed attempt leaves -----------------------------------------------------------------


async def test_a_failed_attempt_leaves_all_that_was_known(office: Office) -> None:
    office.network.add(facts_of())
    fault = DeviceFault(DeviceFaultKind.OTHER, "no such kernel")
    fault.trace = "Traceback: in forward"
    office.pool.outcomes = [fault, DONE]
    office.pool.reports[CARD] = Report(
        "1", 77, Health.READY, KIND, "", None, None, 0, 0, 0, frozenset(), frozenset(), frozenset(),
    )  # fmt: skip
    async with serving(office):
        await until(lambda: "ResultStored" in office.kinds())
        bundle = await office.coordinator.bundle(TASK)
        story = await office.coordinator.story(TASK)
    (attempt,) = cast(list[dict[str, Any]], bundle["attempts"])
    assert attempt["error"] == "DeviceFault: no such kernel"
    assert attempt["trace"] == "Traceback: in forward"
    assert (attempt["gpu"], attempt["card"]["pid"]) == (CARD, 77)
    assert attempt["record"]["parameters"] is None
    assert attempt["turn"]["facts"]["status"]
    assert bundle["parameters"]
    assert story["bundles"] == [attempt["attempt"]]


# --- live settings --------------------------------------------------------------------------------


def reloading(tmp_path: Path, **sections: Mapping[str, object]) -> tuple[Path, Any]:
    file = tmp_path / "operator.yaml"
    said = yaml.safe_load(MINIMAL)
    file.write_text(yaml.safe_dump(said))
    again = assembly.Reloading(file, load(file), {1: ALICE}).again
    file.write_text(yaml.safe_dump({**said, **sections}))
    return file, again


def test_what_can_change_is_taken_over(tmp_path: Path) -> None:
    _, again = reloading(
        tmp_path,
        policy={"max_attempts": 7},
        fleet={"auto": False},
        verify={"fraction": 0.5},
        canary={"interval_seconds": 5, "strikes": 2, "strike_window_seconds": 60},
        logs={"level": "debug"},
    )
    live, changed = again()
    assert set(changed) == {
        "policy.max_attempts",
        "fleet.auto",
        "verify.fraction",
        "canary.interval_seconds",
        "canary.strikes",
        "canary.strike_window_seconds",
        "logs.level",
    }
    assert live.policy.max_attempts == 7
    assert live.fleet.automatic is False
    assert (live.safeguards.canary.interval, live.level) == (5, "debug")
    assert live.safeguards.limit == Limit(2, 60.0)
    assert again()[1] == ()


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({"serve": {"port": 9000}}, "serve.port"),
        ({"logs": {"format": "json"}}, "logs.format"),
        ({"lease": {"ttl_seconds": 3}}, "lease.ttl_seconds"),
    ],
)
def test_what_cant_change_is_refused_and_nothing_else_is_taken_over(
    tmp_path: Path, section: Mapping[str, Mapping[str, object]], key: str
) -> None:
    file, again = reloading(tmp_path, policy={"max_attempts": 7}, **section)
    for _ in range(2):
        with pytest.raises(ConfigError, match=f"{key} can't change while it runs"):
            again()
    said = yaml.safe_load(file.read_text())
    del said[next(iter(section))]
    file.write_text(yaml.safe_dump(said))
    assert again()[1] == ("policy.max_attempts",)


async def test_a_reload_reaches_the_running_term(office: Office, tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    _, again = reloading(tmp_path / "f", logs={"level": "debug"}, policy={"max_attempts": 7})
    levels: list[str] = []
    office.world = replace(office.world, reload=again, set_level=levels.append)
    office.coordinator = module.Coordinator(office.world, "me")
    async with serving(office):
        await office.acting()
        done = await told(office, ReloadConfig())
        assert (done.kind, done.text) == ("done", "taken over: policy.max_attempts, logs.level")
        assert office.coordinator._term is not None
        assert office.coordinator._term._reconciler.policy.max_attempts == 7
        assert levels == ["debug"]
        assert (await told(office, ReloadConfig())).kind == "nothing"


def test_an_order_is_told_by_its_action() -> None:
    for order in (Drain(what="card", name="a", now=True), ReloadConfig()):
        assert ORDERS.validate_python(order.model_dump(mode="json")) == order
