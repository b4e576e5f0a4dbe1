# pragma version 0.4.3
# pragma evm-version cancun
# pragma optimize codesize
# The registry: who has joined with which card and stake, and whom a task goes to.

import fit

interface Tasks:
    def nodeAvailable(node: address): nonpayable

interface Quality:
    def record(node: address, points: uint256): nonpayable
    def forget(node: address): nonpayable
    def getTaskScore(node: address) -> uint256: view
    def shouldKickOut(node: address) -> bool: view

event NodeSlashed:
    nodeAddress: address

event NodeKickedOut:
    nodeAddress: address

struct GPU:
    name: String[128]
    vram: uint256

struct NodeInfo:
    status: uint8
    gpuID: bytes32
    gpu: GPU
    score: uint256
    version: uint256[3]
    publicKey: Bytes[64]
    lastModelIDs: DynArray[String[256], MAX_TASK_MODELS]
    localModelIDs: DynArray[String[256], MAX_LOCAL_MODELS]

QUIT: constant(uint8) = 0
AVAILABLE: constant(uint8) = 1
BUSY: constant(uint8) = 2
PENDING_PAUSE: constant(uint8) = 3
PENDING_QUIT: constant(uint8) = 4
PAUSED: constant(uint8) = 5

REQUIRED_STAKE: constant(uint256) = 400 * 10**18
MAX_NODES: constant(uint256) = 256
MAX_TASK_MODELS: constant(uint256) = 16
MAX_LOCAL_MODELS: constant(uint256) = 64
MAX_OTHERS: constant(uint256) = 10  # nodes told to download a model besides the picked one

owner: public(address)
tasks: public(address)
QUALITY: immutable(Quality)

joined: DynArray[address, MAX_NODES]
position: HashMap[address, uint256]  # in `joined`
status: HashMap[address, uint8]
card: HashMap[address, fit.Card]
gpu_name: HashMap[address, String[128]]
score: HashMap[address, uint256]  # the average QoS, as of the last ended task
public_key: HashMap[address, Bytes[64]]
stake: HashMap[address, uint256]
last_models: HashMap[address, DynArray[String[256], MAX_TASK_MODELS]]
local_models: HashMap[address, DynArray[String[256], MAX_LOCAL_MODELS]]
# A node that leaves and comes back holds only what it then reports: `stay` counts its joins.
stay: HashMap[address, uint256]
holding: HashMap[address, HashMap[uint256, HashMap[bytes32, bool]]]


@deploy
def __init__(quality: address):
    self.owner = msg.sender
    QUALITY = Quality(quality)


@external
def setTasks(tasks: address):
    assert msg.sender == self.owner, "Invalid caller"
    self.tasks = tasks


# --- for nodes ------------------------------------------------------------------------------------

@external
@payable
def join(
    gpuName: String[128],
    gpuVram: uint256,
    version: uint256[3],
    publicKey: Bytes[128],
    modelIDs: DynArray[String[256], MAX_LOCAL_MODELS],
):
    node: address = msg.sender
    assert len(self.joined) < MAX_NODES, "Network is full"
    assert self.status[node] == QUIT, "Node already joined"
    assert len(publicKey) == 64, "Public key mismatch"
    hashed: uint256 = convert(keccak256(publicKey), uint256) % 2**160
    assert convert(convert(hashed, uint160), address) == node, "Public key mismatch"
    assert msg.value >= REQUIRED_STAKE, "Staked amount is not enough"

    self.position[node] = len(self.joined)
    self.joined.append(node)
    self.stay[node] += 1
    self.card[node] = fit.Card(
        gpu_id=fit._gpu_id(gpuName, gpuVram), vram=gpuVram, version=fit._pack(version)
    )
    self.gpu_name[node] = gpuName
    self.public_key[node] = slice(publicKey, 0, 64)
    self.stake[node] = msg.value
    self.score[node] = staticcall QUALITY.getTaskScore(node)
    for model: String[256] in modelIDs:
        self._hold(node, model)
    self._become_available(node)


@external
def quit():
    status: uint8 = self.status[msg.sender]
    if status == BUSY:
        self.status[msg.sender] = PENDING_QUIT
        return
    assert status == AVAILABLE or status == PAUSED, "Illegal node status"
    self._leave(msg.sender, msg.sender)


@external
def pause():
    status: uint8 = self.status[msg.sender]
    if status == BUSY:
        self.status[msg.sender] = PENDING_PAUSE
        return
    assert status == AVAILABLE, "Illegal node status"
    self.status[msg.sender] = PAUSED


@external
def resume():
    assert self.status[msg.sender] == PAUSED, "Illegal node status"
    self._become_available(msg.sender)


@external
def updateVersion(version: uint256[3]):
    assert self.status[msg.sender] != QUIT, "Node has quitted"
    self.card[msg.sender].version = fit._pack(version)


@external
def reportModelDownloaded(modelID: String[256]):
    assert self.status[msg.sender] != QUIT, "Node has quitted"
    self._hold(msg.sender, modelID)


# --- for the task contract ------------------------------------------------------------------------

@external
def startTask(node: address, modelIDs: DynArray[String[256], MAX_TASK_MODELS]):
    assert msg.sender == self.tasks, "Invalid caller"
    assert self.status[node] == AVAILABLE, "Illegal node status"
    self.status[node] = BUSY
    self.last_models[node] = modelIDs


