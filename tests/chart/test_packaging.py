"""One source for rules and dashboards: symbolic links, which Helm follows into its package too."""

from __future__ import annotations

import os
import re
import shutil
import tarfile
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import cluster
from tests.chart.cases import values_of
from tests.chart.charts import CHART, Refused, case, of_kind, render, run
from tests.chart.tools import ROOT
from tests.prometheus_tools import promtool

CONFIGS = ROOT / "configs"
SOURCES = {
    "files/rules.yaml": CONFIGS / "prometheus" / "rules.yaml",
    **{
        f"files/dashboards/{file.name}": file
        for file in (CONFIGS / "grafana" / "dashboards").glob("*.json")
    },
}


def test_rules_and_dashboards_are_the_files_of_configs() -> None:
    objects = render(case(values_of("monitored")))
    (rules,) = of_kind(objects, "PrometheusRule")
    assert rules["spec"] == yaml.safe_load(SOURCES["files/rules.yaml"].read_text())
    found: dict[str, Any] = {}
    for each in of_kind(objects, "ConfigMap"):
        found |= {key: text for key, text in each["data"].items() if key.endswith(".json")}
    wanted = {f"crynux-{file.name}": file for file in SOURCES.values() if file.suffix == ".json"}
    assert len(wanted) >= 4
    assert found == {name: file.read_text() for name, file in wanted.items()}


def test_promtool_takes_the_rules_as_they_are_rendered(tmp_path: Path) -> None:
    (rules,) = of_kind(render(case(values_of("monitored"))), "PrometheusRule")
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump(rules["spec"]), encoding="utf-8")
    count = sum(len(group["rules"]) for group in rules["spec"]["groups"])
    said = promtool("check", "rules", "--lint=all", "--lint-fatal", file)
    assert f"{count} rules found" in said


def test_the_chart_holds_links_and_no_copies() -> None:
    for name, source in SOURCES.items():
        assert (CHART / name).resolve() == source
    links = [file for file in (CHART / "files").iterdir() if file.is_symlink()]
    assert len(links) == len(list((CHART / "files").iterdir()))
    for link in links:
        target = link.readlink()
        assert not target.is_absolute()
        # Argo CD refuses a link that leads out of the repository.
        assert (link.parent / target).resolve().is_relative_to(ROOT)


@pytest.mark.parametrize("major", [3, 4])
def test_a_package_holds_the_files_themselves_and_renders_the_same(
    major: int, tmp_path: Path
) -> None:
    run(major, "package", CHART, "--destination", tmp_path)
    (package,) = tmp_path.glob("*.tgz")
    with tarfile.open(package) as archive:
        members = {each.name: each for each in archive.getmembers()}
        assert all(each.isfile() for each in members.values())
        for name, source in SOURCES.items():
            held = archive.extractfile(members[f"crynux-cluster/{name}"])
            assert held is not None
            assert held.read() == source.read_bytes()
    values = values_of("monitored")
    assert render(case(values, major=major, chart=package)) == render(case(values, major=major))


def test_a_checkout_whose_links_were_dropped_says_so(tmp_path: Path) -> None:
    """As Flux drops them, and Windows may: no rules would be installed, and nobody would know."""
    chart = tmp_path / CHART.name
    shutil.copytree(CHART, chart, symlinks=True)
    for link in (chart / "files").iterdir():
        link.unlink()
    with pytest.raises(Refused, match=r"symbolic links were dropped.*helm package"):
        render(case(values_of("monitored"), chart=chart))
    assert render(case(values_of("single-server"), chart=chart))


def test_the_chart_names_the_versions_that_it_was_made_for() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    assert chart["appVersion"] == cluster.__version__
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (ray,) = (each for each in project["dependencies"] if each.startswith("ray"))
    assert chart["annotations"]["crynux-cluster/ray"] == ray.partition("==")[2]


def test_the_templates_ask_nothing_of_a_cluster() -> None:
    """Under GitOps there is none when they are rendered."""
    for file in sorted((CHART / "templates").rglob("*")):
        if file.is_dir():
            continue
        text = file.read_text(encoding="utf-8")
        code = " ".join(re.findall(r"\{\{.*?\}\}", text, re.DOTALL))
        for word in (r"\.Capabilities\b", r"\blookup\b", r"\bnow\b", r"\brand\w+\b", r"\btpl\b"):
            assert not re.search(word, code), f"{file.name}: {word}"


def test_nothing_of_the_chart_is_left_behind_by_git() -> None:
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    assert not [each for each in ignored if "helm" in each or each == "files/"]
    assert not any(os.path.islink(file) for file in (CHART / "templates").rglob("*"))
