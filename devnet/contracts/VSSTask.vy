# pragma version 0.4.3
# pragma evm-version cancun
# pragma optimize codesize
# The task contract: fees in, the state machine of a task, payments and slashes out.
#
#   Queued ─ Started ─ ParametersUploaded ─┬─ ScoreReady ────┬─ Validated ────── EndSuccess
#                                          └─ ErrorReported ─┤  GroupValidated ─ EndGroupSuccess
#                                                            └─ EndGroupRefund, EndInvalidated
#   EndAborted: from any state that isn't final.

import fit
import sampling
import similarity

interface Registry:
    def startTask(node: address, modelIDs: DynArray[String[256], MAX_MODELS]): nonpayable
    def finishTask(node: address, points: uint256) -> bool: nonpayable
    def slash(node: address): nonpayable
    def getCard(node: address) -> fit.Card: view
    def pick(
        need: fit.Requirement, models: DynArray[bytes32, MAX_MODELS], seed: bytes32
    ) -> address: view
    def lacking(
        need: fit.Requirement, picked: address, model: bytes32, seed: bytes32
    ) -> DynArray[address, 11]: view

event TaskQueued:
    taskIDCommitment: bytes32

event TaskStarted:
    taskIDCommitment: bytes32
    selectedNode: address

event TaskParametersUploaded:
    taskIDCommitment: bytes32
    selectedNode: address

event TaskErrorReported:
    taskIDCommitment: bytes32
    selectedNode: address
    error: uint8

event TaskScoreReady:
    taskIDCommitment: bytes32
    selectedNode: address
    taskScore: Bytes[MAX_SCORE]

event TaskValidated:
    taskIDCommitment: bytes32

event TaskEndSuccess:
    taskIDCommitment: bytes32

event TaskEndInvalidated:
    taskIDCommitment: bytes32

event TaskEndGroupSuccess:
    taskIDCommitment: bytes32

event TaskEndGroupRefund:
    taskIDCommitment: bytes32

event TaskEndAborted:
    taskIDCommitment: bytes32
    abortIssuer: address
    lastStatus: uint8
    abortReason: uint8

event DownloadModel:
    nodeAddress: address
    modelID: String[256]
    taskType: uint8

struct TaskInfo:
    taskType: uint8
    creator: address
    taskIDCommitment: bytes32
    samplingSeed: bytes32
    nonce: bytes32
    sequence: uint256
    status: uint8
    selectedNode: address
    timeout: uint256
    score: Bytes[MAX_SCORE]
    taskFee: uint256
    taskSize: uint256
    modelIDs: DynArray[String[256], MAX_MODELS]
    minimumVRAM: uint256
    requiredGPU: String[128]
    requiredGPUVRAM: uint256
    taskVersion: uint256[3]
    abortReason: uint8
    error: uint8
    paymentAddresses: DynArray[address, 3]
    payments: DynArray[uint256, 3]
    createTimestamp: uint256
    startTimestamp: uint256
    scoreReadyTimestamp: uint256

MAX_MODELS: constant(uint256) = 16
MAX_SCORE: constant(uint256) = 1024
MAX_QUEUE: constant(uint256) = 64

LLM: constant(uint8) = 1
LAST_TYPE: constant(uint8) = 2

QUEUED: constant(uint8) = 0
STARTED: constant(uint8) = 1
PARAMETERS_UPLOADED: constant(uint8) = 2
ERROR_REPORTED: constant(uint8) = 3
SCORE_READY: constant(uint8) = 4
VALIDATED: constant(uint8) = 5
GROUP_VALIDATED: constant(uint8) = 6
END_INVALIDATED: constant(uint8) = 7
END_SUCCESS: constant(uint8) = 8
END_ABORTED: constant(uint8) = 9
END_GROUP_REFUND: constant(uint8) = 10
END_GROUP_SUCCESS: constant(uint8) = 11

PARAMETERS_VALIDATION_FAILED: constant(uint8) = 1

INCORRECT_RESULT: constant(uint8) = 3
FEE_TOO_LOW: constant(uint8) = 4
LAST_REASON: constant(uint8) = 4

POINTS: constant(uint256[3]) = [10, 9, 6]  # by order of submission

owner: public(address)
relay: public(address)
timeout: public(uint256)          # seconds, for tasks created from now on
samplingModulus: public(uint256)  # see setSamplingModulus
REGISTRY: immutable(Registry)

