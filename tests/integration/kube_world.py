"""A release of the chart on this machine: what Helm renders, KubeRay's pods of it as processes, and
a devnet that it serves.

What differs from a cluster, and only that, is in `Place` and `localised`: pods share the machine's
network and file system. So each has an address of its own (all of 127/8 is this machine) and ports
of its own, and the containers' /etc, /var/lib and /tmp are folders.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import re
import secrets
import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
from pydantic import ValidationError

from cluster.config import Config, load
from cluster.core.types import Commitment, GigaBytes, GpuState
from cluster.journal import SqlJournal
from cluster.status import GpuStatus, Status
from devnet.anvil import free_port
from devnet.models import make_models
from devnet.network import MODELS, Devnet, SimulatedCards
from tests.chart import kuberay
from tests.chart.charts import NAMESPACE, Object, case, merged, of_kind, only, operator_text, render
from tests.chart.kuberay import Asked
from tests.integration.kube_image import ROOT, Witness, make_image
from tests.integration.kube_pods import Pod
from tests.integration.operator_gate import Gate
from tests.integration.task_world import TASK_TIMEOUT, Found, TaskWorld

BLOCK_SECONDS = 0.5
CARDS = SimulatedCards("NVIDIA GeForce RTX 4090", GigaBytes(24), 2)
"""One in each of the worker pods."""
HEAD_ENV = {
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "120",
    "RAY_health_check_period_ms": "1000",
}
"""Serve replaces a proxy that is slower to start or to answer (5 and 10 s by itself), which a busy
machine's may be; a dead node is found out in 5 s, not in 15."""
REDIS_HOST = "127.0.0.9"
AGENT_PORT = 52365
COORDINATOR = "ray::CoordinatorActor"
CARD = "ray::InferenceActor"
OLD, NEW = "0.1.0", "0.1.1"
"""Versions of the operator, and tags of their images."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a pod is: workers have no use for some of the ports."""

    ip: str
    gcs: int
    agent: int
    metrics: int
    dashboard: int
    clients: int
    tmp: Path


def localised(value: Any, place: Place, root: Path) -> Any:
    """What is rendered for a pod's own network and file system, for this machine's."""
    if isinstance(value, Mapping):
        return {key: localised(each, place, root) for key, each in value.items()}
    if isinstance(value, list):
        return [localised(each, place, root) for each in value]
    if value == AGENT_PORT:
        return place.agent
    if not isinstance(value, str):
        return value
    text = value.replace("127.0.0.1:6379", f"{place.ip}:{place.gcs}")
    text = re.sub(r"(127\.0\.0\.1|0\.0\.0\.0)(?![\d.])", place.ip, text)
    text = re.sub(r"(?<![\w.-])/tmp\b", str(place.tmp), text)
    return re.sub(r"(?<![\w.-])(/etc|/var/lib)/crynux-cluster", rf"{root}\1/crynux-cluster", text)


def at(place: Place, head: bool) -> dict[str, str]:
    """Parameters of `ray start` that a pod of its own doesn't need."""
    found = {
        "node-ip-address": place.ip,
        "temp-dir": "/tmp/ray",  # noqa: S108 - where it is by itself
        "dashboard-agent-listen-port": str(place.agent),
        "metrics-export-port": str(place.metrics),
    }
    if not head:
        return found
    more = {"port": place.gcs, "dashboard-port": place.dashboard}
    more["ray-client-server-port"] = place.clients
    return found | {name: str(port) for name, port in more.items()}


