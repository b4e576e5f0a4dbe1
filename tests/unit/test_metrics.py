from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

from prometheus_client.parser import text_string_to_metric_families

from cluster.chain.outbox_rows import RowState
from cluster.core.record import (
    AttemptStarted,
    Claim,
    Claimed,
    Closed,
    Event,
    Fault,
    Noticed,
    Outcome,
    ParametersFetched,
    ResultStored,
    ResultUploaded,
    Seen,
    TaskRecord,
    fold,
)
from cluster.core.types import (
    Address,
    AttemptId,
    Commitment,
    Effort,
    GigaBytes,
    GpuClass,
    GpuId,
    GpuState,
    NodeStatus,
    Score,
    TaskType,
    Tier,
    Timestamp,
    Wei,
)
from cluster.core.types import Stage as Stage_
from cluster.metrics import Metrics
from cluster.stages import Stage, stages
from cluster.status import (
    ChainView,
    ClassStatus,
    DownloadView,
    EndpointStatus,
    FleetStatus,
    GpuClassView,
    IdentityView,
    RelayView,
    StoreStatus,
    TaskView,
    judged,
)
from tests.unit.metric_fakes import (
    ADDRESS,
    CARD,
    LABELS,
    TASK,
    account,
    card,
    gpu,
    large,
    sample,
    snapshot,
)


def test_every_label_set_is_there_from_the_start() -> None:
    metrics = Metrics("1", "d")
    for task_type, outcome in itertools.product(TaskType, Outcome):
        labels = {"type": task_type.name, "outcome": outcome.value}
        assert sample(metrics, "crynux_tasks_total", **labels) == 0
    for fault in ["none", *(fault.value for fault in Fault)]:
        assert sample(metrics, "crynux_attempts_total", fault=fault) == 0
    assert sample(metrics, "crynux_slashes_total") == 0
    assert sample(metrics, "crynux_kick_outs_total") == 0
    for cause in ("canary", "verification", "slash", "strikes"):
        assert sample(metrics, "crynux_quarantines_total", by=cause) == 0
    assert sample(metrics, "crynux_results_total", tier="device") == 0
    assert sample(metrics, "crynux_score_slack_seconds_count", type="SD") == 0
    assert sample(metrics, "crynux_chain_events_total", event="reorganised") == 0
    assert sample(metrics, "crynux_relay_calls_total", call="results", result="refused") == 0
    assert sample(metrics, "crynux_outbox_rows", state="sent") == 0
    assert sample(metrics, "crynux_task_stage_seconds_count", stage="paid", type="LLM") == 0
    assert sample(metrics, "crynux_build_info", version="1", config_digest="d") == 1


def test_names_follow_the_conventions() -> None:
    families = list(text_string_to_metric_families(Metrics("1", "d").render().decode()))
    assert families
    for family in families:
        assert family.name.startswith("crynux_")
        assert family.documentation.endswith(".")
        assert not any(found.name.endswith("_created") for found in family.samples)
        if family.type == "counter":
            assert all(found.name.endswith("_total") for found in family.samples)


