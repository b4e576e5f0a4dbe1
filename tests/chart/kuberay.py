"""The pods that KubeRay makes of a RayCluster, told by its own rules.

What it adds to the templates, by `DefaultHeadPodTemplate`, `DefaultWorkerPodTemplate`, `BuildPod`
in its `ray-operator/controllers/ray/common/pod.go` (as of 1.6 and 1.7, all feature gates off):

* `setMissingRayStartParams`: a worker's `address`, `metrics-export-port`, `block`.
* `generateRayStartCommand`: `memory` and `num-gpus` from the container's limits; then all
  parameters, sorted, as options (`convertParamMap`: true is a bare option, false none).
* `BuildPod`: a command of the template's own is put before `ulimit` and `ray start`, with `&&`, in
  one text for `/bin/bash -c --`.
* `setContainerEnvVars`: where the head is, and as what this pod is known.
* `configureGCSFaultTolerance`: Redis for the head, patience for the workers.
* `configureTokenAuth`: the token, to Ray's container and to the init container of its own, which
  has workers wait for the GCS.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from tests.chart.charts import Object, amount

SHELL: Final = ("/bin/bash", "-c", "--")
GCS_PORT: Final = "6379"
METRICS_PORT: Final = "8080"
AUTH_KEY: Final = "auth_token"
REDIS: Final = (
    ("redisUsername", "redis-username", "REDIS_USERNAME"),
    ("redisPassword", "redis-password", "REDIS_PASSWORD"),
)
"""Keys of `gcsFaultToleranceOptions`, and the parameters and variables that they become."""
SWITCHES: Final = frozenset({"log-color", "include-dashboard", "include-log-monitor"})
"""Options that are told true or false."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A pod that is to be: `uid` is the RayCluster's, `head` where workers find the head's pod."""

    name: str
    namespace: str
    uid: str
    head: str


def head_service(cluster: Object, namespace: str) -> str:
    return f"{cluster['metadata']['name']}-head-svc.{namespace}.svc.cluster.local"


def auth_secret(cluster: Object) -> str:
    """The name of the Secret with Ray's token: KubeRay makes it where none is named."""
    options: Mapping[str, Any] = cluster["spec"]["authOptions"]
    return str(options.get("secretName") or cluster["metadata"]["name"])


def head_pod(cluster: Object, asked: Asked) -> dict[str, Any]:
    return _pod(cluster, cluster["spec"]["headGroupSpec"], asked, "head", "headgroup")


def worker_pod(cluster: Object, group: Mapping[str, Any], asked: Asked) -> dict[str, Any]:
    return _pod(cluster, group, asked, "worker", group["groupName"])


def _pod(
    cluster: Object, group: Mapping[str, Any], asked: Asked, role: str, name: str
) -> dict[str, Any]:
    pod: dict[str, Any] = copy.deepcopy(dict(group["template"]))
    metadata = pod["metadata"]
    metadata["name"], metadata["namespace"] = asked.name, asked.namespace
    metadata["labels"] |= {
        "ray.io/cluster": cluster["metadata"]["name"],
        "ray.io/node-type": role,
        "ray.io/group": name,
    }
    head_params = cluster["spec"]["headGroupSpec"]["rayStartParams"]
    port = head_params.get("port", GCS_PORT)
    params = dict(group["rayStartParams"])
    container = pod["spec"]["containers"][0]
    tolerant = _tolerance(cluster, asked, role)
    token = _token(cluster)
    if role == "worker":
        params.setdefault("address", f"{asked.head}:{port}")
        waits = _waiting(container, params["address"], token)
        pod["spec"].setdefault("initContainers", []).append(waits)
    else:
        options = cluster["spec"].get("gcsFaultToleranceOptions", {})
        params |= {param: f"${name}" for key, param, name in REDIS if key in options}
    params.setdefault("metrics-export-port", METRICS_PORT)
    params |= {"block": "true"}
    start = _ray_start(role, params, container["resources"]["limits"])
    own = _pasted(container.get("command", ())) + _pasted(container.get("args", ()))
    generated = f"ulimit -n ${{RAY_START_ULIMIT_OPEN_FILES:-65536}}; {start}"
    container["command"] = list(SHELL)
    container["args"] = [f"{own} && {generated}" if own else generated]
    found = {
        "FQ_RAY_IP": asked.head if role == "worker" else None,
        "RAY_CLUSTER_NAME": cluster["metadata"]["name"],
        "RAY_CLUSTER_NAMESPACE": asked.namespace,
        "RAY_CLOUD_INSTANCE_ID": asked.name,
        "RAY_NODE_TYPE_NAME": name,
        "KUBERAY_GEN_RAY_START_CMD": start,
        "RAY_PORT": port,
        "RAY_ADDRESS": f"{asked.head if role == 'worker' else '127.0.0.1'}:{port}",
        "RAY_USAGE_STATS_KUBERAY_IN_USE": "1",
        "RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE": "1",
    }
    plain = [{"name": key, "value": value} for key, value in found.items() if value is not None]
    container["env"] = _filled(container["env"], [*tolerant, *token, *plain])
    return pod


def _tolerance(cluster: Object, asked: Asked, role: str) -> list[dict[str, Any]]:
    options = cluster["spec"].get("gcsFaultToleranceOptions")
    if options is None:
        return []
    if role == "worker":
        return [{"name": "RAY_gcs_rpc_server_reconnect_timeout_s", "value": "600"}]
    found = [
        {"name": "RAY_external_storage_namespace", "value": asked.uid},
        {"name": "RAY_REDIS_ADDRESS", "value": options["redisAddress"]},
    ]
    return [*found, *({"name": name, **options[key]} for key, _, name in REDIS if key in options)]


def _token(cluster: Object) -> list[dict[str, Any]]:
    if cluster["spec"]["authOptions"]["mode"] != "token":
        return []
    secret = {"name": auth_secret(cluster), "key": AUTH_KEY}
    return [
        {"name": "RAY_AUTH_MODE", "value": "token"},
        {"name": "RAY_AUTH_TOKEN", "valueFrom": {"secretKeyRef": secret}},
    ]


def _waiting(
    container: Mapping[str, Any], address: str, token: list[dict[str, Any]]
) -> dict[str, Any]:
    """Its script says more, and does the same."""
    script = f"until ray health-check --address {address} >/dev/null 2>&1; do sleep 5; done"
    return {
        "name": "wait-gcs-ready",
        "image": container["image"],
        "command": list(SHELL),
        "args": [script],
        "env": _filled(container["env"], token),
        "volumeMounts": container["volumeMounts"],
    }


def _filled(env: list[dict[str, Any]], more: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the template has stays as it is."""
    known = {each["name"] for each in env}
    return [*env, *(each for each in more if each["name"] not in known)]


def _pasted(words: Iterator[str] | tuple[str, ...]) -> str:
    return "".join(f" {word} " for word in words)


def _ray_start(role: str, params: dict[str, str], limits: Mapping[str, Any]) -> str:
    params.setdefault("memory", str(int(amount(limits["memory"]))))
    for resource in sorted(limits):
        if resource.endswith("gpu") and int(limits[resource]):
            params.setdefault("num-gpus", str(limits[resource]))
    options = "".join(_option(name, params[name]) for name in sorted(params))
    return f"ray start {'--head ' if role == 'head' else ''}{options}"


def _option(name: str, value: str) -> str:
    if value.lower() in {"true", "false"} and name not in SWITCHES:
        return f" --{name} " if value.lower() == "true" else ""
    return f" --{name}={value} "
