"""Every rendered object against Kubernetes' schemas, strictly, and against those of the CRDs.

The CRDs' own files lie beside the checkout (shared/crds) where the project is developed, and are no
part of it; what the chart uses of them is written down here, and checked everywhere.
"""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any, Final

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml
from jsonschema import Draft7Validator  # type: ignore[import-untyped]

from tests.chart.cases import NAMES, values_of
from tests.chart.charts import Object, case, name_of, only, pods, render
from tests.chart.tools import ROOT

KUBERNETES: Final = ("1.29", "1.37")
"""The oldest that is meant, and the newest that is known."""
CUSTOM: Final = {"RayCluster": "ray.io/v1"} | dict.fromkeys(
    ("PodMonitor", "PrometheusRule"), "monitoring.coreos.com/v1"
)

# --- what the chart uses of custom resources ------------------------------------------------------

TEXT: Final = {"type": "string", "minLength": 1}
LABELS: Final = {"type": "object", "additionalProperties": {"type": "string"}}
SECRET_KEY: Final = {
    "type": "object",
    "required": ["name", "key"],
    "properties": {"name": TEXT, "key": TEXT},
    "additionalProperties": False,
}


def closed(required: tuple[str, ...] = (), /, **properties: Any) -> dict[str, Any]:  # noqa: ANN401
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


METADATA: Final = closed(("name",), name=TEXT, labels=LABELS)
COUNT: Final = {"type": "integer", "minimum": 0}
FROM_SECRET: Final = closed(
    ("valueFrom",), valueFrom=closed(("secretKeyRef",), secretKeyRef=SECRET_KEY)
)
TEMPLATE: Final = closed(
    ("metadata", "spec"),
    metadata=closed(("labels",), labels=LABELS, annotations=LABELS),
    spec={"type": "object"},  # validated as a pod's
)
OURS: Final = {
    "RayCluster": closed(
        ("rayVersion", "upgradeStrategy", "authOptions", "headGroupSpec", "workerGroupSpecs"),
        rayVersion={"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
        suspend={"const": True},
        upgradeStrategy=closed(("type",), type={"enum": ["Recreate"]}),
        authOptions=closed(("mode",), mode={"enum": ["token"]}, secretName=TEXT),
        gcsFaultToleranceOptions=closed(
            ("redisAddress", "redisPassword"),
            redisAddress=TEXT,
            redisPassword=FROM_SECRET,
            redisUsername=FROM_SECRET,
        ),
        headGroupSpec=closed(
            ("rayStartParams", "template"),
            headService={"type": "object"},  # validated as a Service
            rayStartParams=LABELS,
            template=TEMPLATE,
        ),
        workerGroupSpecs={
            "type": "array",
            "minItems": 1,
            "items": closed(
                (
                    "groupName",
                    "replicas",
                    "minReplicas",
                    "maxReplicas",
                    "rayStartParams",
                    "template",
                ),
                groupName=TEXT,
                replicas=COUNT,
                minReplicas=COUNT,
                maxReplicas=COUNT,
                rayStartParams=LABELS,
                template=TEMPLATE,
            ),
        },
    ),
    "PodMonitor": closed(
        ("selector", "podMetricsEndpoints"),
        jobLabel=TEXT,
        selector=closed(("matchLabels",), matchLabels=LABELS),
        podMetricsEndpoints={
            "type": "array",
            "minItems": 1,
            "items": closed(
                ("port", "path"),
                port=TEXT,
                path=TEXT,
                interval={"type": "string", "pattern": "^[0-9]+[sm]$"},
                scrapeTimeout={"type": "string", "pattern": "^[0-9]+s$"},
                authorization=closed(("credentials",), credentials=SECRET_KEY),
                relabelings={
                    "type": "array",
                    "items": closed(
                        ("targetLabel", "replacement"), targetLabel=TEXT, replacement=TEXT
                    ),
                },
            ),
        },
    ),
    "PrometheusRule": closed(
        ("groups",),
        groups={
            "type": "array",
            "minItems": 1,
            "items": closed(
                ("name", "rules"),
                name=TEXT,
                rules={
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "required": ["expr"],
                        "properties": {
                            "alert": TEXT,
                            "record": TEXT,
                            "expr": {},
                            "for": {"type": "string"},
                            "keep_firing_for": {"type": "string"},
                            "labels": LABELS,
                            "annotations": LABELS,
                        },
                        "additionalProperties": False,
                    },
                },
            ),
        },
    ),
}