def test_what_happens_is_counted() -> None:
    metrics = Metrics("1", "d")
    metrics.observe(snapshot(accounts=(account(1, NodeStatus.BUSY),)))
    assert sample(metrics, "crynux_paid_cnx_total", **LABELS) == 0
    metrics.closed(record())
    metrics.spent(Address(ADDRESS), Wei(10**16))
    metrics.spent(Address("0xelse"), Wei(10**15))
    metrics.happened("replaced")
    metrics.computed(Tier.HOST)
    metrics.score_sent(TaskType.SD, 33.0)
    metrics.score_sent(TaskType.SD, -1.0)
    metrics.score_sent(TaskType.SD, None)
    metrics.stage_took("compute", TaskType.SD, 3.0)
    metrics.stage_took("compute", TaskType.SD, -0.1)
    metrics.attempt_ended(Fault.DEVICE)
    metrics.attempt_ended(None)
    metrics.slashed()
    metrics.kicked_out()
    metrics.network.relay_called("parameters", "not_ready")
    metrics.network.outbox({RowState.SENT: 3})
    metrics.turn_ended(Timestamp(1234.5))
    assert sample(metrics, "crynux_tasks_total", type="SD", outcome="EndSuccess") == 1
    assert sample(metrics, "crynux_paid_cnx_total", **LABELS) == 1.5
    assert sample(metrics, "crynux_gas_cnx_total", **LABELS) == 0.01
    assert sample(metrics, "crynux_gas_cnx_total", gpu_name="") == 0.001
    assert sample(metrics, "crynux_chain_events_total", event="replaced") == 1
    assert sample(metrics, "crynux_results_total", tier="host") == 1
    assert sample(metrics, "crynux_score_slack_seconds_count", type="SD") == 2
    assert sample(metrics, "crynux_score_slack_seconds_bucket", type="SD", le="0.0") == 1
    assert sample(metrics, "crynux_score_slack_seconds_bucket", type="SD", le="40.0") == 2
    assert sample(metrics, "crynux_task_stage_seconds_sum", stage="compute", type="SD") == 5.5
    assert sample(metrics, "crynux_attempts_total", fault="device") == 1
    assert sample(metrics, "crynux_attempts_total", fault="none") == 1
    assert sample(metrics, "crynux_slashes_total") == 1
    assert sample(metrics, "crynux_relay_calls_total", call="parameters", result="not_ready") == 1
    assert sample(metrics, "crynux_outbox_rows", state="sent") == 3
    assert sample(metrics, "crynux_coordinator_last_turn_timestamp_seconds") == 1234.5


def test_a_snapshot_sets_the_gauges() -> None:
    metrics = Metrics("1", "d")
    metrics.observe(
        snapshot(
            (gpu(0, GpuState.BUSY), gpu(1, GpuState.READY), gpu(2, GpuState.READY)),
            (account(1, NodeStatus.BUSY), account(2, NodeStatus.QUIT, None)),
        )
    )
    assert sample(metrics, "crynux_gpus", **LABELS, state="ready") == 2
    assert sample(metrics, "crynux_gpus", **LABELS, state="quarantined") == 0
    assert sample(metrics, "crynux_accounts", **LABELS, status="busy") == 1
    assert sample(metrics, "crynux_accounts", gpu_name="", status="quit") == 1
    assert sample(metrics, "crynux_stake_cnx", **LABELS) == 400
    assert sample(metrics, "crynux_chain_head_block") == 42
    assert sample(metrics, "crynux_chain_head_timestamp_seconds") == 999
    assert sample(metrics, "crynux_chain_reached") == 1
    assert sample(metrics, "crynux_relay_reached") == 0
    assert sample(metrics, "crynux_lease_held") == 1
    assert sample(metrics, "crynux_lease_epoch") == 7
    assert sample(metrics, "crynux_ready") == 0  # without the relay


def test_it_is_ready_when_the_status_says_so() -> None:
    metrics = Metrics("1", "d")
    found = snapshot((gpu(0, GpuState.READY),), (account(1, NodeStatus.AVAILABLE),))
    for reached in (True, False, True):
        relay = RelayView(reached=reached)
        metrics.observe(judged(found.model_copy(update={"relay": relay})))
        assert sample(metrics, "crynux_ready") == reached


def test_what_is_not_known_has_no_sample() -> None:
    metrics = Metrics("1", "d")
    unknown = (
        "crynux_chain_reached",
        "crynux_chain_head_block",
        "crynux_chain_head_timestamp_seconds",
        "crynux_coordinator_last_turn_timestamp_seconds",
        "crynux_relay_reached",
        "crynux_treasury_cnx",
    )
    told = snapshot().model_copy(update={"fleet": FleetStatus(treasury="7")})
    silent = ChainView(reached=False, chain_id=1)
    spare = told.model_copy(update={"acting": False, "chain": silent, "fleet": FleetStatus()})
    for status, known in ((None, False), (told, True), (spare, False), (told, True)):
        if status is not None:
            metrics.observe(status)
        if known:
            metrics.turn_ended(Timestamp(5.0))
        found = {name: sample(metrics, name) is not None for name in unknown}
        assert found == dict.fromkeys(unknown, known)
    metrics.observe(spare)
    assert sample(metrics, "crynux_coordinator_last_turn_timestamp_seconds") is None


