"""What is measured of the machines' model stores, all of them together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge

from cluster.models.refusals import Rule
from cluster.status import StoreStatus

StoreEvent = Literal["fetched", "evicted", "broke", "damaged", "failed"]
"""What a model store's diary tells (`cluster.models.diary`); refusals are counted by rule."""
SOURCES = ("mirror", "hub", "web")
_RULES = frozenset(rule.value for rule in Rule)
_OTHER = "other"


class StoreMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"crynux_store_{name}", text, registry=registry)

        def counter(name: str, text: str, label: str, values: Iterable[str]) -> Counter:
            made = Counter(f"crynux_store_{name}", text, (label,), registry=registry)
            for value in values:
                made.labels(value)
            return made

        self._events = counter(
            "events",
            "What happened in the model stores of all machines.",
            "event",
            get_args(StoreEvent),
        )
        self._refusals = counter(
            "refusals", "Models that were refused, by the rule.", "rule", [*_RULES, _OTHER]
        )
        self._fetched = counter(
            "fetched_bytes", "Bytes of models fetched, by source.", "source", [*SOURCES, _OTHER]
        )
        self._models = gauge("models", "Fetched models on all machines' disks.")
        self._used = gauge("used_bytes", "Bytes that fetched models take.")
        self._leftover = gauge(
            "leftover_bytes", "Bytes that broken downloads left for the next try."
        )
        self._troubled = gauge(
            "troubled_machines",
            "Machines whose store can't fetch anything, or doesn't answer.",
        )
        self._fullest = gauge(
            "fullest_ratio", "What is used of the room of the fullest machine's store, 0 to 1."
        )
        self._queue = gauge("queued_models", "Models that wait to be fetched.")
        self._missing = gauge(
            "missing_models",
            "Models configured or asked for that couldn't be had on some machine, each once.",
        )
        self._downloads = gauge("downloads", "Downloads that run now.")
        self._rate = gauge("download_bytes_per_second", "Rate of the downloads that run now.")
        self._left = gauge(
            "download_left_bytes",
            "Bytes still to come of the downloads that run now, of those whose size is known.",
        )
        self._longest = gauge(
            "download_left_seconds", "Until the last of the downloads that run now is there."
        )

    def happened(self, event: str, label: str, count: int) -> None:
        """`count` more events in the machines' model stores; `label` is a rule or a source."""
        if event == "refused":
            self._refusals.labels(label if label in _RULES else _OTHER).inc(count)
        elif event in get_args(StoreEvent):
            self._events.labels(event).inc(count)

    def fetched(self, source: str, size: int) -> None:
        """So many bytes more of models came whole from there."""
        self._fetched.labels(source if source in SOURCES else _OTHER).inc(size)

    def observe(self, stores: tuple[StoreStatus, ...]) -> None:
        downloads = [each for store in stores for each in store.downloads]
        self._models.set(sum(store.models for store in stores))
        self._used.set(sum(store.used_bytes for store in stores))
        self._leftover.set(sum(store.leftover_bytes for store in stores))
        self._troubled.set(sum(bool(store.trouble) for store in stores))
        self._fullest.set(max(map(_fullness, stores), default=0))
        self._queue.set(sum(store.queued for store in stores))
        self._missing.set(len({model for store in stores for model in store.failed}))
        self._downloads.set(len(downloads))
        self._rate.set(sum(each.bytes_per_second for each in downloads))
        self._left.set(sum(max(each.total_bytes - each.done_bytes, 0) for each in downloads))
        self._longest.set(max((each.seconds_left or 0.0 for each in downloads), default=0.0))


def _fullness(store: StoreStatus) -> float:
    """0 where it isn't known how much more may come."""
    if store.room_bytes is None:
        return 0.0
    taken = store.used_bytes + store.leftover_bytes
    whole = taken + store.room_bytes
    return taken / whole if whole else 1.0
