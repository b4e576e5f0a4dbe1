"""What is started in the pods, as KubeRay composes it of what is rendered."""

from __future__ import annotations

from typing import Any

from tests.chart import kuberay
from tests.chart.cases import values_of
from tests.chart.charts import case, groups, only, render
from tests.chart.kuberay import Asked

HEAD = "site-crynux-cluster-head-svc.gpu.svc.cluster.local"
ASKED = Asked("a-pod", "gpu", "a-uid", HEAD)


def head(name: str) -> dict[str, Any]:
    return kuberay.head_pod(only(render(case(values_of(name))), "RayCluster"), ASKED)


def worker(name: str) -> dict[str, Any]:
    objects = render(case(values_of(name)))
    (group,) = groups(objects)
    return kuberay.worker_pod(only(objects, "RayCluster"), group, ASKED)


def ray_start(pod: dict[str, Any]) -> tuple[str, list[str]]:
    """What goes before it, and its words."""
    container = pod["spec"]["containers"][0]
    assert container["command"] == ["/bin/bash", "-c", "--"]
    (script,) = container["args"]
    before, _, start = script.partition("; ")
    return " ".join(before.split()), start.split()


def environment(container: dict[str, Any]) -> dict[str, Any]:
    names = [each["name"] for each in container["env"]]
    assert len(names) == len(set(names))
    return {each["name"]: each.get("value", each.get("valueFrom")) for each in container["env"]}


def test_the_head_is_started_without_processors() -> None:
    before, words = ray_start(head("single-server"))
    assert before == "rm -rf /tmp/ray && ulimit -n ${RAY_START_ULIMIT_OPEN_FILES:-65536}"
    assert words == [
        *("ray", "start", "--head", "--block", "--dashboard-agent-listen-port=52365"),
        *("--dashboard-host=127.0.0.1", "--memory=6442450944", "--metrics-export-port=8080"),
        *("--no-redirect-output", "--num-cpus=0", "--object-store-memory=268435456"),
    ]


def test_a_worker_offers_its_cards_and_looks_for_the_head_by_name() -> None:
    _, words = ray_start(worker("single-server"))
    assert words == [
        *("ray", "start", f"--address={HEAD}:6379", "--block"),
        *("--dashboard-agent-listen-port=52365", "--memory=17179869184"),
        *("--metrics-export-port=8080", "--no-redirect-output", "--num-cpus=2", "--num-gpus=1"),
        "--object-store-memory=268435456",
    ]


def test_simulated_cards_arrive_as_one_word() -> None:
    _, words = ray_start(worker("simulated cards"))
    assert "--num-gpus=0" in words
    assert """--resources='{"crynux-sim|NVIDIA GeForce RTX 4090+docker|24":2}'""" in " ".join(words)


def test_every_process_of_ray_has_the_token() -> None:
    ray = {"secretKeyRef": {"name": "site-crynux-cluster", "key": "auth_token"}}
    pods = head("single-server"), worker("single-server")
    for pod in pods:
        env = environment(pod["spec"]["containers"][0])
        assert (env["RAY_AUTH_MODE"], env["RAY_AUTH_TOKEN"]) == ("token", ray)
    (waiting,) = pods[1]["spec"]["initContainers"]
    assert environment(waiting)["RAY_AUTH_TOKEN"] == ray
    # The supervisor isn't KubeRay's: it has the same by a file.
    supervisor = environment(pods[0]["spec"]["containers"][1])
    assert supervisor["RAY_AUTH_TOKEN_PATH"] == "/etc/crynux-cluster/ray/auth_token"
    (volume,) = (each for each in pods[0]["spec"]["volumes"] if each["name"] == "ray-token")
    assert volume["secret"]["secretName"] == ray["secretKeyRef"]["name"]


def test_redis_is_the_heads_and_its_password_stays_a_variable() -> None:
    pod = head("redis")
    words = ray_start(pod)[1]
    assert {"--redis-password=$REDIS_PASSWORD", "--redis-username=$REDIS_USERNAME"} <= set(words)
    env = environment(pod["spec"]["containers"][0])
    assert env["RAY_REDIS_ADDRESS"] == "redis:6379"
    assert env["RAY_external_storage_namespace"] == "a-uid"
    assert env["REDIS_PASSWORD"] == {"secretKeyRef": {"name": "redis", "key": "password"}}
    theirs = environment(worker("redis")["spec"]["containers"][0])
    assert theirs["RAY_gcs_rpc_server_reconnect_timeout_s"] == "600"
    assert "REDIS_PASSWORD" not in theirs


def test_ray_does_not_wait_for_actors_that_never_leave() -> None:
    """Half a minute by itself, on top of the hook that has emptied the machine."""
    for pod in (head("single-server"), worker("single-server")):
        env = environment(pod["spec"]["containers"][0])
        assert env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] == "0"
