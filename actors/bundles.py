"""What is kept of an attempt that failed, for whoever has to find out why: the facts and what was
decided, the record, the order, the error with its traceback, the card as it was.

It holds the task's parameters, so it goes to the journal and, when asked for by name, to an
operator; never to a log.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from actors.inference import Report
from actors.ledger import Ledger
from actors.reconciler import Turn
from cluster import journal_history
from cluster.core.errors import ClusterError
from cluster.core.ports import Order
from cluster.core.types import Commitment, GpuId, Timestamp
from cluster.journal_history import Bundle


class Bundles:
    """`turns` has what was last seen of each task; `report_of` a card's last report."""

    def __init__(
        self,
        ledger: Ledger,
        turns: Mapping[Commitment, Turn],
        report_of: Callable[[GpuId], Report | None],
        clock: Callable[[], float],
    ) -> None:
        self._ledger = ledger
        self._turns = turns
        self._report_of = report_of
        self._clock = clock

    def keep(self, gpu: GpuId, order: Order, error: ClusterError) -> None:
        """Raises `LeaseLost`."""
        turn, report = self._turns.get(order.task), self._report_of(gpu)
        record = self._ledger.open.get(order.task)
        body: dict[str, Any] = {
            "gpu": gpu,
            "error": f"{type(error).__name__}: {error}",
            "trace": error.trace,
            "deadline": order.deadline,
            "turn": None if turn is None else _plain(asdict(turn)),
            "record": None if record is None else _plain(asdict(replace(record, parameters=None))),
            "card": None if report is None else _plain(asdict(report)),
        }
        fault = type(error).__name__
        bundle = Bundle(order.attempt_id, Timestamp(self._clock()), body, gpu, fault)
        with self._ledger.journal.write(self._ledger.lease) as connection:
            journal_history.keep_bundle(connection, order.task, bundle)


def _plain(value: Any) -> Any:  # noqa: ANN401 - whatever a dataclass holds
    """As JSON can hold it."""
    match value:
        case dict():
            return {str(key): _plain(each) for key, each in value.items()}
        case list() | tuple():
            return [_plain(each) for each in value]
        case set() | frozenset():
            return sorted(map(str, value))
        case bytes():
            return value.hex()
        case _:
            return value if isinstance(value, str | int | float | None) else str(value)