tasks: HashMap[bytes32, TaskInfo]
need: HashMap[bytes32, fit.Requirement]
modulus: HashMap[bytes32, uint256]
turn: HashMap[bytes32, uint256]             # order of submission among all tasks
points: HashMap[bytes32, uint256]           # QoS points earned, told to the registry at the end
agreeing: HashMap[bytes32, DynArray[bytes32, 3]]  # of a GroupValidated task: who shares its fee
node_task: HashMap[address, bytes32]
nonce_used: HashMap[bytes32, bool]
queue: DynArray[bytes32, MAX_QUEUE]
created: uint256
submitted: uint256


@deploy
def __init__(registry: address, relay: address, timeout: uint256):
    REGISTRY = Registry(registry)
    self.owner = msg.sender
    self.relay = relay
    self.timeout = timeout
    self.samplingModulus = 10


@external
def setTimeout(timeout: uint256):
    assert msg.sender == self.owner, "Invalid caller"
    self.timeout = timeout


@external
def setRelay(relay: address):
    assert msg.sender == self.owner, "Invalid caller"
    self.relay = relay


@external
def setSamplingModulus(modulus: uint256):
    # DEVNET ONLY. A task needs a group when its sampling number is divisible by the modulus in force
    # when it was created: 10 is the network's rule (last decimal digit 0), 1 makes a group of every
    # task, 0 of none. The seed is made here, so no one else can steer it.
    assert msg.sender == self.owner, "Invalid caller"
    self.samplingModulus = modulus


# --- for applications -----------------------------------------------------------------------------

@external
@payable
def createTask(
    taskType: uint8,
    taskIDCommitment: bytes32,
    nonce: bytes32,
    modelIDs: DynArray[String[256], MAX_MODELS],
    minimumVRAM: uint256,
    requiredGPU: String[128],
    requiredGPUVRAM: uint256,
    taskVersion: uint256[3],
    taskSize: uint256,
):
    c: bytes32 = taskIDCommitment
    assert taskType <= LAST_TYPE, "Invalid task type"
    assert msg.value > 0, "Task fee is zero"
    assert not self.nonce_used[nonce], "Nonce already used"
    assert c != empty(bytes32), "Invalid task"
    assert self.tasks[c].taskIDCommitment == empty(bytes32), "Task already exists"

    self.nonce_used[nonce] = True
    self.created += 1
    self.modulus[c] = self.samplingModulus
    self.need[c] = fit.Requirement(
        gpu_id=fit._gpu_id(requiredGPU, requiredGPUVRAM) if len(requiredGPU) > 0 else empty(bytes32),
        vram=minimumVRAM,
        version=fit._pack(taskVersion),
    )
    self.tasks[c].taskType = taskType
    self.tasks[c].creator = msg.sender
    self.tasks[c].taskIDCommitment = c
    self.tasks[c].samplingSeed = self._random(c)
    self.tasks[c].nonce = nonce
    self.tasks[c].sequence = self.created
    self.tasks[c].timeout = self.timeout
    self.tasks[c].taskFee = msg.value
    self.tasks[c].taskSize = taskSize
    self.tasks[c].modelIDs = modelIDs
    self.tasks[c].minimumVRAM = minimumVRAM
    self.tasks[c].requiredGPU = requiredGPU
    self.tasks[c].requiredGPUVRAM = requiredGPUVRAM
    self.tasks[c].taskVersion = taskVersion
    self.tasks[c].createTimestamp = block.timestamp

    hashes: DynArray[bytes32, MAX_MODELS] = []
    for model: String[256] in modelIDs:
        hashes.append(keccak256(model))
    node: address = staticcall REGISTRY.pick(self.need[c], hashes, self._random(c))
    if node == empty(address):
        self._enqueue(c)
    else:
        self._start(c, node)


@external
def validateSingleTask(taskIDCommitment: bytes32, vrfProof: Bytes[256], publicKey: Bytes[256]):
    c: bytes32 = taskIDCommitment
    self._check_creator(c)
    status: uint8 = self.tasks[c].status
    assert status == SCORE_READY or status == ERROR_REPORTED, "Illegal previous task state"
    assert not self._sampled(c, vrfProof, publicKey), "Task is selected for a group"
    self.points[c] = POINTS[0]
    if status == ERROR_REPORTED:
        self._abort(c, INCORRECT_RESULT)
    else:
        self.tasks[c].status = VALIDATED
        log TaskValidated(taskIDCommitment=c)


