from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from eth_account import Account
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.relay import signing

DATA = Path(__file__).parents[1] / "data"
KEY = "0x420fcabfd5dbb55215490693062e6e530840c64de837d071f0d9da21aaac861e"
ADDRESS = Account.from_key(KEY).address


def sheet_vectors() -> list[dict[str, Any]]:
    vectors: list[dict[str, Any]] = json.loads((DATA / "relay_signing.json").read_text())
    return vectors


def relay3_vectors() -> list[dict[str, Any]]:
    vectors: list[dict[str, Any]] = json.loads((DATA / "relay3_signing.json").read_text())[
        "vectors"
    ]
    return [each for each in vectors if "signed_fields" in each]


@pytest.mark.parametrize("vector", sheet_vectors())
def test_the_sheets_vectors(vector: dict[str, Any]) -> None:
    fields, at = vector["input"], vector["timestamp"]
    if "signed_text" in vector:
        assert signing.signed_text(fields, at) == vector["signed_text"]
    assert signing.sign(fields, at, vector["private_key"]) == vector["signature"]
    assert signing.recover(fields, at, vector["signature"]) == ADDRESS


@pytest.mark.parametrize("vector", relay3_vectors(), ids=lambda each: each["name"])
def test_the_relays_own_vectors(vector: dict[str, Any]) -> None:
    fields, at = vector["signed_fields"], vector["timestamp"]
    assert signing.signed_text(fields, at) == vector["signed_text"]
    assert "0x" + signing.digest(fields, at).hex() == vector["hash"]
    assert signing.sign(fields, at, vector["private_key"]) == vector["signature"]
    assert signing.recover(fields, at, vector["signature"]) == vector["address"]


@pytest.mark.parametrize(
    ("text", "encoded"),
    [
        ("\b\f\n\r\t", r"\b\f\n\r\t"),
        ("\x00\x0b\x1f", r"\u0000\u000b\u001f"),
        ("\x7f", "\x7f"),
        ("<>&", r"\u003c\u003e\u0026"),
        ("\u2028\u2029", r"\u2028\u2029"),
        ('"\\/', r"\"\\/"),
        ("\ud800", "\ufffd"),
        ("\U0001f600é", "\U0001f600é"),
    ],
)
def test_text_is_escaped_as_go_does(text: str, encoded: str) -> None:
    assert signing.signed_text({"a": text}, 7) == f'{{"a":"{encoded}"}}7'


def test_keys_are_sorted_by_code_point_at_every_depth() -> None:
    fields: dict[str, signing.Field] = {"b": [{"z": 1, "Z": True}], "a": None, "é": [], "<": ""}
    assert (
        signing.signed_text(fields, 1) == '{"\\u003c":"","a":null,"b":[{"Z":true,"z":1}],"é":[]}1'
    )


def test_what_go_would_change_is_refused() -> None:
    assert signing.signed_text({"n": 2**53}, 0) == '{"n":9007199254740992}0'
    with pytest.raises(ValueError, match="re-encoding"):
        signing.signed_text({"n": 2**53 + 1}, 0)
    with pytest.raises(TypeError):
        signing.signed_text({"n": 1.5}, 0)  # type: ignore[dict-item]


@pytest.mark.parametrize("signature", ["", "0x", "0x" + "00" * 65, "0x" + "ff" * 65, "zz" * 66])
def test_no_signature_at_all(signature: str) -> None:
    with pytest.raises(signing.InvalidSignature):
        signing.recover({"a": 1}, 1, signature)


def test_a_recovery_id_beyond_one_is_refused() -> None:
    good = signing.sign({"a": 1}, 1, KEY)
    with pytest.raises(signing.InvalidSignature):
        signing.recover({"a": 1}, 1, good[:-2] + "1b")


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(st.text(), st.text() | st.integers(-(2**53), 2**53)), st.integers(0, 2**40))
def test_who_signed_is_recovered(fields: dict[str, signing.Field], at: int) -> None:
    signature = signing.sign(fields, at, KEY)
    assert signing.recover(fields, at, signature) == ADDRESS
    assert signing.recover(fields, at + 1, signature) != ADDRESS


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_the_text_still_reads_as_the_same_json(text: str) -> None:
    assert json.loads(signing.signed_text({"a": text}, 0)[:-1]) == {"a": text}
