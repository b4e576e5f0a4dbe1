"""Values that can't be right are refused by both Helms, each with one line that says what to do."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator  # type: ignore[import-untyped]

from helm.schema import generate, operator
from tests.chart.cases import NAMES, configured, one, values_of
from tests.chart.charts import CHART, Refused, case, defaults, example, merged, render

CONTRACTS = {"network": {"contracts": {"task": None}}}

BY_THE_CHART: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "no head image": (
        {"image": {"head": {"repository": ""}}},
        "image.head.repository: missing; build the image from the Dockerfile",
    ),
    "no worker image": (
        {"image": {"worker": {"repository": ""}}},
        "image.worker.repository: missing",
    ),
    "no key": ({"identity": {"existingSecret": ""}}, "identity.existingSecret: missing; make a"),
    "no urls": ({"network": {"existingSecret": ""}}, "network.existingSecret: missing; make a"),
    "no token": ({"api": {"existingSecret": ""}}, "api.existingSecret: missing; without a token"),
    "a database without its url": (
        {"journal": {"kind": "postgresql"}},
        "journal.existingSecret: missing; a journal in PostgreSQL",
    ),
    "a journal without a volume": (
        {"head": {"persistence": {"enabled": False}}},
        "head.persistence.enabled: a journal in SQLite would be lost with the head pod",
    ),
    "redis without its address": (
        {"ray": {"faultTolerance": {"enabled": True, "existingSecret": "redis"}}},
        "ray.faultTolerance: redisAddress and existingSecret",
    ),
    "redis without its password": (
        {"ray": {"faultTolerance": {"enabled": True, "redisAddress": "redis:6379"}}},
        "ray.faultTolerance: redisAddress and existingSecret",
    ),
    "no chain": ({"config": {"network": {"chain_id": None}}}, "config.network.chain_id: missing"),
    "no contract": ({"config": CONTRACTS}, "config.network.contracts.task: missing; the contract"),
    "a port of ray's": ({"api": {"port": 8265}}, "api.port: 8265 is Ray's; choose another"),
    "an ingress for nobody": ({"ingress": {"enabled": True}}, "ingress.host: missing"),
    "an ingress for everyone": (
        {
            "ingress": {"enabled": True, "host": "a.example"},
            "api": {"existingSecret": "", "openReads": True},
        },
        "ingress.enabled: needs api.existingSecret; without a token anyone would read",
    ),
    "a port of the machines for everyone": (
        {"service": {"type": "NodePort"}, "api": {"existingSecret": "", "openReads": True}},
        "service.type: NodePort needs api.existingSecret; without a token anyone would read",
    ),
    "no groups": ({"gpuGroups": []}, "gpuGroups: missing; name at least one group"),
    "a name twice": ({"gpuGroups": [one(), one()]}, "gpuGroups[card]: the name stands twice"),
    "two counts": (
        {"gpuGroups": [one(minReplicas=1)]},
        "gpuGroups[card]: give replicas, or minReplicas and maxReplicas",
    ),
    "slots for cards without a name": (
        {"gpuGroups": [one(slots=2)]},
        "gpuGroups[card].slots: needs gpuName, the driver's name for the cards",
    ),
    "two minds about slots": (
        {"gpuGroups": [one(gpuName="A", slots=2), one(name="b", gpuName="A", slots=3)]},
        "gpuGroups[b].slots: another group has other slots for A",
    ),
    "bounds the wrong way round": (
        {"gpuGroups": [one(replicas=None, minReplicas=3, maxReplicas=2)]},
        "gpuGroups[card]: minReplicas is more than maxReplicas",
    ),
    "simulated cards on a real chain": (
        {"gpuGroups": [one(simulated={"name": "Card", "vram": 8})]},
        "gpuGroups[card].simulated: refused on any chain that isn't marked a devnet",
    ),
    "cards that outlast the head": (
        {"gpuGroups": [one(graceSeconds=601)]},
        "gpuGroups[card].graceSeconds: more than head.graceSeconds (600); at an upgrade all pods",
    ),
    "a part of a card": (
        {"gpuGroups": [one(gpuResource="nvidia.com/mig-1g.10gb")]},
        "gpuGroups[card].gpuResource: nvidia.com/mig-1g.10gb is a part of a card",
    ),
    "a card that is shared": (
        {"gpuGroups": [one(gpuResource="nvidia.com/gpu.shared")]},
        "gpuGroups[card].gpuResource: nvidia.com/gpu.shared is a part of a card",
    ),
    "one volume for many": (
        {"gpuGroups": [one(replicas=2)]},
        "gpuGroups[card].cache: ReadWriteOnce is for one pod, and there may be 2",
    ),
    "no claim": (
        {"gpuGroups": [one(cache={"kind": "existingClaim"})]},
        "gpuGroups[card].cache.existingClaim: missing",
    ),
    "a cache without a quota": (
        {"gpuGroups": [one(cache={"kind": "ephemeral", "size": "100Gi"})]},
        "gpuGroups[card].cache: a pod whose cache outgrows its size is evicted; set config.models",
    ),
    "a cache that its quota outgrows": (
        {"gpuGroups": [one(cache={"kind": "ephemeral", "size": "100Gi"})]}
        | configured(models={"quota_gb": 96}),
        "gpuGroups[card].cache: a pod whose cache outgrows its size is evicted; set config.models",
    ),
    "too little memory": (
        configured(gpu={"host_memory_gb": 14}),
        "gpuGroups[card].resources.limits.memory: 16Gi is too little for shm (2Gi)",
    ),
    "more asked for than allowed": (
        {"head": {"resources": {"requests": {"memory": "1Ti"}}}},
        "head.resources: requests.memory (1Ti) is more than limits.memory (6Gi)",
    ),
    "a secret in the environment": (
        {"head": {"env": [{"name": "crynux_password", "value": "x"}]}},
        "head.env: crynux_password; secrets are given by existingSecret",
    ),
    "a secret in the workers' environment": (
        {"gpuGroups": [one(env=[{"name": "HF_TOKEN", "value": "x"}])]},
        "gpuGroups[card].env: HF_TOKEN; secrets are given by existingSecret",
    ),
    "kuberay's labels": (
        {"head": {"labels": {"app.kubernetes.io/name": "x"}}},
        "head.labels: app.kubernetes.io/name is set by this chart or by KubeRay",
    ),
    "kuberay's labels on all": (
        {"commonLabels": {"ray.io/cluster": "x"}},
        "commonLabels: ray.io/cluster is set by this chart or by KubeRay",
    ),
}


def refusal(values: Mapping[str, Any], major: int, **where: Any) -> str:  # noqa: ANN401
    with pytest.raises(Refused) as caught:
        render(case(values, major=major, **where))
    return str(caught.value)


@pytest.mark.parametrize("major", [3, 4])
@pytest.mark.parametrize("name", BY_THE_CHART)
def test_what_cant_be_right_is_refused_with_one_line(name: str, major: int) -> None:
    values, said = BY_THE_CHART[name]
    lines = refusal(merged(example("single-server"), values), major).splitlines()
    (line,) = (each for each in lines if each != "Use --debug flag to render out invalid YAML")
    assert re.fullmatch(r"Error: execution error at \(\S+\): (.*)", line)
    assert said in line


BY_THE_SCHEMA: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "a typo": ({"gpuGroup": []}, "gpuGroup"),
    "a typo within": ({"api": {"prot": 8000}}, "prot"),
    "a typo in the configuration": (configured(fleet={"slots_pr_gpu": 1}), "slots_pr_gpu"),
    "a typo in a group": ({"gpuGroups": [one(gpuPerPod=1)]}, "gpuPerPod"),
    "a typo in an affinity": ({"head": {"affinity": {"nodeAfinity": {}}}}, "nodeAfinity"),
    "a key in the values": (configured(identity={"seed_file": "/x"}), "identity"),
    "a url in the values": (configured(network={"rpc_url": "https://x/key"}), "rpc_url"),
    "a password in a url": (configured(models={"proxy": "http://u:p@proxy:1"}), "proxy"),
    "an address without quotes": (configured(network={"contracts": {"task": 255}}), "task"),
    "half an address": (configured(network={"contracts": {"task": "0x12"}}), "task"),
    "a port beyond": ({"api": {"port": 70000}}, "port"),
    "no group name": ({"gpuGroups": [{"replicas": 1}]}, "name"),
    "a group name in capitals": ({"gpuGroups": [one(name="A100")]}, "name"),
    "half a card": ({"gpuGroups": [one(gpusPerPod=0.5)]}, "gpusPerPod"),
    "no card": ({"gpuGroups": [one(gpusPerPod=0)]}, "gpusPerPod"),
    "a number in quotes": ({"identity": {"accounts": "8"}}, "accounts"),
    "too many accounts": ({"identity": {"accounts": 1001}}, "accounts"),
    "slots beyond": (configured(fleet={"slots_per_gpu": 17}), "slots_per_gpu"),
    "slots in words": (configured(fleet={"slots_per_gpu": "many"}), "slots_per_gpu"),
    "memory in other units": (
        {"head": {"resources": {"limits": {"memory": "8G"}}}},
        "memory",
    ),
    "a rule without ports": (
        {"networkPolicy": {"head": {"egress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}]}}},
        "ports",
    ),
    "a grace shorter than a task": ({"gpuGroups": [one(graceSeconds=60)]}, "graceSeconds"),
    "a head's grace shorter than a task": ({"head": {"graceSeconds": 239}}, "graceSeconds"),
    "a kind of journal": ({"journal": {"kind": "mysql"}}, "kind"),
    "a name that kubernetes refuses": ({"fullnameOverride": "9to5"}, "fullnameOverride"),
    "an environment from a secret": (
        {"head": {"env": [{"name": "A", "valueFrom": {}, "value": ""}]}},
        "valueFrom",
    ),
    "a scrape every second": ({"monitoring": {"podMonitor": {"interval": "1s"}}}, "interval"),
}


@pytest.mark.parametrize("major", [3, 4])
@pytest.mark.parametrize("name", BY_THE_SCHEMA)
def test_what_is_out_of_bounds_is_refused_with_one_line(name: str, major: int) -> None:
    values, key = BY_THE_SCHEMA[name]
    said = refusal(merged(example("single-server"), values), major).splitlines()
    assert "don't meet the specifications of the schema(s)" in said[0]
    (line,) = said[2:]
    assert key in line


@pytest.mark.parametrize("major", [3, 4])
def test_a_release_that_would_get_a_bad_name_is_refused(major: int) -> None:
    said = refusal(example("single-server"), major, release="9to5")
    assert "KubeRay wants a lower-case letter first" in said
    assert "set fullnameOverride" in said


@pytest.mark.parametrize("major", [3, 4])
def test_a_long_release_name_leaves_room_for_what_kuberay_adds(major: int) -> None:
    objects = render(case(example("single-server"), major=major, release="a" * 53))
    (name,) = (each["metadata"]["name"] for each in objects if each["kind"] == "RayCluster")
    assert len(f"{name}-head-svc") <= 50
    assert max(len(each["metadata"]["name"]) for each in objects) <= 63


# --- the schema itself ----------------------------------------------------------------------------

SCHEMA: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
MAPS = {"propertyNames", "additionalProperties"}
OPEN = {"global"}
"""What Helm itself puts there."""


def nodes(node: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:  # noqa: ANN401
    """Every value that the schema knows, with its path."""
    for name, child in {**node.get("properties", {}), **node.get("definitions", {})}.items():
        yield f"{path}{name}", child
        yield from nodes(child, f"{path}{name}.")
    items = node.get("items")
    if isinstance(items, dict):
        yield f"{path}[]", items
        yield from nodes(items, f"{path}[].")


def test_generated_files_are_up_to_date() -> None:
    for file, text in generate.written().items():
        assert file.read_text(encoding="utf-8") == text, "run make docs"


def test_the_schema_is_one() -> None:
    Draft7Validator.check_schema(SCHEMA)


def test_every_object_is_closed() -> None:
    assert SCHEMA["additionalProperties"] is False
    for path, node in nodes(SCHEMA):
        if node.get("type") == "object" and path not in OPEN:
            closed = node.get("additionalProperties") is False or node.keys() >= MAPS
            assert closed, path


def test_every_value_has_a_meaning_and_bounds() -> None:
    bounds = {
        "string": {"maxLength", "enum", "pattern"},
        "integer": {"minimum"},
        "number": {"minimum", "exclusiveMinimum"},
        "array": {"items"},
        "object": {"properties", "propertyNames"},
        "boolean": {"type"},
    }
    for path, node in nodes(SCHEMA):
        if not path.endswith("[]") and "$ref" not in node:
            assert node.get("description"), path
        kinds = node.get("type", [])
        for kind in [kinds] if isinstance(kinds, str) else kinds:
            assert bounds[kind] & node.keys() or path in OPEN, path


def test_the_configuration_has_every_key_of_the_operators_and_no_other() -> None:
    known = {key for key, _ in operator.operator_keys()}
    assert known >= operator.OURS
    leaves = {
        path.removeprefix("config.")
        for path, node in nodes(SCHEMA)
        if path.startswith("config.") and "properties" not in node and "[]" not in path
    }
    assert leaves == known - operator.OURS


def test_the_defaults_are_within_the_schema_and_it_knows_no_other_values() -> None:
    validator = Draft7Validator(SCHEMA)
    values = defaults()
    assert list(validator.iter_errors(values)) == []
    top = {path for path, _ in nodes({"properties": SCHEMA["properties"]}) if "." not in path}
    assert set(values) == top - OPEN


@pytest.mark.parametrize("name", NAMES)
def test_another_validator_takes_the_values_too(name: str) -> None:
    errors = Draft7Validator(SCHEMA).iter_errors(merged(defaults(), values_of(name)))
    assert [error.message for error in errors] == []


def test_the_defaults_of_a_group_are_those_that_the_readme_tells() -> None:
    group = merged(one(resources=None, cache=None), {"runtimeClassName": None})
    (worker,) = (
        each["spec"]["workerGroupSpecs"][0]
        for each in render(case(merged(example("single-server"), {"gpuGroups": [group]})))
        if each["kind"] == "RayCluster"
    )
    said = generate.group_defaults()
    spec = worker["template"]["spec"]
    given = spec["containers"][0]["resources"]
    assert given["limits"].pop(said["gpuResource"]) == said["gpusPerPod"]
    assert given["requests"].pop(said["gpuResource"]) == said["gpusPerPod"]
    assert given["requests"].pop("ephemeral-storage") == "20480Mi"
    assert said["tmp"] == "20Gi"
    assert given == said["resources"]
    assert spec["terminationGracePeriodSeconds"] == said["graceSeconds"]
    sizes = {each["name"]: each.get("emptyDir", {}).get("sizeLimit") for each in spec["volumes"]}
    assert (sizes["shm"], sizes["tmp"]) == (said["shm"], said["tmp"])


def test_comments_in_the_values_name_nothing_that_is_gone() -> None:
    text = (CHART / "values.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(text) == defaults()
    for path in re.findall(r"`?(docs/[\w.-]+)`?", text):
        assert (CHART.parents[1] / path).exists(), path
