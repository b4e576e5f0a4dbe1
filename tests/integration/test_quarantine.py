"""A card that turns odd, on the whole operator: found by its canary, left alone, cleared."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from typing import Any

import pytest

from cluster.core.types import GpuState
from cluster.status import GpuStatus, Status
from tests.integration.operator_world import (
    CARDS,
    TEST_SECONDS,
    OperatorWorld,
    task,
)

pytestmark = pytest.mark.timeout(TEST_SECONDS)


@pytest.fixture(autouse=True)
async def serving(operator: OperatorWorld) -> None:
    await operator.until_serving()


async def until_card_is(operator: OperatorWorld, gpu_id: str, state: GpuState) -> GpuStatus:
    def find(status: Status) -> GpuStatus | None:
        for gpu in status.gpus:
            if gpu.gpu_id == gpu_id and gpu.state is state:
                return gpu
        return None

    return await operator.until_status(find, f"{gpu_id} is {state.value}")


async def clear(operator: OperatorWorld, card: str) -> subprocess.CompletedProcess[str]:
    """As an operator types it, in a process of its own."""
    file = str(operator.devnet.config_file)
    command = [sys.executable, "-m", "cluster.cli", "gpus", "clear", card, "--config", file]
    return await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, timeout=120
    )


async def begin_anew(operator: OperatorWorld, gpu_id: str) -> None:
    os.kill((await operator.gpu_report(gpu_id)).pid, signal.SIGKILL)


async def test_a_card_that_turns_odd(operator: OperatorWorld) -> None:
    kind = f"{CARDS[0].name}+docker"
    status = await operator.until_status(lambda s: s, "it answers")
    pair = [gpu.gpu_id for gpu in status.gpus if gpu.name == kind]
    odd = pair[0]
    assert len(pair) == 2

    def recorded() -> bool:
        return "verdict=recorded" in operator.log()

    await operator.until_true(recorded, "two cards of a class have agreed on the canary")
    try:
        operator.oddity.of(odd)
        await begin_anew(operator, odd)
        card = await until_card_is(operator, odd, GpuState.QUARANTINED)

        # It is named, counted, and gets nothing.
        status = await operator.until_status(lambda s: s, "it answers")
        assert any(card.uuid in problem for problem in status.problems)
        line = f'crynux_gpus{{gpu_name="{kind}",state="quarantined",vram_gb="{card.vram}"}} 1.0'

        async def counted() -> bool:
            return line in (await operator.get("/metrics")).text

        await operator.until(counted, "the metrics count it")
        named: dict[str, Any] = {"required_gpu": kind, "required_gpu_vram": card.vram}
        reports = await operator.send(
            *(task(f"around-it-{number}", seed=number, **named) for number in range(2))
        ).ended()
        for report in reports:
            events = await operator.assert_paid_once(report)
            assert operator.gpus_of(events) == [pair[1]]

        # Neither its own process nor the coordinator's lets it out.
        await begin_anew(operator, odd)
        before = await operator.until_status(lambda s: s.epoch, "a coordinator acts")
        operator.kill_coordinator()
        await operator.until_status(lambda s: (s.epoch or 0) > before or None, "it acts again")
        await until_card_is(operator, odd, GpuState.QUARANTINED)

        unknown = await clear(operator, "no-such-card")
        assert (unknown.returncode, unknown.stderr.count("\n")) == (2, 1)
        assert "no card is known as no-such-card" in unknown.stderr

        operator.oddity.end()
        cleared = await clear(operator, odd)
        assert cleared.returncode == 0, cleared.stderr
        assert "is out of quarantine" in cleared.stdout
        await until_card_is(operator, odd, GpuState.READY)
        again = await clear(operator, card.uuid)
        assert (again.returncode, again.stderr) == (0, "")
        assert "is in no quarantine" in again.stdout
    finally:
        operator.oddity.end()
        await clear(operator, odd)

    def well(status: Status) -> bool | None:
        return not status.problems or None

    await operator.until_status(well, "nothing is wrong any more")
