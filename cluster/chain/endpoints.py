"""Any number of RPC endpoints as one transport: reads fail over at once, writes go to all.

What each has done lately decides whom to ask (`cluster.chain.health`). A check now and then looks
at all of them: their heads, their chain, and whether they tell of the same fork; so one that lags,
or is on a fork of its own, isn't believed, and one that is back is asked again.

    call ─▶ first healthy one ── no answer, 429, malformed, refused ──▶ the next one, at once
    send ─▶ all healthy ones: taken by any is taken
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Final

import structlog

from cluster.chain import answers, health
from cluster.chain.answers import SEND, Meaning, Throttled, TooLong
from cluster.chain.health import Bucket, Endpoint, Head
from cluster.chain.rpc import HttpTransport, Transport
from cluster.core.errors import ChainError

_log = structlog.get_logger(__name__)

URGENT: ContextVar[bool] = ContextVar("urgent", default=False)
"""Whether what is asked for waits for nobody's rate: a task's answer is on its way."""
HEAD: Final = "eth_getBlockByNumber"
CHECK_SECONDS: Final = 15.0
FORK_DEPTH: Final = 6
"""How many blocks below the best head the endpoints' blocks are compared."""
DEFAULT_PATIENCE: Final = 5.0
"""Seconds after a 429 that doesn't say how many."""


@dataclass(frozen=True, slots=True)
class EndpointView:
    """`problem` is empty for one that is asked."""

    name: str
    problem: str
    latency: float | None
    head: int | None


