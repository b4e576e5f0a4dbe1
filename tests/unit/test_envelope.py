from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from eth_keys.datatypes import PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.core.errors import ParametersUnreadable
from cluster.core.types import Commitment
from cluster.relay.envelope import is_envelope, open_envelope, seal

KEY = bytes.fromhex("420fcabfd5dbb55215490693062e6e530840c64de837d071f0d9da21aaac861e")
PUBLIC = PrivateKey(KEY).public_key.to_bytes()
TASK = Commitment("0x" + "ab" * 32)


def seeded(seed: int) -> Callable[[int], bytes]:
    return random.Random(seed).randbytes  # noqa: S311


def envelope(parameters: str = '{"prompt":"a cat"}') -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(seal(parameters, TASK, PUBLIC, seeded(1)))
    return parsed


def encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


@settings(max_examples=60, deadline=None)
@given(
    st.text(alphabet=st.characters(exclude_categories=["Cs"])),
    st.integers(1, 2**250),
    st.binary(min_size=32, max_size=32),
    st.integers(0, 2**32),
)
def test_what_is_sealed_opens(text: str, secret: int, task: bytes, seed: int) -> None:
    key = secret.to_bytes(32, "big")
    commitment = Commitment("0x" + task.hex())
    sealed = seal(text, commitment, PrivateKey(key).public_key.to_bytes(), seeded(seed))
    assert is_envelope(sealed)
    assert open_envelope(sealed, commitment, key) == text


def test_the_form_of_an_envelope() -> None:
    made = envelope()
    assert list(made) == ["v", "alg", "epk", "nonce", "ct"]
    assert made["v"] == 1
    assert made["alg"] == "ECIES-secp256k1-HKDF-SHA256-AES256GCM"
    assert "=" not in made["epk"] + made["nonce"] + made["ct"]
    assert seal("x", TASK, PUBLIC, seeded(1)) == seal("x", TASK, PUBLIC, seeded(1))
    assert seal("x", TASK, PUBLIC, seeded(1)) != seal("x", TASK, PUBLIC, seeded(2))


def test_padding_and_a_compressed_point_are_taken() -> None:
    made = envelope()
    point = base64.urlsafe_b64decode(made["epk"] + "=")
    made["epk"] = encode(bytes([2 + (point[64] & 1)]) + point[1:33])
    made["nonce"] += "=" * (-len(made["nonce"]) % 4)
    assert open_envelope(json.dumps(made), TASK, KEY) == '{"prompt":"a cat"}'


def test_it_opens_for_its_key_and_task_only() -> None:
    sealed = json.dumps(envelope())
    with pytest.raises(ParametersUnreadable):
        open_envelope(sealed, Commitment("0x" + "ac" * 32), KEY)
    with pytest.raises(ParametersUnreadable):
        open_envelope(sealed, TASK, b"\x01" * 32)


@pytest.mark.parametrize(
    "change",
    [
        {"v": 2},
        {"v": True},
        {"v": 1.0},
        {"alg": "none"},
        {"epk": encode(b"\x04" + b"\x01" * 64)},
        {"epk": encode(b"\x00")},
        {"epk": ""},
        {"epk": 5},
        {"epk": "a b="},
        {"nonce": encode(b"\x00" * 11)},
        {"nonce": encode(b"\x00" * 16)},
        {"nonce": "AAAAAAAAAAAAAAA+"},
        {"nonce": "AAAAAAAAAAAAAAAAAAAAA="},
        {"ct": encode(b"\x00" * 15)},
        {"ct": encode(b"\x00" * 16)},
        {"ct": None},
        {"ct": "AA\u00e9"},
        {"ct": "AB"},
        {"extra": 1},
    ],
)
def test_what_is_not_right_is_unreadable(change: dict[str, Any]) -> None:
    text = json.dumps(envelope() | change)
    assert is_envelope(text)
    with pytest.raises(ParametersUnreadable):
        open_envelope(text, TASK, KEY)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["epk", "nonce", "ct"]), st.integers(0, 10**6), st.integers(1, 255))
def test_no_altered_byte_goes_unseen(name: str, place: int, flip: int) -> None:
    made = envelope()
    data = bytearray(base64.urlsafe_b64decode(made[name] + "=" * (-len(made[name]) % 4)))
    data[place % len(data)] ^= flip
    with pytest.raises(ParametersUnreadable):
        open_envelope(json.dumps(made | {name: encode(bytes(data))}), TASK, KEY)


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_any_text_is_judged_without_a_crash(text: str) -> None:
    is_envelope(text)
    with pytest.raises(ParametersUnreadable):
        open_envelope(text, TASK, KEY)


@pytest.mark.parametrize(
    "text", ["", "[]", '"ct"', '{"prompt":"epk ct"}', "{", "[" * 100_000, '{"ct":1}']
)
def test_plain_parameters_are_no_envelope(text: str) -> None:
    assert not is_envelope(text)


def test_a_recipient_off_the_curve_is_refused() -> None:
    with pytest.raises(ValueError, match="EC key"):
        seal("x", TASK, b"\x01" * 64, seeded(1))
