"""The devnet's application: creates tasks, uploads parameters, validates, aborts, fetches results.

It drives many tasks at once, each by polling the chain: what is done next depends only on the
task's present state there.

    create ─ Started: upload ─ ScoreReady, ErrorReported: validate ─ EndSuccess: fetch, check
       └── any state past the timeout that nothing else ends: abort

A task whose sampling number asks for it gets two more beside it with the same parameters, each
encrypted for its own node, and the three are validated together.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from eth_account.signers.local import LocalAccount
from eth_typing import BlockNumber
from eth_utils.crypto import keccak
from web3.exceptions import ContractLogicError, Web3Exception
from web3.types import FilterParams

from cluster.core.errors import ChainError, RelayError
from cluster.core.types import (
    ENDED,
    AbortReason,
    Commitment,
    TaskError,
    TaskStatus,
    TaskType,
)
from cluster.inference.scoring import score_images, score_llm
from cluster.relay.envelope import seal
from devnet.chain_client import ChainClient
from devnet.deploy import Deployment, sampling_proof
from devnet.relay_client import RelayClient, ResultRefused
from devnet.tasks import ChainTask, TaskSpec, from_chain

POLL_SECONDS = 0.5
UPLOADED_SECONDS = 2.0
QUEUED_SECONDS = 10.0
"""Between two looks at a task of which nothing was heard, at the nodes' turn or nobody's."""
GRACE_SECONDS = 60
"""How long past the timeout validating is still tried, and the upload of what was validated waited
for, before the task is aborted."""
ABORT_GAS = 3_000_000
_ANSWERED = frozenset({TaskStatus.SCORE_READY, TaskStatus.ERROR_REPORTED})
_VALIDATED = frozenset({TaskStatus.VALIDATED, TaskStatus.GROUP_VALIDATED})
_GROUP_SIZE = 3
_PAID = frozenset({TaskStatus.END_SUCCESS, TaskStatus.END_GROUP_SUCCESS})
_TRANSIENT = (Web3Exception, httpx.HTTPError, OSError, ChainError, RelayError)
_EXTENSIONS = {TaskType.SD: ".png", TaskType.LLM: ".json", TaskType.SD_FT: ".png"}


@dataclass(frozen=True, slots=True)
class TaskChange:
    """A task was seen in a state that it wasn't in before."""

    name: str
    commitment: Commitment
    status: TaskStatus
    node: str
    at: float


@dataclass(frozen=True, slots=True)
class TaskReport:
    """How a task ended. `fee` in wei; `seconds_to_score` is from start to score, by the chain.

    `files` are where the results were saved; `problem` says what went wrong on our side of it.
    """

    commitment: Commitment
    name: str
    type: TaskType
    expected_end: frozenset[str]
    actual_end: str
    node: str
    fee: int
    seconds_to_score: int | None
    files: tuple[str, ...]
    problem: str = ""
    reported: bool = False
    expected_report: bool = False

    @property
    def as_expected(self) -> bool:
        """Also that the node reported an error if, and only if, it should have."""
        right = self.actual_end in self.expected_end and self.reported is self.expected_report
        return right and not self.problem

    @property
    def verdict(self) -> str:
        if self.actual_end not in self.expected_end:
            return f"NOT {sorted(self.expected_end)}"
        if self.reported is not self.expected_report:
            return f"an error was {'' if self.reported else 'not '}reported, which was NOT expected"
        return "NOT as expected" if self.problem else "as expected"


@dataclass(slots=True)
class _Group:
    """What the three members of a group share. `failed`: it can't be validated, so abort."""

    changed: asyncio.Event = field(default_factory=asyncio.Event)
    failed: bool = False


@dataclass(slots=True)
class _Member:
    """One task being driven."""

    name: str
    spec: TaskSpec
    commitment: Commitment
    group: _Group | None = None
    uploaded: bool = False
    status: TaskStatus | None = None
    answered_at: float | None = None
    problem: str = ""
    waits: bool = True
    """It takes one of the application's places in the queue."""
    files: list[str] = field(default_factory=list)
    stirred: asyncio.Event = field(default_factory=asyncio.Event)
    """An event was seen that is about it."""

    @property
    def key(self) -> bytes:
        return bytes.fromhex(self.commitment[2:])


