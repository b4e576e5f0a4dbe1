"""The devnet's contracts on a real chain, with hands for every party: for test_contracts.py."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from eth_account.signers.local import LocalAccount
from eth_utils.crypto import keccak
from web3 import HTTPProvider, Web3
from web3.exceptions import ContractLogicError

from cluster.core.types import NodeStatus, TaskStatus, TaskType
from devnet.anvil import Anvil
from devnet.compile import CONTRACTS, load
from devnet.deploy import (
    APPLICATION,
    DEPLOYER,
    RELAY,
    Deployment,
    deploy,
    dev_account,
    public_key,
    sampling_proof,
)

STAKE = 400 * 10**18
TIMEOUT = 180
GPU = "NVIDIA GeForce RTX 4090+docker"
VERSION = (2, 5, 0)
GAS = 12_000_000

account = functools.lru_cache(dev_account)


@dataclass(frozen=True)
class Seen:
    """A mined transaction: whether it went through, its events as (name, arguments), its gas."""

    ok: bool
    events: list[tuple[str, dict[str, Any]]]
    gas: int

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.events]

    def first(self, name: str) -> dict[str, Any]:
        return next(arguments for seen, arguments in self.events if seen == name)


def new_chain() -> Iterator[tuple[Web3, Deployment]]:
    """The body of a module's chain fixture."""
    with Anvil() as anvil:
        yield Web3(HTTPProvider(anvil.rpc_url)), deploy(anvil.rpc_url, timeout_seconds=TIMEOUT)


def fresh_world(chain: tuple[Web3, Deployment]) -> Iterator[World]:
    """The body of a test's world fixture: the freshly deployed network, put back afterwards."""
    world = World(*chain)
    before = world.rpc("evm_snapshot")
    world.rpc("anvil_setNextBlockBaseFeePerGas", "0x0")
    yield world
    world.rpc("evm_revert", before)


