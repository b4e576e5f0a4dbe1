from __future__ import annotations

import copy
import json
import os
import pickle
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from eth_account import Account
from eth_account.hdaccount.deterministic import derive_child_key
from eth_keys.datatypes import PublicKey, Signature
from eth_utils.crypto import keccak

from cluster.chain.outbox_ports import Signer
from cluster.core.errors import ClusterError, ConfigError
from cluster.core.types import Address, Commitment
from cluster.identity import Identity
from cluster.relay.client import Keys
from cluster.relay.envelope import seal

# The phrase of every local development chain; no secret.
PHRASE = "test test test test test test test test test test test junk"
FIRST = (
    "0xf39Fd6e51aad88F6F4ce6aB8827279cffFb92266",
    "0x70997970C51812dc3A010C7d01b50e0d17dc79C8",
    "0x3C44CdDdB6a900fa2b585dd299e03d12FA4293BC",
)
KEY_0 = "ac0974bec39a17e36ba4a6b4d238ff944bacb478cbed5efcae784d7bf4f2ff80"
DIGEST = keccak(b"something")


@pytest.fixture
def identity() -> Identity:
    return Identity.from_phrase(PHRASE)


def written(folder: Path, data: bytes, mode: int = 0o600) -> Path:
    file = folder / "seed"
    file.write_bytes(data)
    file.chmod(mode)
    return file


def test_accounts_are_derived_as_everyone_does(identity: Identity) -> None:
    assert tuple(identity.address(i) for i in range(3)) == FIRST


def test_the_way_to_the_accounts_is_gone_once(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []

    def derive(*arguments: Any) -> tuple[bytes, bytes]:
        steps.append(1)
        return derive_child_key(*arguments)

    monkeypatch.setattr("cluster.identity.derive_child_key", derive)
    identity = Identity.from_phrase(PHRASE)
    before = len(steps)
    for index in range(3):
        identity.address(index)
    assert len(steps) - before == 3


def test_it_is_what_chain_and_relay_sign_with(identity: Identity) -> None:
    signer: Signer = identity
    keys: Keys = identity
    assert isinstance(signer, Identity)
    assert isinstance(keys, Identity)


def test_the_public_key_hashes_to_the_address(identity: Identity) -> None:
    key = identity.public_key(Address(FIRST[1]))
    assert len(key) == 64
    assert "0x" + keccak(key)[-20:].hex() == FIRST[1].lower()


def test_a_signature_recovers_to_the_account(identity: Identity) -> None:
    # An account that was never asked for by its number, as after a restart.
    signature = identity.sign(Address(FIRST[2]), DIGEST)
    assert len(signature) == 65
    assert signature[64] in (0, 1)
    signer = PublicKey.recover_from_msg_hash(DIGEST, Signature(signature))
    assert signer.to_checksum_address() == FIRST[2]
    assert identity.sign(Address(FIRST[2]), DIGEST) == signature


def test_a_transaction_is_signed_alike_each_time(identity: Identity) -> None:
    transaction = {
        "nonce": 0,
        "gas": 21000,
        "gasPrice": 10,
        "to": FIRST[1],
        "value": 5,
        "data": b"",
        "chainId": 31337,
    }
    raw = identity.sign_transaction(Address(FIRST[0]), transaction)
    assert Account.recover_transaction(raw) == FIRST[0]
    assert identity.sign_transaction(Address(FIRST[0]), transaction) == raw


def test_an_envelope_is_opened_by_its_account(identity: Identity) -> None:
    task = Commitment("0x" + "ab" * 32)
    account = Address(FIRST[1])
    envelope = seal('{"prompt":"a cat"}', task, identity.public_key(account), os.urandom)
    assert identity.open(account, task, envelope) == '{"prompt":"a cat"}'


def test_a_stranger_and_a_long_digest_are_refused(identity: Identity) -> None:
    with pytest.raises(ClusterError, match="not an account of this identity"):
        identity.sign(Address("0x5FbDB2315678afecb367f032d93F642f64180aa3"), DIGEST)
    with pytest.raises(ClusterError, match="32-byte digest"):
        identity.sign(Address(FIRST[0]), DIGEST + b"x")


def test_a_seed_file_is_read(tmp_path: Path) -> None:
    file = written(tmp_path, f"  {PHRASE.replace(' ', chr(10))}\n".encode())
    assert Identity.load(file).address(0) == FIRST[0]


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o620])
def test_a_seed_file_that_others_can_reach_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(ConfigError, match="run: chmod 600"):
        Identity.load(written(tmp_path, PHRASE.encode(), mode))


def test_a_missing_file_or_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        Identity.load(tmp_path / "none")
    with pytest.raises(ConfigError, match="can't be read"):
        Identity.load(tmp_path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe",
        PHRASE.replace("junk", "jumk").encode(),
        PHRASE.replace("junk", "test").encode(),
        PHRASE.removesuffix(" junk").encode(),
        f"0x{KEY_0}".encode(),
    ],
)
def test_a_wrong_phrase_is_refused_and_never_quoted(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(ConfigError) as caught:
        Identity.load(written(tmp_path, data))
    story = "".join(traceback.format_exception(caught.value))
    assert "\n" not in str(caught.value)
    assert "test test" not in story
    assert KEY_0 not in story
    assert caught.value.__context__ is None


@pytest.mark.parametrize("show", [repr, str, lambda i: json.dumps(i, default=str)])
def test_showing_it_shows_the_treasury_only(identity: Identity, show: Callable[[Any], str]) -> None:
    identity.address(1)
    assert show(identity).strip('"') == f"Identity(treasury={FIRST[0]})"


@pytest.mark.parametrize("carry", [pickle.dumps, copy.copy, copy.deepcopy])
def test_it_stays_in_its_process(identity: Identity, carry: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match="stays in its process"):
        carry(identity)
    assert not hasattr(identity, "__dict__")
