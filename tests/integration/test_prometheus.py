"""Rules and dashboards before the real Prometheus: it reads them, and finds what they ask for in a
running operator."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path
from typing import Any, cast

import pytest
import yaml

from cluster.chain.outbox_rows import RowState
from cluster.metrics import Metrics
from tests.integration.operator_world import TEST_SECONDS, OperatorWorld, task
from tests.prometheus_tools import Prometheus, prometheus, promtool
from tests.unit.metric_fakes import large
from tests.watching import DASHBOARDS, PROMETHEUS, RULES, Asked, alerts, asked, asked_by, filled

CONFIG = PROMETHEUS / "prometheus.yaml"
WINDOWS = {"__rate_interval": "1m", "__range": "10m", "cluster": ".*", "class": ".*"}
SILENT = {
    "gpu: Temperature": "a simulated card has none",
    "gpu: Memory errors": "a simulated card counts none",
    "gpu: Utilisation": "dcgm-exporter's",
    "gpu: Power": "dcgm-exporter's",
    "gpu: Clock": "dcgm-exporter's",
    "gpu: Xid": "dcgm-exporter's",
}
"""What finds nothing on a devnet, and why."""
MARKS = ("marks alerts", "marks restarts")
"""They find nothing as long as nothing goes wrong."""
DOWN = "CrynuxOperatorDown"
CANARY = "crynux_gpu_canary_timestamp_seconds"
"""A card alone in its class has none: nobody knows what is right."""
SCRAPES_SECONDS = 90.0
"""How long a scrape that came too late may spoil what is seen."""
REFUSED = "> 0"
"""How a panel ends that leaves out what never happened."""


def test_the_rules_have_no_fault_that_promtool_knows() -> None:
    promtool("check", "rules", "--lint=all", "--lint-fatal", RULES)


def test_each_alert_fires_when_it_should_and_not_when_it_should_not() -> None:
    assert "SUCCESS" in promtool("test", "rules", PROMETHEUS / "rules_test.yaml")


def test_an_alert_that_fires_too_late_would_be_noticed(tmp_path: Path) -> None:
    """By the cases of one that waits five minutes; all of them take half a minute."""
    text = RULES.read_text(encoding="utf-8")
    said = yaml.safe_load((PROMETHEUS / "rules_test.yaml").read_text(encoding="utf-8"))
    said["tests"] = [each for each in said["tests"] if each["name"].startswith(DOWN)]
    cases = tmp_path / "rules_test.yaml"
    cases.write_text(yaml.safe_dump(said), encoding="utf-8")
    (tmp_path / "rules.yaml").write_text(text, encoding="utf-8")
    assert "SUCCESS" in promtool("test", "rules", cases)
    (tmp_path / "rules.yaml").write_text(text.replace("for: 5m", "for: 50m"), encoding="utf-8")
    with pytest.raises(AssertionError, match=f"(?s)FAILED.*{DOWN}"):
        promtool("test", "rules", cases)


def test_what_two_coordinators_read_in_one_journal_is_counted_once(tmp_path: Path) -> None:
    """Three rows in each state are in a journal that two share, four in another operator's."""
    of_one = [("north-a", "k1", 3), ("north-b", "k1", 3), ("south", "k2", 4)]
    series = {}
    for name, identity, rows in of_one:
        target = f'job="crynux", instance="{name}", cluster="{name}"'
        series[f'crynux_identity_info{{{target}, identity="{identity}"}}'] = 1
        for state in RowState:
            series[f'crynux_outbox_rows{{{target}, state="{state.value}"}}'] = rows
    panels = {
        each.where.removeprefix("chain: "): filled(each.expression, WINDOWS)
        for each in asked_by(PROMETHEUS.parent / "grafana" / "dashboards" / "chain.json")
        if "crynux_outbox_rows" in each.expression
    }
    wanted = {
        "Writes under way": 3 * 7,
        "Writes by where they stand": 7,
        "Writes that came to nothing": 7,
    }
    assert panels.keys() == wanted.keys()
    case = {
        "interval": "1m",
        "input_series": [{"series": name, "values": f"{n}x2"} for name, n in series.items()],
        "promql_expr_test": [
            {
                "expr": f"max({panels[panel]})",
                "eval_time": "1m",
                "exp_samples": [{"labels": "{}", "value": value}],
            }
            for panel, value in wanted.items()
        ],
    }
    cases = tmp_path / "cases.yaml"
    cases.write_text(yaml.safe_dump({"tests": [case]}), encoding="utf-8")
    assert "SUCCESS" in promtool("test", "rules", cases)


