"""Hypothesis profiles, and which tests may run in several processes at once.

`ci` gives the same examples in every run, `dev` looks for new ones.

Integration tests wait for blocks most of their time, so several processes share them (pytest-xdist,
`--dist loadgroup`). Tests that share something costly (a chain, an operator) stay together: those
of the running operator, wherever they are, and those of a file that has a fixture of its own for
more than one test. All others go wherever there is time.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest
from hypothesis import settings

settings.register_profile("ci", derandomize=True, deadline=None, database=None)
settings.register_profile("dev", deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

OPERATOR = "running_operator"


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    for item in items:
        group = _shared(item)
        if group is not None:
            item.add_marker(pytest.mark.xdist_group(group))


def _shared(item: pytest.Item) -> str | None:
    """The name of what it shares with other tests; None for one that stands alone."""
    if not isinstance(item, pytest.Function):
        return None
    found = item._fixtureinfo.name2fixturedefs
    if OPERATOR in found:
        return OPERATOR
    ours = (each for defs in found.values() for each in defs if each.baseid.startswith("tests"))
    return item.path.stem if any(each.scope != "function" for each in ours) else None
