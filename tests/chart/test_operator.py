"""What is rendered, against the operator's own code: its loader, its pool, its commands."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from actors import pool as pool_module
from actors.coordinator import CoordinatorActor
from actors.inference import InferenceActor
from actors.keeping import StoreActor
from actors.pool import RayGpuPool, parse_simulated, slots_of
from cluster.api.app import create_api
from cluster.cli import cli
from cluster.config import Config, load
from cluster.core.errors import ConfigError
from tests.chart.cases import ADDRESS, NAMES, SWITCHES, values_of
from tests.chart.charts import (
    EXAMPLES,
    Object,
    Pod,
    case,
    groups,
    head,
    operator_text,
    operator_values,
    pods,
    render,
    workers,
)
from tests.chart.policy.rendered import ETC, mounted_files
from tests.unit.test_docs import check_command

SAID = {
    "rpc": "https://rpc.example/key\nhttps://second.example/key",
    "relay": "https://relay.example",
    "ws": "wss://rpc.example/key",
    "url": "postgresql://user:password@db/crynux",
    "token": "a-token-of-some-length",
}
"""What the Secrets hold, by the name of the file that it becomes."""


def lay(pod: Pod, container: str, root: Path) -> None:
    """The Secrets that this container has, as files under `root`."""
    for path in mounted_files(pod, container):
        file = root / path.removeprefix("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(SAID.get(file.name, "x"), encoding="utf-8")


def loaded(objects: tuple[Object, ...], container: str, root: Path) -> Config:
    """As the operator's loader reads the configuration in that container of the head."""
    lay(head(objects), container, root)
    text = operator_text(objects).replace("0x" + "00" * 20, ADDRESS)
    text = text.replace(f"{ETC}/", f"{root}{ETC}/")
    file = root / ETC.removeprefix("/") / "config" / "operator.yaml"
    file.write_text(text, encoding="utf-8")
    return load(file)


@pytest.mark.parametrize("container", ["ray-head", "supervisor"])
@pytest.mark.parametrize("name", NAMES)
def test_the_configuration_loads_where_it_is_read(
    name: str, container: str, tmp_path: Path
) -> None:
    objects = render(case(values_of(name)))
    config = loaded(objects, container, tmp_path)
    assert config.network.rpc_url == "https://rpc.example/key"
    assert config.network.fallback_rpc_urls == ("https://second.example/key",)
    assert config.network.relay_url == "https://relay.example"
    assert config.ray.address == "127.0.0.1:6379"
    assert config.serve.host == "0.0.0.0"  # noqa: S104 - the pod's own
    key = config.identity.key_file
    assert key is not None
    assert str(key).endswith("/key/key")


def test_both_containers_of_the_head_read_the_same(tmp_path: Path) -> None:
    for name in NAMES:
        objects = render(case(values_of(name)))
        ours = [loaded(objects, each, tmp_path) for each in ("ray-head", "supervisor")]
        assert ours[0] == ours[1]


def test_an_example_says_where_its_addresses_are_missing(tmp_path: Path) -> None:
    objects = render(case(values_of("single-server")))
    lay(head(objects), "ray-head", tmp_path)
    file = tmp_path / "operator.yaml"
    file.write_text(operator_text(objects).replace(f"{ETC}/", f"{tmp_path}{ETC}/"))
    with pytest.raises(ConfigError, match="the zero address is a placeholder"):
        load(file)


WITH_VALUES = {
    "postgresql": ("journal", "url", SAID["url"]),
    "a websocket": ("network", "ws_url", SAID["ws"]),
    "a large chain": ("network", "chain_id", 11155111),
    "a namespace of ray": ("ray", "namespace", "site-2"),
    "another port": ("serve", "port", 9000),
    "reads are open": ("serve", "token_file", None),
    "mixed-pool": ("network", "explorer_url", "https://explorer.example.org/tx/{hash}"),
    "air-gapped": ("models", "sources", ("mirror",)),
}


