"""Secrets: none is made or shown, and each is where it is read and nowhere else."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final
from urllib.parse import urlsplit

from tests.chart.charts import Pod, name_of, operator_values, pods
from tests.chart.policy.rendered import ETC, Policy, Rendered

SECRET_WORDS: Final = re.compile(r"pass|secret|token|credential|private|seed|key", re.IGNORECASE)


def no_secret_outside_of_secrets(found: Rendered) -> Iterator[str]:
    """None is made, none is in a ConfigMap, none in an environment: they are mounted as files."""
    for each in found.objects:
        if each["kind"] == "Secret":
            yield f"{name_of(each)}: the chart makes a Secret"
    for key, value in _leaves(operator_values(found.objects), ""):
        if isinstance(value, str) and "://" in value and "@" in urlsplit(value).netloc:
            yield f"ConfigMap: {key} has a user in its URL"
        if SECRET_WORDS.search(key.rsplit(".", 1)[-1]) and not str(value).startswith(f"{ETC}/"):
            yield f"ConfigMap: {key} isn't the path of a file"
        if key in {"network.rpc_url", "network.ws_url", "network.relay_url"}:
            yield f"ConfigMap: {key} may hold a key"
    for pod in pods(found.objects):
        for container in pod.every_container:
            yield from _secrets_in_environment(f"{pod.name}, {container['name']}", container)


def _secrets_in_environment(where: str, container: Mapping[str, Any]) -> Iterator[str]:
    if "envFrom" in container:
        yield f"{where}: envFrom"
    names = [each["name"] for each in container.get("env", ())]
    if len(names) != len(set(names)):
        yield f"{where}: a variable stands twice"
    for each in container.get("env", ()):
        if "valueFrom" in each:
            yield f"{where}: {each['name']} comes from elsewhere"
        elif SECRET_WORDS.search(each["name"]) and not each["value"].startswith(f"{ETC}/"):
            yield f"{where}: {each['name']} may be a secret"


def _leaves(value: object, path: str) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        for key, child in value.items():
            yield from _leaves(child, f"{path}.{key}".lstrip("."))
    else:
        yield path, value


def secrets_are_mounted_for_their_reader_only(found: Rendered) -> Iterator[str]:
    for pod in pods(found.objects):
        for name, volume in pod.volumes.items():
            if (secret := volume.get("secret")) is None:
                continue
            where = f"{pod.name}, volume {name}"
            if secret.get("defaultMode") != 0o400:
                yield f"{where}: mode {secret.get('defaultMode')}"
            if not secret.get("items"):
                yield f"{where}: all of the Secret is mounted"
            for mount in _mounts(pod, name):
                if not mount.get("readOnly"):
                    yield f"{where}: can be written"


def _mounts(pod: Pod, volume: str) -> Iterator[Mapping[str, Any]]:
    for container in pod.every_container:
        yield from (each for each in container.get("volumeMounts", ()) if each["name"] == volume)


def _mounted_in(pod: Pod, volume: str) -> set[str]:
    return {
        container["name"]
        for container in pod.every_container
        if any(each["name"] == volume for each in container.get("volumeMounts", ()))
    }


def the_key_is_in_the_coordinators_container_only(found: Rendered) -> Iterator[str]:
    key = found.values["identity"]["existingSecret"]
    for pod in pods(found.objects):
        of_key = [
            name
            for name, volume in pod.volumes.items()
            if volume.get("secret", {}).get("secretName") == key
        ]
        if pod.role != "head" and of_key:
            yield f"{pod.name}: has the key"
        if pod.role == "head":
            yield from _key_in_the_head(pod, of_key)


def _key_in_the_head(pod: Pod, of_key: list[str]) -> Iterator[str]:
    if of_key != ["key-secret"]:
        yield f"{pod.name}: the key's Secret is mounted as {of_key}"
        return
    if _mounted_in(pod, "key-secret") != {"key"}:
        yield f"{pod.name}: the key's Secret is in {sorted(_mounted_in(pod, 'key-secret'))}"
    if _mounted_in(pod, "key") != {"key", "ray-head"}:
        yield f"{pod.name}: the key is in {sorted(_mounted_in(pod, 'key'))}"
    if pod.volumes["key"].get("emptyDir", {}).get("medium") != "Memory":
        yield f"{pod.name}: the key's copy is on disk"
    maker = pod.container("key")
    if maker["command"][:3] != ["install", "-m", "0400"]:
        yield f"{pod.name}: the key's copy isn't its user's alone"
    for mount in pod.container("ray-head")["volumeMounts"]:
        if mount["name"] == "key" and not mount.get("readOnly"):
            yield f"{pod.name}: the coordinator may write its key"


POLICIES: Final[tuple[Policy, ...]] = (
    no_secret_outside_of_secrets,
    secrets_are_mounted_for_their_reader_only,
    the_key_is_in_the_coordinators_container_only,
)