class Endpoints:
    """`transports` in the order in which they are asked."""

    def __init__(
        self,
        transports: Sequence[HttpTransport],
        chain_id: int | None = None,
        rate: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        called: Callable[[str, str], None] = lambda _method, _result: None,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """`rate`: calls a second to each endpoint that has no rate of its own; None for no limit.
        `called` hears of each call by method and result (ok, refused, throttled, failed). `wall`
        is the time of day."""
        self._sends: list[Transport] = [transport.send for transport in transports]
        self._closes = [transport.close for transport in transports]
        names = _told_apart([each.name for each in transports])
        self._states = [
            Endpoint(name, each.priority) for name, each in zip(names, transports, strict=True)
        ]
        self._buckets = [Bucket(rate if each.rate is None else each.rate) for each in transports]
        self._sending: set[asyncio.Task[Mapping[str, Any]]] = set()
        """Writes on their way to endpoints that nobody waits for."""
        self._best: Head | None = None
        """The best head of those that were compared, and when it was seen."""
        self._best_at = 0.0
        self._complete = [False for _ in transports]
        """Which were seen to have all contracts."""
        self.contracts: Collection[str] = ()
        """That an endpoint must have to be asked anything."""
        self._chain_id = chain_id
        self._clock = clock
        self._sleep = sleep
        self._called = called
        self._wall = wall
        self._undecided: tuple[str, ...] = ()
        """Endpoints that tell of different chains, without a majority for one."""

    # --- the transport ---------------------------------------------------------------------------

    async def send(self, method: str, params: Sequence[Any]) -> Mapping[str, Any]:
        """The first answer that is one; raises the last endpoint's `ChainError` without any."""
        if method == SEND:
            return await self._send_to_all(method, params)
        failure = ChainError(f"{method}: {self.why_none()}")
        refused: dict[int, Mapping[str, Any]] = {}
        tried: set[int] = set()
        # Asked anew after each failure, because that failure may change the order.
        while (index := self._next(tried)) is not None:
            tried.add(index)
            try:
                if not await self._reaches(index, method, params):
                    failure = ChainError(f"{method}: {self._states[index].name} has no such block")
                    continue
                answer = await self._ask(index, method, params)
            except TooLong:
                raise  # of all of them, most likely
            except ChainError as error:
                failure = error
                continue
            if answers.meaning(method, answer) is Meaning.ANSWER:
                self._learn(index, method, params, answer)
                self._note_refusals(method, refused)
                return answer
            refused[index] = answer
        if refused:
            # The question may be what is wrong; one that has no such block says the least of it.
            return min(refused.values(), key=lambda each: _is_behind(method, each))
        raise failure

    async def _reaches(self, index: int, method: str, params: Sequence[Any]) -> bool:
        """Whether the endpoint has the blocks whose logs are asked for: of those that it hasn't it
        says that there is nothing in them. What else is asked of a block it refuses without it."""
        if method != answers.LOGS or len(self._states) == 1:
            return True
        last = _quantity(params[0].get("toBlock")) or 0
        known = self._states[index].head
        if known is None or known < last:
            head = await self._head(index)
            known = None if head is None else head.number
        return known is not None and known >= last

    def _note_refusals(self, method: str, refused: Mapping[int, Mapping[str, Any]]) -> None:
        """Another has answered what these would not."""
        for index, answer in refused.items():
            if _is_behind(method, answer):
                continue
            before, why = self._states[index], f"refuses calls ({_code(answer)})"
            self._states[index] = health.refused(before, self._clock(), why)
            if self._states[index].is_open and not before.is_open:
                _log.warning("endpoint_given_up", endpoint=before.name, reason=why)

    async def ask_each(self, method: str, params: Sequence[Any]) -> Sequence[Mapping[str, Any]]:
        """What all that may be asked have to say; raises `ChainError` where none has anything."""
        asked = health.order(self._states, self._clock())
        if not asked:
            raise ChainError(f"{method}: {self.why_none()}")
        ended = await asyncio.gather(
            *(self._ask(index, method, params) for index in asked), return_exceptions=True
        )
        found, failures = list[Mapping[str, Any]](), list[BaseException]()
        for each in ended:
            if isinstance(each, BaseException):
                failures.append(each)
            elif answers.meaning(method, each) is Meaning.ANSWER:
                found.append(each)
            else:
                failures.append(ChainError(f"{method}: refused"))
        failures.sort(key=lambda error: isinstance(error, ChainError))
        if failures and not (found and isinstance(failures[0], ChainError)):
            raise failures[0]
        return found

    async def close(self) -> None:
        for each in self._sending:
            each.cancel()
        await asyncio.gather(*self._sending, return_exceptions=True)
        await asyncio.gather(*(close() for close in self._closes))

    def _next(self, tried: set[int]) -> int | None:
        now = self._clock()
        waits = {i: bucket.wait(now) for i, bucket in enumerate(self._buckets)}
        return next((i for i in health.order(self._states, now, waits) if i not in tried), None)

    async def _ask(self, index: int, method: str, params: Sequence[Any]) -> Mapping[str, Any]:
        """One endpoint's answer, and what it says about the endpoint."""
        if self._states[index].is_open:
            self._states[index] = replace(self._states[index], probing=True)
        began = self._clock()
        try:
            await self._wait_for_turn(index)
            began = self._clock()
            answer = await self._sends[index](method, params)
            if answers.meaning(method, answer) is Meaning.BUSY:
                raise Throttled(f"{method}: too many calls", answers.patience(answer))
        except Throttled as error:
            patience = DEFAULT_PATIENCE if error.retry_after is None else error.retry_after
            self._states[index] = health.put_off(self._states[index], self._clock(), patience)
            self._called(method, "throttled")
            raise
        except TooLong:
            self._note_answer(index, self._clock() - began)
            self._called(method, "refused")
            raise
        except ChainError as error:
            self._note_failure(index, error)
            self._called(method, "failed")
            raise
        except BaseException:
            # Given up by the caller: says nothing of the endpoint.
            self._states[index] = replace(self._states[index], probing=False)
            raise
        self._note_answer(index, self._clock() - began)
        if answers.meaning(method, answer) is Meaning.ANSWER:
            self._states[index] = replace(self._states[index], refusals=0)
        self._called(method, "refused" if answer.get("error") is not None else "ok")
        return answer

    def _note_answer(self, index: int, seconds: float) -> None:
        was_open = self._states[index].is_open
        self._states[index] = health.answered(self._states[index], seconds)
        if was_open:
            _log.info("endpoint_back", endpoint=self._states[index].name)

    def _note_failure(self, index: int, error: ChainError) -> None:
        before = self._states[index]
        why = str(error).partition(": ")[2]
        self._states[index] = health.failed(before, self._clock(), why)
        if self._states[index].is_open and not before.is_open:
            _log.warning("endpoint_given_up", endpoint=before.name, reason=str(error))

    async def _wait_for_turn(self, index: int) -> None:
        self._buckets[index], pause = self._buckets[index].take(self._clock())
        if pause > 0 and not URGENT.get():
            await self._sleep(pause)

    async def _send_to_all(self, method: str, params: Sequence[Any]) -> Mapping[str, Any]:
        """A transaction that any endpoint has taken may be mined, so taken by one is taken: nobody
        waits for the slower ones, which get it all the same."""
        chosen = health.for_writes(self._states, self._clock())
        if not chosen:
            raise ChainError(f"{method}: {self.why_none()}")
        sending = [asyncio.create_task(self._ask(each, method, params)) for each in chosen]
        self._sending.update(sending)
        for task in sending:
            task.add_done_callback(self._sent)
        waiting = set(sending)
        while waiting:
            _, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for each in sending:
                if each.done() and each.exception() is None and each.result().get("error") is None:
                    return each.result()
        failures = [error for each in sending if (error := each.exception()) is not None]
        if len(failures) < len(sending):
            return next(each.result() for each in sending if each.exception() is None)
        failures.sort(key=lambda error: isinstance(error, ChainError))
        raise failures[0]

    def _sent(self, task: asyncio.Task[Mapping[str, Any]]) -> None:
        self._sending.discard(task)
        if not task.cancelled():
            task.exception()  # noted where it was asked

    def _learn(
        self, index: int, method: str, params: Sequence[Any], answer: Mapping[str, Any]
    ) -> None:
        """A head that was asked for anyway says how far the endpoint is."""
        if method == HEAD and params and params[0] == "latest":
            head = _head(answer.get("result"))
            if head is not None:
                self._states[index] = health.saw_head(self._states[index], head, self._clock())

    # --- checking them ---------------------------------------------------------------------------

    async def watch(self) -> None:
        """Check all of them, for ever."""
        while True:
            await self.check()
            await self._sleep(CHECK_SECONDS)

    async def check(self) -> None:
        """One look at each: its chain, its head, and its block some way below the best head. Heads
        are asked for together: those of different moments can't be compared."""
        everyone = range(len(self._states))
        suitable = await asyncio.gather(*(self._is_suitable(index) for index in everyone))
        asked = [index for index in everyone if suitable[index] and not self._is_known(index)]
        heads = await asyncio.gather(*(self._head(index) for index in asked))
        found = {i: head for i, head in zip(asked, heads, strict=True) if head is not None}
        self._compare_heads(found)
        if len(self._states) > 1:
            await self._compare_forks(found)

    def _is_known(self, index: int) -> bool:
        """Whether there is nobody to compare it with, and it was asked just now anyway."""
        state = self._states[index]
        if len(self._states) > 1 or state.head is None:
            return False
        return self._clock() - state.head_at < CHECK_SECONDS

    async def _head(self, index: int) -> Head | None:
        params = ("latest", False)
        with contextlib.suppress(ChainError):  # noted where it was asked
            answer = await self._ask(index, HEAD, params)
            self._learn(index, HEAD, params, answer)
            return _head(answer.get("result"))
        return None

    def _compare_heads(self, heads: Mapping[int, Head]) -> None:
        now = self._clock()
        self._judge_times(heads)
        best = health.vouched([head for i, head in heads.items() if not self._states[i].wrong])
        if self._best is not None and now - self._best_at <= health.STALE_SECONDS:
            best = health.vouched([self._best, *([] if best is None else [best])])
        if best is None:
            return
        if best != self._best:
            self._best, self._best_at = best, now
        for index, head in heads.items():
            self._states[index] = health.compared(self._states[index], head, best, now)

    def _judge_times(self, heads: Mapping[int, Head]) -> None:
        """Where all are of the future, it is our clock that is wrong."""
        latest = self._wall() + health.MOST_AHEAD
        odd = {index for index, head in heads.items() if head.timestamp > latest}
        for index in heads:
            from_future = index in odd and len(odd) < len(heads)
            self._judge(index, replace(self._states[index], from_future=from_future))

    async def _is_suitable(self, index: int) -> bool:
        """Whether it answers, serves our chain, and has all contracts."""
        state, now = self._states[index], self._clock()
        if state.patience_until > now or (state.is_open and state.open_until > now):
            return False
        try:
            return await self._is_ours(index) and await self._is_complete(index)
        except ChainError:
            return False  # noted where it was asked

    async def _is_ours(self, index: int) -> bool:
        if self._chain_id is not None:
            answer = await self._ask(index, "eth_chainId", ())
            found = _quantity(answer.get("result"))
            if found is not None:  # else it stays as it was judged
                other = None if found == self._chain_id else found
                self._judge(index, replace(self._states[index], chain_id=other))
        return self._states[index].chain_id is None

    async def _is_complete(self, index: int) -> bool:
        if not self._complete[index]:
            lacks = await self._lacks(index)
            if lacks is not None:
                self._complete[index] = not lacks
                self._judge(index, replace(self._states[index], lacks=lacks))
        return not self._states[index].lacks

    async def _lacks(self, index: int) -> str | None:
        """A contract that it hasn't; empty for none, None where it doesn't say."""
        for address in self.contracts:
            code = (await self._ask(index, "eth_getCode", (address, "latest"))).get("result")
            if not isinstance(code, str):
                return None
            if code in {"0x", "0x0", ""}:
                return address
        return ""

    def unsuitable(self) -> Transport | None:
        """The first of them, where all of them are of another chain or without the contracts."""
        if any(each.chain_id is None and not each.lacks for each in self._states):
            return None

        async def send(method: str, params: Sequence[Any]) -> Mapping[str, Any]:
            return await self._ask(0, method, params)

        return send

    async def _compare_forks(self, heads: Mapping[int, Head]) -> None:
        if self._best is None:
            return
        number = max(self._best.number - FORK_DEPTH, 0)
        asked = [index for index, head in heads.items() if head.number >= number]
        found = await asyncio.gather(*(self._hash(index, number) for index in asked))
        hashes = {i: each for i, each in zip(asked, found, strict=True) if each is not None}
        strangers = health.outvoted(hashes)
        names = tuple(self._states[index].name for index in hashes)
        self._undecided = names if health.undecided(hashes) else ()
        for index in hashes:
            self._judge(index, replace(self._states[index], forked=index in strangers))

    async def _hash(self, index: int, number: int) -> str | None:
        with contextlib.suppress(ChainError):
            answer = await self._ask(index, HEAD, (hex(number), False))
            block = answer.get("result")
            if isinstance(block, Mapping) and isinstance(block.get("hash"), str):
                return str(block["hash"])
        return None

    def _judge(self, index: int, now: Endpoint) -> None:
        before = self._states[index]
        self._states[index] = now
        if now.wrong != before.wrong:
            _log.warning("endpoint_judged", endpoint=now.name, problem=now.wrong or "none any more")

    # --- for people ------------------------------------------------------------------------------

    def views(self) -> tuple[EndpointView, ...]:
        now = self._clock()
        return tuple(
            EndpointView(each.name, health.problem(each, now), each.latency, each.head)
            for each in self._states
        )

    def alerts(self) -> tuple[str, ...]:
        """What an operator has to see to, in words."""
        if not self._undecided:
            return ()
        names = ", ".join(self._undecided)
        line = f"RPC endpoints tell of different chains, and no majority of one ({names})"
        return (f"{line}: the first in order is believed; add another endpoint",)

    def why_none(self) -> str:
        """Why no endpoint can be asked, in one line."""
        reasons = [f"{each.name} {each.problem}" for each in self.views() if each.problem]
        return "no endpoint answers" + (f": {'; '.join(reasons)}" if reasons else "")


def _is_behind(method: str, answer: Mapping[str, Any]) -> bool:
    return answers.meaning(method, answer) is Meaning.BEHIND


def _code(answer: Mapping[str, Any]) -> object:
    error = answer.get("error")
    code = error.get("code") if isinstance(error, Mapping) else None
    return code if isinstance(code, int) else "without a code"


def _head(block: object) -> Head | None:
    if not isinstance(block, Mapping):
        return None
    number, timestamp = _quantity(block.get("number")), _quantity(block.get("timestamp"))
    return None if number is None or timestamp is None else Head(number, timestamp)


def _quantity(value: object) -> int | None:
    try:
        return int(value, 16) if isinstance(value, str) and len(value) <= 66 else None
    except ValueError:
        return None


def _told_apart(names: Sequence[str]) -> list[str]:
    """The second of one host is `host#2`: a URL's path, in which they differ, may hold a key."""
    counts: Counter[str] = Counter()
    told: list[str] = []
    for name in names:
        counts[name] += 1
        told.append(name if counts[name] == 1 else f"{name}#{counts[name]}")
    return told
