"""The operator's secret at rest: a BIP-39 phrase in plain text, or an encrypted keystore (V3).

A keystore of ours holds the phrase's entropy, and says so (`crynux.words`), so that the phrase can
be had back from it. Any other V3 keystore holds one private key: that is the treasury's then, and
the node accounts are derived with it for a seed (`cluster.identity`).

Nothing here is logged, and no library's error is let through: some quote what they refuse.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NoReturn

from eth_account.hdaccount.mnemonic import Mnemonic
from eth_keyfile.keyfile import create_keyfile_json, decode_keyfile_json

from cluster.core.errors import ConfigError

PASSWORD: Final = "CRYNUX_PASSWORD"  # noqa: S105 - the variable's name
"""The environment variable that may hold the password; a secret in Kubernetes sets it."""
LEAST_PASSWORD: Final = 8
_MAX_FILE: Final = 16_384
_WORDS: Final = (12, 15, 18, 21, 24)
_KEY_BYTES: Final = 32
_MARK: Final = "crynux"
WORK: Final = 2**18
"""Of scrypt: about a second and 256 MiB each time it is opened, for whoever guesses too."""


@dataclass(frozen=True, slots=True)
class Secret:
    """Either the phrase, or a single private key (32 bytes). Shows neither."""

    phrase: str | None = field(default=None, repr=False)
    key: bytes | None = field(default=None, repr=False)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Secret stays in its process: it can't be pickled or copied")


def new_phrase(words: int, random: Callable[[int], bytes]) -> str:
    """A BIP-39 phrase of so many English words, from `random` bytes. Raises `ConfigError`."""
    if words not in _WORDS:
        raise ConfigError(f"a phrase has 12, 15, 18, 21 or 24 words, not {words}")
    return Mnemonic().to_mnemonic(random(words * 4 // 3))


def checked_phrase(text: str, source: str) -> str:
    """The phrase in `text`, with single spaces. Raises `ConfigError` when it isn't one."""
    words = " ".join(text.split())
    try:
        valid = Mnemonic().is_mnemonic_valid(words)
    except (ValueError, LookupError):
        valid = False
    if not valid:
        raise ConfigError(
            f"{source}: not a valid BIP-39 phrase (12 to 24 words and their checksum); "
            "check for a missing or misspelt word"
        )
    return words


# --- keystores ------------------------------------------------------------------------------------


def is_keystore(text: str) -> bool:
    return text.lstrip().startswith("{")


def seal_phrase(phrase: str, password: str, treasury: str, work: int = WORK) -> str:
    """A keystore's text that holds a valid phrase; `treasury` is the address that it shows."""
    entropy = _entropy(phrase)
    made = _seal(entropy.rjust(_KEY_BYTES, b"\0"), password, work)
    made["address"] = treasury.removeprefix("0x")
    made[_MARK] = {"words": len(phrase.split())}
    return json.dumps(made, indent=2) + "\n"


def seal_key(key: bytes, password: str, work: int = WORK) -> str:
    """A keystore's text that holds one private key, as every wallet reads it."""
    return json.dumps(_seal(key, password, work), indent=2) + "\n"


def _seal(secret: bytes, password: str, work: int) -> dict[str, Any]:
    return create_keyfile_json(secret, password.encode(), kdf="scrypt", iterations=work)


def open_keystore(text: str, password: str, source: str) -> Secret:
    """What the keystore holds. Raises `ConfigError` for a wrong password, or when it is none."""
    found: Any = None
    opened = b""
    problem = "not a V3 keystore (JSON with version 3 and a section crypto)"
    try:
        found = json.loads(text)
        if isinstance(found, dict) and found.get("version") == 3:
            opened = bytes(decode_keyfile_json(found, password.encode()))
    except ValueError as error:
        if "MAC" in str(error):
            problem = "the password doesn't open it"
    except (KeyError, TypeError, NotImplementedError, RecursionError, OverflowError):
        pass
    # Outside the handlers: their errors may quote what was read.
    if len(opened) != _KEY_BYTES:
        raise ConfigError(f"{source}: {problem}")
    mark = found.get(_MARK)
    if mark is None:
        return Secret(key=opened)
    words = mark.get("words") if isinstance(mark, Mapping) else None
    if words not in _WORDS:
        raise ConfigError(f"{source}: its section {_MARK} is not one that this version wrote")
    entropy = opened[_KEY_BYTES - words * 4 // 3 :]
    return Secret(phrase=Mnemonic().to_mnemonic(entropy))


def _entropy(phrase: str) -> bytes:
    """The bytes that a valid phrase stands for: 11 bits a word, but for the checksum's."""
    words = phrase.split()
    places = Mnemonic().wordlist
    value = 0
    for word in words:
        value = value << 11 | places.index(word)
    return (value >> len(words) // 3).to_bytes(len(words) * 4 // 3, "big")


# --- files ----------------------------------------------------------------------------------------


def read_private(file: Path, what: str, key: str) -> str:
    """The text of a file that holds a secret; refuses one that its group or others may reach.

    `what` it must hold and the configuration's `key` for it are for the errors (`ConfigError`).
    """
    try:
        with file.open("rb") as opened:
            status = os.fstat(opened.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ConfigError(f"{file}: not a plain file; it must hold {what}")
            if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise ConfigError(
                    f"{file}: others than its owner can get at {what}; run: chmod 600 {file}"
                )
            data = opened.read(_MAX_FILE)
    except FileNotFoundError:
        raise ConfigError(f"{file}: there is no such file ({key})") from None
    except OSError as error:
        raise ConfigError(f"{file}: can't be read: {error.strerror}") from None
    try:
        return data.decode()
    except UnicodeDecodeError:
        pass
    # Outside the handler: that error carries the bytes.
    raise ConfigError(f"{file}: not text; it must hold {what}")


def write_private(file: Path, text: str) -> None:
    """A new file that only its owner can read, whole or not at all. Raises `ConfigError`."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except FileExistsError:
        raise ConfigError(f"{file}: there is one already, and keys are never overwritten") from None
    except OSError as error:
        raise ConfigError(f"{file}: can't be written: {error.strerror}") from None
    try:
        with os.fdopen(handle, "w") as opened:
            opened.write(text)
            opened.flush()
            os.fsync(opened.fileno())
    except OSError as error:
        file.unlink(missing_ok=True)
        raise ConfigError(f"{file}: can't be written: {error.strerror}") from None
