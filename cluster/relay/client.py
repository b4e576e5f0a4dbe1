"""The relay as a node uses it: parameters in, result files out (protocol.md section 3).

Every answer is a stranger's until it was validated: bodies are bounded while they are read, never
decompressed, redirects are never followed, and no text of the relay's gets into an error beyond
the messages that the protocol names. No error carries an address either, because the query of a
call holds its signature.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from cluster.core.errors import (
    ParametersNotReady,
    ParametersUnreadable,
    RelayBroken,
    RelayError,
    RelayRefused,
    ResultRefused,
)
from cluster.core.types import Address, Commitment, TaskStatus
from cluster.relay.envelope import is_envelope
from cluster.relay.signing import digest

MAX_BODY_BYTES = 32 * 1024 * 1024
MAX_PARAMETERS = 4 * 2**20
"""Characters; more are never kept: `cluster.inference.reading` takes no longer ones."""
_MAX_ENVELOPE = 2 * MAX_PARAMETERS
"""Room for base64."""
_CHECKPOINT = "checkpoint.zip"
_MAX_SKEW_SECONDS = 86_400.0
_INVALID_SIGNATURE = "Invalid signature"
_PAID = frozenset({TaskStatus.END_SUCCESS, TaskStatus.END_GROUP_SUCCESS})
_KNOWN_REFUSALS = frozenset(
    {
        "Task not found",
        "Task not ready",
        "Task not validated",
        "Signer not allowed",
        _INVALID_SIGNATURE,
        "Wrong result files uploaded",
        "Task results not uploaded",
        "File not found",
    }
)


class Keys(Protocol):
    """The node accounts' keys, which stay behind this interface."""

    def sign(self, account: Address, digest: bytes) -> bytes:
        """65 bytes r‖s‖v over the bare digest, v 0 or 1."""
        ...

    def open(self, account: Address, task: Commitment, envelope: str) -> str:
        """The parameters in an envelope to `account`; raises `ParametersUnreadable`."""
        ...


@dataclass(frozen=True, slots=True)
class Refusal:
    """The relay said no in its own words (HTTP 400)."""

    message: str

    def error(self, call: str) -> RelayRefused:
        said = self.message if self.message in _KNOWN_REFUSALS else "an unknown reason"
        return RelayRefused(f"relay: {call} refused: {said}")


class _RefusalData(BaseModel):
    message: str


class _RefusalBody(BaseModel):
    data: _RefusalData


class _NowData(BaseModel):
    now: float


class _NowBody(BaseModel):
    data: _NowData


class _TaskData(BaseModel):
    task_args: str
    status: int | None = None


class _TaskBody(BaseModel):
    data: _TaskData


class _DoneBody(BaseModel):
    message: str


_Body = TypeVar("_Body", bound=BaseModel)
_Request = Callable[[Mapping[str, str]], httpx.Request]


def _validated(model: type[_Body], body: bytes, call: str) -> _Body:
    try:
        return model.model_validate_json(body)
    except ValidationError:
        raise RelayError(f"relay: {call} answered what isn't the protocol's") from None


def _parts(files: Sequence[tuple[str, bytes]]) -> list[tuple[str, tuple[str, bytes, str]]]:
    return [
        (
            "checkpoint" if name == _CHECKPOINT else "files",
            (name, data, "application/octet-stream"),
        )
        for name, data in files
    ]