@pytest.mark.parametrize("name", WITH_VALUES)
def test_values_arrive_in_the_operators_configuration(name: str, tmp_path: Path) -> None:
    section, key, wanted = WITH_VALUES[name]
    config = loaded(render(case(values_of(name))), "ray-head", tmp_path)
    assert getattr(getattr(config, section), key) == wanted


def test_the_stake_is_in_cnx_to_the_last_digit(tmp_path: Path) -> None:
    config = loaded(render(case(values_of("a large chain"))), "ray-head", tmp_path)
    assert config.network.stake == 4005 * 10**17
    assert config.fleet.stake_budget == 800 * 10**18


def test_a_groups_slots_are_those_of_its_kind_of_card(tmp_path: Path) -> None:
    config = loaded(render(case(values_of("slots of their own"))), "ray-head", tmp_path)
    found = {each.gpu: each.slots for each in config.fleet.slots_by_gpu}
    assert found == {"NVIDIA L4": 3, "NVIDIA A40": "auto"}
    assert config.fleet.slots_per_gpu == 2


@pytest.mark.parametrize("name", NAMES)
def test_every_file_that_is_named_is_mounted_for_who_reads_it(name: str) -> None:
    objects = render(case(values_of(name)))
    config = operator_values(objects)
    head_files = set(mounted_files(head(objects), "ray-head"))
    for section, keys in config.items():
        for key, value in keys.items():
            if key.endswith("_file") and section != "identity":
                assert value in head_files, f"{section}.{key}"
    tokens = [
        config["models"].get("hub", {}).get("token_file"),
        config["models"].get("web", {}).get("civitai_token_file"),
    ]
    for worker in workers(objects):
        theirs = mounted_files(worker, "ray-worker")
        env = {each["name"]: each["value"] for each in worker.containers[0]["env"]}
        named = {*filter(None, tokens), *filter(None, [env.get("AWS_SHARED_CREDENTIALS_FILE")])}
        assert named == set(theirs)


@pytest.mark.parametrize("name", NAMES)
def test_the_key_is_where_the_coordinator_looks_for_it(name: str) -> None:
    objects = render(case(values_of(name)))
    pod = head(objects)
    maker = pod.container("key")
    copied = {f"{ETC}/key/{path.rsplit('/', 1)[1]}" for path in maker["args"]}
    assert set(maker["args"]) == set(mounted_files(pod, "key"))
    identity = operator_values(objects)["identity"]
    assert {value for key, value in identity.items() if key.endswith("_file")} == copied


# --- what actors ask for --------------------------------------------------------------------------


def node(pod: Pod) -> dict[str, Any]:
    """The Ray node that this pod becomes, as `ray.nodes()` would tell of it."""
    resources = {"CPU": float(pod.params["num-cpus"])}
    if int(pod.params.get("num-gpus", "0")):
        resources["GPU"] = float(pod.params["num-gpus"])
    # KubeRay pastes it into a command line: the quotes are the shell's.
    custom = pod.params.get("resources", "'{}'")
    assert (custom[0], custom[-1]) == ("'", "'")
    return {
        "NodeID": "a" * 56,
        "Alive": True,
        "Resources": resources | json.loads(custom[1:-1]),
        "NodeManagerHostname": "h",
    }


@dataclass
class Asked:
    """Records the options with which actors are made."""

    options_given: list[Mapping[str, Any]] = field(default_factory=list)

    def options(self, **given: Any) -> Asked:  # noqa: ANN401 - Ray's
        self.options_given.append(given)
        return self

    def remote(self, *_: object) -> object:
        return object()


