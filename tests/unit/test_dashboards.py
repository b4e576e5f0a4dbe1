"""The dashboards are what the code makes, complete, and tied to no datasource."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.watching import DASHBOARDS, ROOT, dashboard, panels

FOLDER = ROOT / "configs" / "grafana"
every_dashboard = pytest.mark.parametrize("file", DASHBOARDS, ids=lambda file: file.stem)


def check(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(folder / "generate.py"), "--check"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_files_are_what_the_code_makes() -> None:
    done = check(FOLDER)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_file_that_was_edited_or_left_behind_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "grafana"
    shutil.copytree(FOLDER, folder)
    made = folder / "dashboards" / "money.json"
    made.write_text(made.read_text().replace("Earned", "Gained"))
    (folder / "dashboards" / "old.json").write_text("{}")
    done = check(folder)
    assert done.returncode == 1
    assert "money.json, old.json" in done.stdout


def shown(file: Path) -> list[dict[str, Any]]:
    return [panel for panel in panels(dashboard(file)) if panel["type"] != "row"]


@every_dashboard
def test_every_panel_has_a_unit_a_description_and_a_legend(file: Path) -> None:
    for panel in shown(file):
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        for target in panel["targets"]:
            legend = target["legendFormat"]
            assert legend != "__auto" or panel["type"] in {"stat", "table"}, panel["title"]


@every_dashboard
def test_the_datasource_is_a_choice(file: Path) -> None:
    found = dashboard(file)
    variables = found["templating"]["list"]
    assert (variables[0]["name"], variables[0]["type"]) == ("datasource", "datasource")
    sources = [panel["datasource"] for panel in shown(file)]
    sources += [target["datasource"] for panel in shown(file) for target in panel["targets"]]
    sources += [mark["datasource"] for mark in found["annotations"]["list"]]
    sources += [each["datasource"] for each in variables[1:]]
    assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)


@every_dashboard
def test_windows_follow_the_scrape_interval(file: Path) -> None:
    for panel in shown(file):
        for target in panel["targets"]:
            assert "$__interval" not in target["expr"], panel["title"]
            if "rate(" in target["expr"]:
                assert "[$__ra" in target["expr"], panel["title"]  # _rate_interval, or _range


@every_dashboard
def test_panels_have_ids_and_do_not_overlap(file: Path) -> None:
    found = list(panels(dashboard(file)))
    assert [panel["id"] for panel in found] == list(range(1, len(found) + 1))
    cells = [
        {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        for place in (panel["gridPos"] for panel in found)
    ]
    assert all(x < 24 for cell in cells for x, _ in cell)
    assert not any(one & other for one, other in itertools.combinations(cells, 2))


def test_each_has_its_own_name() -> None:
    names = [dashboard(file)["uid"] for file in DASHBOARDS]
    assert names == ["crynux-chain", "crynux-fleet", "crynux-gpu", "crynux-money"]


def test_provisioning_is_what_grafana_reads() -> None:
    folder = FOLDER / "provisioning"
    (provider,) = yaml.safe_load((folder / "dashboards" / "crynux-cluster.yaml").read_text())[
        "providers"
    ]
    assert (provider["type"], provider["allowUiUpdates"]) == ("file", False)
    (source,) = yaml.safe_load((folder / "datasources" / "prometheus.yaml").read_text())[
        "datasources"
    ]
    assert source["type"] == "prometheus"
    assert "uid" not in source