class KubeWorld(TaskWorld):
    """`root` is what the pods have for / ; `seams` is shared with the images."""

    def __init__(self, devnet: Devnet, base: Path, redis_port: int) -> None:
        self.devnet = devnet
        self.sent = []
        self.root = base / "root"
        self.seams = base / "seams"
        self.logs = devnet.directory / "pods"
        for folder in (self.root, self.seams, self.logs):
            folder.mkdir()
        self.gate = Gate(self.seams)
        self.witness = Witness(self.seams / "writes")
        self._base = base
        self.redis_port = redis_port
        self._api_port = free_port()
        self._uid = str(uuid.uuid4())
        self._numbers = iter(range(11, 250))
        self._images: dict[str, Path] = {}
        self._objects: tuple[Object, ...] = ()
        self._head: Pod | None = None
        self._place: Place | None = None
        self._workers: list[Pod] = []
        self._strays: list[Pod] = []
        self._secrets = self._make_secrets()
        shutil.copytree(MODELS, self.root / "var/lib/crynux-cluster/models")

    # --- what is installed -----------------------------------------------------------------------

    def _make_secrets(self) -> dict[str, dict[str, str]]:
        devnet = self.devnet
        return {
            "key": {"phrase": (devnet.directory / "seed").read_text()},
            "urls": {"rpc-url": devnet.deployment.rpc_url, "relay-url": devnet.relay_url},
            "api": {"token": secrets.token_hex(16)},
            "redis": {"password": secrets.token_hex(16)},
        }

    @property
    def redis_password(self) -> str:
        return self._secrets["redis"]["password"]

    def values(self, **more: Any) -> dict[str, Any]:
        """What an operator would write for this devnet, and `more` of it."""
        where = self.devnet.deployment
        image = {"repository": "crynux-cluster", "tag": OLD}
        contracts = {"task": where.task, "node": where.node, "qos": where.qos}
        network = {"chain_id": where.chain_id, "devnet": True, "contracts": contracts}
        plain = {
            "image": {"head": image, "worker": image},
            "identity": {
                "existingSecret": "key",
                "kind": "seed",
                "keyName": "phrase",
                "accounts": CARDS.count,
            },
            "network": {"existingSecret": "urls"},
            "api": {"existingSecret": "api", "port": self._api_port},
            "config": {
                "network": network | {"block_poll_seconds": BLOCK_SECONDS},
                "models": {"sources": [], "spare_gb": 0.01},
                # Tasks are held at a gate for longer than a card may stand still.
                "gpu": {"host_memory_gb": 1, "stall_seconds": 600},
                "policy": {"retry_backoff": 0.2},
                "fleet": {"pause_after_seconds": 900},
            },
            "head": {"env": [{"name": name, "value": value} for name, value in HEAD_ENV.items()]},
            "gpuGroups": [
                {
                    "name": "cards",
                    "replicas": CARDS.count,
                    "gpusPerPod": 1,
                    "simulated": {"name": CARDS.name, "vram": int(CARDS.vram)},
                    "cache": {"kind": "existingClaim", "existingClaim": "models"},
                }
            ],
        }
        return merged(plain, more)

    def with_redis(self, **more: Any) -> dict[str, Any]:
        tolerance = {
            "enabled": True,
            "redisAddress": f"{REDIS_HOST}:{self.redis_port}",
            "existingSecret": "redis",
        }
        return self.values(ray={"faultTolerance": tolerance}, **more)

    # --- KubeRay ---------------------------------------------------------------------------------

    def apply(self, values: Mapping[str, Any]) -> None:
        """`helm upgrade --install`. Where the RayCluster's spec differs, but for numbers of
        replicas, all pods are deleted and made anew (`upgradeStrategy: Recreate`)."""
        objects = render(case(values))
        same = bool(self._objects) and _fixed(self._objects) == _fixed(objects)
        if self._objects and not same:
            self.delete_pods()
        self._objects = objects
        self.reconcile()

    def reconcile(self) -> None:
        """Pods that are missing are made."""
        cluster = only(self._objects, "RayCluster")
        self._secrets.setdefault(
            kuberay.auth_secret(cluster), {kuberay.AUTH_KEY: secrets.token_hex(32)}
        )
        if self._head is None:
            self._place = self._new_place()
            self._head = self._make_head(self._place)
        (group,) = cluster["spec"]["workerGroupSpecs"]
        while len(self._workers) < group["replicas"]:
            self._workers.append(self._make_worker(group))

    def delete_pods(self) -> None:
        """All at once, and each as it wants to go."""
        gone = self.pods
        self._head, self._workers = None, []
        with ThreadPoolExecutor(len(gone)) as pool:
            list(pool.map(Pod.delete, gone))

    def kill_head(self) -> None:
        """With all that is in it; the next one is found where it was."""
        self.head.kill()
        self._place = replace(self.head_place, tmp=self._new_tmp())
        self._head = self._make_head(self._place)

    def kill_worker(self, pod: Pod) -> None:
        pod.kill()
        self._workers.remove(pod)

    def cut_off_head(self) -> Pod:
        """The head's machine stands still, and is given up for another. Workers have lost it: what
        is left of their sessions ends, as it does where a connection's other end is silent."""
        frozen = self.head
        frozen.freeze()
        self._strays.append(frozen)
        for pod in list(self._workers):
            self.kill_worker(pod)
        self._head = None
        self.reconcile()
        return frozen

    @property
    def head(self) -> Pod:
        assert self._head is not None, "there is no head"
        return self._head

    @property
    def head_place(self) -> Place:
        """Also while it is being deleted."""
        assert self._place is not None, "there was no head"
        return self._place

    @property
    def workers(self) -> list[Pod]:
        return list(self._workers)

    @property
    def pods(self) -> list[Pod]:
        return [*([] if self._head is None else [self._head]), *self._workers]

    def _new_tmp(self) -> Path:
        return self._base / "t" / str(next(self._numbers))

    def _new_place(self) -> Place:
        number = next(self._numbers)
        gcs, agent, metrics, dashboard, clients = (free_port() for _ in range(5))
        tmp = self._base / "t" / str(number)
        return Place(f"127.0.0.{number}", gcs, agent, metrics, dashboard, clients, tmp)

    def _make_head(self, place: Place) -> Pod:
        cluster = copy.deepcopy(dict(only(self._objects, "RayCluster")))
        cluster["spec"]["headGroupSpec"]["rayStartParams"] |= at(place, head=True)
        asked = Asked(f"head-{place.tmp.name}", NAMESPACE, self._uid, place.ip)
        return self._make(kuberay.head_pod(cluster, asked), place)

    def _make_worker(self, group: Mapping[str, Any]) -> Pod:
        place, head = self._new_place(), self.head_place
        cluster = copy.deepcopy(dict(only(self._objects, "RayCluster")))
        cluster["spec"]["headGroupSpec"]["rayStartParams"] |= at(head, head=True)
        here = {**group, "rayStartParams": group["rayStartParams"] | at(place, head=False)}
        asked = Asked(f"worker-{place.tmp.name}", NAMESPACE, self._uid, head.ip)
        return self._make(kuberay.worker_pod(cluster, here, asked), place)

    # --- the kubelet's part before anything runs -------------------------------------------------

    def _make(self, pod: Mapping[str, Any], place: Place) -> Pod:
        place.tmp.mkdir(parents=True)
        spec = localised(pod["spec"], place, self.root)
        containers = [*spec.get("initContainers", ()), *spec["containers"]]
        mounts = {
            mount["name"]: mount["mountPath"]
            for container in containers
            for mount in container.get("volumeMounts", ())
        }
        for volume in spec["volumes"]:
            if volume["name"] not in {"tmp", "shm"}:
                self._lay(volume, Path(mounts[volume["name"]]), place)
        found = {each["name"]: self._environment(each) for each in containers}
        name = pod["metadata"]["name"]
        made = Pod(name, spec, found, place.ip, place.tmp, self.logs)
        made.start()
        return made

    def _lay(self, volume: Mapping[str, Any], folder: Path, place: Place) -> None:
        if "emptyDir" in volume:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        if "configMap" in volume:
            text = localised(operator_text(self._objects), place, self.root)
            (folder / "operator.yaml").write_text(text)
        for item in volume.get("secret", {}).get("items", ()):
            file = folder / item["path"]
            file.unlink(missing_ok=True)
            file.write_text(self._secrets[volume["secret"]["secretName"]][item["key"]])
            file.chmod(volume["secret"]["defaultMode"])

    def _environment(self, container: Mapping[str, Any]) -> dict[str, str]:
        """The image's, then the container's."""
        image = self._image(str(container["image"]).rpartition(":")[2].partition("-")[0])
        found = {
            "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin",
            "PYTHONPATH": f"{image}:{ROOT}",
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        for each in container.get("env", ()):
            if "value" in each:
                found[each["name"]] = each["value"]
            else:
                wanted = each["valueFrom"]["secretKeyRef"]
                found[each["name"]] = self._secrets[wanted["name"]][wanted["key"]]
        return found

    def _image(self, tag: str) -> Path:
        if tag not in self._images:
            self._images[tag] = make_image(self._base / f"image-{tag}", tag, self.seams)
        return self._images[tag]

    # --- the operator, from outside --------------------------------------------------------------

    @property
    def config(self) -> Config:
        """As the operator's own loader reads it in the head."""
        return load(self.root / "etc/crynux-cluster/config/operator.yaml")

    @functools.cached_property
    def journal(self) -> SqlJournal:  # type: ignore[override]
        return SqlJournal(self.config.journal.url)

    async def status(self) -> Status | None:
        """None while it doesn't answer as it should."""
        place = self.head_place
        headers = {"Authorization": f"Bearer {self._secrets['api']['token']}"}
        url = f"http://{place.ip}:{self._api_port}/v1/status"
        with contextlib.suppress(httpx.HTTPError, ValidationError):
            async with httpx.AsyncClient(timeout=10) as http:
                answer = await http.get(url, headers=headers)
            if answer.is_success:
                return Status.model_validate(answer.json())
        return None

    async def until_status(self, find: Callable[[Status], Found | None], what: str) -> Found:
        async def look() -> Found | None:
            status = await self.status()
            return None if status is None else find(status)

        return await self.until(look, what)

    async def until_serving(self) -> Status:
        """Every card is ready and every card's account takes tasks."""

        def serving(status: Status) -> Status | None:
            free = [gpu for gpu in status.gpus if gpu.state is GpuState.READY]
            joined = [each for each in status.accounts if each.status == "available"]
            enough = len(free) == CARDS.count and len(joined) == CARDS.count
            return status if status.acting and enough else None

        return await self.until_status(serving, "all cards are ready and their accounts joined")

    async def until_ready(self) -> None:
        """By the probes that are rendered."""

        def ready() -> bool:
            return all(pod.ready for pod in self.pods)

        await self.until_true(ready, "all pods are ready")

    async def computing(self, commitment: Callable[[], Commitment | None]) -> GpuStatus:
        """Wait until a card is in the middle of the task, where the closed gate holds it."""

        def find(status: Status) -> GpuStatus | None:
            wanted = commitment()
            for gpu in status.gpus:
                if wanted is not None and gpu.task == wanted and (gpu.step or 0) > 0:
                    return gpu
            return None

        return await self.until_status(find, "a GPU is in the middle of the task")

    def begin(self) -> None:
        """A test begins here."""
        self.sent.clear()
        self.gate.open()

    def explain(self) -> str:
        """The tasks' stories, and the end of what each container said."""
        lines = []
        for commitment in self.sent:
            lines.append(f"story of {commitment}")
            lines += [
                f"  {at:.2f} {str(event)[:300]}" for event, at in self.journal.story(commitment)
            ]
        for file in sorted(self.logs.glob("*.log"), key=lambda each: each.stat().st_mtime):
            lines.append(f"{file}, its end")
            lines += [f"  {line[:400]}" for line in file.read_text().splitlines()[-25:]]
        return "\n".join(lines)

    def end_strays(self) -> None:
        """A machine that is back has its former pods ended."""
        while self._strays:
            self._strays.pop().kill()

    def stop(self) -> None:
        self.end_strays()
        for pod in self.pods:
            pod.kill()
        if "journal" in self.__dict__:
            self.journal.close()


def _fixed(objects: tuple[Object, ...]) -> str:
    """What KubeRay compares."""
    (cluster,) = of_kind(objects, "RayCluster")
    spec = copy.deepcopy(cluster["spec"])
    for group in spec["workerGroupSpecs"]:
        for key in ("replicas", "minReplicas", "maxReplicas"):
            del group[key]
    return json.dumps(spec, sort_keys=True)


@contextlib.contextmanager
def kube_world(folder: Path, redis_port: int) -> Iterator[KubeWorld]:
    make_models(MODELS)
    with contextlib.ExitStack() as stack:
        devnet = stack.enter_context(
            Devnet(
                folder,
                block_time=BLOCK_SECONDS,
                task_timeout=TASK_TIMEOUT,
                models=MODELS,
                cards=[CARDS],
            )
        )
        # Ray's sockets want a short name, and what is in /tmp would be taken for the pods'.
        base = Path(tempfile.mkdtemp(prefix="kube-", dir="/var/tmp"))  # noqa: S108
        stack.callback(shutil.rmtree, base, ignore_errors=True)
        world = KubeWorld(devnet, base, redis_port)
        stack.callback(world.stop)
        yield world