@pytest.mark.parametrize("name", NAMES)
def test_all_actors_of_a_node_fit_on_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = render(case(values_of(name)))
    devnet = operator_values(objects)["network"].get("devnet", False)
    wanted = {group["name"]: group.get("gpusPerPod", 1) for group in values_of(name)["gpuGroups"]}
    for group, pod in zip(groups(objects), workers(objects), strict=True):
        here = node(pod)
        slots = slots_of([here], allow_simulated=devnet)
        assert len(slots) == wanted[group["groupName"]]
        asked = Asked()
        monkeypatch.setattr(pool_module, "InferenceActor", asked)
        pool = RayGpuPool(lambda _: cast(Any, lambda: None), "r", devnet, 300.0)
        for slot in slots:
            pool._actor(slot)
        taken: dict[str, float] = {}
        for options in asked.options_given:
            needs = {"GPU": options["num_gpus"], **options["resources"]}
            for resource, count in needs.items():
                taken[resource] = taken.get(resource, 0) + count
        assert {key: count for key, count in taken.items() if count} == {
            key: count for key, count in here["Resources"].items() if key != "CPU" and count
        }


def test_no_actor_asks_for_processors() -> None:
    """So the head can be told that it has none, and workers of any number."""
    for actor in (CoordinatorActor, InferenceActor, StoreActor):
        assert cast(Any, actor)._default_options["num_cpus"] == 0


def test_simulated_cards_are_offered_under_the_name_that_the_network_sees() -> None:
    (worker,) = workers(render(case(values_of("simulated cards"))))
    (kind,) = filter(None, map(parse_simulated, node(worker)["Resources"]))
    assert (kind.name, kind.vram) == ("NVIDIA GeForce RTX 4090+docker", 24)


# --- commands and paths ---------------------------------------------------------------------------


def test_what_is_probed_exists_in_the_api() -> None:
    class Nobody:
        pass

    api = create_api(cast(Any, Nobody()))
    paths = {getattr(route, "path", "") for route in api.routes}
    asked = {
        container[probe]["httpGet"]["path"]
        for pod in pods(render(case(values_of("single-server"))))
        for container in pod.containers
        for probe in ("livenessProbe", "readinessProbe", "startupProbe")
        if container.get(probe, {}).get("httpGet", {}).get("port") == 8000
    }
    assert asked == {"/healthz", "/readyz"}
    assert asked <= paths


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_commands_exist_with_their_options(name: str) -> None:
    found = pods(render(case(values_of(name))))
    for pod in found:
        for container in pod.containers:
            stop = container.get("lifecycle", {}).get("preStop", {}).get("exec", {})
            if stop:
                check_command(" ".join(stop["command"]))
    (script,) = head(render(case(values_of(name)))).container("supervisor")["args"]
    check_command(script.rpartition("exec ")[2])


def test_variables_that_the_chart_sets_are_read_by_the_command_line() -> None:
    known = {
        name
        for command in cli.commands.values()
        for parameter in command.params
        for name in [parameter.envvar]
        if isinstance(name, str)
    }
    pod = head(render(case(values_of("single-server"))))
    ours = {each["name"] for each in pod.container("ray-head")["env"] if "CRYNUX" in each["name"]}
    assert ours == {"CRYNUX_URL", "CRYNUX_TOKEN_FILE"}
    assert ours <= known


# --- checksums ------------------------------------------------------------------------------------


def checksum(values: Mapping[str, Any]) -> str:
    return head(render(case(values))).annotations["checksum/config"]


def test_the_checksum_changes_exactly_when_the_configuration_does() -> None:
    found: dict[str, str] = {}
    for name in SWITCHES:
        values = values_of(name)
        text = operator_text(render(case(values)))
        assert found.setdefault(text, checksum(values)) == checksum(values)
    assert len(found) > 10
    assert len(set(found.values())) == len(found)


def test_the_workers_are_not_touched_by_a_change_of_the_configuration() -> None:
    plain, changed = (render(case(values_of(each))) for each in ("single-server", "a large chain"))
    assert groups(plain) == groups(changed)


def test_a_rollout_reaches_every_pod() -> None:
    objects = render(case(values_of("rolled out again")))
    for pod in pods(objects):
        if pod.role != "other":
            assert pod.annotations["crynux-cluster/rollout"] == "after the key was renewed"
