"""Every example and every switch, rendered by real Helm, keeps every policy."""

from __future__ import annotations

import json
import re

import pytest

from tests.chart.cases import NAMES, problems, rendered, values_of
from tests.chart.charts import CHART, EXAMPLES, case, notes, render, run


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_wrong_with_what_is_rendered(name: str) -> None:
    values = values_of(name)
    assert list(problems(rendered(case(values), values))) == []


@pytest.mark.parametrize("name", NAMES)
def test_both_helms_render_the_same(name: str) -> None:
    values = values_of(name)
    three, four = (render(case(values, major=major)) for major in (3, 4))
    key = [(each["kind"], each["metadata"]["name"]) for each in three]
    assert dict(zip(key, three, strict=True)) == {
        (each["kind"], each["metadata"]["name"]): each for each in four
    }


@pytest.mark.parametrize("major", [3, 4])
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_pass_helms_strict_linter(name: str, major: int) -> None:
    said = run(major, "lint", "--strict", CHART, "--values", EXAMPLES[name])
    assert "0 chart(s) failed" in said


@pytest.mark.parametrize("name", EXAMPLES)
def test_where_it_is_installed_changes_nothing(name: str) -> None:
    values = values_of(name)
    here, there = case(values), case(values, namespace="elsewhere")
    assert render(here) == render(there)


def test_a_site_without_the_internet_has_no_way_to_it() -> None:
    policies = [x for x in render(case(values_of("air-gapped"))) if x["kind"] == "NetworkPolicy"]
    assert len(policies) == 3
    assert not re.search(r"0\.0\.0\.0/0|::/0", json.dumps(policies))


TOLD = {
    "suspended": "It is suspended",
    "postgresql and no volume": "a head that dies loses those, and their fees",
    "reads are open": "nobody may act through it",
    "redis": "kubectl -n gpu delete raycluster site-crynux-cluster --wait",
    "simulated cards": "Fault tolerance by Redis is off",
    "many cards": "8 cards may come, and identity.accounts is 2",
    "no network policies": "Ray's ports are guarded by its token alone",
    "an ingress": "http://crynux.example.org",
    "another port": "needs an ipBlock there",
} | dict.fromkeys(EXAMPLES, "A change of values or of the version makes all pods anew")


@pytest.mark.parametrize("name", TOLD)
def test_the_notes_tell_what_to_do_and_what_was_chosen(name: str) -> None:
    said = notes(case(values_of(name)))
    assert TOLD[name] in said
    assert "crynux doctor --config /etc/crynux-cluster/config/operator.yaml" in said
    for gap in ("<no value>", "<nil>", "%!", "ports  "):
        assert gap not in said
