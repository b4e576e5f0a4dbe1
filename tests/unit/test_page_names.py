"""The page's own tables name what Python names, and nothing else."""

from __future__ import annotations

import re
from importlib import resources

from cluster.core.types import GpuState, NodeStatus

VIEWS = (resources.files("cluster.api") / "page" / "views.js").read_text(encoding="utf-8")
SIGNS = {"good", "busy", "warn", "bad"}


def table(name: str) -> dict[str, str]:
    """A constant of the page: an object of words to words."""
    found = re.search(rf"const {name} = \{{(.*?)\}};", VIEWS, re.DOTALL)
    assert found is not None, name
    return dict(re.findall(r"(\w+): \"(\w+)\"", found[1]))


def test_each_state_of_a_card_has_its_sign() -> None:
    kinds = table("GPU_KIND")
    assert kinds.keys() == {state.value for state in GpuState}
    assert set(kinds.values()) <= SIGNS
    # What was wanted isn't marked as broken, and what is broken is.
    assert kinds["drained"] == "warn"
    assert kinds["unreachable"] == kinds["quarantined"] == "bad"


def test_each_status_of_an_account_has_its_sign() -> None:
    kinds = table("ACCOUNT_KIND")
    assert kinds.keys() == {status.name.lower() for status in NodeStatus} | {"unknown"}
    assert set(kinds.values()) <= SIGNS