class World:
    def __init__(self, web3: Web3, deployment: Deployment) -> None:
        self.web3 = web3
        self.owner, self.relay, self.app = account(DEPLOYER), account(RELAY), account(APPLICATION)
        places = {"QOS": deployment.qos, "Node": deployment.node, "VSSTask": deployment.task}
        made: dict[str, Any] = {
            name: web3.eth.contract(Web3.to_checksum_address(places[name]), abi=load(name).abi)
            for name in CONTRACTS
        }
        self.qos_contract, self.node_contract = made["QOS"], made["Node"]
        self.task_contract = made["VSSTask"]
        self.task, self.node = self.task_contract.functions, self.node_contract.functions
        self.qos = self.qos_contract.functions
        self._topics = {
            bytes(Web3.keccak(text=event.signature)): event
            for contract in (self.node_contract, self.task_contract)
            for event in contract.events
        }
        self._serial = itertools.count(1)

    # --- the chain ---

    def rpc(self, method: str, *parameters: Any) -> Any:
        answer = self.web3.provider.make_request(method, list(parameters))  # type: ignore[arg-type]
        assert "error" not in answer, answer
        return answer.get("result")

    def later(self, seconds: int) -> None:
        self.rpc("evm_increaseTime", seconds)
        self.rpc("evm_mine")

    def balance(self, of: LocalAccount | str) -> int:
        address = of if isinstance(of, str) else of.address
        return self.web3.eth.get_balance(Web3.to_checksum_address(address))

    def send(self, sender: LocalAccount, function: Any, value: int = 0) -> Seen:
        """At gas price 0, so that balances move by fees, stakes and payments alone."""
        transaction = {
            "to": function.address,
            "data": function._encode_transaction_data(),
            "value": value,
            "gas": GAS,
            "gasPrice": 0,
            "chainId": 31337,
            "nonce": self.web3.eth.get_transaction_count(sender.address),
        }
        raw = sender.sign_transaction(transaction).raw_transaction
        receipt = self.web3.eth.wait_for_transaction_receipt(
            self.web3.eth.send_raw_transaction(raw), poll_latency=0.005
        )
        events = []
        for log in receipt["logs"]:
            decoded = self._topics[bytes(log["topics"][0])].process_log(log)
            events.append((decoded["event"], dict(decoded["args"])))
        return Seen(receipt["status"] == 1, events, receipt["gasUsed"])

    def do(self, sender: LocalAccount, function: Any, value: int = 0) -> Seen:
        seen = self.send(sender, function, value)
        assert seen.ok, self.reason(sender, function, value)
        return seen

    def reason(self, sender: LocalAccount, function: Any, value: int = 0) -> str | None:
        """Why the chain would refuse the call; None when it wouldn't."""
        try:
            function.call({"from": sender.address, "value": value, "gas": GAS})
        except ContractLogicError as error:
            return str(error.message).removeprefix("execution reverted: ")
        return None

    # --- nodes ---

    def join_call(
        self,
        who: LocalAccount,
        gpu: str = GPU,
        vram: int = 24,
        version: Sequence[int] = VERSION,
        models: Sequence[str] = (),
        key: bytes | None = None,
    ) -> Any:
        key = public_key(who) if key is None else key
        return self.node.join(gpu, vram, list(version), key, list(models))

    def join(self, index: int, stake: int = STAKE, **wishes: Any) -> LocalAccount:
        """Dev account 10 + `index` joins with an otherwise empty purse."""
        who = account(10 + index)
        self.rpc("anvil_setBalance", who.address, hex(stake))
        self.do(who, self.join_call(who, **wishes), stake)
        return who

    def status_of(self, who: LocalAccount) -> NodeStatus:
        return NodeStatus(self.node.getNodeStatus(who.address).call())

    # --- tasks ---

    def create_call(
        self,
        task_type: TaskType = TaskType.LLM,
        models: Sequence[str] = (),
        min_vram: int = 8,
        gpu: str = "",
        vram: int = 0,
        version: Sequence[int] = VERSION,
        guid: bytes | None = None,
    ) -> tuple[bytes, Any]:
        serial = next(self._serial)
        nonce = serial.to_bytes(32, "big")
        commitment = keccak((guid or bytes(32)) + nonce)
        models = list(models)
        return commitment, self.task.createTask(
            task_type, commitment, nonce, models, min_vram, gpu, vram, list(version), 1
        )

    def create(self, fee: int = 1000, **wishes: Any) -> bytes:
        commitment, call = self.create_call(**wishes)
        self.do(self.app, call, fee)
        return commitment

    def info(self, commitment: bytes) -> dict[str, Any]:
        values = self.task.getTask(commitment).call()
        (output,) = self.task_contract.get_function_by_name("getTask").abi["outputs"]
        names = [component["name"] for component in output["components"]]
        return dict(zip(names, values, strict=True))

    def state(self, commitment: bytes) -> TaskStatus:
        return TaskStatus(self.info(commitment)["status"])

    def holder(self, commitment: bytes) -> LocalAccount:
        address = self.info(commitment)["selectedNode"]
        return next(account(i) for i in range(10, 40) if account(i).address == address)

    def ready(self, commitment: bytes) -> None:
        self.do(self.relay, self.task.reportTaskParametersUploaded(commitment))

    def score(self, commitment: bytes, score: bytes = b"\1" * 32) -> Seen:
        return self.do(self.holder(commitment), self.task.submitTaskScore(commitment, score))

    def error(self, commitment: bytes) -> Seen:
        return self.do(self.holder(commitment), self.task.reportTaskError(commitment, 1))

    def proof(self, commitment: bytes) -> tuple[bytes, bytes]:
        proof = sampling_proof(self.app, self.info(commitment)["samplingSeed"])
        return proof.proof, proof.public_key

    def single(self, commitment: bytes) -> Seen:
        proof = self.proof(commitment)
        return self.do(self.app, self.task.validateSingleTask(commitment, *proof))

    def group(self, commitments: Sequence[bytes], guid: bytes) -> Seen:
        proof = self.proof(commitments[0])
        return self.do(self.app, self.task.validateTaskGroup(*commitments, guid, *proof))

    def delivered(self, commitment: bytes) -> Seen:
        return self.do(self.relay, self.task.reportTaskResultUploaded(commitment))

    def modulus(self, modulus: int) -> None:
        self.do(self.owner, self.task.setSamplingModulus(modulus))

    def bring_to(self, status: TaskStatus) -> bytes:
        """A new task (and node 0 for it, unless it is to stay queued) in the given state."""
        self.modulus(0)
        if status is TaskStatus.GROUP_VALIDATED:
            return self.group_of([b"\1" * 32] * 3)[0]
        if status is not TaskStatus.QUEUED:
            self.join(0)
        commitment = self.create()
        if status >= TaskStatus.PARAMETERS_UPLOADED:
            self.ready(commitment)
        if status is TaskStatus.ERROR_REPORTED:
            self.error(commitment)
        elif status >= TaskStatus.SCORE_READY:
            self.score(commitment)
        if status >= TaskStatus.VALIDATED:
            self.single(commitment)
        if status is TaskStatus.END_SUCCESS:
            self.delivered(commitment)
        assert self.state(commitment) is status
        return commitment

    def group_of(
        self,
        answers: Sequence[bytes | str],
        task_type: TaskType = TaskType.LLM,
        order: Sequence[int] = (0, 1, 2),
        fee: int = 25_000,
    ) -> list[bytes]:
        """Three nodes, three tasks answered in `order` by a score, "error" or "abort", judged."""
        self.modulus(1)
        guid = keccak(text="group")
        for i in range(3):
            self.join(i)
        tasks = [self.create(fee, guid=guid, task_type=task_type) for _ in range(3)]
        for commitment in tasks:
            self.ready(commitment)
        for i in order:
            answer = answers[i]
            if isinstance(answer, bytes):
                self.score(tasks[i], answer)
            elif answer == "error":
                self.error(tasks[i])
        if "abort" in answers:
            self.later(TIMEOUT)
        for commitment, answer in zip(tasks, answers, strict=True):
            if answer == "abort":
                self.do(self.app, self.task.abortTask(commitment, 1))
        self.group(tasks, guid)
        return tasks
