"""One machine's model store: brings what is configured and what the network asks for.

One process on each machine that has cards, beside theirs. What running tasks need their own
processes fetch, through the same store, so that each model comes once; what is fetched here stands
back while they do (`cluster.models.keeper`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import ray
import structlog

from actors.precedence import STORES, give_way
from cluster.core.errors import Cancelled, ClusterError
from cluster.models.disk import Progress
from cluster.models.keeper import Keeper, Wanted
from cluster.models.refs import ModelRef, of_model_id, plain

MOST_QUEUED = 256
"""Models the network has asked for; whoever creates tasks may ask for any number."""
AGAIN_SECONDS = 600.0
"""After which a configured model that couldn't be had is tried again."""
TURN_SECONDS = 3600.0
"""After which a download goes on behind the others that are queued, where there are any."""
LOST_SECONDS = 1800.0
"""After which a download that gives no sign of life isn't waited for."""
MOST_LOST = 4
LOOK_SECONDS = 0.5
LABELS = ("source", "rule")
DROPPED = "dropped"


@dataclass(frozen=True, slots=True)
class StoreReport:
    """What a machine's store has and does. Model ids are as the network writes them.

    `here` are those that were asked for, or configured, and are there; `failed` says why others
    aren't; `room_bytes` may yet come without another leaving (None: nobody knows); `leftover_bytes`
    are what broken downloads left. `events` counts the store's diary since this process began, by
    event and by source or rule; `fetched_bytes` by source. `trouble` says why nothing at all is
    fetched there.
    """

    release: str
    pid: int
    here: frozenset[str]
    failed: Mapping[str, str]
    downloads: tuple[Progress, ...]
    queued: int
    models: int
    used_bytes: int
    quota_bytes: int | None
    room_bytes: int | None
    events: Mapping[tuple[str, str], int]
    fetched_bytes: Mapping[str, int]
    trouble: str = ""
    leftover_bytes: int = 0


@dataclass(slots=True)
class _Turn:
    """One download's; times are the worker's clock."""

    began: float
    heard_at: float
    lost: bool = False


