"""New heads over a real WebSocket, from a real chain."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import pytest
from websockets.asyncio.server import ServerConnection, serve

from cluster.chain import heads as module
from cluster.chain.heads import Heads
from cluster.chain.rpc import Rpc
from devnet.anvil import Anvil

PATIENCE = 30.0


@contextlib.asynccontextmanager
async def listening(heads: Heads) -> AsyncIterator[None]:
    running = asyncio.create_task(heads.run())
    try:
        yield
        assert not running.done()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def live(heads: Heads) -> None:
    end = time.monotonic() + PATIENCE
    while not heads.is_live:
        assert time.monotonic() < end
        await asyncio.sleep(0.02)


async def test_each_block_wakes_once() -> None:
    with Anvil() as anvil:
        heads = Heads((f"ws://127.0.0.1:{anvil.port}",))
        rpc = Rpc.http(anvil.rpc_url)
        async with listening(heads):
            await live(heads)
            assert not await heads.wait(0.1)
            for _ in range(3):
                await rpc.request("evm_mine")
                assert await heads.wait(PATIENCE)
            assert not await heads.wait(0.1)
        await rpc.close()


async def test_a_lost_connection_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.05)
    with Anvil() as anvil:
        port = anvil.port
        heads = Heads((f"ws://127.0.0.1:{port}",))
        async with listening(heads):
            await live(heads)
            anvil.stop()
            end = time.monotonic() + PATIENCE
            while heads.is_live:
                assert time.monotonic() < end
                await asyncio.sleep(0.02)
            assert not await heads.wait(0.05), "and nobody waits for it for ever"
            with Anvil(port=port) as again:
                await live(heads)
                rpc = Rpc.http(again.rpc_url)
                await rpc.request("evm_mine")
                assert await heads.wait(PATIENCE)
                await rpc.close()


async def test_one_that_promises_heads_and_has_none_is_not_relied_upon(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "SILENT_SECONDS", 0.3)
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.05)
    connections = 0

    async def promise(socket: ServerConnection) -> None:
        nonlocal connections
        connections += 1
        await socket.recv()
        await socket.send('{"jsonrpc": "2.0", "id": 1, "result": "0x1"}')
        await socket.wait_closed()

    async with serve(promise, "127.0.0.1", 0) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        heads = Heads((f"ws://127.0.0.1:{port}",))
        async with listening(heads):
            await live(heads)
            assert not heads.heard_within(PATIENCE)
            assert not await heads.wait(0.01)
            end = time.monotonic() + PATIENCE
            while connections < 2:
                assert time.monotonic() < end, "it is tried anew after a while"
                await asyncio.sleep(0.02)


async def test_of_several_any_wakes() -> None:
    with Anvil() as anvil:
        heads = Heads(("ws://127.0.0.1:9", f"ws://127.0.0.1:{anvil.port}"))
        rpc = Rpc.http(anvil.rpc_url)
        async with listening(heads):
            await live(heads)
            await rpc.request("evm_mine")
            assert await heads.wait(PATIENCE)
            assert heads.heard_within(PATIENCE)
        await rpc.close()


async def test_without_an_address_nobody_wakes() -> None:
    heads = Heads()
    await heads.run()
    assert not await heads.wait(0.01)
    assert not heads.is_live
