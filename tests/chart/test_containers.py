"""Image, Compose file, systemd unit and locks, judged without building anything."""

from __future__ import annotations

import configparser
import fnmatch
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import cluster
from cluster import runtime
from cluster.config import load
from cluster.core.errors import ConfigError
from requirements import lock
from tests.chart.cases import ADDRESS, NAMES, values_of
from tests.chart.charts import case, pods, render
from tests.chart.policy.secrets import SECRET_WORDS
from tests.chart.tools import ROOT
from tests.unit.test_docs import check_command

PROJECT: Final = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# --- Dockerfile -----------------------------------------------------------------------------------

DOCKERFILE: Final = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def instructions(text: str) -> list[tuple[str, str]]:
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    found = [line.split(None, 1) for line in joined.splitlines() if line.strip()]
    return [(word.upper(), rest.strip()) for word, rest in found]


def arguments(text: str) -> dict[str, str]:
    given = [rest for word, rest in instructions(text) if word == "ARG"]
    assert all("=" in each for each in given), "an argument without a default"
    return dict(each.split("=", 1) for each in given)


def stages(text: str) -> list[list[tuple[str, str]]]:
    found: list[list[tuple[str, str]]] = []
    for word, rest in instructions(text):
        if word == "FROM":
            found.append([])
        if found:
            found[-1].append((word, rest))
    return found


def faults(text: str) -> list[str]:
    """What is wrong with it: its image must be built again alike, and hold no secret."""
    found = [
        f"{word} {rest}: {said}"
        for word, rest in instructions(text)
        for of, wrong, said in RULES
        if word in of and wrong(rest)
    ]
    defaults = arguments(text)
    for name in (
        re.match(r"\$\{(\w+)\}", rest) for word, rest in instructions(text) if word == "FROM"
    ):
        if name is None or not re.fullmatch(r"\S+:[\w.-]*\d[\w.-]*", defaults[name[1]]):
            found.append("FROM: no argument with a certain version")
    last = stages(text)[-1]
    users = [rest for word, rest in last if word == "USER"]
    if not users or not re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1]):
        found.append("the last USER is no number above 0")
    words = {word for word, _ in last}
    return found + [
        f"no {each}" for each in ("HEALTHCHECK", "LABEL", "ENTRYPOINT") if each not in words
    ]


def _unlocked(command: str) -> bool:
    return "pip install -" in command and "--no-deps" not in command


def _keeps_lists(command: str) -> bool:
    return "apt-get install" in command and "rm -rf /var/lib/apt/lists" not in command


def _odd(command: str) -> bool:
    return bool(re.search(r"\b(sudo|chmod (-R )?777|curl [^|]*\| *(ba)?sh)\b", command))


RULES: Final[tuple[tuple[set[str], Callable[[str], bool], str], ...]] = (
    ({"ADD"}, lambda _: True, "whatever it is, COPY is meant"),
    (
        {"ARG", "ENV"},
        lambda rest: bool(SECRET_WORDS.search(rest.split("=")[0])),
        "a secret stays in the image's history",
    ),
    ({"RUN"}, _keeps_lists, "apt's lists stay in the image"),
    ({"RUN"}, _unlocked, "something else than what is locked"),
    ({"RUN"}, _odd, "nothing that an image needs"),
)


def test_the_dockerfile_is_as_it_should_be() -> None:
    assert faults(DOCKERFILE) == []


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("FROM ${BASE} AS build", "FROM debian:latest AS build", "no argument with a certain"),
        ("ARG BASE=debian:12.12-slim", "ARG BASE=debian:latest", "no argument with a certain"),
        ("USER 1000:1000", "USER root", "the last USER is no number above 0"),
        ("ARG REVISION=unknown", "ARG HF_TOKEN=none", "a secret stays in the image's history"),
        ("--no-deps --require-hashes", "--require-hashes", "something else than what is locked"),
        ("    && rm -rf /var/lib/apt/lists/*", "    && true", "apt's lists stay in the image"),
        ("HEALTHCHECK", "ONBUILD RUN true #", "no HEALTHCHECK"),
    ],
)
def test_a_worse_dockerfile_would_be_noticed(old: str, new: str, said: str) -> None:
    assert old in DOCKERFILE
    assert any(said in fault for fault in faults(DOCKERFILE.replace(old, new)))


def test_what_is_copied_is_there_and_let_through() -> None:
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").split("\n")
    allowed = [line[1:] for line in ignore if line.startswith("!")]
    sources = [
        source
        for word, rest in instructions(DOCKERFILE)
        if word == "COPY" and "--from" not in rest
        for source in rest.split()[:-1]
    ]
    assert "*" in ignore
    for source in sources:
        for name in {source.replace("${VARIANT}", each) for each in ("head", "worker")}:
            assert (ROOT / name).exists(), name
            probe = f"{name}x" if name.endswith("/") else name
            assert any(fnmatch.fnmatch(probe, each.replace("**", "*")) for each in allowed), name
    assert not [each for each in allowed if re.search(r"secret|key|operator|\.env", each)]


