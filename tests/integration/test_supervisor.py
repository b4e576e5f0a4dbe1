"""The supervisor on a Ray cluster that runs already, with the shipped coordinator."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import ray
import yaml

import serve_app
from actors import precedence
from cluster import runtime
from cluster.releases import release
from tests.integration.operator_world import PATIENCE, TEST_SECONDS, OperatorWorld, answer_of

pytestmark = pytest.mark.timeout(TEST_SECONDS)


@pytest.fixture(autouse=True)
async def serving(operator: OperatorWorld) -> None:
    await operator.until_serving()


async def test_a_killed_coordinator_is_brought_back(operator: OperatorWorld) -> None:
    before = await operator.until_status(lambda status: status.epoch, "a coordinator acts")
    supervisor = runtime.Supervisor(operator.config, operator.devnet.config_file, serve_app.build)
    killed = operator.coordinator()
    # Its lease is given back first, only so that nobody has to wait for the end of it.
    await answer_of(killed.stop.remote(), PATIENCE)
    ray.kill(killed, no_restart=True)
    try:

        async def look() -> bool:
            """As the supervisor does it for ever."""
            await asyncio.to_thread(supervisor.look)
            status = await operator.status()
            return status is not None and (status.epoch or 0) > before

        await operator.until(look, "another coordinator acts")
        await operator.until_serving()
        await operator.hear_nothing_missing()
        await answer_of(operator.coordinator().stop.remote(), PATIENCE)
    finally:
        ray.kill(operator.coordinator(), no_restart=True)
        operator.start_coordinator()


async def test_the_coordinator_goes_before_all_that_is_begun_beside_it(
    operator: OperatorWorld,
) -> None:
    """Where Ray is begun by us, as it is here: by itself it has all of them yield alike."""

    async def look() -> dict[str, set[tuple[int, int]]] | None:
        return await asyncio.to_thread(_yielding)

    found = await operator.until(look, "Serve's own are found and held back")
    assert found["CoordinatorActor"] == {(0, os.SCHED_OTHER)}
    assert found["InferenceActor"] == {(precedence.CARDS, os.SCHED_BATCH)}
    assert found["StoreActor"] == {(precedence.STORES, os.SCHED_BATCH)}
    assert found["ServeReplica"] == {(precedence.ONLOOKERS, os.SCHED_BATCH)}


def _yielding() -> dict[str, set[tuple[int, int]]] | None:
    """Niceness and policy of the actors' threads, each of which has its own; None while Serve's
    aren't held back yet: that is done after a while."""
    found: dict[str, set[tuple[int, int]]] = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error, ProcessLookupError):  # it has just ended
            title = " ".join(process.cmdline())
            actor = re.match(r"ray::(\w+)", title)
            if actor is not None:
                threads = {
                    (os.getpriority(os.PRIO_PROCESS, each.id), os.sched_getscheduler(each.id))
                    for each in process.threads()
                }
                found.setdefault(actor[1], set()).update(threads)
    held = {(precedence.ONLOOKERS, os.SCHED_BATCH)}
    return found if found.get("ProxyActor") == found.get("ServeController") == held else None


JOIN = """
import sys
from pathlib import Path
import ray
from actors.names import NAME
from cluster import runtime
from cluster.config import load

config = load(Path(sys.argv[1]))
own = runtime.connect(config)
coordinator = ray.get_actor(NAME, config.ray.namespace)
print("FOUND", own, ray.get(coordinator.release.remote()))
ray.shutdown()
"""


async def test_an_existing_cluster_is_joined(operator: OperatorWorld, tmp_path: Path) -> None:
    """From another process, as `up` does it where `ray.address` is `auto`; and left as it was."""
    text = yaml.safe_load(operator.devnet.config_file.read_text())
    text["ray"]["address"] = "auto"
    # Beside the other: what it names is found from there.
    config = operator.folder / "joining.yaml"
    config.write_text(yaml.safe_dump(text))
    script = tmp_path / "join.py"
    script.write_text(JOIN)
    address = ray.get_runtime_context().gcs_address
    joined = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, str(script), str(config)],
        env={**os.environ, "RAY_ADDRESS": address, "PYTHONPATH": str(Path.cwd())},
        capture_output=True,
        text=True,
        check=False,
    )
    assert joined.returncode == 0, joined.stderr
    found = [line for line in joined.stdout.splitlines() if line.startswith("FOUND")]
    assert found == [f"FOUND False {release(operator.config)}"]
    await operator.until_serving()
