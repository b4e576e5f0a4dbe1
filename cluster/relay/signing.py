"""How the relay wants its calls signed (protocol.md section 3).

The named inputs of a call, as the relay's own Go encoder would write them, followed by the decimal
timestamp; keccak256; secp256k1 over the bare hash; 65 bytes r‖s‖v with v 0 or 1.

Go's encoder is matched by Python's with five more escapes. Both write `\\b \\f \\n \\r \\t` in
short (Go since 1.22; the relay is built with 1.24), other control characters as `\\u00xx`, and
leave DEL alone. Go reads a lone surrogate as U+FFFD, and every number as a float64.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from eth_keys.datatypes import PrivateKey, Signature
from eth_keys.exceptions import BadSignature
from eth_utils.crypto import keccak
from eth_utils.exceptions import ValidationError

from cluster.core.errors import ClusterError
from cluster.core.types import Address

Field = str | int | bool | None | Sequence["Field"] | Mapping[str, "Field"]

_GO_ESCAPES = str.maketrans({mark: f"\\u{ord(mark):04x}" for mark in "<>&\u2028\u2029"})
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_EXACT_IN_FLOAT64 = 2**53


class InvalidSignature(ClusterError):
    """Not a signature that the relay would take."""


def _checked(value: Field) -> Field:
    match value:
        case str():
            return _LONE_SURROGATE.sub("\ufffd", value)
        case bool() | None:
            return value
        case int():
            if abs(value) > _EXACT_IN_FLOAT64:
                raise ValueError(f"{value} doesn't survive the relay's re-encoding")
            return value
        case Mapping():
            return {_LONE_SURROGATE.sub("\ufffd", key): _checked(value[key]) for key in value}
        case Sequence():
            return [_checked(each) for each in value]
        case _:
            raise TypeError(f"a {type(value).__name__} can't be signed")


def signed_text(fields: Mapping[str, Field], timestamp: int) -> str:
    """The text whose hash is signed. Raises `ValueError` for an integer beyond 2^53."""
    text = json.dumps(_checked(fields), ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return f"{text.translate(_GO_ESCAPES)}{timestamp}"


def digest(fields: Mapping[str, Field], timestamp: int) -> bytes:
    return keccak(signed_text(fields, timestamp).encode())


def sign_digest(hashed: bytes, private_key: bytes) -> bytes:
    """65 bytes r‖s‖v, v 0 or 1, deterministic (RFC 6979)."""
    return PrivateKey(private_key).sign_msg_hash(hashed).to_bytes()


def sign(fields: Mapping[str, Field], timestamp: int, private_key: str) -> str:
    """The signature as 0x hex; `private_key` is 32 bytes as hex, with or without 0x."""
    key = bytes.fromhex(private_key.removeprefix("0x"))
    return "0x" + sign_digest(digest(fields, timestamp), key).hex()


def recover(fields: Mapping[str, Field], timestamp: int, signature: str) -> Address:
    """Who signed. Raises `InvalidSignature` for what can't be a signature at all."""
    if not re.fullmatch(r"0x[0-9a-fA-F]{130}", signature):
        raise InvalidSignature("not 65 bytes of hex with 0x")
    try:
        signed = Signature(bytes.fromhex(signature[2:]))
        key = signed.recover_public_key_from_msg_hash(digest(fields, timestamp))
    except (BadSignature, ValidationError, ValueError) as error:
        raise InvalidSignature("no key makes this signature") from error
    return Address(key.to_checksum_address())
