"""Put the network's contracts on a chain that has the well-known dev accounts, and use them.

Account 0 deploys and owns the contracts, 1 is the relay, 2 the application. Transactions are signed
here, so any chain where these accounts have money will do (`python -m devnet.deploy --rpc URL`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eth_account import Account
from eth_account.signers.local import LocalAccount
from eth_keys.datatypes import PrivateKey
from eth_typing import ChecksumAddress, Hash32
from eth_utils.crypto import keccak
from web3 import HTTPProvider, Web3
from web3.exceptions import Web3Exception
from web3.types import Nonce
from web3.utils.address import get_create_address

from cluster.core.errors import ChainError, ClusterError
from cluster.core.types import Address, Wei
from devnet.compile import load
from devnet.tasks import fees

MNEMONIC = "test test test test test test test test test test test junk"
DEPLOYER, RELAY, APPLICATION = 0, 1, 2
TIMEOUT_SECONDS = 180
RECEIPT_SECONDS = 120
DEPLOY_GAS = 8_000_000
CALL_GAS = 200_000


@dataclass(frozen=True, slots=True)
class Deployment:
    """Where the network's contracts are."""

    rpc_url: str
    chain_id: int
    task: Address
    node: Address
    qos: Address


@dataclass(frozen=True, slots=True)
class SamplingProof:
    """What `validateSingleTask` and `validateTaskGroup` take, and the number that it gives."""

    proof: bytes
    public_key: bytes
    number: int


def dev_account(index: int) -> LocalAccount:
    """The well-known dev account `index`; its key is public, so never use it for real money."""
    Account.enable_unaudited_hdwallet_features()
    account: LocalAccount = Account.from_mnemonic(MNEMONIC, account_path=f"m/44'/60'/0'/0/{index}")
    return account


def public_key(account: LocalAccount) -> bytes:
    """The 64 bytes that `join` and the sampling proof take."""
    return PrivateKey(account.key).public_key.to_bytes()


def sampling_proof(creator: LocalAccount, seed: bytes) -> SamplingProof:
    """The sampling number of a task of `creator` (contracts/sampling.vy: instead of a VRF).

    The task needs a group when `number % getSamplingModulus(commitment) == 0`.
    """
    proof = bytes(creator.unsafe_sign_hash(Hash32(seed)).signature)
    return SamplingProof(proof, public_key(creator), int.from_bytes(keccak(proof), "big"))


def connect(rpc_url: str) -> Web3:
    """A sync client; raises `ChainError` when the chain doesn't answer."""
    web3 = Web3(HTTPProvider(rpc_url))
    if not web3.is_connected():
        raise ChainError(f"no chain answers at {rpc_url}")
    return web3


def deploy(
    rpc_url: str,
    *,
    timeout_seconds: int = TIMEOUT_SECONDS,
    relay: Address | None = None,
    sampling_modulus: int = 10,
) -> Deployment:
    """Deploy and wire the three contracts, all sent at once: one block is enough.

    `timeout_seconds` is every task's timeout, `relay` the relay's account (dev account 1 if None),
    `sampling_modulus` is as in contracts/VSSTask.vy: 10 is the network's rule, 1 makes every task
    need a group, 0 none. Raises `ChainError`.
    """
    web3 = connect(rpc_url)
    owner = dev_account(DEPLOYER)
    relay = relay or Address(dev_account(RELAY).address)
    nonce = web3.eth.get_transaction_count(owner.address, "pending")
    qos, node, task = (get_create_address(owner.address, Nonce(nonce + i)) for i in range(3))

    def create(name: str, *arguments: Any) -> dict[str, Any]:
        artifact = load(name)
        contract = web3.eth.contract(abi=artifact.abi, bytecode=artifact.bytecode)
        return {"data": contract.constructor(*arguments).data_in_transaction, "gas": DEPLOY_GAS}

    def call(name: str, to: ChecksumAddress, function: str, *arguments: Any) -> dict[str, Any]:
        contract = web3.eth.contract(to, abi=load(name).abi)
        return {"to": to, "data": contract.encode_abi(function, arguments), "gas": CALL_GAS}

    transactions = [
        create("QOS"),
        create("Node", qos),
        create("VSSTask", node, relay, timeout_seconds),
        call("QOS", qos, "setRegistry", node),
        call("Node", node, "setTasks", task),
    ]
    if sampling_modulus != 10:
        transactions.append(call("VSSTask", task, "setSamplingModulus", sampling_modulus))
    try:
        _send_all(web3, owner, nonce, transactions)
        chain_id = web3.eth.chain_id
    except (Web3Exception, OSError, ValueError) as error:
        raise ChainError(f"the deployment failed: {error}") from error
    return Deployment(rpc_url, chain_id, Address(task), Address(node), Address(qos))


def fund(rpc_url: str, address: Address, amount: Wei) -> None:
    """Make `address` hold at least `amount`: by decree where the chain is anvil, else by transfer.

    Raises `ChainError`.
    """
    web3 = connect(rpc_url)
    target = Web3.to_checksum_address(address)
    try:
        missing = amount - web3.eth.get_balance(target)
        if missing <= 0:
            return
        method: Any = "anvil_setBalance"
        answer = web3.provider.make_request(method, [target, hex(amount)])
        if "error" not in answer:
            return
        owner = dev_account(DEPLOYER)
        nonce = web3.eth.get_transaction_count(owner.address, "pending")
        _send_all(web3, owner, nonce, [{"to": target, "value": missing, "gas": 21_000}])
    except (Web3Exception, OSError, ValueError) as error:
        raise ChainError(f"funding {address} failed: {error}") from error


def _send_all(
    web3: Web3, sender: LocalAccount, nonce: int, transactions: Sequence[dict[str, Any]]
) -> None:
    common = {"chainId": web3.eth.chain_id, **fees(web3.eth.get_block("latest"))}
    hashes = [
        web3.eth.send_raw_transaction(
            sender.sign_transaction(common | transaction | {"nonce": nonce + i}).raw_transaction
        )
        for i, transaction in enumerate(transactions)
    ]
    for i, sent in enumerate(hashes):
        receipt = web3.eth.wait_for_transaction_receipt(sent, RECEIPT_SECONDS)
        if receipt["status"] != 1:
            raise ChainError(
                f"transaction {i + 1} of {len(hashes)} was reverted: {sent.to_0x_hex()}"
            )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m devnet.deploy", description=__doc__)
    parser.add_argument("--rpc", required=True, metavar="URL", help="the chain's JSON-RPC address")
    parser.add_argument("--timeout", type=int, default=TIMEOUT_SECONDS, help="of tasks, seconds")
    parser.add_argument("--sampling-modulus", type=int, default=10, help="1: groups only, 0: none")
    arguments = parser.parse_args(argv)
    try:
        deployed = deploy(
            arguments.rpc,
            timeout_seconds=arguments.timeout,
            sampling_modulus=arguments.sampling_modulus,
        )
    except ClusterError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(dataclasses.asdict(deployed), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