def test_an_endpoint_that_never_answered_is_not_the_fastest() -> None:
    metrics = Metrics("1", "d")
    times = "crynux_rpc_endpoint_answer_seconds"
    for seconds, head in ((None, None), (0.2, 42), (None, None)):
        each = EndpointStatus(name="rpc.example", problem="silent", seconds=seconds, head=head)
        chain = ChainView(reached=True, chain_id=1, endpoints=(each,))
        metrics.observe(snapshot().model_copy(update={"chain": chain}))
        assert sample(metrics, times, endpoint="rpc.example") == seconds
        assert sample(metrics, "crynux_rpc_endpoint_head_block", endpoint="rpc.example") == head


def test_endpoints_that_nobody_asks_any_more_leave_nothing_behind() -> None:
    metrics = Metrics("1", "d")
    asked = tuple(
        EndpointStatus(name=f"{name}.example", problem="silent", seconds=0.2, head=42)
        for name in ("rpc", "other")
    )
    for endpoints in (asked, asked[:1], (), asked):
        chain = ChainView(reached=True, chain_id=1, endpoints=endpoints)
        metrics.observe(snapshot().model_copy(update={"chain": chain}))
        for each in asked:
            for name in ("fit", "answer_seconds", "head_block"):
                found = sample(metrics, f"crynux_rpc_endpoint_{name}", endpoint=each.name)
                assert (found is not None) is (each in endpoints)


def test_what_is_paid_before_the_first_look_is_its_class_s() -> None:
    metrics = Metrics("1", "d")
    metrics.belong({ADDRESS: GpuClass(CARD.name, GigaBytes(24))})
    metrics.closed(record())
    assert sample(metrics, "crynux_paid_cnx_total", **LABELS) == 1.5
    assert sample(metrics, "crynux_paid_cnx_total", gpu_name="") is None


def test_a_class_that_comes_up_while_gauges_are_set_breaks_nothing() -> None:
    """The loop counts what an account of no known class spent, a thread sets the gauges."""
    metrics = Metrics("1", "d")
    metrics.observe(large(8))

    metrics._gpus.labels = _then(  # type: ignore[method-assign]
        metrics._gpus.labels, lambda: metrics.spent(Address("0xelse"), Wei(1))
    )
    metrics.observe(large(8))
    assert sample(metrics, "crynux_gas_cnx_total", gpu_name="") is not None


def _then(method: Any, also: Callable[[], None]) -> Any:
    def both(*arguments: object) -> object:
        also()
        return method(*arguments)

    return both


def test_a_class_that_is_gone_stays_at_zero() -> None:
    metrics = Metrics("1", "d")
    metrics.observe(snapshot((gpu(0, GpuState.READY),)))
    metrics.observe(snapshot())
    assert sample(metrics, "crynux_gpus", **LABELS, state="ready") == 0
    assert sample(metrics, "crynux_ready") == 0


def test_nothing_that_names_a_task_becomes_a_label() -> None:
    metrics = Metrics("1", "d")
    task = TaskView(
        commitment=TASK,
        account=ADDRESS,
        type="SD",
        stage="answerable",
        progress="running",
        action="Wait: computing",
        seen_at=1.0,
    )
    metrics.observe(snapshot((gpu(0, GpuState.BUSY),), (account(1, NodeStatus.BUSY),), (task,)))
    assert sample(metrics, "crynux_open_tasks", type="SD", progress="running") == 1
    text = metrics.render().decode()
    assert TASK not in text
    assert ADDRESS not in text


def test_two_registries_live_side_by_side() -> None:
    one, other = Metrics("1", "d"), Metrics("1", "d")
    one.slashed()
    assert sample(other, "crynux_slashes_total") == 0


def series(metrics: Metrics) -> list[bytes]:
    return [line for line in metrics.render().splitlines() if not line.startswith(b"#")]


def test_a_card_has_few_series_and_an_account_none() -> None:
    def count(cards: int, accounts: int) -> int:
        metrics = Metrics("1", "d")
        nodes = tuple(
            account(n, NodeStatus.AVAILABLE, GpuClassView(name=f"Card {n % 8}", vram=8 + n % 8))
            for n in range(accounts)
        )
        metrics.observe(snapshot(tuple(map(card, range(cards))), nodes))
        return len(series(metrics))

    # What a benchmark then measures the time of: benchmarks/metrics_render.py.
    assert count(256, 512) < 5000
    assert count(256, 512) == count(256, 8)


