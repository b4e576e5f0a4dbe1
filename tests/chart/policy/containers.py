"""Pods and containers: bounds, rights, probes, and how they go."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from tests.chart.charts import Pod, amount, operator_values, pods
from tests.chart.policy.rendered import Policy, Rendered

AS_WHOM: Final = {"runAsUser": "user", "runAsGroup": "group", "fsGroup": "group"}
TO_END: Final = 30
"""Seconds that Ray is left to end its processes in."""
LONGEST_TASK: Final = 180
"""Seconds, unless its creator says otherwise (protocol.md, "Timeout")."""


def every_container_has_requests_and_limits(found: Rendered) -> Iterator[str]:
    for pod in pods(found.objects):
        for container in pod.every_container:
            where = f"{pod.name}, {container['name']}"
            given = container.get("resources", {})
            requests, limits = given.get("requests", {}), given.get("limits", {})
            for kind in ("cpu", "memory"):
                if kind not in requests or kind not in limits:
                    yield f"{where}: no {kind} in requests or limits"
                elif amount(requests[kind]) > amount(limits[kind]):
                    yield f"{where}: more {kind} is requested than allowed"
        for name, volume in pod.volumes.items():
            if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
                yield f"{pod.name}, volume {name}: may grow without bound"


def disk_is_asked_for(found: Rendered) -> Iterator[str]:
    """As much of the machine's as the pod's volumes may take: else it comes where it is evicted."""
    for pod in pods(found.objects):
        volumes = [each["emptyDir"] for each in pod.volumes.values() if "emptyDir" in each]
        wanted = sum(amount(each["sizeLimit"]) for each in volumes if "medium" not in each)
        given = [each.get("resources", {}) for each in pod.containers]
        if any("ephemeral-storage" in each.get("limits", {}) for each in given):
            continue  # theirs, which is what is asked for too
        asked = [each.get("requests", {}).get("ephemeral-storage", "0") for each in given]
        if sum(map(amount, asked)) < wanted:
            yield f"{pod.name}: its volumes may take more of the disk than it asks for"


def pods_are_restricted(found: Rendered) -> Iterator[str]:
    """The pod security standard "restricted", and nothing of the machine or of Kubernetes' API."""
    kinds = {"configMap", "emptyDir", "persistentVolumeClaim", "secret"}
    for pod in pods(found.objects):
        spec, own = pod.spec, pod.spec.get("securityContext", {})
        yield from _runs_as_told(pod, own, found.values["security"])
        if own.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield f"{pod.name}: no seccomp profile"
        if spec.get("automountServiceAccountToken") is not False:
            yield f"{pod.name}: a service account's token is mounted"
        for key in ("hostNetwork", "hostPID", "hostIPC"):
            if spec.get(key):
                yield f"{pod.name}: {key}"
        for name, volume in pod.volumes.items():
            if not (set(volume) - {"name"}) <= kinds:
                yield f"{pod.name}: volume {name} is none of {sorted(kinds)}"
        for container in pod.every_container:
            yield from _container_is_restricted(pod, container, found)


