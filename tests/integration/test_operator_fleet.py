"""Draining and its end, with a whole operator; and what nothing but the coordinator may hold."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import psutil
import pytest
import ray

from cluster.core.record import AttemptFailed
from cluster.core.types import GpuState
from cluster.status import Status
from tests.integration.operator_world import (
    ACCOUNTS,
    CARDS,
    TEST_SECONDS,
    OperatorWorld,
    answer_of,
    task,
)
from tests.integration.process_memory import in_answers, in_files, memory, secrets

pytestmark = pytest.mark.timeout(TEST_SECONDS)


async def cli(operator: OperatorWorld, *words: str) -> tuple[int, str, str]:
    """`crynux-cluster`, as typed on the operator's machine, in a shell that knows nothing of it."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "cluster.cli", *words, "--config", str(operator.devnet.config_file),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env={name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"},
    )  # fmt: skip
    out, error = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), error.decode()


async def restart(operator: OperatorWorld) -> None:
    """The coordinator dies, and the next one acts: what is shown isn't the former's any more."""
    before = await operator.until_status(lambda status: status.epoch, "a coordinator acts")
    operator.kill_coordinator()
    await operator.until_status(
        lambda status: (status.epoch or 0) > before or None, "another coordinator acts"
    )


async def test_a_drain_finishes_what_runs_and_takes_nothing_new(operator: OperatorWorld) -> None:
    await operator.until_serving()
    operator.gate.close()
    sent = operator.send(task("drained", seed=81))
    await operator.computing(lambda: sent.commitments.get("drained"))
    code, out, error = await cli(operator, "drain", "--timeout", "0")
    assert (code, error.strip()) == (1, "not drained yet; it goes on"), out
    await operator.hear("it is being drained: 1 tasks are open")
    # It lasts over a restart.
    await restart(operator)
    await operator.hear("it is being drained: 1 tasks are open")
    operator.gate.open()
    code, out, error = await cli(operator, "drain")
    assert code == 0, error
    assert out.endswith("drained\n")
    (report,) = await sent.ended()
    await operator.assert_paid_once(report)
    assert await operator.missing() == ("it is drained",)

    def resting(status: Status) -> bool:
        return all(each.status in {"paused", "quit"} for each in status.accounts)

    await operator.until_status(resting, "every account is paused")
    code, out, error = await cli(operator, "resume")
    assert code == 0, error
    await operator.until_serving()
    await operator.hear_nothing_missing()
    code, out, error = await cli(operator, "fleet", "plan")
    assert code == 0, error
    assert all(f"{cards.name}+docker ({cards.vram} GB)" in out for cards in CARDS)


async def test_a_drained_card_gives_its_work_away(operator: OperatorWorld) -> None:
    await operator.until_serving()
    operator.gate.close()
    sent = operator.send(task("moved-away", seed=82))
    card = await operator.computing(lambda: sent.commitments.get("moved-away"))
    code, out, error = await cli(operator, "drain", "--gpu", card.gpu_id, "--now", "--no-wait")
    assert code == 0, error
    operator.gate.open()
    (report,) = await sent.ended()
    events = await operator.assert_paid_once(report)
    first, *others = operator.gpus_of(events)
    assert first == card.gpu_id
    assert others
    assert card.gpu_id not in others
    assert any(isinstance(event, AttemptFailed) for event in events)

    def drained(status: Status) -> bool:
        states = {gpu.gpu_id: gpu.state for gpu in status.gpus}
        return status.drain.done and states[card.gpu_id] is GpuState.DRAINED

    await operator.until_status(drained, "the card is drained")
    code, out, error = await cli(operator, "drain", "--gpu", "nobody", "--no-wait")
    assert code == 2
    assert "no card is known as nobody" in error
    assert (await cli(operator, "resume"))[0] == 0
    await operator.until_serving()


async def test_an_account_that_is_told_to_quit_brings_its_stake_home(
    operator: OperatorWorld,
) -> None:
    await operator.until_serving()
    before = await operator.status()
    assert before is not None
    leaver = next(each for each in before.accounts if each.status == "available")
    reserve = operator.config.fleet.gas_reserve
    code, out, error = await cli(operator, "fleet", "quit", leaver.address)
    assert code == 0, error
    assert "goes back to the treasury" in out

    def gone(status: Status) -> bool:
        (account,) = (each for each in status.accounts if each.address == leaver.address)
        return account.status == "quit" and int(account.balance) <= reserve

    await operator.until_status(gone, "it has quit, and its money is with the treasury")
    # It stays so, over a restart too, while another serves in its place.
    await restart(operator)
    await operator.until_serving()
    status = await operator.until_status(
        lambda status: status if status.fleet.retired and not status.fleet.unread else None,
        "the fleet has planned, and has seen every account",
    )
    assert status.fleet.retired == (leaver.address,)
    assert gone(status)
    code, out, error = await cli(operator, "fleet", "clear", leaver.address)
    assert code == 0, error
    await operator.until_status(lambda status: not status.fleet.retired, "it may be used again")


# --- the key --------------------------------------------------------------------------------------


async def test_nothing_but_the_coordinator_holds_the_key(operator: OperatorWorld) -> None:
    """After a full run: files, logs, metrics, what Ray keeps, and every process's memory."""
    await operator.until_serving()
    (report,) = await operator.send(task("secret", seed=83)).ended()
    await operator.assert_paid_once(report)
    assert operator.config.identity.seed_file is not None
    seed_file = operator.config.identity.seed_file
    wanted = secrets(seed_file.read_text().strip(), ACCOUNTS)

    node = ray._private.worker._global_node
    assert node is not None
    session = Path(node.get_session_dir_path())
    # Where it is, the search finds it: in the seed's own file, and in no other.
    assert in_files(wanted, operator.folder, session) == {seed_file: ["the phrase"]}
    said = await asyncio.to_thread(in_answers, wanted, operator.devnet.operator_url)
    assert said == []
    coordinator = await answer_of(operator.coordinator().__ray_call__.remote(_own_pid))
    # Where it is, the search finds it.
    where = psutil.Process(coordinator)
    if not any(memory(where)):
        pytest.skip("this machine lets no process read another's memory")
    assert any(secret in piece for piece in memory(where) for secret in wanted.values())
    found, searched = [], 0
    for process in psutil.Process().children(recursive=True):
        if process.pid == coordinator or "anvil" in process.name():
            continue
        for piece in memory(process):
            searched += len(piece)
            found += [
                f"{name} in {process.name()}" for name, secret in wanted.items() if secret in piece
            ]
    assert found == []
    assert searched > 50 * 2**20, "the processes' memory was read"


def _own_pid(_actor: object) -> int:
    return os.getpid()
