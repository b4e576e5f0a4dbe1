"""What configs/ watches by: the expressions of rules and dashboards, as they stand in the files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
PROMETHEUS = ROOT / "configs" / "prometheus"
RULES = PROMETHEUS / "rules.yaml"
DASHBOARDS = sorted((ROOT / "configs" / "grafana" / "dashboards").glob("*.json"))
VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


@dataclass(frozen=True, slots=True)
class Asked:
    """An expression, and whose it is: file, panel or alert."""

    where: str
    expression: str


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def dashboard(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def panels(found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows and all, those in folded rows too."""
    for panel in found["panels"]:
        yield panel
        yield from panel.get("panels") or ()


def asked_by(file: Path) -> Iterator[Asked]:
    """Everything a dashboard asks of Prometheus as an expression."""
    found = dashboard(file)
    for panel in panels(found):
        for target in panel.get("targets") or ():
            yield Asked(f"{file.stem}: {panel['title']}", target["expr"])
    for mark in found["annotations"]["list"]:
        yield Asked(f"{file.stem}: marks {mark['name']}", mark["expr"])


def asked() -> list[Asked]:
    found = [Asked(rule["alert"], rule["expr"]) for rule in alerts()]
    return found + [each for file in DASHBOARDS for each in asked_by(file)]


def filled(expression: str, values: Mapping[str, str]) -> str:
    """With Grafana's variables replaced; raises `KeyError` for one without a value."""
    return VARIABLE.sub(lambda match: values[match[1] or match[2]], expression)
