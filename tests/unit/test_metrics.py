from __future__ import annotations

import itertools

from prometheus_client.parser import text_string_to_metric_families

from cluster.chain.outbox_rows import RowState
from cluster.core.record import Fault, Outcome
from cluster.core.types import GpuState, NodeStatus, TaskType, Timestamp, Wei
from cluster.metrics import Metrics
from cluster.status import (
    AccountStatus,
    ChainView,
    DownloadView,
    GpuClassView,
    GpuStatus,
    IdentityView,
    RelayView,
    Status,
    StoreStatus,
    TaskView,
)

CARD = GpuClassView(name="NVIDIA GeForce RTX 4090+docker", vram=24)
LABELS = {"gpu_name": CARD.name, "vram_gb": "24"}
TASK = "0x" + "ab" * 32
ADDRESS = "0xf39Fd6e51aad88F6F4ce6aB8827279cffFb92266"


def gpu(number: int, state: GpuState, kind: GpuClassView = CARD) -> GpuStatus:
    return GpuStatus(
        gpu_id=f"n/{number}",
        ray_node="n",
        name=kind.name,
        vram=kind.vram,
        simulated=True,
        state=state,
        task=TASK if state is GpuState.BUSY else None,
    )


def account(index: int, status: NodeStatus, kind: GpuClassView | None = CARD) -> AccountStatus:
    return AccountStatus(
        index=index,
        address=ADDRESS,
        status=status.name.lower(),
        gpu_class=kind,
        stake=str(400 * 10**18),
    )


def snapshot(
    gpus: tuple[GpuStatus, ...] = (),
    accounts: tuple[AccountStatus, ...] = (),
    tasks: tuple[TaskView, ...] = (),
) -> Status:
    return Status(
        version="1",
        config_digest="d",
        now=1000.0,
        acting=True,
        epoch=7,
        identity=IdentityView(treasury=ADDRESS),
        chain=ChainView(reached=True, chain_id=31337, block=42, block_timestamp=999.0),
        relay=RelayView(reached=False, error="refused"),
        gpus=gpus,
        accounts=accounts,
        tasks=tasks,
    )


def sample(metrics: Metrics, name: str, **labels: str) -> float | None:
    for family in text_string_to_metric_families(metrics.render().decode()):
        for found in family.samples:
            if found.name == name and labels.items() <= found.labels.items():
                return found.value
    return None


def test_every_label_set_is_there_from_the_start() -> None:
    metrics = Metrics("1", "d")
    for task_type, outcome in itertools.product(TaskType, Outcome):
        labels = {"type": task_type.name, "outcome": outcome.value}
        assert sample(metrics, "crynux_tasks_total", **labels) == 0
    for fault in ["none", *(fault.value for fault in Fault)]:
        assert sample(metrics, "crynux_attempts_total", fault=fault) == 0
    assert sample(metrics, "crynux_slashes_total") == 0
    assert sample(metrics, "crynux_kick_outs_total") == 0
    assert sample(metrics, "crynux_paid_cnx_total") == 0
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
    metrics.task_closed(TaskType.SD, Outcome.SUCCESS, Wei(15 * 10**17))
    metrics.stage_took("compute", TaskType.SD, 3.0)
    metrics.stage_took("compute", TaskType.SD, -0.1)
    metrics.attempt_ended(Fault.DEVICE)
    metrics.attempt_ended(None)
    metrics.slashed()
    metrics.kicked_out()
    metrics.relay_called("parameters", "not_ready")
    metrics.outbox({RowState.SENT: 3})
    metrics.turn_ended(Timestamp(1234.5))
    assert sample(metrics, "crynux_tasks_total", type="SD", outcome="EndSuccess") == 1
    assert sample(metrics, "crynux_paid_cnx_total") == 1.5
    assert sample(metrics, "crynux_task_stage_seconds_sum", stage="compute", type="SD") == 3.0
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
    assert sample(metrics, "crynux_ready") == 1


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


def test_more_cards_and_accounts_make_no_more_series() -> None:
    kinds = [GpuClassView(name=f"Card {n}", vram=8 + n) for n in range(8)]

    def lines(count: int) -> list[bytes]:
        gpus = tuple(gpu(n, GpuState.READY, kinds[n % 8]) for n in range(count))
        accounts = tuple(account(n, NodeStatus.AVAILABLE, kinds[n % 8]) for n in range(count))
        metrics = Metrics("1", "d")
        metrics.observe(snapshot(gpus, accounts))
        return [line for line in metrics.render().splitlines() if not line.startswith(b"#")]

    few, many = lines(8), lines(256)
    assert len(few) < 5000
    assert [line.rsplit(b" ", 1)[0] for line in many] == [line.rsplit(b" ", 1)[0] for line in few]


def test_what_happens_in_the_stores_is_counted_and_no_model_becomes_a_label() -> None:
    metrics = Metrics("1", "d")
    metrics.store_happened("fetched", "hub", 2)
    metrics.store_happened("refused", "address", 3)
    metrics.store_happened("refused", "acme/secret", 1)
    metrics.store_happened("acme/secret", "x", 9)
    metrics.store_fetched("hub", 1000)
    metrics.store_fetched("acme/secret", 7)
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
        background=True,
    )
    store = StoreStatus(
        ray_node="n1",
        models=3,
        used_bytes=50,
        queued=2,
        downloads=(download,),
        failed={"base:acme/secret": "401"},
    )
    metrics.observe(snapshot().model_copy(update={"stores": (store, store)}))
    for name, value in {
        "models": 6,
        "used_bytes": 100,
        "queued_models": 4,
        "missing_models": 2,
        "downloads": 2,
        "download_bytes_per_second": 10,
    }.items():
        assert sample(metrics, f"crynux_store_{name}") == value
    assert "secret" not in metrics.render().decode()
