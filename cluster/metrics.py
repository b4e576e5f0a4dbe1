"""Prometheus metrics of the coordinator, in a registry of their own (one scrape for everything).

Counters and histograms are fed as things happen, and start at 0 when the coordinator does; gauges
are set from a `Status`, and have no sample while what they tell isn't known. Every label set that
can be known is there from the start, at 0, because `increase()` misses a series that is born at 1;
a state is a label, with all states exported. Labels are bounded: no task, no attempt, no prompt, no
address ever becomes one.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter as Count
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Literal, get_args

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from cluster.card_metrics import CardMetrics
from cluster.chain.outbox_ports import ChainEvent
from cluster.core.record import Fault, Outcome, Progress, TaskRecord
from cluster.core.types import (
    Address,
    Commitment,
    GpuClass,
    GpuState,
    NodeStatus,
    TaskType,
    Tier,
    Timestamp,
    Wei,
)
from cluster.gauges import Known
from cluster.network_metrics import NetworkMetrics
from cluster.stages import Stage, stages
from cluster.status import (
    AccountStatus,
    FleetStatus,
    GpuClassView,
    GpuStatus,
    Status,
    TaskView,
)
from cluster.store_metrics import StoreMetrics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

CanaryResult = Literal[
    "passed", "provisional", "recorded", "disputed", "quarantined", "failed", "impossible"
]
"""What became of a card's canary (`cluster.inference.canary.Verdict`), or why there was none."""
VerifyResult = Literal["equal", "odd", "differ", "alone"]
"""Of a task that was to be computed twice: all agreed, one was outvoted, nobody knows, or no second
card was to be had."""

CLOSED_KEPT = 4096
WEI_PER_CNX = 10**18
_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
_LAGS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_SLACK = (0, 5, 10, 20, 40, 80, 160, 320, 640, 1280)
Kind = tuple[str, int]
"""A class of card: name and whole GB."""
_NO_CLASS: Kind = ("", 0)
_CLASS_LABELS = ("gpu_name", "vram_gb")