@external
def finishTask(node: address, points: uint256) -> bool:
    # True when the node is available again: the caller then looks into its queue.
    assert msg.sender == self.tasks, "Invalid caller"
    status: uint8 = self.status[node]
    assert status in [BUSY, PENDING_PAUSE, PENDING_QUIT], "Illegal node status"
    extcall QUALITY.record(node, points)
    if staticcall QUALITY.shouldKickOut(node):
        extcall QUALITY.forget(node)
        self._leave(node, node)
        log NodeKickedOut(nodeAddress=node)
        return False
    self.score[node] = staticcall QUALITY.getTaskScore(node)
    if status == PENDING_QUIT:
        self._leave(node, node)
        return False
    self.status[node] = PAUSED if status == PENDING_PAUSE else AVAILABLE
    return status == BUSY


@external
def slash(node: address):
    assert msg.sender == self.tasks, "Invalid caller"
    extcall QUALITY.record(node, 0)
    extcall QUALITY.forget(node)
    self._leave(node, self.owner)
    log NodeSlashed(nodeAddress=node)


@external
@view
def getCard(node: address) -> fit.Card:
    return self.card[node]


@external
@view
def pick(
    need: fit.Requirement, models: DynArray[bytes32, MAX_TASK_MODELS], seed: bytes32
) -> address:
    # Weighted by QoS, in one pass: each node replaces the choice with its share of the weight so far.
    anyone: address = empty(address)
    holder: address = empty(address)
    all_weight: uint256 = 0
    holders_weight: uint256 = 0
    for node: address in self.joined:
        if self.status[node] != AVAILABLE or not fit._fits(need, self.card[node]):
            continue
        draw: uint256 = convert(keccak256(concat(seed, convert(node, bytes32))), uint256)
        weight: uint256 = max(self.score[node], 1)
        all_weight += weight
        if draw % all_weight < weight:
            anyone = node
        if self._holds_all(node, models):
            holders_weight += weight
            if draw % holders_weight < weight:
                holder = node
    return anyone if holder == empty(address) else holder


@external
@view
def lacking(
    need: fit.Requirement, picked: address, model: bytes32, seed: bytes32
) -> DynArray[address, MAX_OTHERS + 1]:
    # Who should download the model: the picked node, and others that could serve the same need.
    found: DynArray[address, MAX_OTHERS + 1] = []
    if not self._holds(picked, model):
        found.append(picked)
    wanted: uint256 = len(found) + MAX_OTHERS
    size: uint256 = len(self.joined)
    first: uint256 = convert(seed, uint256) % size
    for i: uint256 in range(size, bound=MAX_NODES):
        node: address = self.joined[(first + i) % size]
        if node == picked or self._holds(node, model) or not fit._fits(need, self.card[node]):
            continue
        found.append(node)
        if len(found) == wanted:
            break
    return found


# --- views ----------------------------------------------------------------------------------------

@external
@view
def getNodeStatus(nodeAddress: address) -> uint8:
    return self.status[nodeAddress]


@external
@view
def getStakedAmount(nodeAddress: address) -> uint256:
    return self.stake[nodeAddress]


@external
@view
def getNodeInfo(nodeAddress: address) -> NodeInfo:
    return NodeInfo(
        status=self.status[nodeAddress],
        gpuID=self.card[nodeAddress].gpu_id,
        gpu=GPU(name=self.gpu_name[nodeAddress], vram=self.card[nodeAddress].vram),
        score=self.score[nodeAddress],
        version=fit._unpack(self.card[nodeAddress].version),
        publicKey=self.public_key[nodeAddress],
        lastModelIDs=self.last_models[nodeAddress],
        localModelIDs=self.local_models[nodeAddress],
    )


@external
@view
def getAvailableNodes() -> DynArray[address, MAX_NODES]:
    found: DynArray[address, MAX_NODES] = []
    for node: address in self.joined:
        if self.status[node] == AVAILABLE:
            found.append(node)
    return found


@external
@view
def nodeContainsModelID(nodeAddress: address, modelID: String[256]) -> bool:
    assert self.status[nodeAddress] != QUIT, "Node has quitted"
    return self._holds(nodeAddress, keccak256(modelID))


# --- inside ---------------------------------------------------------------------------------------

@internal
def _become_available(node: address):
    self.status[node] = AVAILABLE
    extcall Tasks(self.tasks).nodeAvailable(node)


@internal
def _leave(node: address, stake_to: address):
    last: address = self.joined[len(self.joined) - 1]
    self.joined[self.position[node]] = last
    self.position[last] = self.position[node]
    self.joined.pop()
    stake: uint256 = self.stake[node]
    self.status[node] = QUIT
    self.stake[node] = 0
    self.score[node] = 0
    self.card[node] = empty(fit.Card)
    self.gpu_name[node] = ""
    self.public_key[node] = b""
    self.last_models[node] = []
    self.local_models[node] = []
    send(stake_to, stake)


@internal
def _hold(node: address, model: String[256]):
    if self._holds(node, keccak256(model)):
        return
    assert len(self.local_models[node]) < MAX_LOCAL_MODELS, "Too many models"
    self.holding[node][self.stay[node]][keccak256(model)] = True
    self.local_models[node].append(model)


@internal
@view
def _holds(node: address, model: bytes32) -> bool:
    return self.holding[node][self.stay[node]][model]


@internal
@view
def _holds_all(node: address, models: DynArray[bytes32, MAX_TASK_MODELS]) -> bool:
    for model: bytes32 in models:
        if not self._holds(node, model):
            return False
    return True
