"""A chain with the contracts, the devnet's relay, and node accounts driven by hand."""

from __future__ import annotations

import asyncio
import contextlib
import io
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
from eth_account import Account
from eth_account.signers.local import LocalAccount
from PIL import Image
from web3 import Web3

from cluster.chain.abi import NODE_ABI, TASK_ABI
from cluster.core.errors import ParametersNotReady
from cluster.core.types import Address, Commitment, TaskStatus, Wei
from cluster.relay.client import RelayClient
from cluster.relay.envelope import open_envelope
from cluster.relay.signing import sign_digest
from devnet.application import Application, TaskReport
from devnet.deploy import Deployment, connect, deploy, dev_account, fund, public_key
from devnet.relay import RelayServer
from devnet.tasks import ChainTask, fees, from_chain

STAKE = 400 * 10**18
TASK_TIMEOUT = 1800
"""Far longer than any test: a test that wants a task to time out moves the chain's time."""
HTTP_SECONDS = 60.0
"""For an answer: a busy machine may take longer than httpx waits by itself."""
UNKNOWN = Commitment("0x" + "77" * 32)


def hex_key(account: LocalAccount) -> str:
    return "0x" + bytes(account.key).hex()


def png(shade: int) -> bytes:
    image = Image.radial_gradient("L").rotate(shade).convert("RGB")
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


async def ticks() -> AsyncIterator[None]:
    while True:
        yield
        await asyncio.sleep(0.05)


def contents(report: TaskReport) -> list[bytes]:
    return [Path(name).read_bytes() for name in report.files]


class OneKey:
    def __init__(self, account: LocalAccount) -> None:
        self._key = bytes(account.key)

    def sign(self, account: Address, digest: bytes) -> bytes:
        return sign_digest(digest, self._key)

    def open(self, account: Address, task: Commitment, envelope: str) -> str:
        return open_envelope(envelope, task, self._key)


class Node:
    """A node account driven by hand; blocking on chain, async towards the relay."""

    def __init__(self, web3: Web3, deployment: Deployment, relay_url: str, seed: int) -> None:
        self.web3 = web3
        self.account: LocalAccount = Account.from_key(seed.to_bytes(32, "big"))
        self.address = Address(self.account.address)
        self.http = httpx.AsyncClient(timeout=HTTP_SECONDS)
        self.client = RelayClient(relay_url, self.http, OneKey(self.account), time.time)
        self.tasks: Any = web3.eth.contract(address=deployment.task, abi=TASK_ABI)  # type: ignore[call-overload]
        self.nodes: Any = web3.eth.contract(address=deployment.node, abi=NODE_ABI)  # type: ignore[call-overload]
        fund(deployment.rpc_url, self.address, Wei(STAKE + 10**19))

    def send(self, call: Any, value: int = 0) -> None:
        eth = self.web3.eth
        fields = {
            "from": self.account.address,
            "value": value,
            "nonce": eth.get_transaction_count(self.account.address),
            **fees(eth.get_block("latest")),
        }
        signed = self.account.sign_transaction(call.build_transaction(fields))
        receipt = eth.wait_for_transaction_receipt(eth.send_raw_transaction(signed.raw_transaction))
        assert receipt["status"] == 1

    def join(self) -> None:
        key = public_key(self.account)
        self.send(self.nodes.functions.join("Sim A+docker", 8, [2, 5, 0], key, []), STAKE)

    def task(self, commitment: Commitment) -> ChainTask:
        task = from_chain(self.tasks.functions.getTask(bytes.fromhex(commitment[2:])).call())
        assert task is not None
        return task

    async def current(self) -> Commitment:
        held = b""
        async for _ in ticks():
            held = self.tasks.functions.getNodeTask(self.address).call()
            if any(held):
                break
        return Commitment("0x" + held.hex())

    async def status(self, commitment: Commitment, wanted: set[TaskStatus]) -> None:
        async for _ in ticks():
            if self.task(commitment).status in wanted:
                break

    async def parameters(self, commitment: Commitment) -> str:
        while True:
            try:
                return await self.client.fetch_parameters(self.address, commitment)
            except ParametersNotReady:
                await asyncio.sleep(0.05)

    async def answer(self, commitment: Commitment, score: bytes) -> None:
        await self.status(commitment, {TaskStatus.PARAMETERS_UPLOADED})
        key = bytes.fromhex(commitment[2:])
        self.send(self.tasks.functions.submitTaskScore(key, score))


class Devnet:
    """Chain, contracts and relay, and nodes and applications on them."""

    def __init__(self, rpc_url: str, folder: Path) -> None:
        self.deployment = deploy(rpc_url, timeout_seconds=TASK_TIMEOUT)
        self.folder = folder
        self.web3 = connect(rpc_url)
        self.servers: list[RelayServer] = []
        self.nodes: list[Node] = []
        self.relay = self.serve()

    def serve(self, **options: Any) -> RelayServer:
        rpc, task = self.deployment.rpc_url, self.deployment.task
        server = RelayServer(rpc, task, self.folder / "relay", hex_key(dev_account(1)), **options)
        server.__enter__()
        self.servers.append(server)
        return server

    def stop_relay(self) -> None:
        self.servers.pop().__exit__(None, None, None)

    def node(self, seed: int) -> Node:
        node = Node(self.web3, self.deployment, self.relay.url, seed)
        node.join()
        self.nodes.append(node)
        return node

    def application(self, **options: Any) -> Application:
        return Application(
            self.deployment.rpc_url,
            self.deployment,
            self.relay.url,
            dev_account(2),
            owner=dev_account(0),
            out=self.folder / "out",
            **options,
        )

    def overdue_by(self, seconds: int, task: ChainTask) -> None:
        """The chain's time jumps to so many seconds past the task's timeout."""
        at = (task.started_at or task.created_at) + task.timeout + seconds
        for method, values in (("evm_setNextBlockTimestamp", [at]), ("evm_mine", [])):
            answer = self.web3.provider.make_request(method, values)  # type: ignore[arg-type]
            assert "error" not in answer, answer


@contextlib.asynccontextmanager
async def devnet_on(rpc_url: str, folder: Path) -> AsyncIterator[Devnet]:
    devnet = Devnet(rpc_url, folder)
    try:
        yield devnet
    finally:
        for node in devnet.nodes:
            await node.http.aclose()
        for server in devnet.servers:
            server.__exit__(None, None, None)