def test_versions_in_the_dockerfile_are_those_of_the_project() -> None:
    given = arguments(DOCKERFILE)
    assert given["VERSION"] == cluster.__version__
    assert given["PYTHON"].startswith(f"{lock.PYTHON}.")
    for tag in ("cpu", "cuda"):
        assert f"crynux-cluster:{cluster.__version__}-{tag}" in DOCKERFILE
    (entry,) = (rest for word, rest in instructions(DOCKERFILE) if word == "ENTRYPOINT")
    assert json.loads(entry)[0] in PROJECT["scripts"]


def test_python_and_programs_are_found_by_a_login_shell_too() -> None:
    """KubeRay runs Ray by bash, and may be told to make it a login shell."""
    runs = " ".join(rest for word, rest in instructions(DOCKERFILE) if word == "RUN")
    for program in ("python", "ray", "crynux-cluster"):
        assert f"/opt/crynux-cluster/bin/{program} " in runs
    assert "/usr/local/bin/" in runs


def test_whichever_user_the_chart_runs_it_as_comes_to_what_is_mounted() -> None:
    """What lies in the folders is mounted, with modes of its own; and a user of theirs, as
    OpenShift gives one, is in no group of the image's."""
    runs = " ".join(rest for word, rest in instructions(DOCKERFILE) if word == "RUN")
    ((mode, places),) = re.findall(r"install --directory .*?--mode=(\d+) ([\w/ -]+)", runs)
    assert mode == "0755"
    for name in NAMES:
        for pod in pods(render(case(values_of(name)))):
            mounted = [
                Path(mount["mountPath"])
                for container in pod.every_container
                for mount in container.get("volumeMounts", ())
            ]
            above = {
                str(each) for path in mounted for each in path.parents if "crynux" in str(each)
            }
            assert above <= set(places.split()), name


# --- locks ----------------------------------------------------------------------------------------


def pinned(variant: str) -> dict[str, str]:
    text = (ROOT / "requirements" / f"{variant}.txt").read_text(encoding="utf-8")
    found = dict(re.findall(r"^([a-z0-9_.-]+)==(\S+) \\$", text, re.MULTILINE))
    assert len(lock.ITEM.findall(text)) == len(found), "something without a hash"
    assert len(found) == len(re.findall(r"^\S+==", text, re.MULTILINE))
    return found


def test_the_workers_lock_has_what_the_project_asks_for() -> None:
    wanted = [*PROJECT["dependencies"]]
    for extra in lock.EXTRAS:
        wanted += PROJECT["optional-dependencies"][extra]
    found = pinned("worker")
    for each in map(Requirement, wanted):
        name = re.sub(r"[-_.]+", "-", each.name).lower()
        assert each.specifier.contains(Version(found[name])), f"{each}: run make lock"


def test_the_images_hold_nothing_for_another_torch() -> None:
    """xformers is made for another CUDA than our torch; diffusers imports it where it is found, and
    would start CUDA early for what nothing uses."""
    assert "xformers" not in pinned("worker")
    assert lock.EXTRAS == ("gpu", "postgres", "tracing")


def test_the_heads_lock_is_the_workers_without_the_frameworks() -> None:
    head, worker = pinned("head"), pinned("worker")
    assert head == {name: at for name, at in worker.items() if not lock.is_framework(name)}
    assert worker.keys() >= lock.FRAMEWORKS
    assert {"ray", "web3", "psycopg", "setuptools"} <= head.keys()


