"""Hypothesis profiles, and which tests may run in several processes at once.

`ci` gives the same examples in every run, `dev` looks for new ones.

Integration tests wait for blocks most of their time, so several processes share them (pytest-xdist,
`--dist loadgroup`). Tests that share something costly (a chain, an operator) stay together: those
of the running operator, wherever they are, and those of a file that has a fixture of its own for
more than one test. All others go wherever there is time. Two clusters of Ray with all that belongs
to them are too much for a small machine, so the tests of the pods go one after the other with the
running operator's.
"""

from __future__ import annotations

import os
from collections.abc import Container, Sequence

import pytest
from hypothesis import settings

settings.register_profile("ci", derandomize=True, deadline=None, database=None)
settings.register_profile("dev", deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

OPERATOR = "running_operator"
CLUSTERS = frozenset({OPERATOR, "kube"})
"""Fixtures that are whole clusters: their tests are one group."""


# First: xdist reads the groups in a hook of the same name.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, items: Sequence[pytest.Item]) -> None:
    costly = {
        each.baseid
        for found in session._fixturemanager._arg2fixturedefs.values()
        for each in found
        if each.scope != "function"
    }
    for item in items:
        group = _shared(item, costly)
        if group is not None:
            item.add_marker(pytest.mark.xdist_group(group))


def _shared(item: pytest.Item, costly: Container[str]) -> str | None:
    """The name of what it shares with other tests; None for one that stands alone."""
    if not CLUSTERS.isdisjoint(getattr(item, "fixturenames", ())):
        return "clusters"
    return item.path.stem if item.nodeid.partition("::")[0] in costly else None