class Application:
    """One application account on a devnet.

    `owner` may be given to have the contract sample exactly the tasks whose spec says `group`, and
    to give tasks timeouts of their own; without it the deployed values decide. `out` is where
    result files go, under the task's name. `clock` is unix time, the chain's own as far as the
    machine has it. An answer is validated `validate_after` seconds after it was seen. Of its tasks
    no more than `most_waiting` wait for a node at a time: the network's queue has an end.
    """

    def __init__(
        self,
        rpc_url: str,
        deployment: Deployment,
        relay_url: str,
        account: LocalAccount,
        *,
        owner: LocalAccount | None = None,
        out: Path | None = None,
        clock: Callable[[], float] = time.time,
        random: Callable[[int], bytes] = secrets.token_bytes,
        validate_after: float = 0.0,
        most_waiting: int | None = None,
    ) -> None:
        self.validate_after = validate_after
        self.most_waiting = most_waiting
        self._rpc_url = rpc_url
        self._deployment = deployment
        self._relay_url = relay_url
        self._account = account
        self._owner = owner
        self._out = out
        self._clock = clock
        self._random = random
        self._members: dict[Commitment, _Member] = {}

    async def run(
        self,
        specs: Sequence[TaskSpec],
        on_change: Callable[[TaskChange], None] = lambda _change: None,
    ) -> list[TaskReport]:
        """Create all tasks and drive them to their ends; one report per task, three for a group."""
        async with httpx.AsyncClient(timeout=60) as http:
            self._chain = ChainClient(self._rpc_url, self._deployment.chain_id, http)
            self._relay = RelayClient(self._relay_url, self._account, http)
            self._task = self._chain.contract(self._deployment.task, "VSSTask")
            self._node = self._chain.contract(self._deployment.node, "Node")
            self._on_change = on_change
            most = len(specs) * _GROUP_SIZE if self.most_waiting is None else self.most_waiting
            self._places = asyncio.Semaphore(most)
            watching = asyncio.create_task(self._watch())
            try:
                return await self._run(specs)
            finally:
                watching.cancel()

    async def _run(self, specs: Sequence[TaskSpec]) -> list[TaskReport]:
        drives: dict[str, asyncio.Task[list[TaskReport]]] = {}
        async with asyncio.TaskGroup() as tasks:
            async for wave in self._waves(specs):
                guids = [self._random(32) for _ in wave]
                firsts = [
                    tasks.create_task(self._create(spec, spec.name, guid))
                    for spec, guid in zip(wave, guids, strict=True)
                ]
                for spec, first, guid in zip(wave, firsts, guids, strict=True):
                    drives[spec.name] = tasks.create_task(self._follow(first, guid))
                # The next wave's setting isn't theirs.
                await asyncio.gather(*firsts)
        return [report for spec in specs for report in drives[spec.name].result()]

    async def _waves(self, specs: Sequence[TaskSpec]) -> AsyncIterator[Sequence[TaskSpec]]:
        """The tasks to create at a time, each time after the contract was set up for them: what it
        is set to holds for the tasks created from then on."""
        if self._owner is None:
            yield specs
            return
        functions = self._task.functions
        usual: int = await functions.timeout().call()
        for timeout in dict.fromkeys(each.timeout for each in specs if each.timeout is not None):
            await self._chain.send(functions.setSamplingModulus(0), self._owner)
            await self._chain.send(functions.setTimeout(timeout), self._owner)
            yield [spec for spec in specs if spec.timeout == timeout]
            await self._chain.send(functions.setTimeout(usual), self._owner)
        for modulus, group in ((0, False), (1, True)):
            wave = [spec for spec in specs if spec.timeout is None and spec.group is group]
            if wave:
                await self._chain.send(functions.setSamplingModulus(modulus), self._owner)
                yield wave

    async def _follow(self, created: asyncio.Task[_Member], guid: bytes) -> list[TaskReport]:
        first = await created
        task = await self._read(first)
        modulus = await self._patiently(self._task.functions.getSamplingModulus(first.key).call)
        proof = sampling_proof(self._account, task.sampling_seed)
        if modulus == 0 or proof.number % modulus != 0:
            return [await self._drive(first)]
        others = [
            await self._create(first.spec, f"{first.name}.{turn}", guid) for turn in ("2", "3")
        ]
        members, group = [first, *others], _Group()
        for member in members:
            member.group = group
        async with asyncio.TaskGroup() as tasks:
            drives = [tasks.create_task(self._drive(member)) for member in members]
            tasks.create_task(self._validate_group(group, members, guid))  # noqa: RUF006
        return [drive.result() for drive in drives]

    async def _create(self, spec: TaskSpec, name: str, guid: bytes) -> _Member:
        nonce = self._random(32)
        commitment = keccak(guid + nonce)
        call = self._task.functions.createTask(
            int(spec.type),
            commitment,
            nonce,
            list(spec.model_ids),
            spec.min_vram,
            spec.required_gpu,
            spec.required_gpu_vram,
            list(spec.version),
            spec.size,
        )
        await self._places.acquire()
        await self._chain.send(call, self._account, value=spec.fee)
        return _Member(name, spec, Commitment("0x" + commitment.hex()))

    async def _drive(self, member: _Member) -> TaskReport:
        """Poll until the end. What fails for want of chain or relay is tried again next time."""
        self._members[member.commitment] = member
        while True:
            member.stirred.clear()
            try:
                task = await self._read(member)
                if member.status is not task.status:
                    self._note(member, task)
                if task.status in ENDED:
                    break
                await self._act(member, task)
                member.problem = ""
            except _TRANSIENT as error:
                member.problem = f"{type(error).__name__}: {error}"
            await self._rest(member, task)
        member.problem = ""
        if task.status in _PAID:
            await self._collect(member, task)
        return self._report(member, task)

    async def _rest(self, member: _Member, task: ChainTask) -> None:
        """Until there is something to do, or an event was seen: a queued task needs no looks."""
        seconds = POLL_SECONDS
        if task.status is TaskStatus.QUEUED:
            seconds = QUEUED_SECONDS
        elif member.uploaded and task.status not in _ANSWERED:
            seconds = UPLOADED_SECONDS
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await member.stirred.wait()

    async def _watch(self) -> None:
        """Stir the members whose tasks events are about; losing some costs only time."""
        eth, block = self._chain.eth, BlockNumber(-1)
        while True:
            with contextlib.suppress(*_TRANSIENT):
                newest = await eth.block_number
                block = newest if block < 0 else block
                if newest > block:
                    wanted: FilterParams = {
                        "address": self._task.address,
                        "fromBlock": BlockNumber(block + 1),
                        "toBlock": newest,
                    }
                    for log in await eth.get_logs(wanted):
                        subject = "0x" + bytes(log["data"][:32]).hex()
                        member = self._members.get(Commitment(subject))
                        if member is not None:
                            member.stirred.set()
                    block = newest
            await asyncio.sleep(POLL_SECONDS)

    async def _act(self, member: _Member, task: ChainTask) -> None:
        overdue = await self._chain_time() - (task.started_at or task.created_at) - task.timeout
        answered = task.status in _ANSWERED
        if answered and member.group is not None and not member.group.failed:
            return
        if answered and self._thinks_about(member):
            return
        if task.status in _VALIDATED and overdue < GRACE_SECONDS:
            return
        if answered and member.group is None and overdue < GRACE_SECONDS:
            proof = sampling_proof(self._account, task.sampling_seed)
            call = self._task.functions.validateSingleTask(
                member.key, proof.proof, proof.public_key
            )
            await self._chain.send(call, self._account)
        elif overdue >= 0:
            abort = self._task.functions.abortTask(member.key, int(AbortReason.TIMEOUT))
            # No estimate: on a chain that mines on demand it is made for the last block's time.
            await self._chain.send(abort, self._account, gas=ABORT_GAS)
        elif task.status is TaskStatus.STARTED and member.spec.upload and not member.uploaded:
            await self._upload(member, task)

    def _thinks_about(self, member: _Member) -> bool:
        """Whether it is too early to validate the answer."""
        now = self._clock()
        if member.answered_at is None:
            member.answered_at = now
        return now - member.answered_at < self.validate_after

    async def _validate_group(self, group: _Group, members: Sequence[_Member], guid: bytes) -> None:
        """Once every member has answered or was aborted. `_drive` ends with what comes of it."""
        judgeable = _ANSWERED | {TaskStatus.END_ABORTED}
        while not all(member.status in judgeable for member in members):
            group.changed.clear()
            await group.changed.wait()
        if all(member.status is TaskStatus.END_ABORTED for member in members):
            return
        first = await self._read(members[0])
        proof = sampling_proof(self._account, first.sampling_seed)
        call = self._task.functions.validateTaskGroup(
            *(member.key for member in members), guid, proof.proof, proof.public_key
        )
        try:
            await self._patiently(lambda: self._chain.send(call, self._account))
        except ContractLogicError as error:
            members[0].problem = str(error)
            group.failed = True

    async def _patiently(self, call: Callable[[], Any]) -> Any:
        """Again until chain and relay answer; a revert is final."""
        while True:
            try:
                return await call()
            except ContractLogicError:
                raise
            except _TRANSIENT:
                await asyncio.sleep(POLL_SECONDS)

    async def _read(self, member: _Member) -> ChainTask:
        call = self._task.functions.getTask(member.key).call
        task = from_chain(await self._patiently(call))
        if task is None:
            raise ChainError(f"{member.commitment} is not on the chain")
        return task

    async def _chain_time(self) -> float:
        block = await self._chain.eth.get_block("latest")
        return max(float(block["timestamp"]), self._clock())

    def _note(self, member: _Member, task: ChainTask) -> None:
        member.status = task.status
        if member.waits and task.status is not TaskStatus.QUEUED:
            member.waits = False
            self._places.release()
        if member.group is not None:
            member.group.changed.set()
        node = "" if task.status is TaskStatus.QUEUED else task.selected_node
        self._on_change(
            TaskChange(member.name, member.commitment, task.status, node, self._clock())
        )

    def _report(self, member: _Member, task: ChainTask) -> TaskReport:
        scored = task.score_ready_at > 0
        return TaskReport(
            commitment=member.commitment,
            name=member.name,
            type=member.spec.type,
            expected_end=member.spec.expected_end,
            actual_end=task.status.label,
            node=task.selected_node,
            fee=task.fee,
            seconds_to_score=task.score_ready_at - task.started_at if scored else None,
            files=tuple(member.files),
            problem=member.problem,
            reported=task.error is not TaskError.NONE,
            expected_report=member.spec.expected_report,
        )

    async def _upload(self, member: _Member, task: ChainTask) -> None:
        text = member.spec.text
        if member.spec.encrypted:
            info = await self._node.functions.getNodeInfo(task.selected_node).call()
            text = seal(text, member.commitment, bytes(info[5]), self._random)
        checkpoint = task.task_type is TaskType.SD_FT
        await self._relay.upload(member.commitment, text, checkpoint=checkpoint)
        member.uploaded = True

    async def _collect(self, member: _Member, task: ChainTask) -> None:
        """Fetch every result file, check them against the score and save them."""
        files: list[bytes] = []
        while (data := await self._fetch(member, len(files))) is not None:
            files.append(data)
        if task.task_type is TaskType.LLM:
            score = b"".join(score_llm(data) for data in files)
        else:
            try:
                score = bytes(score_images(files))
            except ValueError as error:
                member.problem = str(error)
                return
        if score != task.score:
            member.problem = "the files fetched don't have the score that is on the chain"
        if self._out is None:
            return
        folder = self._out / member.name
        folder.mkdir(parents=True, exist_ok=True)
        for index, data in enumerate(files):
            path = folder / f"{index}{_EXTENSIONS[task.task_type]}"
            path.write_bytes(data)
            member.files.append(str(path))

    async def _fetch(self, member: _Member, index: int) -> bytes | None:
        """A result file; None past the last."""
        try:
            data: bytes | None = await self._patiently(
                lambda: self._relay.result(member.commitment, index)
            )
        except ResultRefused as error:
            member.problem = str(error)
            return None
        return data