@external
def validateTaskGroup(
    taskIDCommitment1: bytes32,
    taskIDCommitment2: bytes32,
    taskIDCommitment3: bytes32,
    taskGUID: bytes32,
    vrfProof: Bytes[256],
    publicKey: Bytes[256],
):
    first: bytes32 = taskIDCommitment1
    given: bytes32[3] = [first, taskIDCommitment2, taskIDCommitment3]
    members: DynArray[bytes32, 3] = []  # those that answered; aborted ones take no part
    for c: bytes32 in given:
        self._check_creator(c)
        status: uint8 = self.tasks[c].status
        assert status in [SCORE_READY, ERROR_REPORTED, END_ABORTED], "Illegal previous task state"
        assert keccak256(concat(taskGUID, self.tasks[c].nonce)) == c, "Invalid task GUID"
        assert self.tasks[c].taskType == self.tasks[first].taskType, "Different task types"
        if status != END_ABORTED:
            members.append(c)
    assert given[1] != given[2], "Invalid task sequence"
    for c: bytes32 in [given[1], given[2]]:
        assert self.tasks[first].sequence < self.tasks[c].sequence, "Invalid task sequence"
    assert self._sampled(first, vrfProof, publicKey), "Task is not selected for a group"

    self._rank(members)
    self._judge(members)


# --- for nodes ------------------------------------------------------------------------------------

@external
def reportTaskError(taskIDCommitment: bytes32, error: uint8):
    c: bytes32 = taskIDCommitment
    self._check_answerable(c)
    assert error == PARAMETERS_VALIDATION_FAILED, "Invalid task error"
    self.tasks[c].error = error
    self._answered(c, ERROR_REPORTED)
    log TaskErrorReported(taskIDCommitment=c, selectedNode=msg.sender, error=error)


@external
def submitTaskScore(taskIDCommitment: bytes32, taskScore: Bytes[MAX_SCORE]):
    c: bytes32 = taskIDCommitment
    self._check_answerable(c)
    assert len(taskScore) > 0, "Invalid task score"
    assert self.tasks[c].taskType == LLM or len(taskScore) % 8 == 0, "Invalid task score"
    self.tasks[c].score = taskScore
    self._answered(c, SCORE_READY)
    log TaskScoreReady(taskIDCommitment=c, selectedNode=msg.sender, taskScore=taskScore)


# --- for both -------------------------------------------------------------------------------------

@external
def abortTask(taskIDCommitment: bytes32, abortReason: uint8):
    # Validated and GroupValidated may be aborted too: a relay that died holds no node for ever.
    c: bytes32 = taskIDCommitment
    self._check_known(c)
    node: address = self.tasks[c].selectedNode
    assert msg.sender == self.tasks[c].creator or msg.sender == node, "Invalid caller"
    assert self.tasks[c].status < END_INVALIDATED, "Illegal previous task state"
    assert abortReason <= LAST_REASON, "Invalid abort reason"
    since: uint256 = self.tasks[c].startTimestamp
    if self.tasks[c].status == QUEUED:
        since = self.tasks[c].createTimestamp
    assert block.timestamp >= since + self.tasks[c].timeout, "Timeout not reached"
    self._abort(c, abortReason)


@external
@view
def getTask(taskIDCommitment: bytes32) -> TaskInfo:
    return self.tasks[taskIDCommitment]


@external
@view
def getNodeTask(nodeAddress: address) -> bytes32:
    return self.node_task[nodeAddress]


@external
@view
def getSamplingModulus(taskIDCommitment: bytes32) -> uint256:
    return self.modulus[taskIDCommitment]


@external
@view
def getQueue() -> DynArray[bytes32, MAX_QUEUE]:
    return self.queue


# --- for the relay --------------------------------------------------------------------------------

@external
def reportTaskParametersUploaded(taskIDCommitment: bytes32):
    c: bytes32 = taskIDCommitment
    self._check_relay(c)
    assert self.tasks[c].status == STARTED, "Illegal previous task state"
    self.tasks[c].status = PARAMETERS_UPLOADED
    log TaskParametersUploaded(taskIDCommitment=c, selectedNode=self.tasks[c].selectedNode)