def test_a_card_is_described_by_its_uuid_and_leaves_nothing_behind() -> None:
    metrics = Metrics("1", "d")
    metrics.observe(snapshot((card(1), card(2))))
    one = {"gpu_uuid": "GPU-1"}
    assert sample(metrics, "crynux_gpu_info", **one, gpu="n/1", gpu_name="Card 1") == 1
    assert sample(metrics, "crynux_gpu_state", **one, state="ready") == 1
    assert sample(metrics, "crynux_gpu_state", **one, state="quarantined") == 0
    uses = [
        sample(metrics, "crynux_gpu_memory_bytes", **one, use=use)
        for use in ("models", "other", "free")
    ]
    assert uses == [5, 2, 3]
    assert sample(metrics, "crynux_gpu_temperature_celsius", **one) == 61
    assert sample(metrics, "crynux_gpu_canary_timestamp_seconds", **one) == 900
    metrics.attempt_ended(Fault.DEVICE, "GPU-1")
    metrics.attempt_ended(Fault.MODEL, "GPU-1")
    assert sample(metrics, "crynux_gpu_faults_total", **one) == 1
    metrics.observe(snapshot((card(1).model_copy(update={"gpu_id": "m/1"}), card(2))))
    assert sample(metrics, "crynux_gpu_info", **one, gpu="n/1") is None
    assert sample(metrics, "crynux_gpu_info", **one, gpu="m/1") == 1
    metrics.observe(snapshot((card(2),)))
    assert b"GPU-1" not in metrics.render()
    assert b"GPU-2" in metrics.render()


def test_what_nobody_knows_of_a_card_any_more_has_no_sample() -> None:
    metrics = Metrics("1", "d")
    names = (
        "crynux_gpu_memory_bytes",
        "crynux_gpu_temperature_celsius",
        "crynux_gpu_ecc_uncorrected_errors",
        "crynux_gpu_canary_timestamp_seconds",
    )
    unknown = dict.fromkeys(("memory", "temperature", "ecc_uncorrected", "canary_at"))
    for said, known in ((unknown, False), ({}, True), (unknown, False), ({}, True)):
        metrics.observe(snapshot((card(1, **said),)))
        found = {name: sample(metrics, name, gpu_uuid="GPU-1") is not None for name in names}
        assert found == dict.fromkeys(names, known)
        assert sample(metrics, "crynux_gpu_state", gpu_uuid="GPU-1", state="ready") == 1


def test_what_a_cards_process_counts_goes_on_over_its_end() -> None:
    metrics = Metrics("1", "d")
    looks = ((10.0, 3), (12.5, 3), (1.0, 2), (4.0, 2))
    for (busy, loads), counted in zip(looks, (0.0, 2.5, 3.5, 6.5), strict=True):
        said = {"busy_seconds": busy, "moves": {"loaded": loads}, "store_hits": loads}
        metrics.observe(snapshot((card(1, **said),)))
        # What was before the coordinator began isn't counted again.
        assert sample(metrics, "crynux_gpu_busy_seconds_total", gpu_uuid="GPU-1") == counted
    assert sample(metrics, "crynux_model_parts_moved_total", move="loaded") == 2
    assert sample(metrics, "crynux_store_hits_total") == 2


def test_a_task_that_is_closed_again_after_a_reorganisation_counts_once() -> None:
    metrics = Metrics("1", "d")
    metrics.observe(snapshot(accounts=(account(1, NodeStatus.BUSY),)))
    again = replace(record(), closed_at=Timestamp(500.0))
    aborted = replace(again, outcome=Outcome.ABORTED, payment=Wei(0))
    for each in (record(), again, aborted):
        metrics.closed(each)
    assert sample(metrics, "crynux_tasks_total", type="SD", outcome="EndSuccess") == 1
    assert sample(metrics, "crynux_tasks_total", type="SD", outcome="EndAborted") == 1
    assert sample(metrics, "crynux_paid_cnx_total", **LABELS) == 1.5
    assert sample(metrics, "crynux_task_stage_seconds_count", stage="compute", type="SD") == 1
    other = replace(record(), commitment=Commitment("0x" + "cd" * 32))
    metrics.closed(other)
    assert sample(metrics, "crynux_tasks_total", type="SD", outcome="EndSuccess") == 2


