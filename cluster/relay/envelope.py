"""Task parameters encrypted to the selected node's key (protocol.md section 3, "Encryption").

    {"v":1,"alg":"ECIES-secp256k1-HKDF-SHA256-AES256GCM","epk":…,"nonce":…,"ct":…}

`epk` is an ephemeral key's point in SEC 1 form (written uncompressed, 65 bytes), `nonce` 12 bytes,
`ct` the AES-256-GCM ciphertext with its 16-byte tag; all base64url, written without padding. The
AES key is HKDF-SHA256 (no salt) of the ECDH x-coordinate with the commitment's 32 bytes as info;
the commitment is the associated data too, so an envelope opens for its own task only.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pydantic_core import from_json

from cluster.core.errors import ParametersUnreadable
from cluster.core.types import Commitment

VERSION = 1
ALGORITHM = "ECIES-secp256k1-HKDF-SHA256-AES256GCM"

_FIELDS = frozenset({"v", "alg", "epk", "nonce", "ct"})
_CURVE = ec.SECP256K1()
_ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
_NONCE_BYTES = 12
_TAG_BYTES = 16


def _object(text: str) -> dict[str, Any] | None:
    # Not json.loads: py_ecc, which web3 brings, lifts the recursion limit so far that deep nesting
    # in a stranger's text would end the process. This parser has a limit of its own.
    try:
        parsed = from_json(text)
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) else None


def is_envelope(text: str) -> bool:
    """Whether `text` is an envelope of any version, also one that we can't open.

    No task's own parameters have these fields, and an envelope of a later version must never be
    taken for parameters that fail their schema.
    """
    parsed = _object(text)
    return parsed is not None and "epk" in parsed and "ct" in parsed


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(name: str, value: object) -> bytes:
    if not isinstance(value, str):
        raise ParametersUnreadable(f"envelope: {name} is not text")
    bare = value.rstrip("=")
    padded = bare + "=" * (-len(bare) % 4)
    try:
        data = base64.b64decode(padded, altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as error:
        raise ParametersUnreadable(f"envelope: {name} is not base64url") from error
    if value not in {bare, padded} or _encode(data) != bare:
        raise ParametersUnreadable(f"envelope: {name} is not base64url")
    return data


def _commitment_bytes(commitment: Commitment) -> bytes:
    data = bytes.fromhex(commitment.removeprefix("0x"))
    if len(data) != 32:
        raise ValueError("a commitment has 32 bytes")
    return data


def _cipher(
    own: ec.EllipticCurvePrivateKey, other: ec.EllipticCurvePublicKey, context: bytes
) -> AESGCM:
    shared = own.exchange(ec.ECDH(), other)
    return AESGCM(HKDF(algorithm=SHA256(), length=32, salt=None, info=context).derive(shared))


def seal(
    parameters: str,
    commitment: Commitment,
    recipient_public_key: bytes,
    random: Callable[[int], bytes],
) -> str:
    """Encrypt to a node's 64-byte public key (as on chain, without 0x04).

    `random(n)` gives n random bytes: 40 for the ephemeral secret, then 12 for the nonce. Raises
    `ValueError` when the recipient's key isn't a point of the curve.
    """
    recipient = ec.EllipticCurvePublicKey.from_encoded_point(_CURVE, b"\x04" + recipient_public_key)
    secret = int.from_bytes(random(40), "big") % (_ORDER - 1) + 1
    ephemeral = ec.derive_private_key(secret, _CURVE)
    nonce = random(_NONCE_BYTES)
    context = _commitment_bytes(commitment)
    sealed = _cipher(ephemeral, recipient, context).encrypt(nonce, parameters.encode(), context)
    point = ephemeral.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    return json.dumps(
        {
            "v": VERSION,
            "alg": ALGORITHM,
            "epk": _encode(point),
            "nonce": _encode(nonce),
            "ct": _encode(sealed),
        },
        separators=(",", ":"),
    )


def _parse(text: str) -> tuple[ec.EllipticCurvePublicKey, bytes, bytes]:
    parsed = _object(text)
    if parsed is None or parsed.keys() != _FIELDS:
        raise ParametersUnreadable("envelope: not the fields it should have")
    version, algorithm = parsed["v"], parsed["alg"]
    if type(version) is not int or version != VERSION or algorithm != ALGORITHM:
        raise ParametersUnreadable("envelope: a version or algorithm we don't know")
    point, nonce, sealed = (_decode(name, parsed[name]) for name in ("epk", "nonce", "ct"))
    if len(nonce) != _NONCE_BYTES or len(sealed) < _TAG_BYTES:
        raise ParametersUnreadable("envelope: nonce or ciphertext of a wrong size")
    try:
        ephemeral = ec.EllipticCurvePublicKey.from_encoded_point(_CURVE, point)
    except ValueError as error:
        raise ParametersUnreadable("envelope: epk is not a point of the curve") from error
    return ephemeral, nonce, sealed


def open_envelope(text: str, commitment: Commitment, private_key: bytes) -> str:
    """The parameters. Raises `ParametersUnreadable` for anything but a good envelope to this key.

    `private_key` is the node account's, 32 bytes.
    """
    ephemeral, nonce, sealed = _parse(text)
    own = ec.derive_private_key(int.from_bytes(private_key, "big"), _CURVE)
    context = _commitment_bytes(commitment)
    try:
        return _cipher(own, ephemeral, context).decrypt(nonce, sealed, context).decode()
    except InvalidTag as error:
        raise ParametersUnreadable("envelope: not for this key and task, or altered") from error
    except UnicodeDecodeError as error:
        raise ParametersUnreadable("envelope: its content is not UTF-8") from error
