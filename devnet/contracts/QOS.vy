# pragma version 0.4.3
# pragma evm-version cancun
# pragma optimize codesize
# Quality of service: points per ended task, the average (a node's weight) and the last three.

POOL: constant(uint256) = 3
FULL_MARK: constant(uint256) = 10
KICK_OUT_AT: constant(uint256) = 10

owner: public(address)
registry: public(address)

total: HashMap[address, uint256]
count: HashMap[address, uint256]
recent: HashMap[address, uint256[POOL]]  # newest first
recent_count: HashMap[address, uint256]


@deploy
def __init__():
    self.owner = msg.sender


@external
def setRegistry(registry: address):
    assert msg.sender == self.owner, "Invalid caller"
    self.registry = registry


@external
def record(node: address, points: uint256):
    assert msg.sender == self.registry, "Invalid caller"
    last: uint256[POOL] = self.recent[node]
    self.recent[node] = [points, last[0], last[1]]
    self.recent_count[node] = min(self.recent_count[node] + 1, POOL)
    self.total[node] += points
    self.count[node] += 1


@external
def forget(node: address):
    # A node that was thrown out begins its last three anew; its average stays.
    assert msg.sender == self.registry, "Invalid caller"
    self.recent[node] = empty(uint256[POOL])
    self.recent_count[node] = 0


@external
@view
def getTaskScore(nodeAddress: address) -> uint256:
    if self.count[nodeAddress] == 0:
        return FULL_MARK
    return self.total[nodeAddress] // self.count[nodeAddress]


@external
@view
def getRecentTaskScore(nodeAddress: address) -> uint256:
    return self._recent(nodeAddress)


@external
@view
def shouldKickOut(nodeAddress: address) -> bool:
    return self.recent_count[nodeAddress] == POOL and self._recent(nodeAddress) <= KICK_OUT_AT


@internal
@view
def _recent(node: address) -> uint256:
    last: uint256[POOL] = self.recent[node]
    return last[0] + last[1] + last[2]
