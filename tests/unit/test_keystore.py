"""The operator's secret at rest: phrases and keystores, and what is refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from eth_account import Account
from eth_account.hdaccount.mnemonic import Mnemonic
from hypothesis import given
from hypothesis import strategies as st

from cluster import keystore
from cluster.core.errors import ConfigError
from cluster.identity import Identity, load_secret, password_from
from cluster.keystore import PASSWORD, Secret
from tests.unit.test_identity import FIRST, KEY_0, PHRASE

WORD = "correct horse"
WORK = 2**4
"""Of scrypt, so that tests don't wait."""


@pytest.mark.parametrize("words", [12, 15, 18, 21, 24])
def test_a_phrase_comes_back_from_its_keystore(words: int) -> None:
    phrase = keystore.new_phrase(words, lambda size: bytes(range(size)))
    assert len(phrase.split()) == words
    text = keystore.seal_phrase(phrase, WORD, FIRST[0], WORK)
    assert keystore.open_keystore(text, WORD, "file") == Secret(phrase=phrase)
    assert not any(word in text for word in phrase.split() if len(word) > 6)


@given(st.binary(min_size=16, max_size=16))
def test_every_phrase_is_the_bytes_it_was_made_of(entropy: bytes) -> None:
    assert keystore._entropy(Mnemonic().to_mnemonic(entropy)) == entropy


def test_random_bytes_are_taken_for_the_phrase_alone() -> None:
    asked: list[int] = []

    def random(size: int) -> bytes:
        asked.append(size)
        return b"\x07" * size

    keystore.new_phrase(24, random)
    assert asked == [32]
    with pytest.raises(ConfigError, match="12, 15, 18, 21 or 24 words, not 13"):
        keystore.new_phrase(13, random)


def test_a_keystore_of_one_key_is_every_wallets() -> None:
    text = keystore.seal_key(bytes.fromhex(KEY_0), WORD, WORK)
    assert Account.decrypt(json.loads(text), WORD).hex() == KEY_0
    assert keystore.open_keystore(text, WORD, "file") == Secret(key=bytes.fromhex(KEY_0))


def test_another_wallets_keystore_makes_its_account_the_treasury() -> None:
    text = json.dumps(Account.encrypt(bytes.fromhex(KEY_0), WORD, kdf="scrypt", iterations=WORK))
    identity = Identity.of(keystore.open_keystore(text, WORD, "file"))
    assert identity.address(0) == FIRST[0]
    assert identity.address(1) not in FIRST
    assert identity.address(1) == Identity.of(Secret(key=bytes.fromhex(KEY_0))).address(1)
    assert len(identity.sign(identity.address(0), b"\x01" * 32)) == 65


def test_an_account_comes_out_encrypted_only() -> None:
    text = Identity.from_phrase(PHRASE).export(1, WORD, WORK)
    assert Account.from_key(Account.decrypt(json.loads(text), WORD)).address == FIRST[1]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "not a V3 keystore"),
        ("{}", "not a V3 keystore"),
        ("[" * 10_000, "not a V3 keystore"),
        ('{"version": 3}', "not a V3 keystore"),
        ('{"version": 3, "crypto": {"kdf": "none"}}', "not a V3 keystore"),
        ('{"version": 4, "crypto": {}}', "not a V3 keystore"),
        ('{"version": 3, "crypto": []}', "not a V3 keystore"),
    ],
)
def test_what_is_no_keystore_is_refused_in_one_line(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=f"^file: {problem}") as caught:
        keystore.open_keystore(text, WORD, "file")
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


def test_a_wrong_password_and_a_wrong_mark() -> None:
    text = keystore.seal_phrase(PHRASE, WORD, FIRST[0], WORK)
    with pytest.raises(ConfigError, match="the password doesn't open it"):
        keystore.open_keystore(text, "another", "file")
    for mark in (1, {}, {"words": 13}):
        wrong = json.dumps(json.loads(text) | {"crynux": mark})
        with pytest.raises(ConfigError, match="its section crynux"):
            keystore.open_keystore(wrong, WORD, "file")


def test_a_secret_shows_nothing_and_stays() -> None:
    secret = Secret(phrase=PHRASE, key=b"k" * 32)
    assert "test" not in repr(secret)
    assert "kkk" not in repr(secret)
    with pytest.raises(TypeError):
        pickle.dumps(secret)


# --- files and passwords --------------------------------------------------------------------------


def private(file: Path, text: str, mode: int = 0o600) -> Path:
    file.write_text(text)
    file.chmod(mode)
    return file


def test_what_is_written_is_its_owners_and_never_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "new" / "key"
    keystore.write_private(file, "secret")
    assert file.stat().st_mode & 0o777 == 0o600
    with pytest.raises(ConfigError, match="never overwritten"):
        keystore.write_private(file, "other")
    assert file.read_text() == "secret"
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError):
        keystore.write_private(link, "secret")
    assert not (tmp_path / "elsewhere").exists()


def test_an_identity_from_each_kind_of_file(tmp_path: Path) -> None:
    plain = private(tmp_path / "plain", PHRASE)
    sealed = private(tmp_path / "k", keystore.seal_phrase(PHRASE, WORD, FIRST[0], WORK))
    assert Identity.load(plain).address(1) == FIRST[1]
    assert Identity.load(sealed, lambda: WORD).address(1) == FIRST[1]
    with pytest.raises(ConfigError, match="there is no password"):
        Identity.load(sealed)
    sealed.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        load_secret(sealed, lambda: WORD)


def test_where_a_password_comes_from(tmp_path: Path) -> None:
    file = private(tmp_path / "password", "from the file\nnot this\n")
    environment = {PASSWORD: "from the environment"}
    assert password_from(file, environment, lambda: "asked") == "from the file"
    assert password_from(None, environment, lambda: "asked") == "from the environment"
    assert password_from(None, {}, lambda: "asked") == "asked"
    with pytest.raises(ConfigError, match=r"identity\.password_file.*CRYNUX_PASSWORD"):
        password_from(None, {})
    with pytest.raises(ConfigError, match="needs a password"):
        password_from(private(tmp_path / "empty", "\n"), environment)
    file.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        password_from(file, environment)