class RelayClient:
    """One relay, for all of the operator's accounts.

    `clock` is this machine's unix time. Signatures carry the relay's time, by the skew measured on
    first use and again after an `Invalid signature`; `called` hears what came of that, of calls
    for tasks their caller knows. `timeout` bounds one call in seconds, whatever
    the trickle of its bytes.
    """

    def __init__(
        self,
        base_url: str,
        http: httpx.AsyncClient,
        keys: Keys,
        clock: Callable[[], float],
        *,
        timeout: float = 120.0,
        called: Callable[[Literal["now"], Literal["ok", "refused", "unreachable"]], None] = (
            lambda _call, _result: None
        ),
    ) -> None:
        self._base = base_url.rstrip("/")
        self._http = http
        self._keys = keys
        self._clock = clock
        self._timeout = timeout
        self._called = called
        self._skew: float | None = None

    async def now(self) -> float:
        """The relay's unix time; measures the skew."""
        try:
            now = await self._now()
        except RelayError as error:
            refused = isinstance(error, RelayRefused)
            self._called("now", "refused" if refused else "unreachable")
            raise
        self._called("now", "ok")
        return now

    async def _now(self) -> float:
        before = self._clock()
        answer = await self._exchange(self._http.build_request("GET", f"{self._base}/v1/now"))
        after = self._clock()
        if isinstance(answer, Refusal):
            raise answer.error("now")
        now = _validated(_NowBody, answer, "now").data.now
        skew = now - (before + after) / 2
        # A relay far ahead would collect signatures that stay good for its future.
        if not abs(skew) <= _MAX_SKEW_SECONDS:
            raise RelayError("relay: its clock is more than a day from ours")
        self._skew = skew
        return now

    async def fetch_parameters(self, account: Address, task: Commitment) -> str:
        """The task's parameters as JSON text, opened if they came in an envelope. Asks once.

        Raises `ParametersNotReady`, `ParametersUnreadable` or `RelayError`.
        """
        answer = await self._get_task(account, task)
        if isinstance(answer, Refusal):
            if answer.message in {"Task not ready", "Task not found"}:
                raise ParametersNotReady(f"relay: {answer.message}")
            raise answer.error("task")
        text = _at_most(_MAX_ENVELOPE, answer.task_args)
        if not text.strip():
            # A column that isn't filled yet says nothing of the task.
            raise ParametersNotReady("relay: empty parameters")
        if is_envelope(text):
            text = self._keys.open(account, task, text)
        return _at_most(MAX_PARAMETERS, text)

    async def upload_result(
        self, account: Address, task: Commitment, files: Sequence[tuple[str, bytes]]
    ) -> None:
        """Hand over the files in index order; one named `checkpoint.zip` goes as the checkpoint.

        Success also when the relay holds them already. Raises `ResultRefused` or `RelayError`.
        """
        url = self._task_url(task) + "/results"

        def request(proof: Mapping[str, str]) -> httpx.Request:
            return self._http.build_request("POST", url, data=dict(proof), files=_parts(files))

        answer = await self._signed(account, {"task_id_commitment": task}, request)
        if not isinstance(answer, Refusal):
            if _validated(_DoneBody, answer, "results").message != "success":
                raise RelayError("relay: results answered neither success nor an error")
        elif answer.message == "Wrong result files uploaded":
            raise ResultRefused(f"relay: {answer.message}")
        elif answer.message != "Task not validated" or not await self._holds_result(account, task):
            raise answer.error("results")

    async def _holds_result(self, account: Address, task: Commitment) -> bool:
        """Whether the relay is past this task, rather than behind the chain's validation of it.

        A relay of 2.x takes files only until it has them: then the upload answers "Task not
        validated", and the task itself, which it gives out up to that point, "Task not ready". One
        of 3.x gives the task out with its status.
        """
        answer = await self._get_task(account, task)
        if isinstance(answer, Refusal):
            return answer.message == "Task not ready"
        return answer.status in _PAID

    async def _get_task(self, account: Address, task: Commitment) -> _TaskData | Refusal:
        url = self._task_url(task)

        def request(proof: Mapping[str, str]) -> httpx.Request:
            return self._http.build_request("GET", url, params=dict(proof))

        answer = await self._signed(account, {"task_id_commitment": task}, request)
        if isinstance(answer, Refusal):
            return answer
        return _validated(_TaskBody, answer, "task").data

    def _task_url(self, task: Commitment) -> str:
        if not re.fullmatch(r"0x[0-9a-f]{64}", task):
            raise ValueError(f"not a commitment: {task!r}")
        return f"{self._base}/v1/inference_tasks/{task}"

    async def _signed(
        self, account: Address, fields: Mapping[str, str], request: _Request
    ) -> bytes | Refusal:
        if self._skew is None:
            await self.now()
        answer = await self._exchange(request(self._proof(account, fields)))
        if isinstance(answer, Refusal) and answer.message == _INVALID_SIGNATURE:
            await self.now()
            answer = await self._exchange(request(self._proof(account, fields)))
        return answer

    def _proof(self, account: Address, fields: Mapping[str, str]) -> dict[str, str]:
        at = int(self._clock() + (self._skew or 0.0))
        signature = self._keys.sign(account, digest(fields, at))
        return {"timestamp": str(at), "signature": "0x" + signature.hex()}

    async def _exchange(self, request: httpx.Request) -> bytes | Refusal:
        """The body of a good answer or the relay's refusal; raises `RelayError` for all else."""
        request.headers["Accept-Encoding"] = "identity"
        try:
            async with asyncio.timeout(self._timeout):
                response = await self._http.send(request, stream=True, follow_redirects=False)
                try:
                    body = await _bounded(response)
                finally:
                    await response.aclose()
        except TimeoutError:
            raise RelayError("relay: no answer in time") from None
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise RelayError(f"relay: {type(error).__name__}") from None
        if response.status_code == httpx.codes.BAD_REQUEST:
            return Refusal(_validated(_RefusalBody, body, "a refusal").data.message)
        if response.status_code == httpx.codes.INTERNAL_SERVER_ERROR:
            raise RelayBroken("relay: HTTP 500")
        if response.status_code != httpx.codes.OK:
            raise RelayError(f"relay: HTTP {response.status_code}")
        return body


def _at_most(characters: int, text: str) -> str:
    """What is fetched is stored for good and read at every start, so its length is bounded."""
    if len(text) > characters:
        raise ParametersUnreadable(f"relay: parameters of more than {characters} characters")
    return text


async def _bounded(response: httpx.Response) -> bytes:
    if response.headers.get("content-encoding", "identity") != "identity":
        raise RelayError("relay: a compressed answer that we didn't ask for")
    body = bytearray()
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise RelayError("relay: an answer over 32 MiB")
    return bytes(body)
