"""The chart as Helm renders it: objects, and the pods that KubeRay would make of them."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import yaml

from tests.chart.tools import ROOT, helm

CHART: Final = ROOT / "helm" / "crynux-cluster"
EXAMPLES: Final = {file.stem: file for file in sorted((ROOT / "helm" / "examples").glob("*.yaml"))}
RELEASE, NAMESPACE = "site", "gpu"

Object = Mapping[str, Any]
Values = Mapping[str, Any]


# --- rendering ------------------------------------------------------------------------------------


class Refused(Exception):
    """Helm would not render it; the message is what it said."""


def run(major: int, *arguments: str | Path) -> str:
    """One call of Helm, which finds nothing of whoever runs the tests."""
    with tempfile.TemporaryDirectory() as folder:
        places = {f"HELM_{each}_HOME": folder for each in ("CACHE", "CONFIG", "DATA")}
        done = subprocess.run(
            [str(helm(major)), *map(str, arguments)],
            env={"PATH": os.environ["PATH"], "HOME": folder, "KUBECONFIG": "/dev/null", **places},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode != 0:
        raise Refused("\n".join(_said(done.stderr + done.stdout)))
    return done.stdout


def _said(output: str) -> Iterator[str]:
    """Without what it says of each symbolic link that it follows."""
    return (
        each for each in output.splitlines() if each.strip() and "found symbolic link" not in each
    )


@dataclass(frozen=True, slots=True)
class Case:
    """What is rendered: values (as JSON, so that a case can be a key), by which Helm, where."""

    values: str
    major: int = 4
    namespace: str = NAMESPACE
    release: str = RELEASE
    chart: Path = CHART


def case(values: Values, **others: Any) -> Case:  # noqa: ANN401 - as `Case` has them
    return Case(json.dumps(values, sort_keys=True), **others)


@cache
def render(what: Case) -> tuple[Object, ...]:
    """Its objects, in Helm's order. Raises `Refused`."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(what.values)
        file.flush()
        where = ["--namespace", what.namespace, "--values", file.name]
        text = run(what.major, "template", what.release, what.chart, *where)
    return tuple(each for each in yaml.load_all(text, Loader=_Loader) if each)  # noqa: S506


@cache
def notes(what: Case) -> str:
    """NOTES.txt, as `helm install` would print it."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(what.values)
        file.flush()
        dry = ["--dry-run=client", "--namespace", what.namespace, "--values", file.name]
        text = run(what.major, "install", what.release, what.chart, *dry)
    return text.split("\nNOTES:\n", 1)[1]


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"a key stands twice: {sorted(keys)}"
        return super().construct_mapping(node, deep)


# --- values ---------------------------------------------------------------------------------------


def example(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(EXAMPLES[name].read_text(encoding="utf-8"))
    return found


def defaults() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    return found


def merged(below: Values, above: Values) -> dict[str, Any]:
    """As Helm puts one file of values above another: lists are replaced, null removes."""
    found = copy.deepcopy(dict(below))
    for key, value in above.items():
        if isinstance(value, Mapping) and isinstance(found.get(key), Mapping):
            found[key] = merged(found[key], value)
        elif value is None:
            found.pop(key, None)
        else:
            found[key] = copy.deepcopy(value)
    return found


# --- objects --------------------------------------------------------------------------------------


def of_kind(objects: Sequence[Object], kind: str) -> list[Object]:
    return [each for each in objects if each["kind"] == kind]


def only(objects: Sequence[Object], kind: str) -> Object:
    (found,) = of_kind(objects, kind)
    return found


def name_of(found: Object) -> str:
    return f"{found['kind']} {found['metadata']['name']}"


@dataclass(frozen=True, slots=True)
class Pod:
    """`role`: head or worker of Ray, or other; `params`: Ray's start parameters."""

    name: str
    role: str
    labels: Mapping[str, str]
    spec: Mapping[str, Any]
    params: Mapping[str, str]
    annotations: Mapping[str, str]

    @property
    def containers(self) -> Sequence[Mapping[str, Any]]:
        found: Sequence[Mapping[str, Any]] = self.spec["containers"]
        return found

    @property
    def every_container(self) -> Iterator[Mapping[str, Any]]:
        yield from self.spec.get("initContainers", ())
        yield from self.containers

    def container(self, name: str) -> Mapping[str, Any]:
        (found,) = (each for each in self.every_container if each["name"] == name)
        return found

    @property
    def volumes(self) -> dict[str, Mapping[str, Any]]:
        return {each["name"]: each for each in self.spec.get("volumes", ())}

    def template(self) -> dict[str, Any]:
        """As a Pod, to be validated as one."""
        metadata = {"name": "x", "labels": dict(self.labels), "annotations": dict(self.annotations)}
        return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": dict(self.spec)}


def pods(objects: Sequence[Object]) -> list[Pod]:
    """All pods: those of Ray with the labels that KubeRay gives them."""
    found = [
        Pod(name_of(each), "other", each["metadata"]["labels"], each["spec"], {}, {})
        for each in of_kind(objects, "Pod")
    ]
    for cluster in of_kind(objects, "RayCluster"):
        spec = cluster["spec"]
        found.append(_ray_pod(cluster, spec["headGroupSpec"], "head", "headgroup"))
        for group in spec["workerGroupSpecs"]:
            found.append(_ray_pod(cluster, group, "worker", group["groupName"]))
    return found


def _ray_pod(cluster: Object, group: Mapping[str, Any], role: str, name: str) -> Pod:
    metadata = group["template"]["metadata"]
    by_kuberay = {
        "ray.io/cluster": cluster["metadata"]["name"],
        "ray.io/node-type": role,
        "ray.io/group": name,
        "app.kubernetes.io/name": "kuberay",
        "app.kubernetes.io/created-by": "kuberay-operator",
    }
    return Pod(
        f"pod of {name}",
        role,
        by_kuberay | metadata["labels"],
        group["template"]["spec"],
        group["rayStartParams"],
        metadata.get("annotations", {}),
    )


def head(objects: Sequence[Object]) -> Pod:
    (found,) = (each for each in pods(objects) if each.role == "head")
    return found


def workers(objects: Sequence[Object]) -> list[Pod]:
    return [each for each in pods(objects) if each.role == "worker"]


def groups(objects: Sequence[Object]) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = only(objects, "RayCluster")["spec"]["workerGroupSpecs"]
    return found


def operator_text(objects: Sequence[Object]) -> str:
    """The operator's configuration, as it stands in the ConfigMap."""
    (found,) = (
        each["data"]["operator.yaml"]
        for each in of_kind(objects, "ConfigMap")
        if "operator.yaml" in each["data"]
    )
    return str(found)


def operator_values(objects: Sequence[Object]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(operator_text(objects))
    return found


def matches(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """A label selector without expressions, or with those that are used here."""
    for each in selector.get("matchExpressions", ()):
        here = labels.get(each["key"]) in each.get("values", ())
        if here is not (each["operator"] == "In"):
            return False
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


UNITS: Final = {"": 1.0, "m": 1e-3, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}


def amount(quantity: object) -> float:
    """Of a Kubernetes quantity, in cores or bytes."""
    found = re.fullmatch(r"([0-9.]+)(m|Mi|Gi|Ti|)", str(quantity))
    assert found is not None, quantity
    return float(found[1]) * UNITS[found[2]]
