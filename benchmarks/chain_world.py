"""The coordinator's chain side on a devnet, without Ray: real chain, relay, journal and outbox.

The cards are stand-ins that give a fixed result at once, so what is measured is the chain room.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from eth_utils.crypto import keccak
from PIL import Image
from web3 import HTTPProvider, Web3

from actors.coordinator import Coordinator
from actors.pool import RayGpuPool
from actors.stores import RayStores
from actors.world import RunningNetwork, World
from cluster import assembly
from cluster import config as configuration
from cluster.chain.rpc import Rpc
from cluster.chain.task_contract import TaskContract
from cluster.core.ports import Computed, Lease, Order
from cluster.core.types import (
    AccountView,
    Address,
    AttemptId,
    CardUuid,
    Commitment,
    GigaBytes,
    Gpu,
    GpuClass,
    GpuId,
    GpuState,
    NodeStatus,
    RayNodeId,
    TaskType,
)
from cluster.identity import Identity
from cluster.inference.scoring import score_images
from devnet.deploy import Deployment, dev_account
from devnet.network import Devnet, SimulatedCards
from devnet.tasks import TaskSpec

CARD = "NVIDIA GeForce RTX 4090"
STRANGER = 5
"""The dev account whose transactions are nobody's business."""
MUCH_MEMORY = 10_000
"""GB: more than any card here has."""
LAG_SECONDS = 0.05
"""Between two looks at how late the loop is."""


class Cards:
    """So many cards of one class, always ready; each order takes so many seconds."""

    def __init__(self, count: int, seconds: float = 0.01) -> None:
        self._seconds = seconds
        self.busy: list[tuple[float, float]] = []
        """When a card computed, from and to, of the event loop's time."""
        kind = GpuClass(f"{CARD}+docker", GigaBytes(24))
        self._gpus = tuple(
            Gpu(
                GpuId(f"bench-{n}"),
                RayNodeId("bench"),
                kind,
                simulated=True,
                state=GpuState.READY,
                uuid=CardUuid(f"bench-{n}"),
            )
            for n in range(count)
        )
        picture = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
        with tempfile.SpooledTemporaryFile() as file:
            picture.save(file, "PNG")
            file.seek(0)
            content = file.read()
        self._done = Computed(score_images([content]), (("0.png", content),), seconds)

    def gpus(self) -> tuple[Gpu, ...]:
        return self._gpus

    def unknown(self) -> tuple[Gpu, ...]:
        return ()

    def report(self, gpu: GpuId) -> None:
        return None

    async def start(self, gpu: GpuId, order: Order) -> None:
        pass

    async def result(self, gpu: GpuId, attempt: AttemptId) -> Computed:
        began = asyncio.get_running_loop().time()
        await asyncio.sleep(self._seconds)
        self.busy.append((began, asyncio.get_running_loop().time()))
        return self._done

    async def cancel(self, gpu: GpuId, attempt: AttemptId) -> None:
        pass

    def prefetch(self, gpu: GpuId, order: Order) -> None:
        pass

    def quarantine(self, cards: frozenset[CardUuid]) -> None:
        pass

    def drain(self, drained: Callable[[Gpu], bool]) -> None:
        pass

    def on_change(self, changed: Callable[[], None]) -> None:
        pass

    async def refresh(self) -> None:
        pass

    async def run(self, interval: float) -> None:
        await asyncio.Event().wait()


@dataclass
class ChainRoom:
    devnet: Devnet
    coordinator: Coordinator
    accounts: int
    cards: Cards
    calls: Counter[str] = field(default_factory=Counter)
    looks: list[tuple[float, str]] = field(default_factory=list)
    """When the coordinator began to look at which account, by the loop's clock."""
    fetches: list[tuple[float, str]] = field(default_factory=list)
    """When it began to fetch the parameters of a task of which account: what a start wakes."""

    async def until_joined(self) -> None:
        while True:
            status = self.coordinator._status()
            free = sum(each.status == NodeStatus.AVAILABLE.name.lower() for each in status.accounts)
            if free == self.accounts:
                return
            await asyncio.sleep(0.2)

    async def send(self, specs: Sequence[TaskSpec]) -> None:
        """Have tasks done and paid. Ends the process where one isn't."""
        reports = await self.devnet.application().run(specs)
        wrong = [f"{each.name}: {each.problem}" for each in reports if not each.as_expected]
        if wrong:
            raise SystemExit(f"error: tasks that did not end as they should: {wrong}")


@dataclass
class Burden:
    """What the coordinator's loop, and the thread that it runs in, had to bear."""

    seconds: float = 0.0
    cpu: float = 0.0
    """Seconds of the thread, of which there is one."""
    late: list[float] = field(default_factory=list)

    @property
    def worst_late(self) -> float:
        """The 99th percentile, in seconds."""
        return sorted(self.late)[int(len(self.late) * 0.99)] if self.late else 0.0


@contextlib.asynccontextmanager
async def burden() -> AsyncIterator[Burden]:
    """Of what happens meanwhile in this loop; filled in at the end."""
    found, loop = Burden(), asyncio.get_running_loop()

    async def watch() -> None:
        while True:
            due = loop.time() + LAG_SECONDS
            await asyncio.sleep(LAG_SECONDS)
            found.late.append(loop.time() - due)

    watching = asyncio.create_task(watch())
    began, cpu = loop.time(), time.thread_time()
    try:
        yield found
    finally:
        found.seconds, found.cpu = loop.time() - began, time.thread_time() - cpu
        watching.cancel()