def _runs_as_told(pod: Pod, own: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[str]:
    if own.get("runAsNonRoot") is not True or own.get("runAsUser", 0) == 0:
        yield f"{pod.name}: may run as root"
    if [own.get(key) for key in AS_WHOM] != [given[key] for key in AS_WHOM.values()]:
        yield f"{pod.name}: doesn't run as whom the values say"


def _container_is_restricted(
    pod: Pod, container: Mapping[str, Any], found: Rendered
) -> Iterator[str]:
    where, own = f"{pod.name}, {container['name']}", container.get("securityContext", {})
    if own.get("allowPrivilegeEscalation") is not False or own.get("privileged"):
        yield f"{where}: may gain privileges"
    if own.get("capabilities") != {"drop": ["ALL"]}:
        yield f"{where}: keeps capabilities"
    if own.get("runAsUser", 1) == 0 or own.get("runAsNonRoot") is False:
        yield f"{where}: may run as root"
    if own.get("readOnlyRootFilesystem") is not found.values["security"]["readOnlyRootFilesystem"]:
        yield f"{where}: its root filesystem isn't as the values say"
    if any("hostPort" in port for port in container.get("ports", ())):
        yield f"{where}: takes a port of the machine"


def probes_fit(found: Rendered) -> Iterator[str]:
    """Each is asked by HTTP for something that knows, and none ends what would come back."""
    api = operator_values(found.objects)["serve"]["port"]
    for pod in pods(found.objects):
        if pod.role == "other":
            continue
        for container in pod.containers:
            where = f"{pod.name}, {container['name']}"
            agent = int(pod.params["dashboard-agent-listen-port"])
            of_ray = container["name"] in {"ray-head", "ray-worker"}
            alive = ("/api/healthz", agent) if of_ray else ("/healthz", api)
            ready = ("/api/healthz", agent) if of_ray else ("/readyz", api)
            wanted = {"startupProbe": alive, "livenessProbe": alive, "readinessProbe": ready}
            for name, (path, port) in wanted.items():
                asked = container.get(name, {}).get("httpGet", {})
                if (asked.get("path"), asked.get("port")) != (path, port):
                    yield f"{where}: {name} doesn't ask {path} at {port}"
            for name in ("startupProbe", "livenessProbe") if of_ray else ():
                if container.get(name, {}).get("terminationGracePeriodSeconds", 600) > TO_END:
                    yield f"{where}: a Ray that doesn't answer is asked to leave for long"
            if (seconds := _patience(container.get("livenessProbe", {}))) < 60:
                yield f"{where}: is ended after {seconds} s of silence"


def _patience(probe: Mapping[str, Any]) -> int:
    found: int = probe.get("periodSeconds", 10) * probe.get("failureThreshold", 3)
    return found


def pods_go_in_good_order(found: Rendered) -> Iterator[str]:
    """Their cards finish first, and there is more time for that than the longest task takes."""
    for pod in pods(found.objects):
        if pod.role == "other":
            continue
        grace = pod.spec.get("terminationGracePeriodSeconds", 30)
        (command,) = (
            each.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
            for each in pod.containers
            if each["name"] in {"ray-head", "ray-worker"}
        )
        if command[:2] != ["crynux-cluster", "leave"]:
            yield f"{pod.name}: its cards are not emptied first"
            continue
        options = dict(zip(command[2::2], command[3::2], strict=True))
        if options["--namespace"] != operator_values(found.objects)["ray"].get(
            "namespace", "crynux"
        ):
            yield f"{pod.name}: asks the coordinator in another namespace of Ray"
        if (waits := float(options["--timeout"])) <= LONGEST_TASK:
            yield f"{pod.name}: waits {waits} s for its cards"
        if grace - waits < TO_END or _drain_seconds(pod) > 0:
            yield f"{pod.name}: is ended before its cards are waited for and Ray has ended"


def _drain_seconds(pod: Pod) -> float:
    """How long Ray waits, at a SIGTERM, for actors that never leave by themselves."""
    env = {each["name"]: each.get("value") for each in pod.containers[0]["env"]}
    return float(env.get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S") or 30)


def what_a_card_computes_can_be_handed_over(found: Rendered) -> Iterator[str]:
    """When all pods go, as at an upgrade: no card waits for longer than the head."""
    grace = {pod.name: pod.spec["terminationGracePeriodSeconds"] for pod in pods(found.objects)}
    (head,) = (grace[pod.name] for pod in pods(found.objects) if pod.role == "head")
    for pod in pods(found.objects):
        if pod.role == "worker" and grace[pod.name] > head:
            yield f"{pod.name}: may compute for {grace[pod.name]} s, and the head waits {head} s"


def the_head_leaves_a_machine_that_is_gone(found: Rendered) -> Iterator[str]:
    """Sooner than Kubernetes would by itself, after five minutes."""
    (pod,) = (each for each in pods(found.objects) if each.role == "head")
    given = {
        each["key"]: each.get("tolerationSeconds")
        for each in pod.spec.get("tolerations", ())
        if each.get("effect") == "NoExecute"
    }
    for key in ("not-ready", "unreachable"):
        if given.get(f"node.kubernetes.io/{key}") != found.values["head"]["unreachableSeconds"]:
            yield f"{pod.name}: stays on a machine that is {key}"
    for each in found.values["head"].get("tolerations", ()):
        if each not in pod.spec["tolerations"]:
            yield f"{pod.name}: goes along with no {each}"


POLICIES: Final[tuple[Policy, ...]] = (
    every_container_has_requests_and_limits,
    disk_is_asked_for,
    pods_are_restricted,
    probes_fit,
    pods_go_in_good_order,
    what_a_card_computes_can_be_handed_over,
    the_head_leaves_a_machine_that_is_gone,
)