@external
def reportTaskResultUploaded(taskIDCommitment: bytes32):
    c: bytes32 = taskIDCommitment
    self._check_relay(c)
    status: uint8 = self.tasks[c].status
    assert status == VALIDATED or status == GROUP_VALIDATED, "Illegal previous task state"
    if status == VALIDATED:
        self.tasks[c].status = END_SUCCESS
        log TaskEndSuccess(taskIDCommitment=c)
        self._pay(c, [c])
    else:
        self.tasks[c].status = END_GROUP_SUCCESS
        log TaskEndGroupSuccess(taskIDCommitment=c)
        self._pay(c, self.agreeing[c])
    self._release(c)


# --- for the registry -----------------------------------------------------------------------------

@external
def nodeAvailable(node: address):
    assert msg.sender == REGISTRY.address, "Invalid caller"
    self._serve(node)


# --- checks ---------------------------------------------------------------------------------------

@internal
@view
def _check_known(c: bytes32):
    assert c != empty(bytes32), "Task not found"
    assert self.tasks[c].taskIDCommitment == c, "Task not found"


@internal
@view
def _check_creator(c: bytes32):
    self._check_known(c)
    assert msg.sender == self.tasks[c].creator, "Invalid caller"


@internal
@view
def _check_relay(c: bytes32):
    self._check_known(c)
    assert msg.sender == self.relay, "Invalid caller"


@internal
@view
def _check_answerable(c: bytes32):
    self._check_known(c)
    assert msg.sender == self.tasks[c].selectedNode, "Invalid caller"
    assert self.node_task[msg.sender] == c, "Wrong task"
    assert self.tasks[c].status == PARAMETERS_UPLOADED, "Illegal previous task state"


@internal
@view
def _sampled(c: bytes32, proof: Bytes[256], public_key: Bytes[256]) -> bool:
    number: uint256 = sampling._number(
        self.tasks[c].samplingSeed, proof, public_key, self.tasks[c].creator
    )
    return self.modulus[c] != 0 and number % self.modulus[c] == 0


@internal
@view
def _random(c: bytes32) -> bytes32:
    return keccak256(concat(block.prevhash, convert(self.created, bytes32), c))


# --- the queue ------------------------------------------------------------------------------------

@internal
def _enqueue(c: bytes32):
    # Into a full queue a task comes only by paying more than the cheapest one, which is then aborted.
    if len(self.queue) == MAX_QUEUE:
        cheapest: bytes32 = c
        for queued: bytes32 in self.queue:
            if self.tasks[queued].taskFee < self.tasks[cheapest].taskFee:
                cheapest = queued
        if cheapest == c:
            self._abort(c, FEE_TOO_LOW)
            return
        self._abort(cheapest, FEE_TOO_LOW)
    self.queue.append(c)
    log TaskQueued(taskIDCommitment=c)


@internal
def _dequeue(c: bytes32):
    for i: uint256 in range(len(self.queue), bound=MAX_QUEUE):
        if self.queue[i] == c:
            self.queue[i] = self.queue[len(self.queue) - 1]
            self.queue.pop()
            return


@internal
def _serve(node: address):
    # The best-paying task that fits; of equals the oldest.
    card: fit.Card = staticcall REGISTRY.getCard(node)
    best: bytes32 = empty(bytes32)
    best_fee: uint256 = 0
    for c: bytes32 in self.queue:
        fee: uint256 = self.tasks[c].taskFee
        if fee < best_fee or not fit._fits(self.need[c], card):
            continue
        if fee > best_fee or self.tasks[c].sequence < self.tasks[best].sequence:
            best = c
            best_fee = fee
    if best != empty(bytes32):
        self._dequeue(best)
        self._start(best, node)


# --- moves ----------------------------------------------------------------------------------------

@internal
def _start(c: bytes32, node: address):
    self.tasks[c].status = STARTED
    self.tasks[c].selectedNode = node
    self.tasks[c].startTimestamp = block.timestamp
    self.node_task[node] = c
    models: DynArray[String[256], MAX_MODELS] = self.tasks[c].modelIDs
    extcall REGISTRY.startTask(node, models)
    log TaskStarted(taskIDCommitment=c, selectedNode=node)
    for model: String[256] in models:
        lacking: DynArray[address, 11] = staticcall REGISTRY.lacking(
            self.need[c], node, keccak256(model), self._random(c)
        )
        for other: address in lacking:
            log DownloadModel(nodeAddress=other, modelID=model, taskType=self.tasks[c].taskType)


@internal
def _answered(c: bytes32, status: uint8):
    self.submitted += 1
    self.turn[c] = self.submitted
    self.tasks[c].status = status
    self.tasks[c].scoreReadyTimestamp = block.timestamp


