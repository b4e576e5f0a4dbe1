# pragma version 0.4.3
# The sampling number. DEVNET SIMPLIFICATION, the only one of these contracts: the network derives it
# by a VRF from the task's sampling seed; here it is the hash of the creator's ECDSA signature over
# the bare seed (r | s | v, 65 bytes, v 27 or 28). A creator could choose among its signatures, which
# a VRF rules out; a signer that follows RFC 6979 has exactly one.


@internal
@view
def _number(
    seed: bytes32, proof: Bytes[256], public_key: Bytes[256], creator: address
) -> uint256:
    assert len(proof) == 65 and len(public_key) == 64, "Invalid VRF proof"
    hashed: uint256 = convert(keccak256(public_key), uint256) % 2**160
    assert convert(convert(hashed, uint160), address) == creator, "Public key mismatch"
    v: uint256 = convert(slice(proof, 64, 1), uint256)
    assert v == 27 or v == 28, "Invalid VRF proof"
    r: bytes32 = extract32(proof, 0)
    s: bytes32 = extract32(proof, 32)
    assert ecrecover(seed, v, r, s) == creator, "Invalid VRF proof"
    return convert(keccak256(proof), uint256)
