"""Everything else: images, rights in Kubernetes, volumes, budgets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import cluster
from tests.chart.charts import Pod, groups, head, name_of, of_kind, operator_values, pods, workers
from tests.chart.policy.rendered import Policy, Rendered

KEPT_FOR_LOGS: Final = "before-hook-creation"
"""Helm 3 deletes a test that succeeded before it asks for its logs, and fails."""


def images_are_of_one_version(found: Rendered) -> Iterator[str]:
    """Unless the values say otherwise; and never just the newest."""
    for pod in pods(found.objects):
        which = "worker" if pod.role == "worker" else "head"
        given = found.values["image"][which]
        for container in pod.every_container:
            image = container["image"]
            if "@" not in image and (":" not in image or image.endswith(":latest")):
                yield f"{pod.name}, {container['name']}: {image} is no certain version"
            if not (given.get("tag") or given.get("digest")) and cluster.__version__ not in image:
                yield f"{pod.name}, {container['name']}: {image} isn't {cluster.__version__}"


def nobody_has_rights_in_kubernetes(found: Rendered) -> Iterator[str]:
    for each in found.objects:
        if each["kind"] in {"Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding"}:
            yield f"{name_of(each)}: gives rights"
        if each["kind"] == "ServiceAccount" and each.get("automountServiceAccountToken", True):
            yield f"{name_of(each)}: its token is mounted"


def nothing_names_a_namespace(found: Rendered) -> Iterator[str]:
    for each in found.objects:
        if "namespace" in each["metadata"]:
            yield f"{name_of(each)}: is fixed to namespace {each['metadata']['namespace']}"


def claims_are_kept(found: Rendered) -> Iterator[str]:
    claims = {
        each["metadata"]["name"]: each for each in of_kind(found.objects, "PersistentVolumeClaim")
    }
    for name, each in claims.items():
        if each["metadata"].get("annotations", {}).get("helm.sh/resource-policy") != "keep":
            yield f"{name_of(each)}: goes when the release is uninstalled"
        if not any(name in _claims_of(pod) for pod in pods(found.objects)):
            yield f"{name_of(each)}: nobody mounts it"
    theirs = {found.values["head"]["persistence"]["existingClaim"]}
    theirs |= {group.get("cache", {}).get("existingClaim") for group in found.values["gpuGroups"]}
    for pod in pods(found.objects):
        for name in _claims_of(pod) - claims.keys() - theirs:
            yield f"{pod.name}: there is no claim {name}"
    for group, pod in zip(groups(found.objects), workers(found.objects), strict=True):
        for name in _claims_of(pod) & claims.keys():
            modes = claims[name]["spec"]["accessModes"]
            if group["maxReplicas"] > 1 and modes != ["ReadWriteMany"]:
                yield f"{pod.name}: only one of its pods can mount {name}"


def _claims_of(pod: Pod) -> set[str]:
    return {
        volume["persistentVolumeClaim"]["claimName"]
        for volume in pod.volumes.values()
        if "persistentVolumeClaim" in volume
    }


def what_must_last_is_on_volumes(found: Rendered) -> Iterator[str]:
    """The journal of SQLite, and results; and what a read-only root leaves to be written."""
    config, pod = operator_values(found.objects), head(found.objects)
    lasting = "persistentVolumeClaim" in pod.volumes["data"]
    if config["journal"].get("url", "").startswith("sqlite") and not lasting:
        yield "head: the journal goes with the pod"
    roots = [mount["mountPath"] for mount in pod.container("ray-head")["volumeMounts"]]
    for path in (config["artifacts"]["path"], config["journal"].get("url", "///var/lib")[10:]):
        if path and not any(path.startswith(root) for root in roots):
            yield f"head: {path} is on no volume"
    for worker in workers(found.objects):
        mounts = [mount["mountPath"] for mount in worker.containers[0]["volumeMounts"]]
        if config["models"]["root"] not in mounts:
            yield f"{worker.name}: the models are on no volume"


def tests_are_hooks(found: Rendered) -> Iterator[str]:
    for each in of_kind(found.objects, "Pod"):
        if each["metadata"].get("annotations", {}).get("helm.sh/hook") != "test":
            yield f"{name_of(each)}: would be made at every install"
        if each["metadata"]["annotations"].get("helm.sh/hook-delete-policy") != KEPT_FOR_LOGS:
            yield f"{name_of(each)}: `helm test --logs` would find it gone"


def budgets_are_numbers(found: Rendered) -> Iterator[str]:
    """For pods whose owner can't be scaled, Kubernetes counts nothing else."""
    least = {group["groupName"]: group["minReplicas"] for group in groups(found.objects)}
    for each in of_kind(found.objects, "PodDisruptionBudget"):
        spec = each["spec"]
        if type(spec.get("minAvailable")) is not int or "maxUnavailable" in spec:
            yield f"{name_of(each)}: no whole number in minAvailable"
            continue
        group = spec["selector"]["matchLabels"]["ray.io/group"]
        if spec.get("unhealthyPodEvictionPolicy") != "AlwaysAllow":
            yield f"{name_of(each)}: a pod that isn't ready keeps its machine"
        if spec.get("minAvailable", 0) > least.get(group, 1):
            yield f"{name_of(each)}: more than there are"


POLICIES: Final[tuple[Policy, ...]] = (
    images_are_of_one_version,
    nobody_has_rights_in_kubernetes,
    nothing_names_a_namespace,
    claims_are_kept,
    what_must_last_is_on_volumes,
    tests_are_hooks,
    budgets_are_numbers,
)
