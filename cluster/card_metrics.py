"""What is measured of each card, by its UUID: it stays over restarts, and other exporters use it.

A card that leaves takes its series with it. What its process counts from its own beginning goes on
here from where the one before it was; what it counted before it was first seen here is left out,
because to Prometheus a counter that begins anew at much has all of that happen at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge

from cluster.core.types import GpuState
from cluster.gauges import put
from cluster.status import GpuStatus

QuarantineCause = Literal["canary", "verification", "slash", "strikes"]

_CARD = ("gpu_uuid",)
_INFO = ("gpu_uuid", "gpu", "ray_node", "gpu_name", "vram_gb")
_MOVES = ("loaded", "returned", "left_device", "left_host", "spoilt")
_USES = ("models", "other", "free")


class CardMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, text: str, labels: tuple[str, ...] = _CARD) -> Gauge:
            return Gauge(f"crynux_gpu_{name}", text, labels, registry=registry)

        self._info = gauge("info", "1 for each card: where it is, and what.", _INFO)
        self._state = gauge("state", "1 for the state the card is in.", (*_CARD, "state"))
        self._memory = gauge(
            "memory_bytes", "The card's memory, by what takes it.", (*_CARD, "use")
        )
        self._temperature = gauge("temperature_celsius", "The card's temperature.")
        self._ecc = gauge(
            "ecc_uncorrected_errors", "Memory errors since the driver was loaded, uncorrected."
        )
        self._canary = gauge(
            "canary_timestamp_seconds", "Unix time of the last right answer to the canary."
        )
        self._busy = Counter(
            "crynux_gpu_busy_seconds", "Time spent on attempts.", _CARD, registry=registry
        )
        self._faults = Counter(
            "crynux_gpu_faults", "Attempts that failed by the card.", _CARD, registry=registry
        )
        self._moves = Counter(
            "crynux_model_parts_moved",
            "Parts of models loaded from disk, returned from host memory, sent away from either,"
            " or spoilt: thrown away because memory has changed them.",
            ("move",),
            registry=registry,
        )
        for move in _MOVES:
            self._moves.labels(move)
        self._hits = Counter(
            "crynux_store_hits",
            "Models that tasks needed and that lay on the machine's disk.",
            registry=registry,
        )
        self._quarantines = Counter(
            "crynux_quarantines",
            "Cards that came into quarantine, by what convicted them.",
            ("by",),
            registry=registry,
        )
        for cause in get_args(QuarantineCause):
            self._quarantines.labels(cause)
        self._known: dict[str, tuple[str, ...]] = {}
        self._counted: dict[tuple[str, str], float] = {}

    def failed(self, uuid: str) -> None:
        """An attempt failed by the card."""
        self._faults.labels(uuid).inc()

    def quarantined(self, by: QuarantineCause) -> None:
        """A card came into quarantine."""
        self._quarantines.labels(by).inc()

    def observe(self, gpus: Iterable[GpuStatus]) -> None:
        here = {gpu.uuid: gpu for gpu in gpus if gpu.uuid}
        for uuid in self._known.keys() - here.keys():
            self._forget(uuid)
        for uuid, gpu in here.items():
            self._describe(uuid, gpu)
            for state in GpuState:
                self._state.labels(uuid, state.value).set(gpu.state is state)
            for use in _USES:
                known = None if gpu.memory is None else float(getattr(gpu.memory, use))
                put(self._memory, (uuid, use), known)
            put(self._temperature, (uuid,), gpu.temperature)
            put(self._ecc, (uuid,), gpu.ecc_uncorrected)
            put(self._canary, (uuid,), gpu.canary_at)
            self._faults.labels(uuid)
            self._busy.labels(uuid).inc(self._more(uuid, "busy", gpu.busy_seconds))
            self._hits.inc(self._more(uuid, "hits", gpu.store_hits))
            for move in _MOVES:
                more = self._more(uuid, move, gpu.moves.get(move, 0))
                self._moves.labels(move).inc(more)

    def _describe(self, uuid: str, gpu: GpuStatus) -> None:
        labels = (uuid, gpu.gpu_id, gpu.ray_node, gpu.name, str(gpu.vram))
        before = self._known.get(uuid)
        if before != labels:
            if before is not None:
                self._info.remove(*before)
            self._known[uuid] = labels
            self._info.labels(*labels).set(1)

    def _more(self, uuid: str, what: str, now: float) -> float:
        """How much came since the last look; a process that began anew begins at 0."""
        before = self._counted.get((uuid, what), now)
        self._counted[uuid, what] = now
        return now - before if now >= before else now

    def _forget(self, uuid: str) -> None:
        self._info.remove(*self._known.pop(uuid))
        for metric in (self._state, self._memory):
            metric.remove_by_labels({"gpu_uuid": uuid})
        for each in (self._temperature, self._ecc, self._canary):
            each.remove_by_labels({"gpu_uuid": uuid})
        for counter in (self._busy, self._faults):
            counter.remove_by_labels({"gpu_uuid": uuid})
        for what in ("busy", "hits", *_MOVES):
            self._counted.pop((uuid, what), None)
