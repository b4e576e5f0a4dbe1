"""Ray and KubeRay: what they need of pods that they didn't think of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from tests.chart.charts import Pod, amount, groups, head, only, operator_values, pods, workers
from tests.chart.policy.rendered import ETC, Policy, Rendered, mounted_files

QUIET: Final = {"RAY_BACKEND_LOG_LEVEL": "warning", "RAY_LOGGER_LEVEL": "warning"}


def ray_is_as_kuberay_needs_it(found: Rendered) -> Iterator[str]:
    spec = only(found.objects, "RayCluster")["spec"]
    if spec.get("upgradeStrategy") != {"type": "Recreate"}:
        yield "RayCluster: pods would stay on the old image"
    if spec.get("enableInTreeAutoscaling"):
        yield "RayCluster: staked nodes would vanish"
    if not spec.get("rayVersion"):
        yield "RayCluster: KubeRay refuses token authentication without rayVersion"
    if (
        not spec["headGroupSpec"]
        .get("headService", {})
        .get("spec", {})
        .get("publishNotReadyAddresses")
    ):
        yield "RayCluster: workers can't find a head that isn't ready, and it waits for them"
    names = [group["groupName"] for group in spec["workerGroupSpecs"]]
    if len(names) != len(set(names)):
        yield "RayCluster: two groups of one name"
    for group in spec["workerGroupSpecs"]:
        if not group["minReplicas"] == group["replicas"] <= group["maxReplicas"]:
            yield f"group {group['groupName']}: replicas are not within their bounds"
    for pod in pods(found.objects):
        if pod.role != "other":
            yield from _pod_is_as_kuberay_needs_it(pod)


def _pod_is_as_kuberay_needs_it(pod: Pod) -> Iterator[str]:
    """Read in KubeRay 1.7: it takes the first container for Ray's, puts its command before its own
    `ray start`, and selects the head by labels of its own making."""
    first = pod.containers[0]
    if first["name"] != f"ray-{pod.role}":
        yield f"{pod.name}: {first['name']} is taken for Ray's container"
    if [*first.get("command", ()), *first.get("args", ())] != ["rm", "-rf", "/tmp/ray"]:  # noqa: S108
        yield f"{pod.name}: more is run before Ray than to remove what the last one left"
    if pod.labels["app.kubernetes.io/name"] != "kuberay":
        yield f"{pod.name}: KubeRay's head Service would not select it"
    if pod.labels["app.kubernetes.io/created-by"] != "kuberay-operator":
        yield f"{pod.name}: KubeRay's head Service would not select it"
    for key, value in pod.params.items():
        if not isinstance(value, str):
            yield f"{pod.name}: rayStartParams.{key} isn't text"


def ray_asks_for_a_token_everywhere(found: Rendered) -> Iterator[str]:
    cluster_object = only(found.objects, "RayCluster")
    auth = cluster_object["spec"].get("authOptions", {})
    if auth.get("mode") != "token":
        yield "RayCluster: anyone who reaches Ray may run code in it"
    for pod in pods(found.objects):
        for container in pod.containers if pod.role != "other" else ():
            env = {each["name"]: each.get("value") for each in container.get("env", ())}
            if env.get("RAY_AUTH_MODE") != "token":
                yield f"{pod.name}, {container['name']}: RAY_AUTH_MODE isn't set"
            if env.get("PROMETHEUS_DISABLE_CREATED_SERIES") != "true":
                yield f"{pod.name}, {container['name']}: metrics would come with _created series"
    pod = head(found.objects)
    env = {each["name"]: each.get("value") for each in pod.container("supervisor")["env"]}
    secret = pod.volumes["ray-token"]["secret"]
    if secret["secretName"] != auth.get("secretName", cluster_object["metadata"]["name"]):
        yield "the supervisor's token is of another Secret than Ray's"
    if env.get("RAY_AUTH_TOKEN_PATH") not in mounted_files(pod, "supervisor"):
        yield "the supervisor's token isn't where it is looked for"


def what_is_logged_is_the_containers_output(found: Rendered) -> Iterator[str]:
    """Files in /tmp/ray are read by nobody, and are gone when the container is begun anew."""
    given = {"head": found.values["head"].get("env", [])}
    given |= {group["name"]: group.get("env", []) for group in found.values["gpuGroups"]}
    for pod in pods(found.objects):
        if pod.role == "other":
            continue
        if pod.params.get("no-redirect-output") != "true":
            yield f"{pod.name}: what is logged stays in files"
        theirs = given["head" if pod.role == "head" else pod.labels["ray.io/group"]]
        env = {each["name"]: each.get("value") for each in pod.containers[0]["env"]}
        wanted = QUIET | {each["name"]: each["value"] for each in theirs}
        if any(env.get(name) != value for name, value in wanted.items()):
            yield f"{pod.name}: Ray logs every step of its own"


def the_supervisor_can_join_ray(found: Rendered) -> Iterator[str]:
    """A driver finds its raylet by looking through the processes, and speaks to it by sockets in
    /tmp/ray and memory in /dev/shm."""
    pod = head(found.objects)
    if pod.spec.get("shareProcessNamespace") is not True:
        yield "head: the supervisor doesn't see Ray's processes"
    places = [
        {mount["mountPath"]: mount["name"] for mount in pod.container(name)["volumeMounts"]}
        for name in ("ray-head", "supervisor")
    ]
    for path in ("/tmp", "/dev/shm", f"{ETC}/config", "/var/lib/crynux-cluster"):  # noqa: S108
        if places[0].get(path) is None or places[0].get(path) != places[1].get(path):
            yield f"head: {path} isn't the same for Ray and the supervisor"
    command = " ".join(map(str, pod.container("supervisor")["args"]))
    config = f"{ETC}/config/operator.yaml"
    if f"exec crynux-cluster up --config {config}" not in command:
        yield "head: the supervisor doesn't begin with the configuration that is mounted"
    if operator_values(found.objects)["ray"]["address"] not in command:
        yield "head: the supervisor waits for another Ray than it joins"


def groups_offer_what_actors_ask_for(found: Rendered) -> Iterator[str]:
    """Whole cards: as many in the pod's limits as Ray is told of. The head has none."""
    pod = head(found.objects)
    if pod.params.get("num-cpus") != "0" or "num-gpus" in pod.params:
        yield "head: Ray would place work on it"
    wanted = {group["name"]: group for group in found.values["gpuGroups"]}
    for group, pod in zip(groups(found.objects), workers(found.objects), strict=True):
        given = pod.containers[0]["resources"]
        asked = wanted[group["groupName"]]
        cards = asked.get("gpusPerPod", 1)
        resource = asked.get("gpuResource", "nvidia.com/gpu")
        expected = 0 if asked.get("simulated") else cards
        counts = {
            "limits": given["limits"].get(resource, 0),
            "requests": given["requests"].get(resource, 0),
            "num-gpus": int(pod.params.get("num-gpus", -1)),
        }
        for where, count in counts.items():
            if count != expected:
                yield f"group {group['groupName']}: {count} cards in {where}, {expected} wanted"
        if asked.get("simulated") and "crynux-sim|" not in pod.params.get("resources", ""):
            yield f"group {group['groupName']}: its simulated cards are not offered"


def shared_memory_holds_the_object_store(found: Rendered) -> Iterator[str]:
    for pod in pods(found.objects):
        if pod.role == "other":
            continue
        shm = amount(pod.volumes["shm"]["emptyDir"]["sizeLimit"])
        if float(pod.params.get("object-store-memory", "inf")) > shm:
            yield f"{pod.name}: Ray's object store is larger than /dev/shm"
        if shm >= amount(pod.containers[0]["resources"]["limits"]["memory"]):
            yield f"{pod.name}: /dev/shm may take all of its memory"


POLICIES: Final[tuple[Policy, ...]] = (
    ray_is_as_kuberay_needs_it,
    ray_asks_for_a_token_everywhere,
    what_is_logged_is_the_containers_output,
    the_supervisor_can_join_ray,
    groups_offer_what_actors_ask_for,
    shared_memory_holds_the_object_store,
)