class Metrics:
    """What the coordinator reports; `render` gives the text of one scrape."""

    def __init__(self, version: str, config_digest: str, network: str = "") -> None:
        """`network`: chain and contracts. Whose accounts these are is told by that and the key,
        because one key may well serve two networks."""
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._served = network
        self._classes: set[Kind] = set()
        self._class_by_account: Mapping[str, Kind] = {}
        self._closed: dict[Commitment, Outcome] = {}
        """The last tasks that were counted: a reorganisation has some close again."""
        self._make_task_metrics()
        self._make_fleet_metrics()
        self.network = NetworkMetrics(self.registry)
        self.stores = StoreMetrics(self.registry)
        self._build = self._gauge("build_info", "What runs here.", ("version", "config_digest"))
        self._build.labels(version, config_digest).set(1)
        ProcessCollector(namespace="crynux", registry=self.registry)

    # --- what happens ---------------------------------------------------------------------------

    def closed(self, record: TaskRecord) -> None:
        """A task's end, and how long each stage took as far as its record tells."""
        if record.outcome is None:
            return
        before = self._closed.pop(record.commitment, None)
        self._closed[record.commitment] = record.outcome
        if len(self._closed) > CLOSED_KEPT:
            del self._closed[next(iter(self._closed))]
        if before is record.outcome:
            return
        self._tasks.labels(record.task_type.name, record.outcome.value).inc()
        self._paid.labels(*self._class_of(record.account)).inc(record.payment / WEI_PER_CNX)
        # What was done until then has been counted.
        for stage, seconds in stages(record) if before is None else ():
            self.stage_took(stage, record.task_type, seconds)

    def stage_took(self, stage: Stage, task_type: TaskType, seconds: float) -> None:
        self._stages.labels(stage, task_type.name).observe(max(seconds, 0.0))

    def attempt_ended(self, fault: Fault | None, card: str = "") -> None:
        """An execution ended: with a result when `fault` is None. `card` is the UUID."""
        self._attempts.labels(fault.value if fault is not None else "none").inc()
        if fault in _OF_CARDS and card:
            self.cards.failed(card)

    def computed(self, tier: Tier) -> None:
        """A result came of a card that had what it needed in this tier."""
        self._tiers.labels(tier.value).inc()

    def score_sent(self, task_type: TaskType, slack: float | None) -> None:
        """A score is sent, so many seconds before it would be too late."""
        if slack is not None:
            self._slack.labels(task_type.name).observe(slack)

    def happened(self, event: ChainEvent) -> None:
        self._chain_events.labels(event).inc()

    def spent(self, account: Address, wei: Wei) -> None:
        """Gas of a transaction that was mined."""
        self._gas.labels(*self._class_of(account)).inc(wei / WEI_PER_CNX)

    def slashed(self) -> None:
        self._slashes.inc()

    def term_broke(self) -> None:
        """A term of office ended of what it shouldn't, and the next begins in the same process."""
        self._terms_broken.inc()

    def kicked_out(self) -> None:
        self._kick_outs.inc()

    def canary(self, result: CanaryResult) -> None:
        self._canaries.labels(result).inc()

    def canary_every(self, seconds: float) -> None:
        """So often the schedule asks a card; 0 for never."""
        self._canary_interval.put(seconds or None)

    def verified(self, result: VerifyResult) -> None:
        self._verifications.labels(result).inc()

    def lagged(self, seconds: float) -> None:
        """Something that was due in the coordinator's loop had its turn so much later."""
        self._lag.observe(seconds)

    def turn_ended(self, now: Timestamp) -> None:
        """The coordinator's loop is alive; `now` is unix time."""
        self._turn.put(now)

    def belong(self, accounts: Mapping[str, GpuClass]) -> None:
        """Whose account is of which class, for what is counted before the first look."""
        self._class_by_account = {each: (kind.name, kind.vram) for each, kind in accounts.items()}

    # --- what is --------------------------------------------------------------------------------

    def observe(self, status: Status) -> None:
        """Set every gauge from one look at everything."""
        self._observe_identity(status.identity.treasury)
        self._ready.set(status.ready)
        self._lease_held.set(status.acting)
        self._lease_epoch.set(status.epoch or 0)
        if not status.acting:
            self._turn.put(None)
        self._problems.set(len(status.problems))
        self.network.observe(status)
        self._observe_fleet(status.gpus, status.accounts)
        self._observe_money(status.fleet, status.accounts)
        self.cards.observe(status.gpus)
        self._observe_tasks(status.tasks)
        self.stores.observe(status.stores)

    def render(self) -> bytes:
        """Prometheus' text format 0.0.4 (`CONTENT_TYPE`)."""
        return prometheus_client.generate_latest(self.registry)

    # --- inside ---------------------------------------------------------------------------------

    def _observe_identity(self, treasury: str) -> None:
        if treasury:
            said = f"{self._served}|{treasury}".lower()
            digest = hashlib.sha256(said.encode()).hexdigest()
            self._identity.labels(digest[:12]).set(1)

    def _observe_fleet(self, gpus: Iterable[GpuStatus], accounts: Iterable[AccountStatus]) -> None:
        cards = Count(((gpu.name, gpu.vram), gpu.state) for gpu in gpus)
        nodes: dict[Kind, list[AccountStatus]] = {}
        for account in accounts:
            nodes.setdefault(_kind(account.gpu_class), []).append(account)
        # A class that is gone stays, at 0.
        for kind in {kind for kind, _ in cards} | nodes.keys():
            self._know_class(kind)
        self._class_by_account = {each.address: kind for kind in nodes for each in nodes[kind]}
        for kind in self._known_classes():
            labels = _labels(kind)
            for state in GpuState:
                self._gpus.labels(*labels, state.value).set(cards[kind, state])
            ours = nodes.get(kind, [])
            stand = Count(account.status.lower() for account in ours)
            for node_status in NodeStatus:
                label = node_status.name.lower()
                self._accounts.labels(*labels, label).set(stand[label])
            stake = sum(int(account.stake) for account in ours)
            self._stake.labels(*labels).set(stake / WEI_PER_CNX)
            total = sum(int(account.balance) for account in ours)
            self._balance.labels(*labels, "sum").set(total / WEI_PER_CNX)
            serving = [account for account in ours if account.status.lower() in _SERVING]
            lowest = min((int(account.balance) for account in serving), default=0)
            self._balance.labels(*labels, "lowest").set(lowest / WEI_PER_CNX)
            scores = [account.qos for account in serving]
            self._qos.labels(*labels, "lowest").set(min(scores, default=0))
            self._qos.labels(*labels, "mean").set(fmean(scores) if scores else 0)

    def _observe_money(self, fleet: FleetStatus, accounts: Iterable[AccountStatus]) -> None:
        treasury = None if fleet.treasury is None else int(fleet.treasury) / WEI_PER_CNX
        self._treasury.put(treasury)
        self._lacks.set(len(fleet.lacks))
        self._held.set(len(fleet.held))
        planned = {(each.name, each.vram): each for each in fleet.classes}
        for kind in planned.keys() | set(self._known_classes()):
            labels, found = _labels(kind), planned.get(kind)
            self._wanted.labels(*labels).set(0 if found is None else found.least)
            self._stopped.labels(*labels).set(found is not None and found.stopped)
        serving = [each for each in accounts if each.status in _SERVING]
        short = sum(int(each.stake) < int(fleet.stake) for each in serving)
        self._understaked.set(short)

    def _class_of(self, account: str) -> tuple[str, str]:
        kind = self._class_by_account.get(account, _NO_CLASS)
        self._know_class(kind)
        return _labels(kind)

    def _know_class(self, kind: Kind) -> None:
        """From now on the class has all its series, at 0."""
        if kind not in self._classes:
            self._classes.add(kind)
            for counter in (self._paid, self._gas):
                counter.labels(*_labels(kind))

    def _known_classes(self) -> tuple[Kind, ...]:
        """As they are now: gauges are set in a thread, and the loop may come to know another."""
        return tuple(self._classes.copy())

    def _observe_tasks(self, tasks: Iterable[TaskView]) -> None:
        standing = [(task.type, task.progress) for task in tasks if task.outcome is None]
        for task_type in TaskType:
            for progress in _OPEN:
                count = standing.count((task_type.name, progress.value))
                self._open_tasks.labels(task_type.name, progress.value).set(count)

    def _make_task_metrics(self) -> None:
        types = [task_type.name for task_type in TaskType if task_type is not TaskType.SD_FT]
        self._tasks = self._counter(
            "tasks",
            "Tasks closed, by how they ended.",
            type=[task_type.name for task_type in TaskType],
            outcome=[o.value for o in Outcome],
        )
        self._stages = Histogram(
            "crynux_task_stage_seconds",
            "Time that tasks spent in each stage of their life.",
            ("stage", "type"),
            registry=self.registry,
            buckets=_SECONDS,
        )
        for stage in get_args(Stage):
            for task_type in types:
                self._stages.labels(stage, task_type)
        faults = ["none", *(fault.value for fault in Fault)]
        self._lag = Histogram(
            "crynux_loop_lag_seconds",
            "How late the coordinator's loop is, looked at twenty times a second.",
            registry=self.registry,
            buckets=_LAGS,
        )
        self._attempts = self._counter(
            "attempts", "Executions ended, by why they gave no result.", fault=faults
        )
        self._paid = Counter(
            "crynux_paid_cnx",
            "Payments received for tasks, in CNX, by the account's class.",
            _CLASS_LABELS,
            registry=self.registry,
        )
        self._slack = Histogram(
            "crynux_score_slack_seconds",
            "Time left when a score was sent until it would have been too late.",
            ("type",),
            registry=self.registry,
            buckets=_SLACK,
        )
        for task_type in types:
            self._slack.labels(task_type)
        self._tiers = self._counter(
            "results",
            "Results, by where what they needed lay when the card began.",
            tier=[tier.value for tier in Tier],
        )
        self._slashes = self._counter("slashes", "Accounts slashed.")
        self._kick_outs = self._counter("kick_outs", "Accounts kicked out for their QoS.")
        self._open_tasks = self._gauge(
            "open_tasks", "Tasks not closed, by how far we are.", ("type", "progress")
        )
        self._observe_tasks(())
        self._chain_events = self._counter(
            "chain_events",
            "Transactions replaced at a higher fee, those that vanished, and reorganisations.",
            event=get_args(ChainEvent),
        )
        self._gas = Counter(
            "crynux_gas_cnx",
            "Gas paid for transactions, in CNX, by the account's class.",
            _CLASS_LABELS,
            registry=self.registry,
        )

    def _make_fleet_metrics(self) -> None:
        self._gpus = self._gauge("gpus", "GPUs, by class and state.", (*_CLASS_LABELS, "state"))
        self._accounts = self._gauge(
            "accounts",
            "Node accounts, by class and status on the network.",
            (*_CLASS_LABELS, "status"),
        )
        self._stake = self._gauge("stake_cnx", "Stake of the accounts of a class.", _CLASS_LABELS)
        self._qos = self._gauge(
            "qos_score", "QoS of the accounts of a class that serve.", (*_CLASS_LABELS, "of")
        )
        self._wanted = self._gauge(
            "accounts_wanted", "Accounts that should serve, by class.", _CLASS_LABELS
        )
        self._stopped = self._gauge(
            "class_stopped",
            "1 when the class serves nothing because an account of it was slashed.",
            _CLASS_LABELS,
        )
        self._balance = self._gauge(
            "balance_cnx",
            "Balances of the accounts of a class; the lowest is of those that serve.",
            (*_CLASS_LABELS, "of"),
        )
        self._treasury = self._known("treasury_cnx", "Balance of the treasury.")
        self._lacks = self._gauge(
            "fleet_lacks", "What stands in the fleet's way and is the operator's to mend."
        )
        self._held = self._gauge(
            "accounts_held",
            "Accounts that aren't where they should be, or whose money is gone: left alone.",
        )
        self._understaked = self._gauge(
            "accounts_understaked", "Accounts that serve with less than the stake that is asked."
        )
        self.cards = CardMetrics(self.registry)
        self._canaries = self._counter(
            "canaries", "Canaries of cards, by what became of them.", result=get_args(CanaryResult)
        )
        self._canary_interval = self._known(
            "canary_interval_seconds", "How often the schedule asks each card its canary."
        )
        self._verifications = self._counter(
            "verifications",
            "Tasks that were to be computed twice, by what came of it.",
            result=get_args(VerifyResult),
        )
        self._identity = self._gauge(
            "identity_info", "1 for whose accounts these are, as a digest.", ("identity",)
        )
        self._ready = self._gauge("ready", "1 when tasks can be taken.")
        self._problems = self._gauge("problems", "Problems that the status names now.")
        self._lease_held = self._gauge("lease_held", "1 when this coordinator may act.")
        self._lease_epoch = self._gauge("lease_epoch", "Epoch of the lease held, or 0.")
        self._terms_broken = self._counter(
            "terms_broken", "Terms of office that ended of what they shouldn't."
        )
        self._turn = self._known(
            "coordinator_last_turn_timestamp_seconds", "Unix time when the loop last went round."
        )

    def _gauge(self, name: str, help_text: str, labels: tuple[str, ...] = ()) -> Gauge:
        return Gauge(f"crynux_{name}", help_text, labels, registry=self.registry)

    def _known(self, name: str, help_text: str) -> Known:
        return Known(f"crynux_{name}", help_text, registry=self.registry)

    def _counter(self, name: str, help_text: str, **labels: Iterable[str]) -> Counter:
        """A counter `crynux_<name>_total` with every combination of its labels' values at 0."""
        counter = Counter(f"crynux_{name}", help_text, tuple(labels), registry=self.registry)
        for values in itertools.product(*labels.values()) if labels else ():
            counter.labels(*values)
        return counter


def _kind(found: GpuClassView | None) -> Kind:
    return _NO_CLASS if found is None else (found.name, found.vram)


def _labels(kind: Kind) -> tuple[str, str]:
    name, vram = kind
    return name, str(vram)


_OF_CARDS = frozenset({Fault.DEVICE, Fault.MEMORY, Fault.LOST})
_SERVING = frozenset({"available", "busy"})
_OPEN = tuple(progress for progress in Progress if progress is not Progress.CLOSED)
