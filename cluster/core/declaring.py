"""Which models a node account still has to declare on the network (protocol.md, section 1).

The network prefers, for a task, nodes that have said they hold its models; an account joins with
what its class holds then, and reports what has come since. Said once is enough, and what has gone
since can't be taken back: then the model is fetched again when a task asks for it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from cluster.core.types import AccountView, Address, GpuClass, ModelId, NodeStatus

_JOINED = frozenset({NodeStatus.AVAILABLE, NodeStatus.BUSY})


def reports(
    views: Iterable[AccountView],
    here: Mapping[GpuClass, Collection[ModelId]],
    sent: Collection[tuple[Address, ModelId]],
    silent: Collection[Address] = (),
) -> tuple[tuple[Address, ModelId], ...]:
    """One report for each account at most, what was not `sent` yet; by name, so always the same.
    `silent` accounts have something else to say, or a report on its way: they wait with it."""
    found: list[tuple[Address, ModelId]] = []
    for view in views:
        facts = view.account
        if facts.status not in _JOINED or facts.gpu_class is None or facts.address in silent:
            continue
        lacking = sorted(
            model
            for model in here.get(facts.gpu_class, ())
            if model not in facts.models and (facts.address, model) not in sent
        )
        if lacking:
            found.append((facts.address, lacking[0]))
    return tuple(found)
