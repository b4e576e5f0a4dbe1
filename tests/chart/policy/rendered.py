"""What a policy judges."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tests.chart.charts import Object, Pod

ETC: Final = "/etc/crynux-cluster"


@dataclass(frozen=True, slots=True)
class Rendered:
    """What is judged: the objects, and the values (with the defaults) that they came of."""

    objects: Sequence[Object]
    values: Mapping[str, Any]


Policy = Callable[[Rendered], Iterator[str]]


def mounted_files(pod: Pod, container: str) -> dict[str, tuple[str, str]]:
    """Paths of what a container finds in Secrets and ConfigMaps: each with its object and key."""
    found: dict[str, tuple[str, str]] = {}
    for mount in pod.container(container).get("volumeMounts", ()):
        volume = pod.volumes[mount["name"]]
        if "secret" in volume:
            for item in volume["secret"].get("items", ()):
                path = f"{mount['mountPath']}/{item['path']}"
                found[path] = (volume["secret"]["secretName"], item["key"])
        if "configMap" in volume:
            found[f"{mount['mountPath']}/operator.yaml"] = (volume["configMap"]["name"], "")
    return found
