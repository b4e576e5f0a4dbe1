# pragma version 0.4.3
# Scores of images are compared per 64-bit perceptual hash.

BLOCK: constant(uint256) = 8
THRESHOLD: constant(uint256) = 24


@internal
@pure
def _distance(a: bytes8, b: bytes8) -> uint256:
    rest: uint256 = convert(a, uint256) ^ convert(b, uint256)
    count: uint256 = 0
    for _: uint256 in range(64):
        if rest == 0:
            break
        rest &= rest - 1  # clears the lowest set bit
        count += 1
    return count


@internal
@pure
def _similar(a: Bytes[1024], b: Bytes[1024]) -> bool:
    if len(a) != len(b) or len(a) % BLOCK != 0:
        return False
    for i: uint256 in range(len(a) // BLOCK, bound=128):
        left: bytes8 = convert(slice(a, i * BLOCK, BLOCK), bytes8)
        right: bytes8 = convert(slice(b, i * BLOCK, BLOCK), bytes8)
        if self._distance(left, right) >= THRESHOLD:
            return False
    return True
