"""The coordinator's chain side on a devnet, without Ray: real chain, relay, journal and outbox.

The cards are stand-ins that give a fixed result at once, so what is measured is the chain room.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from PIL import Image
from web3 import HTTPProvider, Web3

from actors.coordinator import Coordinator
from actors.pool import RayGpuPool
from actors.stores import RayStores
from actors.world import RunningNetwork, World
from cluster import config as configuration
from cluster import runtime
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
from devnet.deploy import dev_account
from devnet.network import Devnet, SimulatedCards
from devnet.tasks import TaskSpec

CARD = "NVIDIA GeForce RTX 4090"
STRANGER = 5
"""The dev account whose transactions are nobody's business."""


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
        world: World = runtime.assemble(config)
        calls: Counter[str] = Counter()
        identity = Identity.load(devnet.directory / "seed")
        looks: list[tuple[float, str]] = []
        opened = functools.partial(
            runtime.open_network,
            config,
            identity,
            world.journal,
            called=lambda method, _result: calls.update([method]),
        )
        world = replace(
            world,
            pool=cast(RayGpuPool, pool),
            stores=RayStores(None, "bench", ()),
            open_network=functools.partial(_watched, opened, looks),
        )
        coordinator = Coordinator(world, "bench")
        running = asyncio.create_task(coordinator.run())
        try:
            yield ChainRoom(devnet, coordinator, accounts, pool, calls, looks)
        finally:
            await coordinator.stop()
            await running


@contextlib.asynccontextmanager
async def _watched(
    opened: Callable[..., Any], looks: list[tuple[float, str]], lease: Callable[[], Lease]
) -> AsyncIterator[RunningNetwork]:
    """The network, with a note of each look."""
    async with opened(lease) as network:
        look = network.look

        async def noted(account: Address, known: Sequence[Commitment]) -> AccountView:
            looks.append((asyncio.get_running_loop().time(), account))
            return cast(AccountView, await look(account, known))

        network.look = noted
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


async def foreign_traffic(rpc_url: str, per_block: int, block_time: float) -> None:
    """So many transactions a block that are none of ours, for ever."""
    web3 = Web3(HTTPProvider(rpc_url))
    sender = dev_account(STRANGER)
    chain_id, nonce = web3.eth.chain_id, web3.eth.get_transaction_count(sender.address)

    def one(number: int) -> None:
        fee = 10**11
        signed = sender.sign_transaction(
            {
                "to": sender.address,
                "value": 1,
                "gas": 21_000,
                "maxFeePerGas": fee,
                "maxPriorityFeePerGas": 10**9,
                "nonce": number,
                "chainId": chain_id,
            }
        )
        web3.eth.send_raw_transaction(signed.raw_transaction)

    for number in itertools.count(nonce):
        await asyncio.to_thread(one, number)
        await asyncio.sleep(block_time / per_block)
