"""Gauges of what may not be known: a series that isn't there says so, where 0 would be a value."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import Gauge, Metric


class Known(Gauge):
    """A gauge without labels that has a sample only while its value is known."""

    _known = False

    def put(self, value: float | None) -> None:
        self._known = value is not None
        if value is not None:
            self.set(value)

    def collect(self) -> Iterable[Metric]:
        found = list(super().collect())
        for metric in found if not self._known else ():
            metric.samples.clear()
        return found


def put(gauge: Gauge, labels: tuple[str, ...], value: float | None) -> None:
    """As `Known.put`, of one label set of a gauge."""
    if value is not None:
        gauge.labels(*labels).set(value)
    else:
        gauge.remove(*labels)
