"""The contracts' interfaces as this operator knows them (protocol.md section 2).

Written as signatures, parsed once into the JSON form that web3 takes. No event parameter is
indexed: a log is found by contract and topic 0, and told apart by its decoded data.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from eth_typing import ABI

_TASK = """
struct TaskInfo { uint8 taskType; address creator; bytes32 taskIDCommitment; bytes32 samplingSeed;
  bytes32 nonce; uint256 sequence; uint8 status; address selectedNode; uint256 timeout;
  bytes score; uint256 taskFee; uint256 taskSize; string[] modelIDs; uint256 minimumVRAM;
  string requiredGPU; uint256 requiredGPUVRAM; uint256[3] taskVersion; uint8 abortReason;
  uint8 error; address[] paymentAddresses; uint256[] payments; uint256 createTimestamp;
  uint256 startTimestamp; uint256 scoreReadyTimestamp; }
event TaskQueued(bytes32 taskIDCommitment);
event TaskStarted(bytes32 taskIDCommitment, address selectedNode);
event TaskParametersUploaded(bytes32 taskIDCommitment, address selectedNode);
event TaskErrorReported(bytes32 taskIDCommitment, address selectedNode, uint8 error);
event TaskScoreReady(bytes32 taskIDCommitment, address selectedNode, bytes taskScore);
event TaskValidated(bytes32 taskIDCommitment);
event TaskEndSuccess(bytes32 taskIDCommitment);
event TaskEndInvalidated(bytes32 taskIDCommitment);
event TaskEndGroupSuccess(bytes32 taskIDCommitment);
event TaskEndGroupRefund(bytes32 taskIDCommitment);
event TaskEndAborted(bytes32 taskIDCommitment, address abortIssuer, uint8 lastStatus,
  uint8 abortReason);
event DownloadModel(address nodeAddress, string modelID, uint8 taskType);
function createTask(uint8 taskType, bytes32 taskIDCommitment, bytes32 nonce, string[] modelIDs,
  uint256 minimumVRAM, string requiredGPU, uint256 requiredGPUVRAM, uint256[3] taskVersion,
  uint256 taskSize) payable;
function validateSingleTask(bytes32 taskIDCommitment, bytes vrfProof, bytes publicKey);
function validateTaskGroup(bytes32 taskIDCommitment1, bytes32 taskIDCommitment2,
  bytes32 taskIDCommitment3, bytes32 taskGUID, bytes vrfProof, bytes publicKey);
function reportTaskError(bytes32 taskIDCommitment, uint8 error);
function submitTaskScore(bytes32 taskIDCommitment, bytes taskScore);
function abortTask(bytes32 taskIDCommitment, uint8 abortReason);
function reportTaskParametersUploaded(bytes32 taskIDCommitment);
function reportTaskResultUploaded(bytes32 taskIDCommitment);
function getNodeTask(address nodeAddress) view returns (bytes32);
function getTask(bytes32 taskIDCommitment) view returns (TaskInfo);
"""

_NODE = """
struct GpuInfo { string name; uint256 vram; }
struct NodeInfo { uint8 status; bytes32 gpuID; GpuInfo gpu; uint256 score; uint256[3] version;
  bytes publicKey; string[] lastModelIDs; string[] localModelIDs; }
event NodeSlashed(address nodeAddress);
event NodeKickedOut(address nodeAddress);
function join(string gpuName, uint256 gpuVram, uint256[3] version, bytes publicKey,
  string[] modelIDs) payable;
function quit();
function pause();
function resume();
function updateVersion(uint256[3] version);
function reportModelDownloaded(string modelID);
function nodeContainsModelID(address nodeAddress, string modelID) view returns (bool);
function getNodeStatus(address nodeAddress) view returns (uint8);
function getStakedAmount(address nodeAddress) view returns (uint256);
function getNodeInfo(address nodeAddress) view returns (NodeInfo);
function getAvailableNodes() view returns (address[]);
"""

_QOS = """
function getTaskScore(address nodeAddress) view returns (uint256);
function getRecentTaskScore(address nodeAddress) view returns (uint256);
function shouldKickOut(address nodeAddress) view returns (bool);
"""

_STRUCT = re.compile(r"struct (?P<name>\w+) \{(?P<fields>[^}]*)\}")
_ELEMENT = re.compile(
    r"(?P<kind>event|function) (?P<name>\w+)\((?P<inputs>[^)]*)\)"
    r"(?: (?P<mutability>view|payable))?(?: returns \((?P<outputs>[^)]*)\))?;"
)
_SUFFIX = re.compile(r"\[\d*\]")

Component = dict[str, Any]
Structs = dict[str, list[Component]]


def _component(text: str, structs: Structs) -> Component:
    declared, _, name = text.strip().partition(" ")
    base = _SUFFIX.sub("", declared)
    if base not in structs:
        return {"name": name, "type": declared}
    return {"name": name, "type": "tuple" + declared[len(base) :], "components": structs[base]}


def _components(texts: Iterable[str], structs: Structs) -> list[Component]:
    return [_component(text, structs) for text in texts if text.strip()]


def _elements(text: str, structs: Structs) -> Iterator[Component]:
    for match in _ELEMENT.finditer(text):
        element: Component = {
            "type": match["kind"],
            "name": match["name"],
            "inputs": _components(match["inputs"].split(","), structs),
        }
        if match["kind"] == "event":
            element["anonymous"] = False
            element["inputs"] = [{**each, "indexed": False} for each in element["inputs"]]
        else:
            element["stateMutability"] = match["mutability"] or "nonpayable"
            element["outputs"] = _components((match["outputs"] or "").split(","), structs)
        yield element


def parse(source: str) -> ABI:
    """The JSON ABI of signatures: `struct`s first, each element ended by a semicolon."""
    text = " ".join(source.split())
    structs: Structs = {}
    for match in _STRUCT.finditer(text):
        structs[match["name"]] = _components(match["fields"].split(";"), structs)
    elements: Any = list(_elements(_STRUCT.sub("", text), structs))
    abi: ABI = elements
    return abi


TASK_ABI = parse(_TASK)
NODE_ABI = parse(_NODE)
QOS_ABI = parse(_QOS)