def custom_faults(found: Object) -> list[str]:
    kind = found["kind"]
    schema = closed(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": CUSTOM[kind]},
        kind={"const": kind},
        metadata=METADATA,
        spec=OURS[kind],
    )
    return [f"{name_of(found)}: {each.message}" for each in _errors(schema, found)]


def _errors(schema: dict[str, Any], found: object) -> list[Any]:
    return list(Draft7Validator(schema).iter_errors(found))


def kubernetes_faults(found: Object, version: str) -> list[str]:
    try:
        kubernetes_validate.validate(found, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{name_of(found)}: {error}"]
    return []


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("name", NAMES)
def test_kubernetes_takes_every_object(name: str, version: str) -> None:
    objects = render(case(values_of(name)))
    faults: list[str] = []
    for each in objects:
        if each["kind"] not in CUSTOM:
            faults += kubernetes_faults(each, version)
    for pod in pods(objects):
        faults += kubernetes_faults(pod.template(), version)
    service = only(objects, "RayCluster")["spec"]["headGroupSpec"]["headService"]
    metadata = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "x"}}
    assert [*faults, *kubernetes_faults(metadata | service, version)] == []


@pytest.mark.parametrize("name", NAMES)
def test_custom_resources_hold_what_is_known_of_them(name: str) -> None:
    objects = render(case(values_of(name)))
    faults = [fault for each in objects if each["kind"] in CUSTOM for fault in custom_faults(each)]
    assert faults == []


def test_a_field_that_kubernetes_does_not_know_would_be_noticed() -> None:
    objects = render(case(values_of("single-server")))
    pod = pods(objects)[0].template()
    pod["spec"] = copy.deepcopy(pod["spec"])
    pod["spec"]["containers"][0]["livenesProbe"] = {}
    assert kubernetes_faults(pod, KUBERNETES[-1])
    cluster = copy.deepcopy(dict(only(objects, "RayCluster")))
    cluster["spec"]["upgradeStrategy"]["typ"] = "Recreate"
    assert custom_faults(cluster)


# --- the CRDs themselves --------------------------------------------------------------------------


def crds() -> Path | None:
    for folder in ROOT.parents:
        if (folder / "shared" / "crds").is_dir():
            return folder / "shared" / "crds"
    return None


@cache
def crd_schemas() -> dict[str, dict[str, Any]]:
    """By kind: the schema of the version that is stored, closed as an API server that is asked
    strictly would have it."""
    folder = crds()
    if folder is None:
        pytest.skip("the CRDs' files are not beside this checkout (../shared/crds)")
    found = {}
    for file in folder.glob("*.yaml"):
        text = file.read_text(encoding="utf-8")
        crd = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506
        kind = crd["spec"]["names"]["kind"]
        (version,) = (each for each in crd["spec"]["versions"] if each["storage"])
        assert f"{crd['spec']['group']}/{version['name']}" == CUSTOM[kind]
        found[kind] = _closed(version["schema"]["openAPIV3Schema"])
    assert found.keys() == CUSTOM.keys()
    return found


def _closed(node: Any) -> Any:  # noqa: ANN401 - a schema
    if isinstance(node, list):
        return [_closed(each) for each in node]
    if not isinstance(node, dict):
        return node
    new = {key: _closed(value) for key, value in node.items()}
    if new.pop("x-kubernetes-int-or-string", False):
        new.pop("type", None)
    of_fields = isinstance(new.get("properties"), dict) and "type" in new
    if of_fields and not new.get("x-kubernetes-preserve-unknown-fields"):
        new.setdefault("additionalProperties", False)
    return new


@pytest.mark.parametrize("name", NAMES)
def test_the_crds_take_every_custom_resource(name: str) -> None:
    schemas = crd_schemas()
    for each in render(case(values_of(name))):
        if each["kind"] in CUSTOM:
            plain = {key: value for key, value in each.items() if key != "metadata"}
            errors = _errors(schemas[each["kind"]], plain)
            assert [(list(error.path), error.message) for error in errors] == []


def test_a_field_that_the_crd_does_not_know_would_be_noticed() -> None:
    cluster = copy.deepcopy(dict(only(render(case(values_of("single-server"))), "RayCluster")))
    cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["imag"] = "x"
    cluster.pop("metadata")
    assert _errors(crd_schemas()["RayCluster"], cluster)