@contextlib.asynccontextmanager
async def chain_room(
    accounts: int,
    block_time: float,
    heads: bool = False,
    cards: int | None = None,
    seconds: float = 0.01,
    fleet: Mapping[str, object] | None = None,
) -> AsyncIterator[ChainRoom]:
    """`heads`: new blocks are announced by WebSocket. `cards` that compute for `seconds`, one for
    each account if not said; `fleet` is that section of the configuration."""
    settings: dict[str, Any] = {
        "canary": {"interval_seconds": 0},
        "logs": {"level": "error"},
        "fleet": dict(fleet or {}),
    }
    pool = Cards(accounts if cards is None else cards, seconds)
    simulated = (SimulatedCards(CARD, GigaBytes(24), accounts),)
    with (
        tempfile.TemporaryDirectory() as folder,
        Devnet(Path(folder), block_time=block_time, cards=simulated, settings=settings) as devnet,
    ):
        config = configuration.load(devnet.config_file)
        if heads:
            url = config.network.rpc_url.replace("http", "ws", 1)
            network = config.network.model_copy(update={"ws_url": url})
            config = config.model_copy(update={"network": network})
        world: World = assembly.assemble(config)
        calls: Counter[str] = Counter()
        identity = Identity.load(devnet.directory / "seed")
        looks: list[tuple[float, str]] = []
        fetches: list[tuple[float, str]] = []
        opened = functools.partial(
            assembly.open_network,
            config,
            identity,
            world.journal,
            called=lambda method, _result: calls.update([method]),
        )
        world = replace(
            world,
            pool=cast(RayGpuPool, pool),
            stores=RayStores(None, "bench", ()),
            open_network=functools.partial(_watched, opened, looks, fetches),
        )
        coordinator = Coordinator(world, "bench")
        running = asyncio.create_task(coordinator.run())
        try:
            yield ChainRoom(devnet, coordinator, accounts, pool, calls, looks, fetches)
        finally:
            await coordinator.stop()
            await running


@contextlib.asynccontextmanager
async def _watched(
    opened: Callable[..., Any],
    looks: list[tuple[float, str]],
    fetches: list[tuple[float, str]],
    lease: Callable[[], Lease],
) -> AsyncIterator[RunningNetwork]:
    """The network, with a note of each look and of each task that is begun."""
    async with opened(lease) as network:
        look, fetch = network.look, network.fetch_parameters

        async def fetched(account: Address, task: Commitment) -> str:
            fetches.append((asyncio.get_running_loop().time(), account))
            return cast(str, await fetch(account, task))

        async def noted(account: Address, known: Sequence[Commitment]) -> AccountView:
            looks.append((asyncio.get_running_loop().time(), account))
            return cast(AccountView, await look(account, known))

        network.look, network.fetch_parameters = noted, fetched
        yield network


def specs(count: int, base: str, timeout: int | None = None) -> list[TaskSpec]:
    """`timeout` in seconds, None for the network's."""
    task = {"image_width": 64, "image_height": 64, "steps": 1, "num_images": 1}
    args = {"base_model": base, "prompt": "a", "task_config": task}
    return [
        TaskSpec(
            name=f"task-{number}",
            type=TaskType.SD,
            parameters=args,
            model_ids=(f"base:{base}",),
            min_vram=8,
            timeout=timeout,
        )
        for number in range(count)
    ]


async def foreign_traffic(deployment: Deployment, per_block: int, block_time: float) -> None:
    """So many transactions a block that are none of ours, for ever. Each has an event of the task
    contract: an application of somebody else asks for what no card here can do."""
    web3 = Web3(HTTPProvider(deployment.rpc_url))
    sender = dev_account(STRANGER)
    contract = TaskContract(Rpc.http(deployment.rpc_url), deployment.task)
    nonce = web3.eth.get_transaction_count(sender.address)
    method: Any = "anvil_setBlockGasLimit"
    web3.provider.make_request(method, [hex(10**9)])

    def one(number: int) -> None:
        name = keccak(b"foreign" + number.to_bytes(32, "big"))
        what: tuple[Any, ...] = (0, name, name, [], MUCH_MEMORY, "", 0, (2, 5, 0), 1)
        signed = sender.sign_transaction(
            {
                "to": Web3.to_checksum_address(deployment.task),
                "value": 1,
                "gas": 2_000_000,
                "maxFeePerGas": 10**11,
                "maxPriorityFeePerGas": 10**9,
                "nonce": number,
                "chainId": deployment.chain_id,
                "data": contract.encode("createTask", *what),
            }
        )
        web3.eth.send_raw_transaction(signed.raw_transaction)

    loop = asyncio.get_running_loop()
    began = loop.time()
    for sent in itertools.count():
        await asyncio.to_thread(one, nonce + sent)
        # By the clock: what one takes longer the next waits less.
        await asyncio.sleep(max(began + (sent + 1) * block_time / per_block - loop.time(), 0.0))
