"""Alerts and their paragraphs; and that what rules and dashboards ask for is there to be had."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from cluster.core.types import Timestamp
from cluster.metrics import Metrics
from tests.unit.metric_fakes import large
from tests.watching import DASHBOARDS, PROMETHEUS, ROOT, Asked, alerts, asked, dashboard

PAGE = (ROOT / "docs" / "alerts.md").read_text(encoding="utf-8")
OF_TARGETS = frozenset({"cluster", "job", "instance"})
OPEN = frozenset({"gpu_uuid", "gpu", "ray_node", "gpu_name", "endpoint", "identity", "version"})
"""Labels whose values differ from site to site."""
OTHERS = frozenset({"up", "ALERTS"})
"""What isn't the operator's: Prometheus' own, and dcgm-exporter's (DCGM_…)."""


def paragraphs() -> dict[str, str]:
    parts = re.split(r"^## (\w+)\n", PAGE, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_every_alert_has_a_paragraph_and_every_paragraph_an_alert() -> None:
    names = [rule["alert"] for rule in alerts()]
    assert len(names) == len(set(names))
    assert set(paragraphs()) == set(names)


def test_every_alert_says_how_urgent_it_is_what_is_wrong_and_where_its_paragraph_is() -> None:
    for rule in alerts():
        name, said = rule["alert"], rule["annotations"]
        assert name.startswith("Crynux")
        assert set(said) == {"summary", "description", "runbook"}
        assert not said["summary"].endswith(".")
        assert said["description"].endswith(".")
        assert said["runbook"] == f"docs/alerts.md#{name.lower()}"
        word = {"page": "Page.", "ticket": "Ticket."}[rule["labels"]["severity"]]
        assert paragraphs()[name].strip().startswith(word)


def test_few_alerts_wake_anybody_and_only_the_slashed_at_once() -> None:
    pages = [rule for rule in alerts() if rule["labels"]["severity"] == "page"]
    assert len(pages) <= 11
    assert [rule["alert"] for rule in pages if "for" not in rule] == ["CrynuxNodeSlashed"]


def test_every_alert_has_a_case_where_it_fires_and_one_where_it_does_not() -> None:
    file = PROMETHEUS / "rules_test.yaml"
    cases = yaml.safe_load(file.read_text(encoding="utf-8"))["tests"]
    found: Counter[tuple[str, bool]] = Counter()
    for case in cases:
        for test in case["alert_rule_test"]:
            found[test["alertname"], bool(test["exp_alerts"])] += 1
    wanted = {(rule["alert"], fires) for rule in alerts() for fires in (True, False)}
    assert set(found) == wanted


# --- every metric, label and value that is asked for exists -------------------------------------

Known = dict[str, dict[str, set[str]]]


@pytest.fixture(scope="module")
def known() -> Known:
    """The values of each label of each metric that the operator gives."""
    metrics = Metrics("1", "d")
    metrics.observe(large(8))
    metrics.turn_ended(Timestamp(1.0))
    metrics.canary_every(3600.0)
    found: Known = defaultdict(lambda: defaultdict(set))
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            labels = found[sample.name]
            for label, value in sample.labels.items():
                labels[label].add(value)
    return found


def selectors(expression: str) -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    """Each metric that is named, and the conditions on its labels."""
    bare = re.sub(r'"[^"]*"', lambda match: '"' + "x" * (len(match[0]) - 2) + '"', expression)
    for match in re.finditer(r"\b((?:crynux|DCGM)_\w+|up|ALERTS)\b(\{[^}]*\})?", bare):
        inside = expression[match.start(2) : match.end(2)] if match[2] else ""
        yield match[1], re.findall(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"', inside)


def problems(each: Asked, known: Known) -> Iterator[str]:
    for metric, conditions in selectors(each.expression):
        if metric in OTHERS or metric.startswith("DCGM_"):
            continue
        if metric not in known:
            yield f"{each.where}: there is no {metric}"
            continue
        for label, operator, value in conditions:
            if label in OF_TARGETS:
                continue
            if label not in known[metric]:
                yield f"{each.where}: {metric} has no {label}"
            elif label not in OPEN:
                values = value.split("|") if operator in {"=~", "!~"} else [value]
                for absent in set(values) - known[metric][label]:
                    yield f"{each.where}: {metric} has no {label}={absent}"


def test_every_metric_label_and_value_that_is_asked_for_exists(known: Known) -> None:
    found = asked()
    assert len(found) > 100
    assert [problem for each in found for problem in problems(each, known)] == []


def test_one_that_does_not_exist_would_be_noticed(known: Known) -> None:
    for wrong in (
        "sum(crynux_card)",
        'crynux_gpus{stat="ready"}',
        'crynux_gpus{state=~"ready|bizy"}',
        'up{job="x"} == 0 or crynux_lease_held{gpu_name="x"}',
    ):
        assert list(problems(Asked("here", wrong), known)), wrong


def test_the_variables_of_the_dashboards_are_filled_from_what_exists(known: Known) -> None:
    for file in DASHBOARDS:
        for variable in dashboard(file)["templating"]["list"][1:]:
            query = variable["query"]["query"]
            match = re.fullmatch(r"label_values\((\w+)(\{.*\})?, (\w+)\)", query)
            assert match, query
            assert match[3] in known[match[1]].keys() | OF_TARGETS
            assert list(problems(Asked(file.stem, query), known)) == []


def test_every_metric_has_its_place_on_a_dashboard_or_in_a_rule(known: Known) -> None:
    """What nobody looks at needn't be measured."""
    named = {metric for each in asked() for metric, _ in selectors(each.expression)}
    stems = {re.sub(r"_(bucket|sum|count)$", "", name) for name in named}
    given = {re.sub(r"_(bucket|sum|count)$", "", name) for name in known}
    unseen = {name for name in given - stems if not name.startswith("crynux_process_")}
    assert unseen == {"crynux_chain_head_block", "crynux_store_models"}