class StoreWorker:
    """The plain class behind the actor, on one event loop; a thread of its own fetches."""

    def __init__(
        self,
        make_keeper: Callable[[], Keeper],
        release: str,
        configured: tuple[str, ...],
        again_seconds: float = AGAIN_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._release = release
        self._again_seconds = again_seconds
        self._make_keeper = make_keeper
        self._keeper = make_keeper()
        self._configured = configured
        self._queue: deque[str] = deque(configured)
        self._refs: dict[str, ModelRef] = {}
        self._here: set[str] = set()
        self._failed: dict[str, str] = {}
        self._news = asyncio.Event()
        self._thread = _one_thread()
        self._lost: set[str] = set()
        self._looker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="look")
        self._ended = threading.Event()
        self._place = self._keeper.diary.end()
        self._events: Counter[tuple[str, str]] = Counter()
        self._bytes: Counter[str] = Counter()
        self._log = structlog.get_logger("models")
        self._working = asyncio.get_running_loop().create_task(self._work())

    async def want(self, model_ids: tuple[str, ...]) -> None:
        """Fetch these behind what is queued already; what isn't a model's id is left out."""
        for model_id in model_ids:
            known = model_id in self._here or model_id in self._lost or model_id in self._queue
            if not known and len(self._queue) < MOST_QUEUED:
                self._queue.append(model_id)
                self._news.set()

    async def drop(self, model_id: str) -> str:
        """Remove a model from the disk: `DROPPED`, or why it stays."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._looker, self._drop, model_id)

    def _drop(self, model_id: str) -> str:
        if (stays := self._keeper.drop(of_model_id(model_id))) is not None:
            return stays.value
        self._here.discard(model_id)
        self._log.info("model_dropped", model=self._shown(model_id))
        return DROPPED

    async def report(self) -> StoreReport:
        return await asyncio.get_running_loop().run_in_executor(self._looker, self._look)

    async def stop(self) -> None:
        """Let the download that runs end where it is; the next process goes on with it."""
        self._ended.set()
        self._working.cancel()

    async def _work(self) -> None:
        """Fetch what is queued, one model after the other; configured ones again and again."""
        again_at = self._clock() + self._again_seconds
        while True:
            if self._clock() >= again_at:
                again_at = self._clock() + self._again_seconds
                await self._open_again()
                waiting = self._here | self._lost | set(self._queue)
                missing = [each for each in self._configured if each not in waiting]
                self._queue.extendleft(reversed(missing))
            if self._queue:
                await self._take_turn(self._queue.popleft())
                continue
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(again_at - self._clock(), 0.0)):
                    await self._news.wait()

    async def _open_again(self) -> None:
        """What couldn't be written may have been mended meanwhile."""
        if self._keeper.trouble:
            loop = asyncio.get_running_loop()
            self._keeper = await loop.run_in_executor(self._thread, self._make_keeper)

    async def _take_turn(self, model_id: str) -> None:
        """Fetch it. Whatever it hangs on, those behind it don't wait for ever."""
        turn = _Turn(self._clock(), self._clock())
        fetching = asyncio.get_running_loop().run_in_executor(
            self._thread, self._fetch, model_id, turn
        )
        while not (await asyncio.wait({fetching}, timeout=LOOK_SECONDS))[0]:
            is_lost = self._clock() - turn.heard_at > LOST_SECONDS
            if is_lost and len(self._lost) < MOST_LOST:
                self._lose(model_id, turn, fetching)
                return

    def _lose(self, model_id: str, turn: _Turn, fetching: asyncio.Future[None]) -> None:
        """Its thread is left to it; when it comes back, the model has another turn."""

        def back(_: asyncio.Future[None]) -> None:
            self._lost.discard(model_id)
            self._news.set()

        turn.lost = True
        self._lost.add(model_id)
        fetching.add_done_callback(back)
        reason = f"no sign of life from its download for {round(LOST_SECONDS)} s"
        self._log.error("fetching_lost", model=self._shown(model_id), reason=reason)
        self._note_failure(model_id, reason)
        self._thread.shutdown(wait=False)
        self._thread = _one_thread()

    def _fetch(self, model_id: str, turn: _Turn) -> None:
        ends = turn.began + TURN_SECONDS

        def is_over() -> bool:
            others_wait = bool(self._queue) and self._clock() > ends
            return self._ended.is_set() or turn.lost or others_wait

        def lives() -> None:
            turn.heard_at = self._clock()

        try:
            with self._keeper.telling(plain(model_id)):
                ref = of_model_id(model_id)
            self._refs[model_id] = ref
            self._keeper.ensure(ref, Wanted(None, is_over, lives, background=True))
        except Cancelled:
            self._queue.append(model_id)
        except ClusterError as error:
            shown = self._shown(model_id)
            self._log.warning("model_not_fetched", model=shown, reason=str(error))
            self._note_failure(model_id, str(error))
        except Exception as error:  # noqa: BLE001 - one model never ends the fetching of all others
            self._log.exception("fetching_broke", model=self._shown(model_id))
            self._note_failure(model_id, type(error).__name__)
        else:
            self._failed.pop(self._shown(model_id), None)
            self._here.add(model_id)
            self._log.info("model_here", model=self._shown(model_id))

    def _shown(self, model_id: str) -> str:
        """Without what may be a secret or no text; a configured one as it is configured."""
        if model_id in self._configured:
            return model_id
        ref = self._refs.get(model_id)
        return plain(model_id) if ref is None else str(ref)

    def _note_failure(self, model_id: str, reason: str) -> None:
        self._failed[self._shown(model_id)] = reason
        self._here.discard(model_id)
        if model_id not in self._configured:
            # The network may ask for anything; only the newest failures are kept in mind.
            others = [each for each in self._failed if each not in self._configured]
            for old in others[:-MOST_QUEUED]:
                del self._failed[old]
            self._refs.pop(model_id, None)

    # --- looking ---------------------------------------------------------------------------------

    def _look(self) -> StoreReport:
        keeper = self._keeper
        for model_id in tuple(self._here):
            if not self._is_here(model_id):
                self._here.discard(model_id)
                self._refs.pop(model_id, None)
        self._read_diary()
        manifests = keeper.disk.manifests()
        return StoreReport(
            release=self._release,
            pid=os.getpid(),
            here=frozenset(self._here),
            failed=dict(self._failed),
            downloads=keeper.disk.downloads(),
            queued=len(self._queue),
            models=len(manifests),
            used_bytes=sum(manifest.size for manifest in manifests.values()),
            quota_bytes=keeper.limits.quota,
            room_bytes=keeper.room.left() if keeper.sources else 0,
            events=dict(self._events),
            fetched_bytes=dict(self._bytes),
            trouble=keeper.trouble,
            leftover_bytes=keeper.room.leftover(),
        )

    def _is_here(self, model_id: str) -> bool:
        """Evicted, or removed by hand: then the network mustn't be told that it is here."""
        ref = self._refs.get(model_id)
        try:
            return ref is not None and self._keeper.has(ref)
        except ClusterError:
            return False

    def _read_diary(self) -> None:
        for entry, place in self._keeper.diary.read_on(self._place):
            self._place = place
            said = next((str(entry[label]) for label in LABELS if label in entry), "")
            self._events[str(entry.get("event", "")), said] += 1
            size = entry.get("bytes")
            if entry.get("event") == "fetched" and isinstance(size, int):
                self._bytes[said] += size


def _one_thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="fetch")


@ray.remote(num_cpus=0, max_restarts=-1)
class StoreActor(StoreWorker):
    """Detached, named after its node; `make_keeper` is a function of the installed package."""

    async def __init__(  # type: ignore[misc]
        self, make_keeper: Callable[[], Keeper], release: str, configured: tuple[str, ...]
    ) -> None:
        give_way(STORES)
        StoreWorker.__init__(self, make_keeper, release, configured)
