"""The node registry (Node, protocol.md section 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.chain.abi import NODE_ABI
from cluster.chain.contract import Contract
from cluster.chain.rpc import Rpc
from cluster.chain.task_contract import member
from cluster.core.types import Address, GigaBytes, GpuClass, ModelId, NodeStatus, Wei

Version = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """`gpu_class` is None when the account never joined."""

    status: NodeStatus
    gpu_class: GpuClass | None
    version: Version
    models: frozenset[ModelId]


class NodeContract(Contract):
    def __init__(self, rpc: Rpc, address: Address) -> None:
        super().__init__(rpc, address, NODE_ABI)

    async def info(self, account: Address, block: int) -> NodeInfo:
        found = await self.read("getNodeInfo", account, block=block)
        status, _gpu_id, (name, vram), _score, version, _key, _last, local = found
        return NodeInfo(
            status=member(NodeStatus, status),
            gpu_class=GpuClass(name, GigaBytes(vram)) if name else None,
            version=(version[0], version[1], version[2]),
            models=frozenset(ModelId(model) for model in local),
        )

    async def stake(self, account: Address, block: int) -> Wei:
        return Wei(await self.read("getStakedAmount", account, block=block))

    def join(
        self, gpu: GpuClass, version: Version, public_key: bytes, models: Sequence[ModelId]
    ) -> bytes:
        return self.encode("join", gpu.name, gpu.vram, version, public_key, list(models))

    def quit(self) -> bytes:
        return self.encode("quit")

    def pause(self) -> bytes:
        return self.encode("pause")

    def resume(self) -> bytes:
        return self.encode("resume")

    def update_version(self, version: Version) -> bytes:
        return self.encode("updateVersion", version)

    def report_model(self, model: ModelId) -> bytes:
        return self.encode("reportModelDownloaded", model)
