# pragma version 0.4.3
# Which card may run which task: shared by the registry (a task looks for a node) and the task
# contract (a node looks for a queued task).

struct Requirement:
    gpu_id: bytes32   # of the required card, or empty: any with enough VRAM
    vram: uint256     # GB, used when gpu_id is empty
    version: uint256  # packed

struct Card:
    gpu_id: bytes32
    vram: uint256
    version: uint256


@internal
@pure
def _gpu_id(name: String[128], vram: uint256) -> bytes32:
    return keccak256(concat(convert(name, Bytes[128]), convert(vram, bytes32)))


@internal
@pure
def _pack(version: uint256[3]) -> uint256:
    for part: uint256 in version:
        assert part < 2**64, "Invalid version"
    return (version[0] << 128) | (version[1] << 64) | version[2]


@internal
@pure
def _unpack(version: uint256) -> uint256[3]:
    return [version >> 128, (version >> 64) % 2**64, version % 2**64]


@internal
@pure
def _fits(need: Requirement, card: Card) -> bool:
    if need.version >> 128 != card.version >> 128 or need.version > card.version:
        return False
    if need.gpu_id != empty(bytes32):
        return need.gpu_id == card.gpu_id
    return card.vram >= need.vram
