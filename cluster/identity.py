"""The operator's one key and the accounts derived from it (design.md, "One identity, many GPUs").

Only the coordinator's process ever holds an `Identity`. Key material leaves this object in no form:
not by repr, pickle, copy or an exception's text, and no method returns it. The libraries' errors
quote the phrase that they refuse, so none of them is let through, nor chained to ours.
"""

from __future__ import annotations

import hmac
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from eth_account import Account
from eth_account.hdaccount import seed_from_mnemonic
from eth_account.hdaccount.deterministic import HardNode, SoftNode, derive_child_key
from eth_keys.datatypes import PrivateKey
from eth_utils.exceptions import ValidationError

from cluster.core.errors import ClusterError, ConfigError
from cluster.core.types import Address, Commitment
from cluster.relay.envelope import open_envelope

TREASURY = 0
"""The account that funds the others; nodes are 1 and up."""
_BRANCH = (HardNode(44), HardNode(60), HardNode(0), SoftNode(0))
"""m/44'/60'/0'/0, below which are the accounts (BIP-44)."""
_SEARCHED = 256
"""How many accounts an unknown address is looked for among."""
_MAX_FILE = 4096


class Identity:
    """Accounts m/44'/60'/0'/0/i of one BIP-39 phrase, derived when first asked for."""

    __slots__ = ("__addresses", "__branch", "__keys")

    def __init__(self, seed: bytes) -> None:
        self.__branch = _branch(seed)
        self.__keys: dict[Address, PrivateKey] = {}
        self.__addresses: dict[int, Address] = {}

    @classmethod
    def load(cls, seed_file: Path) -> Identity:
        """Read the phrase; raises `ConfigError` when others can read the file, or it is wrong."""
        return cls.from_phrase(_read_private(seed_file), str(seed_file))

    @classmethod
    def from_phrase(cls, phrase: str, source: str = "the phrase") -> Identity:
        words = " ".join(phrase.split())
        try:
            seed = seed_from_mnemonic(words, "")
        except (ValidationError, ValueError, LookupError):
            seed = b""
        if not seed:
            raise ConfigError(
                f"{source}: not a valid BIP-39 phrase (12 to 24 words and their checksum); "
                "check for a missing or misspelt word"
            )
        return cls(seed)

    def address(self, index: int) -> Address:
        if index not in self.__addresses:
            private_key = PrivateKey(derive_child_key(*self.__branch, SoftNode(index))[0])
            address = Address(private_key.public_key.to_checksum_address())
            self.__keys[address] = private_key
            self.__addresses[index] = address
        return self.__addresses[index]

    def public_key(self, address: Address) -> bytes:
        """64 bytes: the uncompressed key without its 0x04 prefix (protocol.md section 2)."""
        return bytes(self.__key(address).public_key.to_bytes())

    def sign_transaction(self, account: Address, transaction: Mapping[str, Any]) -> bytes:
        """The raw signed transaction; the same fields always give the same bytes."""
        fields = dict(transaction)
        return bytes(Account.sign_transaction(fields, self.__key(account)).raw_transaction)

    def sign(self, account: Address, digest: bytes) -> bytes:
        """65 bytes r‖s‖v with v 0 or 1, over the bare 32-byte `digest`."""
        if len(digest) != 32:
            raise ClusterError(f"only a 32-byte digest can be signed, not {len(digest)} bytes")
        return bytes(self.__key(account).sign_msg_hash(digest).to_bytes())

    def open(self, account: Address, task: Commitment, envelope: str) -> str:
        """The parameters in `envelope`; raises `ParametersUnreadable` when it doesn't open."""
        return open_envelope(envelope, task, self.__key(account).to_bytes())

    def __key(self, address: Address) -> PrivateKey:
        for index in range(_SEARCHED):
            if address in self.__keys:
                break
            self.address(index)
        if address not in self.__keys:
            raise ClusterError(f"{address} is not an account of this identity")
        return self.__keys[address]

    def __repr__(self) -> str:
        return f"Identity(treasury={self.address(TREASURY)})"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("an Identity stays in its process: it can't be pickled or copied")

    def __getstate__(self) -> NoReturn:
        raise TypeError("an Identity stays in its process: it can't be pickled or copied")


def _branch(seed: bytes) -> tuple[bytes, bytes]:
    """The branch's key and chain code (BIP-32). Each step costs milliseconds, so once for all."""
    master = hmac.digest(b"Bitcoin seed", seed, "sha512")
    key, chain_code = master[:32], master[32:]
    for node in _BRANCH:
        key, chain_code = derive_child_key(key, chain_code, node)
    return key, chain_code


def _read_private(file: Path) -> str:
    """The file's text; refuses one that its group or others may read, write or replace."""
    try:
        with file.open("rb") as opened:
            status = os.fstat(opened.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ConfigError(f"{file}: not a plain file; it must hold the BIP-39 phrase")
            if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise ConfigError(
                    f"{file}: others than its owner can get at the key; run: chmod 600 {file}"
                )
            data = opened.read(_MAX_FILE)
    except FileNotFoundError:
        raise ConfigError(f"{file}: there is no such seed file (identity.seed_file)") from None
    except OSError as error:
        raise ConfigError(f"{file}: the seed file can't be read: {error.strerror}") from None
    try:
        return data.decode()
    except UnicodeDecodeError:
        pass
    # Outside the handler: that error carries the bytes.
    raise ConfigError(f"{file}: not text; it must hold the BIP-39 phrase")