def test_money_and_service_by_class() -> None:
    metrics = Metrics("1", "d")
    cnx = str(10**18)
    low = account(2, NodeStatus.AVAILABLE).model_copy(
        update={"stake": "1", "qos": 4, "balance": cnx}
    )
    high = account(1, NodeStatus.BUSY).model_copy(update={"qos": 8, "balance": cnx + "0"})
    away = account(3, NodeStatus.QUIT).model_copy(update={"stake": "0", "qos": 0})
    wanted = ClassStatus(name=CARD.name, vram=24, slots=1, least=5)
    fleet = FleetStatus(
        stake=str(400 * 10**18),
        treasury=str(7 * 10**18),
        classes=(wanted,),
        lacks=("money",),
        held=("0x1",),
    )
    found = snapshot(accounts=(low, high, away)).model_copy(update={"fleet": fleet})
    metrics.observe(found)
    assert sample(metrics, "crynux_qos_score", **LABELS, of="lowest") == 4
    assert sample(metrics, "crynux_qos_score", **LABELS, of="mean") == 6
    assert sample(metrics, "crynux_accounts_wanted", **LABELS) == 5
    assert sample(metrics, "crynux_treasury_cnx") == 7
    assert sample(metrics, "crynux_accounts_understaked") == 1
    assert sample(metrics, "crynux_balance_cnx", **LABELS, of="sum") == 11
    assert sample(metrics, "crynux_balance_cnx", **LABELS, of="lowest") == 1
    assert sample(metrics, "crynux_fleet_lacks") == 1
    assert sample(metrics, "crynux_accounts_held") == 1
    assert sample(metrics, "crynux_class_stopped", **LABELS) == 0


def test_a_class_that_nothing_is_wanted_of_any_more_wants_nobody() -> None:
    metrics = Metrics("1", "d")
    stopped = ClassStatus(name=CARD.name, vram=24, slots=1, least=5, stopped=True)
    for classes, wanted in (((stopped,), 5), ((), 0)):
        fleet = FleetStatus(classes=classes)
        metrics.observe(snapshot((gpu(1, GpuState.READY),)).model_copy(update={"fleet": fleet}))
        assert sample(metrics, "crynux_accounts_wanted", **LABELS) == wanted
        assert sample(metrics, "crynux_class_stopped", **LABELS) == bool(classes)


def test_whose_it_is_and_since_when_it_runs_is_told_without_an_address() -> None:
    one, same, other = (Metrics("1", "d", "5|0xAb") for _ in range(3))
    elsewhere = Metrics("1", "d", "6|0xAb")
    for metrics, treasury in (
        (one, ADDRESS),
        (same, ADDRESS.lower()),
        (other, "0x" + "7" * 40),
        (elsewhere, ADDRESS),
    ):
        identity = IdentityView(treasury=treasury)
        metrics.observe(snapshot().model_copy(update={"identity": identity}))

    def told(metrics: Metrics) -> set[str]:
        families = text_string_to_metric_families(metrics.render().decode())
        samples = [each for family in families for each in family.samples]
        return {s.labels["identity"] for s in samples if s.name == "crynux_identity_info"}

    assert told(one) == told(same) != told(other)
    # A key that serves a test network and the live one is no second coordinator.
    assert told(elsewhere) not in (told(one), told(other))
    assert len(told(one)) == 1
    assert ADDRESS.lower() not in one.render().decode().lower()
    assert 0 < (sample(one, "crynux_process_start_time_seconds") or 0) < time.time()


def test_each_stage_of_a_task_is_measured() -> None:
    found = dict(stages(record()))
    assert found == {
        "seen": 1,
        "parameters": 2,
        "queue": 3,
        "load": 1.5,
        "compute": 2.5,
        "score_sent": 1,
        "score_mined": 2,
        "validated": 5,
        "uploaded": 1,
        "paid": 7,
    }
    assert set(found) == set(get_args(Stage))
    assert stages(
        replace(record(), started_at=None, fetched_at=None, attempts=(), result=None)
    ) == (
        ("score_mined", 2),
        ("validated", 5),
        ("uploaded", 1),
        ("paid", 7),
    )