def test_what_runs_on_the_head_needs_no_framework() -> None:
    blocked = sorted(lock.FRAMEWORKS | {"cv2", "pynvml", "nvidia"})
    modules = ["serve_app", "actors.coordinator", "actors.client", "cluster.runtime"]
    modules += ["cluster.cli", "cluster.doctor", "cluster.models_cli", "cluster.keys_cli"]
    code = f"""
import importlib, importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ImportError(f"{{name}} isn't on the head")
sys.meta_path.insert(0, Blocked())
for module in {modules!r}:
    importlib.import_module(module)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


# --- Compose --------------------------------------------------------------------------------------

COMPOSE: Final[dict[str, Any]] = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
SECRETS: Final = {
    "rpc": "https://rpc.example/key",
    "relay": "https://relay.example",
    "token": "a-token-of-some-length",
}


def test_compose_runs_it_with_as_little_as_it_needs() -> None:
    (service,) = COMPOSE["services"].values()
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert service["user"] == "1000:1000"
    assert not service.get("privileged")
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert service["image"] == f"${{CRYNUX_IMAGE:-crynux-cluster:{cluster.__version__}-cuda}}"
    assert set(service["build"]["args"]) <= arguments(DOCKERFILE).keys()
    for name, value in service["environment"].items():
        assert not SECRET_WORDS.search(name) or value.startswith("/etc/crynux-cluster/"), name
    check_command(shlex.join(["crynux-cluster", *service["command"]]))


def test_shared_memory_holds_the_object_store_of_the_ray_that_is_begun_there() -> None:
    (service,) = COMPOSE["services"].values()
    (size,) = re.findall(r"^(\d+)gb$", service["shm_size"])
    assert int(size) * 2**30 >= 2 * runtime.OBJECT_STORE_BYTES
    (pod,) = (p for p in pods(render(case(values_of("single-server")))) if p.role == "head")
    assert pod.params["object-store-memory"] == str(runtime.OBJECT_STORE_BYTES)


def mounts(service: dict[str, Any]) -> dict[str, str]:
    """Places in the container, and what stands there."""
    found: dict[str, str] = {}
    for each in service["volumes"]:
        plain = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", each).removesuffix(":ro")
        source, _, target = plain.rpartition(":")
        found[target] = source
    return found


def test_the_containers_configuration_loads_as_compose_lays_it(tmp_path: Path) -> None:
    (service,) = COMPOSE["services"].values()
    places = mounts(service)
    where = Path(service["command"][-1])
    assert places[str(where)] == "./operator.yaml"
    folder = tmp_path / "secrets"
    folder.mkdir()
    for name, said in SECRETS.items():
        (folder / name).write_text(said, encoding="utf-8")
    text = (ROOT / "configs" / "container.yaml").read_text(encoding="utf-8")
    file = tmp_path / "operator.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="the zero address is a placeholder"):
        load(file)
    file.write_text(text.replace("0x" + "00" * 20, ADDRESS), encoding="utf-8")
    config = load(file)
    assert config.network.rpc_url == SECRETS["rpc"]
    assert str(where.parent / "secrets") in places
    named = [config.identity.keystore_file, config.identity.password_file, config.serve.token_file]
    assert {each.parent for each in named if each is not None} == {folder}
    assert service["environment"]["CRYNUX_TOKEN_FILE"] == f"{where.parent}/secrets/token"
    assert service["ports"] == [f"127.0.0.1:{config.serve.port}:{config.serve.port}"]
    (lasting,) = (target for target, source in places.items() if source in COMPOSE["volumes"])
    for path in (config.artifacts.path, config.models.root, config.journal.url[10:]):
        assert str(path).startswith(f"{lasting}/")


# --- systemd --------------------------------------------------------------------------------------


def environment(text: str) -> dict[str, str]:
    return dict(re.findall(r"(?:^Environment=| )([A-Z_]+)=(\S+)", text, re.MULTILINE))


def test_orders_from_outside_of_the_unit_find_its_ray() -> None:
    """Its /tmp is private, and Ray's sockets are where `RAY_TMPDIR` says."""
    unit = (ROOT / "configs" / "systemd" / "crynux-cluster.service").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "containers.md").read_text(encoding="utf-8")
    (function,) = re.findall(r"^crynux\(\) \{ sudo -u crynux env (.*) \"\$@\"; \}$", page, re.M)
    given, ordered = environment(unit), environment(f" {function}")
    for name in ("HOME", "RAY_TMPDIR", "RAY_AUTH_MODE"):
        assert ordered[name] == given[name]
    assert "PrivateTmp=yes" in unit
    assert given["RAY_TMPDIR"] == "/var/cache/crynux-cluster"
    # A socket's path has 107 characters at most.
    session = "ray/session_2026-11-26_02-12-04_717826_4194304/sockets/plasma_store"
    assert len(f"{given['RAY_TMPDIR']}/{session}") <= 107
    assert f"rm -rf {given['RAY_TMPDIR']}/ray" in unit
    assert function.split()[-1] in unit


def test_the_unit_runs_it_as_nobody_in_particular() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(ROOT / "configs" / "systemd" / "crynux-cluster.service", encoding="utf-8")
    service = unit["Service"]
    assert service["User"] not in {"root", "0"}
    program, _, options = service["ExecStart"].partition(" ")
    assert Path(program).name in PROJECT["scripts"]
    check_command(f"crynux-cluster {options}")
    assert service["Restart"] == "always"
    # What comes late (a port, a mount, Ray itself) ends it as a wrong configuration does.
    assert "RestartPreventExitStatus" not in service
    assert int(service["RestartMaxDelaySec"]) <= 300
    for key in ("NoNewPrivileges", "ProtectHome", "PrivateTmp", "RestrictSUIDSGID"):
        assert service[key] == "yes"
    assert service["ProtectSystem"] == "strict"
    assert service["CapabilityBoundingSet"] == ""
    assert service["StateDirectory"] == "crynux-cluster"
    assert service["CacheDirectory"] == "crynux-cluster"
    text = (ROOT / "configs" / "systemd" / "crynux-cluster.service").read_text(encoding="utf-8")
    assert not re.search(r"^Environment=\w*(PASSWORD|TOKEN|SECRET)", text, re.MULTILINE)
