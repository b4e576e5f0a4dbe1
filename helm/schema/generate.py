"""Writes values.schema.json and README.md of the chart."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from helm.schema.kinds import Schema
from helm.schema.operator import ROOT
from helm.schema.values import schema

CHART: Final = ROOT / "helm" / "crynux-cluster"

HEAD = """# crynux-cluster

<!-- Written by helm/schema: change it there, and run `make docs`. -->

The Helm chart of crynux-cluster: a RayCluster for KubeRay 1.6 or newer, with the operator's
supervisor in the head pod. Install, upgrade and the rest: docs/kubernetes.md in the project. Rules
and dashboards are symbolic links into its `configs/`, which Helm follows; `helm package` puts the
files themselves into the chart.

Required: both `image.*.repository`, `identity.existingSecret`, `network.existingSecret`,
`api.existingSecret`, `config.network.chain_id`, `config.network.contracts.*`, and an entry in
`gpuGroups`.

| value | default | what |
|---|---|---|
"""


def rows(node: Schema, prefix: str, defaults: object) -> Iterator[tuple[str, str, str]]:
    for name, child in node["properties"].items():
        path = f"{prefix}{name}"
        given = defaults.get(name) if isinstance(defaults, dict) else None
        if child.get("properties"):
            yield from rows(child, f"{path}.", given)
        else:
            yield path, shown(given), child["description"]


def shown(default: object) -> str:
    return "" if default in (None, "", {}, []) else f"`{json.dumps(default)}`"


def readme(found: Schema, values: Mapping[str, Any], group_defaults: Mapping[str, Any]) -> str:
    lines = [f"| `{path}` | {default} | {about} |" for path, default, about in table(found, values)]
    entries = rows(found["properties"]["gpuGroups"]["items"], "", group_defaults)
    lines += ["", "An entry of `gpuGroups`:", "", "| value | default | what |", "|---|---|---|"]
    lines += [f"| `{path}` | {default} | {about} |" for path, default, about in entries]
    return HEAD + "\n".join(lines) + "\n"


def table(found: Schema, values: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    for path, default, about in rows(found, "", values):
        if path.startswith("config."):
            about, _, default = about.rpartition(". Default: ")
        yield path, default, about


def group_defaults() -> dict[str, Any]:
    """The defaults of an entry, as the chart's helper has them."""
    helpers = (CHART / "templates" / "_helpers.tpl").read_text(encoding="utf-8")
    (said,) = re.findall(r"\$defaults := (dict\n.*?)\n-}}", helpers, re.DOTALL)
    words = re.findall(r"\(|\)|\"[^\"]*\"|[^\s()]+", said)
    return _dict(iter(words[1:]))


def _dict(words: Iterator[str]) -> dict[str, Any]:
    """What follows the word `dict`, until its bracket closes."""
    found: dict[str, Any] = {}
    for word in words:
        if word == ")":
            break
        found[json.loads(word)] = _value(words)
    return found


def _value(words: Iterator[str]) -> Any:  # noqa: ANN401 - as in JSON
    word = next(words)
    if word == "(":
        assert next(words) == "dict"  # noqa: S101
        return _dict(words)
    return [] if word == "list" else json.loads(word)


def written() -> dict[Path, str]:
    """The files, and what must stand in them."""
    found = schema()
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    return {
        CHART / "values.schema.json": json.dumps(found, indent=1) + "\n",
        CHART / "README.md": readme(found, values, group_defaults()),
    }


if __name__ == "__main__":
    for file, content in written().items():
        file.write_text(content, encoding="utf-8")
