"""The operator's one key and the accounts derived from it (design.md, "One identity, many GPUs").

Only the coordinator's process ever holds an `Identity`. Key material leaves this object in no form:
not by repr, pickle, copy or an exception's text, and no method returns it but encrypted. The
libraries' errors quote the phrase that they refuse, so none is let through, nor chained to ours.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from eth_account import Account
from eth_account.hdaccount import seed_from_mnemonic
from eth_account.hdaccount.deterministic import HardNode, SoftNode, derive_child_key
from eth_keys.datatypes import PrivateKey
from eth_utils.exceptions import ValidationError

from cluster import keystore
from cluster.core.errors import ClusterError, ConfigError
from cluster.core.types import Address, Commitment
from cluster.keystore import PASSWORD, Secret
from cluster.relay.envelope import open_envelope

TREASURY = 0
"""The account that funds the others; nodes are 1 and up."""
_BRANCH = (HardNode(44), HardNode(60), HardNode(0), SoftNode(0))
"""m/44'/60'/0'/0, below which are the accounts (BIP-44)."""
_SEARCHED = 256
"""How many accounts an unknown address is looked for among."""


class Identity:
    """Accounts m/44'/60'/0'/0/i of one seed, derived when first asked for.

    Where the secret is one private key and no phrase, that key is the treasury's (i = 0), and its
    32 bytes are the seed of the others.
    """

    __slots__ = ("__addresses", "__branch", "__keys")

    def __init__(self, seed: bytes, treasury: bytes | None = None) -> None:
        self.__branch = _branch(seed)
        self.__keys: dict[Address, PrivateKey] = {}
        self.__addresses: dict[int, Address] = {}
        if treasury is not None:
            self.__keep(TREASURY, PrivateKey(treasury))

    @classmethod
    def load(cls, file: Path, password: Callable[[], str] | None = None) -> Identity:
        """From a file with a phrase, or a keystore, which `password` opens.

        Raises `ConfigError` when others can read the file, or it or the password is wrong.
        """
        return cls.of(load_secret(file, password), str(file))

    @classmethod
    def of(cls, secret: Secret, source: str = "the key") -> Identity:
        if secret.phrase is not None:
            return cls.from_phrase(secret.phrase, source)
        key = secret.key or b""
        try:
            return cls(key, treasury=key)
        except (ValueError, ValidationError):
            pass
        raise ConfigError(f"{source}: it holds no private key")

    @classmethod
    def from_phrase(cls, phrase: str, source: str = "the phrase") -> Identity:
        return cls(seed_from_mnemonic(keystore.checked_phrase(phrase, source), ""))

    def address(self, index: int) -> Address:
        if index not in self.__addresses:
            key = PrivateKey(derive_child_key(*self.__branch, SoftNode(index))[0])
            self.__keep(index, key)
        return self.__addresses[index]

    def __keep(self, index: int, key: PrivateKey) -> None:
        address = Address(key.public_key.to_checksum_address())
        self.__keys[address] = key
        self.__addresses[index] = address

    def export(self, index: int, password: str, work: int = keystore.WORK) -> str:
        """One account's key as an encrypted keystore, for a wallet: the only way out."""
        return keystore.seal_key(self.__key(self.address(index)).to_bytes(), password, work)

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


def load_secret(file: Path, password: Callable[[], str] | None = None) -> Secret:
    """What the key file holds; `password` is asked for a keystore's. Raises `ConfigError`."""
    text = keystore.read_private(file, "the operator's key", "identity")
    if not keystore.is_keystore(text):
        return Secret(phrase=keystore.checked_phrase(text, str(file)))
    if password is None:
        raise ConfigError(f"{file}: a keystore, and there is no password for it")
    return keystore.open_keystore(text, password(), str(file))


def password_from(
    file: Path | None, environment: Mapping[str, str], prompt: Callable[[], str] | None = None
) -> str:
    """The keystore's password: a file's first line, else the environment's, else asked for.

    Never an argument: those are seen by everyone on the machine. Raises `ConfigError`.
    """
    if file is not None:
        text = keystore.read_private(file, "the keystore's password", "identity.password_file")
        found = text.split("\n", 1)[0].rstrip("\r")
    else:
        found = environment.get(PASSWORD, "")
    if not found and prompt is not None:
        found = prompt()
    if not found:
        raise ConfigError(
            "the keystore needs a password: name a file that holds it "
            f"(identity.password_file), or set {PASSWORD}"
        )
    return found
