"""Statuses that metrics are made of, and how to read one out of them."""

from __future__ import annotations

from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from cluster.core.types import GpuState, NodeStatus
from cluster.metrics import Metrics
from cluster.status import (
    AccountStatus,
    ChainView,
    ClassStatus,
    EndpointStatus,
    FleetStatus,
    GpuClassView,
    GpuStatus,
    IdentityView,
    MemoryView,
    RelayView,
    Status,
    TaskView,
    judged,
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
    status = Status(
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
    return judged(status)


def sample(metrics: Metrics, name: str, **labels: str) -> float | None:
    for family in text_string_to_metric_families(metrics.render().decode()):
        for found in family.samples:
            if found.name == name and labels.items() <= found.labels.items():
                return found.value
    return None


def card(number: int, **said: Any) -> GpuStatus:
    kind = GpuClassView(name=f"Card {number % 8}", vram=8 + number % 8)
    fields = {
        "uuid": f"GPU-{number}",
        "memory": MemoryView(models=5, other=2, free=3),
        "temperature": 61,
        "ecc_uncorrected": 0,
        "canary_at": 900.0,
        **said,
    }
    return gpu(number, GpuState.READY, kind).model_copy(update=fields)


def large(cards: int) -> Status:
    """A cluster of that many cards, of eight classes, with two accounts for each card."""
    gpus = tuple(map(card, range(cards)))
    kinds = [GpuClassView(name=gpu.name, vram=gpu.vram) for gpu in gpus]
    accounts = tuple(
        account(index, NodeStatus.AVAILABLE, kind) for index, kind in enumerate(kinds * 2)
    )
    found = snapshot(gpus, accounts)
    endpoints = tuple(EndpointStatus(name=f"rpc-{n}.example", seconds=0.1, head=42) for n in (1, 2))
    classes = tuple(
        ClassStatus(name=kind.name, vram=kind.vram, slots=2, least=2) for kind in set(kinds)
    )
    return found.model_copy(
        update={
            "chain": found.chain.model_copy(update={"endpoints": endpoints}),
            "fleet": FleetStatus(treasury="1", classes=classes),
        }
    )