def test_the_example_configuration_is_one_its_comments_too(tmp_path: Path) -> None:
    promtool("check", "config", CONFIG)
    token = tmp_path / "token"
    token.write_text("0123456789abcdef")
    (tmp_path / "rules.yaml").write_text(RULES.read_text(encoding="utf-8"))
    _, rest = CONFIG.read_text(encoding="utf-8").split("\nglobal:")
    said = re.sub(r"^( *)# ", r"\1", rest, flags=re.MULTILINE)
    file = tmp_path / "prometheus.yaml"
    file.write_text(f"global:{said}".replace("/etc/crynux-cluster/token", str(token)))
    promtool("check", "config", file)
    found = yaml.safe_load(file.read_text())
    assert found["alerting"]["alertmanagers"]
    assert found["scrape_configs"][0]["authorization"] == {"credentials_file": str(token)}


def test_what_256_cards_are_measured_by_is_as_prometheus_wants_it() -> None:
    metrics = Metrics("1", "d")
    metrics.observe(large(256))
    assert promtool("check", "metrics", said=metrics.render().decode()) == ""


def scraping(operator: OperatorWorld) -> dict[str, Any]:
    """The example's configuration, for this operator, and faster."""
    config = cast(dict[str, Any], yaml.safe_load(CONFIG.read_text(encoding="utf-8")))
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(RULES)]
    (job,) = config["scrape_configs"]
    job["scrape_timeout"] = "1s"
    job["static_configs"][0]["targets"] = [operator.devnet.operator_url.removeprefix("http://")]
    return config


@pytest.mark.timeout(TEST_SECONDS)
async def test_all_that_is_asked_is_understood_and_the_happy_path_has_data(
    operator: OperatorWorld, tmp_path: Path
) -> None:
    await operator.until_serving()
    with prometheus(tmp_path, scraping(operator)) as server:

        async def says(expression: str) -> bool:
            answer = await asyncio.to_thread(server.query, expression)
            return bool(answer.json()["data"]["result"])

        await operator.until(lambda: says("crynux_ready == 1"), "it was scraped")
        for report in await operator.send(task("watched"), task("watched-too", seed=2)).ended():
            await operator.assert_paid_once(report)
        earned = "sum(increase(crynux_paid_cnx_total[1d])) > 0"
        await operator.until(lambda: says(earned), "the payments were scraped")
        await operator.until(lambda: says(CANARY), "two cards of a class agreed on the canary")
        found = await asyncio.to_thread(complaints, server)
        deadline = time.monotonic() + SCRAPES_SECONDS
        while found and time.monotonic() < deadline:
            await asyncio.sleep(1)
            found = await asyncio.to_thread(complaints, server)
        assert found == []


def complaints(server: Prometheus) -> list[str]:
    """What isn't as it should be just now: a panel without data, an alert that has a reason."""
    cards = result(server, CANARY)
    if not cards:
        return ["no card has a canary"]
    values = WINDOWS | {"gpu": cards[0]["metric"]["gpu_uuid"]}
    said = {each: bool(result(server, filled(each.expression, values))) for each in asked()}
    panels = [each for file in DASHBOARDS for each in asked_by(file) if has_data(each)]
    found = [
        f"{each.where}: {'data' if said[each] else 'no data'}"
        for each in panels
        if said[each] is (each.where in SILENT)
    ]
    pages = {rule["alert"] for rule in alerts() if rule["labels"]["severity"] == "page"}
    found += [f"{each.where} has a reason" for each in said if each.where in pages and said[each]]
    groups = server.get("rules").json()["data"]["groups"]
    rules = {rule["name"]: rule for group in groups for rule in group["rules"]}
    assert rules.keys() == {rule["alert"] for rule in alerts()}
    found += [f"{name}: {rule}" for name, rule in rules.items() if rule["health"] != "ok"]
    return found + [f"{name} fires" for name, rule in rules.items() if rule["state"] == "firing"]


def has_data(each: Asked) -> bool:
    return not each.where.endswith(MARKS) and not each.expression.endswith(REFUSED)


def result(server: Prometheus, expression: str) -> list[dict[str, Any]]:
    answer = server.query(expression)
    body = answer.json()
    assert body["status"] == "success", f"{expression}: {body.get('error')}"
    return cast(list[dict[str, Any]], body["data"]["result"])