def test_with_retries_the_stages_are_still_a_tasks_whole_life() -> None:
    found = record()
    late = replace(found.attempts[0], started_at=Timestamp(105.0))
    failed = replace(late, attempt_id=AttemptId("failed"), started_at=Timestamp(102.5))
    whole = stages(replace(found, attempts=(failed, late)))
    assert whole == stages(found)
    assert sum(seconds for _, seconds in whole) == 125 - 99
    # Without a result it is the last attempt's.
    lost = dict(stages(replace(found, attempts=(failed, late), result=None)))
    assert lost["queue"] == 3


def record() -> TaskRecord:
    """Of a task that took some whole seconds in each stage."""
    attempt = AttemptId("a")
    events: list[tuple[Event, float]] = [
        (Seen(Address(ADDRESS), TaskType.SD, (), Wei(1), Timestamp(99.0)), 100.0),
        (ParametersFetched("{}"), 102.0),
        (AttemptStarted(attempt, GpuId("n/0")), 105.0),
        (ResultStored(attempt, Score(b"s"), (), Effort(4.0, 1.5, Tier.DISK)), 109.0),
        (Claimed(Claim.SCORE), 110.0),
        (Noticed(Stage_.ANSWERED), 112.0),
        (Noticed(Stage_.WANTED), 117.0),
        (Noticed(Stage_.WANTED), 117.5),
        (ResultUploaded(), 118.0),
        (Closed(Outcome.SUCCESS, Wei(15 * 10**17)), 125.0),
    ]
    return fold(Commitment(TASK), [(event, Timestamp(at)) for event, at in events])


def test_what_happens_in_the_stores_is_counted_and_no_model_becomes_a_label() -> None:
    metrics = Metrics("1", "d")
    metrics.stores.happened("fetched", "hub", 2)
    metrics.stores.happened("refused", "address", 3)
    metrics.stores.happened("refused", "acme/secret", 1)
    metrics.stores.happened("acme/secret", "x", 9)
    metrics.stores.fetched("hub", 1000)
    metrics.stores.fetched("acme/secret", 7)
    assert sample(metrics, "crynux_store_events_total", event="fetched") == 2
    assert sample(metrics, "crynux_store_refusals_total", rule="address") == 3
    assert sample(metrics, "crynux_store_refusals_total", rule="other") == 1
    assert sample(metrics, "crynux_store_fetched_bytes_total", source="hub") == 1000
    assert sample(metrics, "crynux_store_fetched_bytes_total", source="other") == 7
    download = DownloadView(
        model="lora:acme/secret",
        source="hub",
        done_bytes=1,
        total_bytes=9,
        bytes_per_second=5.0,
        seconds_left=1.6,
        background=True,
    )
    store = StoreStatus(
        ray_node="n1",
        models=3,
        used_bytes=50,
        room_bytes=150,
        queued=2,
        downloads=(download,),
        failed={"base:acme/secret": "401"},
    )
    unsized = download.model_copy(update={"total_bytes": 0, "done_bytes": 7, "seconds_left": None})
    fuller = store.model_copy(
        update={"room_bytes": 10, "leftover_bytes": 40, "downloads": (download, unsized)}
    )
    unknown = store.model_copy(
        update={
            "room_bytes": None,
            "trouble": "can't be written",
            "failed": {"base:acme/secret": "no room", "base:acme/secret-2": "401"},
        }
    )
    metrics.observe(snapshot().model_copy(update={"stores": (store, fuller, unknown)}))
    for name, value in {
        "models": 9,
        "used_bytes": 150,
        "leftover_bytes": 40,
        "troubled_machines": 1,
        "fullest_ratio": 90 / 100,
        "queued_models": 6,
        "missing_models": 2,
        "downloads": 4,
        "download_bytes_per_second": 20,
        "download_left_bytes": 24,
        "download_left_seconds": 1.6,
    }.items():
        assert sample(metrics, f"crynux_store_{name}") == value
    assert "secret" not in metrics.render().decode()


def test_how_often_canaries_are_asked_is_told_while_they_are() -> None:
    metrics = Metrics("1", "d")
    assert sample(metrics, "crynux_canary_interval_seconds") is None
    metrics.canary_every(7200.0)
    assert sample(metrics, "crynux_canary_interval_seconds") == 7200
    metrics.canary_every(0.0)
    assert sample(metrics, "crynux_canary_interval_seconds") is None