@internal
def _abort(c: bytes32, reason: uint8):
    # Points that a validation gave stay: it is the answer that earns them, not the upload.
    last: uint8 = self.tasks[c].status
    self.tasks[c].status = END_ABORTED
    self.tasks[c].abortReason = reason
    log TaskEndAborted(
        taskIDCommitment=c, abortIssuer=msg.sender, lastStatus=last, abortReason=reason
    )
    send(self.tasks[c].creator, self.tasks[c].taskFee)
    if last == QUEUED:
        self._dequeue(c)
    else:
        self._release(c)


@internal
def _release(c: bytes32):
    node: address = self.tasks[c].selectedNode
    self.node_task[node] = empty(bytes32)
    if extcall REGISTRY.finishTask(node, self.points[c]):
        self._serve(node)


@internal
def _pay(c: bytes32, earners: DynArray[bytes32, 3]):
    # By QoS points; what division leaves over goes to the last.
    total: uint256 = 0
    for earner: bytes32 in earners:
        total += self.points[earner]
    left: uint256 = self.tasks[c].taskFee
    for i: uint256 in range(len(earners), bound=3):
        share: uint256 = self.tasks[c].taskFee * self.points[earners[i]] // total
        if i == len(earners) - 1:
            share = left
        left -= share
        node: address = self.tasks[earners[i]].selectedNode
        self.tasks[c].paymentAddresses.append(node)
        self.tasks[c].payments.append(share)
        send(node, share)


# --- groups ---------------------------------------------------------------------------------------

@internal
def _rank(members: DynArray[bytes32, 3]):
    for c: bytes32 in members:
        before: uint256 = 0
        for other: bytes32 in members:
            if self.turn[other] < self.turn[c]:
                before += 1
        self.points[c] = POINTS[before]


@internal
@view
def _agree(a: bytes32, b: bytes32) -> bool:
    if self.tasks[a].status != self.tasks[b].status:
        return False
    if self.tasks[a].status == ERROR_REPORTED:
        return True
    if self.tasks[a].taskType == LLM:
        return keccak256(self.tasks[a].score) == keccak256(self.tasks[b].score)
    return similarity._similar(self.tasks[a].score, self.tasks[b].score)


@internal
def _judge(members: DynArray[bytes32, 3]):
    # The first pair that agrees decides, and a third that doesn't agree with the pair's first is
    # slashed, even where it agrees with the second: similarity isn't transitive.
    verdicts: uint8[3] = [END_ABORTED, END_ABORTED, END_ABORTED]
    count: uint256 = len(members)
    for pair: uint256[2] in [[0, 1], [0, 2], [1, 2]]:
        a: uint256 = pair[0]
        b: uint256 = pair[1]
        if b >= count or not self._agree(members[a], members[b]):
            continue
        scored: bool = self.tasks[members[a]].status == SCORE_READY
        third: uint256 = 3 - a - b
        if scored:
            verdicts[a] = GROUP_VALIDATED
            verdicts[b] = END_GROUP_REFUND
        if count == 3:
            if not self._agree(members[a], members[third]):
                verdicts[third] = END_INVALIDATED
            elif scored:
                verdicts[third] = END_GROUP_REFUND
        break
    self._carry_out(members, verdicts)


@internal
def _carry_out(members: DynArray[bytes32, 3], verdicts: uint8[3]):
    paying: bytes32 = empty(bytes32)
    earners: DynArray[bytes32, 3] = []
    for i: uint256 in range(len(members), bound=3):
        c: bytes32 = members[i]
        if verdicts[i] == END_ABORTED:
            self._abort(c, INCORRECT_RESULT)
            continue
        self.tasks[c].status = verdicts[i]
        if verdicts[i] == END_INVALIDATED:
            node: address = self.tasks[c].selectedNode
            self.node_task[node] = empty(bytes32)
            log TaskEndInvalidated(taskIDCommitment=c)
            send(self.tasks[c].creator, self.tasks[c].taskFee)
            extcall REGISTRY.slash(node)
            continue
        earners.append(c)
        if verdicts[i] == GROUP_VALIDATED:
            paying = c
            log TaskValidated(taskIDCommitment=c)
        else:
            log TaskEndGroupRefund(taskIDCommitment=c)
            send(self.tasks[c].creator, self.tasks[c].taskFee)
            self._release(c)
    if paying != empty(bytes32):
        self.agreeing[paying] = earners
