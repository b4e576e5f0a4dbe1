"""What is measured of the network as the coordinator reaches it: endpoints, relay, transactions."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge

from cluster.chain.outbox_rows import RowState
from cluster.gauges import Known, put
from cluster.status import EndpointStatus, Status

RelayCall = Literal["now", "parameters", "results"]
RelayResult = Literal["ok", "not_ready", "refused", "unreachable", "error"]

RpcResult = Literal["ok", "refused", "throttled", "failed"]
RPC_METHODS = (
    "eth_blockNumber",
    "eth_call",
    "eth_chainId",
    "eth_estimateGas",
    "eth_feeHistory",
    "eth_gasPrice",
    "eth_getBalance",
    "eth_getBlockByNumber",
    "eth_getCode",
    "eth_getLogs",
    "eth_getTransactionByHash",
    "eth_getTransactionCount",
    "eth_getTransactionReceipt",
    "eth_sendRawTransaction",
)


class NetworkMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
            return Gauge(f"crynux_{name}", text, labels, registry=registry)

        def known(name: str, text: str) -> Known:
            return Known(f"crynux_{name}", text, registry=registry)

        def counter(name: str, text: str, **labels: Iterable[str]) -> Counter:
            made = Counter(f"crynux_{name}", text, tuple(labels), registry=registry)
            for values in itertools.product(*labels.values()):
                made.labels(*values)
            return made

        self._endpoint_names: frozenset[str] = frozenset()
        self._chain_reached = known("chain_reached", "1 when the chain answers whoever acts.")
        self._head_block = known("chain_head_block", "Number of the newest block seen.")
        self._head_time = known(
            "chain_head_timestamp_seconds", "Unix time of the newest block seen."
        )
        self._endpoints = gauge("rpc_endpoints", "RPC endpoints configured.")
        self._endpoints_fit = gauge(
            "rpc_endpoints_fit", "RPC endpoints that are asked: they answer, and are believed."
        )
        labels = ("endpoint",)
        self._endpoint_up = gauge(
            "rpc_endpoint_fit", "1 when the endpoint is asked: it answers, and is believed.", labels
        )
        self._endpoint_seconds = gauge(
            "rpc_endpoint_answer_seconds", "How long it takes to answer, as a mean.", labels
        )
        self._endpoint_head = gauge(
            "rpc_endpoint_head_block", "Number of the newest block it told of.", labels
        )
        self._rpc_calls = counter(
            "rpc_calls",
            "Calls to RPC endpoints, by result.",
            method=[*RPC_METHODS, "other"],
            result=get_args(RpcResult),
        )
        self._relay_reached = known("relay_reached", "1 when the relay answers whoever acts.")
        self._relay_calls = counter(
            "relay_calls",
            "Calls to the relay, by result.",
            call=get_args(RelayCall),
            result=get_args(RelayResult),
        )
        self._outbox = gauge(
            "outbox_rows", "Writes to the network, by where they stand.", ("state",)
        )
        self.outbox({})

    def rpc_called(self, method: str, result: str) -> None:
        """A call to an RPC endpoint, by what it was and what came of it."""
        known = method if method in RPC_METHODS else "other"
        self._rpc_calls.labels(known, result).inc()

    def relay_called(self, call: RelayCall, result: RelayResult) -> None:
        self._relay_calls.labels(call, result).inc()

    def outbox(self, rows: Mapping[RowState, int] | None) -> None:
        """How many writes to the network stand in each state; None where nobody knows."""
        if rows is None:
            self._outbox.clear()
            return
        for state in RowState:
            self._outbox.labels(state.value).set(rows.get(state, 0))

    def observe(self, status: Status) -> None:
        self._chain_reached.put(status.chain.reached if status.acting else None)
        self._head_block.put(status.chain.block)
        self._head_time.put(status.chain.block_timestamp)
        self._endpoints.set(len(status.chain.endpoints))
        self._endpoints_fit.set(sum(not each.problem for each in status.chain.endpoints))
        self._relay_reached.put(status.relay.reached if status.acting else None)
        self._observe_endpoints(status.chain.endpoints)

    def _observe_endpoints(self, endpoints: Iterable[EndpointStatus]) -> None:
        """Who doesn't act asks none, so that nothing is known of them."""
        here = {each.name: each for each in endpoints}
        for gone in self._endpoint_names - here.keys():
            for gauge in (self._endpoint_up, self._endpoint_seconds, self._endpoint_head):
                gauge.remove(gone)
        self._endpoint_names = frozenset(here)
        for name, each in here.items():
            self._endpoint_up.labels(name).set(not each.problem)
            put(self._endpoint_seconds, (name,), each.seconds)
            put(self._endpoint_head, (name,), each.head)
