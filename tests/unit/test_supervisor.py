"""What the supervisor does about what it finds, on a cluster and a Serve that only note it."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.exceptions import ActorDiedError, GetTimeoutError
from structlog.testing import capture_logs

from actors.names import NAME, REFUSED
from cluster import runtime
from cluster.config import Config
from cluster.core.errors import ConfigError
from cluster.handover import Handover, take
from cluster.releases import release
from cluster.runtime import APPLICATION, SILENT_LOOKS, Supervisor
from tests.unit.test_runtime import config as config_of

Answer = str | Exception


def give(answer: Answer | None) -> Any:
    if isinstance(answer, Exception):
        raise answer
    return answer


@dataclass
class FakeActor:
    """Answers its release, or raises; `stopping` is raised by `stop`."""

    cluster: FakeCluster
    answer: Answer
    stopping: Exception | None = None

    @property
    def release(self) -> Any:
        return SimpleNamespace(remote=lambda: lambda: give(self.answer))

    @property
    def stop(self) -> Any:
        def stop() -> None:
            self.cluster.did.append("stop")
            give(self.stopping)

        return SimpleNamespace(remote=lambda: stop)


@dataclass
class FakeCluster:
    """`did` is what was done to the coordinator, in order."""

    release: str
    coordinator: FakeActor | None = None
    did: list[str] = field(default_factory=list)
    options: list[dict[str, Any]] = field(default_factory=list)
    asked: list[float] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    """Of those that are made; then they answer well."""
    folders: list[Path | None] = field(default_factory=list)

    # --- as `ray`

    def get_actor(self, name: str, namespace: str) -> FakeActor:
        assert (name, namespace) == (NAME, "crynux")
        if self.coordinator is None:
            raise ValueError("no such actor")
        return self.coordinator

    def get(self, call: Callable[[], Any], timeout: float) -> Any:
        self.asked.append(timeout)
        return call()

    def kill(self, actor: FakeActor, no_restart: bool) -> None:
        self.did.append("kill for good" if no_restart else "kill")
        if no_restart and actor is self.coordinator:
            self.coordinator = None

    # --- as the actor's class

    def create(self, options: dict[str, Any], assemble: Callable[[], object]) -> FakeActor:
        assert isinstance(assemble, functools.partial)
        # What is an argument, Ray keeps: where the configuration is, and not what is in it.
        file, digests, folder = assemble.args
        assert (file, len(digests.whole), len(digests.cards)) == (FILE, 12, 12)
        self.folders.append(folder)
        self.did.append("create")
        self.options.append(options)
        self.coordinator = FakeActor(self, self.answers.pop(0) if self.answers else self.release)
        return self.coordinator


FILE = Path("/etc/operator.yaml")


@dataclass
class FakeServe:
    """`state` is the application's, None when there is none."""

    state: str | None = None
    failing: list[Exception] = field(default_factory=list)
    ran: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)
    down: int = 0
    _options: dict[str, Any] = field(default_factory=dict)

    def status(self) -> Any:
        if self.failing:
            raise self.failing.pop()
        found = {} if self.state is None else {APPLICATION: SimpleNamespace(status=self.state)}
        return SimpleNamespace(applications=found)

    def start(
        self, proxy_location: str, http_options: dict[str, Any], logging_config: dict[str, Any]
    ) -> None:
        # Of what Serve itself logs, only what is wrong stands among the operator's lines.
        assert logging_config["log_level"] == "WARNING"
        assert logging_config["encoding"] in {"TEXT", "JSON"}
        assert proxy_location == "HeadOnly"
        self._options = http_options

    def run(self, application: str, name: str, route_prefix: str) -> None:
        assert route_prefix == "/"
        self.ran.append((application, name, self._options))
        self.state = "RUNNING"

    def shutdown(self) -> None:
        self.down += 1


@dataclass
class Post:
    config: Config
    cluster: FakeCluster
    serve: FakeServe

    def supervisor(self, handover: Handover | None = None) -> Supervisor:
        build = cast(Any, lambda config: f"API of {config.ray.namespace}")
        return Supervisor(self.config, FILE, build, handover)


@pytest.fixture
def post(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Post:
    config = config_of(tmp_path)
    cluster, serve = FakeCluster(release(config)), FakeServe()

    def options(**given: Any) -> Any:
        return SimpleNamespace(remote=functools.partial(cluster.create, given))

    monkeypatch.setattr(runtime, "ray", cluster)
    monkeypatch.setattr(runtime, "serve", serve)
    monkeypatch.setattr(runtime, "CoordinatorActor", SimpleNamespace(options=options))
    return Post(config, cluster, serve)


@pytest.fixture
def logs() -> Iterator[list[Any]]:
    with capture_logs() as entries:
        yield entries


def names(logs: list[Any]) -> list[str]:
    return [str(entry["event"]) for entry in logs]


# --- the coordinator ------------------------------------------------------------------------------


def test_what_is_missing_is_made_and_then_left_alone(post: Post) -> None:
    supervisor = post.supervisor()
    for _ in range(3):
        supervisor.look()
    assert post.cluster.did == ["create"]
    (options,) = post.cluster.options
    assert (options["name"], options["namespace"]) == (NAME, post.config.ray.namespace)
    assert (options["lifetime"], options["get_if_exists"]) == ("detached", True)
    assert list(options["resources"]) == ["node:__internal_head__"]
    where = {"host": post.config.serve.host, "port": post.config.serve.port}
    assert post.serve.ran == [(f"API of {post.config.ray.namespace}", APPLICATION, where)]


def test_one_that_runs_this_release_is_left_alone(post: Post) -> None:
    post.cluster.coordinator = FakeActor(post.cluster, post.cluster.release)
    post.supervisor().look()
    assert post.cluster.did == []


def test_a_dead_one_is_made_again(post: Post) -> None:
    supervisor = post.supervisor()
    supervisor.look()
    post.cluster.coordinator = None
    supervisor.look()
    assert post.cluster.did == ["create", "create"]


@pytest.mark.parametrize("error", [GetTimeoutError("no answer"), ActorDiedError()])
def test_one_that_stays_silent_is_begun_anew(post: Post, logs: list[Any], error: Exception) -> None:
    post.cluster.coordinator = FakeActor(post.cluster, error)
    supervisor = post.supervisor()
    for _ in range(SILENT_LOOKS - 1):
        supervisor.look()
    assert post.cluster.did == []
    supervisor.look()
    assert post.cluster.did == ["kill"], "Ray restarts it: it stays the same actor"
    for _ in range(SILENT_LOOKS - 1):
        supervisor.look()
    assert post.cluster.did == ["kill"], "it is given as long again"
    supervisor.look()
    assert post.cluster.did == ["kill", "kill"]
    assert names(logs).count("coordinator_silent") == 2 * SILENT_LOOKS
    assert all(timeout > 0 for timeout in post.cluster.asked)


def test_silence_is_counted_from_the_last_answer(post: Post) -> None:
    actor = FakeActor(post.cluster, post.cluster.release)
    post.cluster.coordinator = actor
    supervisor = post.supervisor()
    for _ in range(3):
        actor.answer = GetTimeoutError("no answer")
        for _ in range(SILENT_LOOKS - 1):
            supervisor.look()
        actor.answer = post.cluster.release
        supervisor.look()
    assert post.cluster.did == []


@pytest.mark.parametrize("stopping", [None, GetTimeoutError("no answer"), ActorDiedError()])
def test_one_of_another_release_is_replaced(post: Post, stopping: Exception | None) -> None:
    post.cluster.coordinator = FakeActor(post.cluster, "0.0.1+abc", stopping)
    supervisor = post.supervisor()
    supervisor.look()
    assert post.cluster.did == ["stop", "kill for good", "create"]
    supervisor.look()
    assert post.cluster.did == ["stop", "kill for good", "create"]


# --- one that refuses -----------------------------------------------------------------------------

WRONG = f"{REFUSED}key.json: the password doesn't open it"


def test_one_that_refuses_ends_the_start_with_its_own_words(post: Post) -> None:
    post.cluster.answers = [WRONG]
    with pytest.raises(ConfigError, match=r"^key\.json: the password doesn't open it$"):
        post.supervisor().look()
    assert post.cluster.did == ["create", "kill for good"]
    assert post.serve.ran == []


def test_what_refused_an_earlier_start_is_not_believed(post: Post) -> None:
    post.cluster.coordinator = FakeActor(post.cluster, WRONG)
    supervisor = post.supervisor()
    supervisor.look()
    assert post.cluster.did == ["kill for good", "create"]
    supervisor.look()
    assert post.cluster.did == ["kill for good", "create"]


def test_one_that_was_well_and_refuses_is_begun_anew_for_ever(post: Post, logs: list[Any]) -> None:
    """Its database may be away for a while."""
    supervisor = post.supervisor()
    supervisor.look()
    assert post.cluster.coordinator is not None
    post.cluster.coordinator.answer = f"{REFUSED}the journal can't be opened"
    for _ in range(3):
        supervisor.look()
    # By Ray, so that it stays the same actor, whose lease is its own.
    assert post.cluster.did == ["create", "kill", "kill", "kill"]
    assert names(logs).count("coordinator_refuses") == 3


def test_each_that_begins_is_offered_the_password(
    post: Post, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.handover._MEMORY", tmp_path)
    given = Handover.of("a password")
    supervisor = post.supervisor(given)
    supervisor.look()
    assert post.cluster.folders == [given.folder]
    assert take(given.folder) == "a password"
    assert post.cluster.coordinator is not None
    # It crashed, and Ray began it anew: there was no password for it.
    post.cluster.coordinator.answer = WRONG
    supervisor.look()
    assert take(given.folder) == "a password"
    assert post.cluster.did == ["create", "kill"]


# --- the API --------------------------------------------------------------------------------------


def test_the_api_is_deployed_once_and_again_when_it_is_unwell(post: Post) -> None:
    supervisor = post.supervisor()
    for state, deployed in (
        (None, 1),
        ("RUNNING", 1),
        ("DEPLOYING", 1),
        ("UNHEALTHY", 2),
        ("RUNNING", 2),
        (None, 3),
        ("DEPLOY_FAILED", 4),
    ):
        post.serve.state = state
        supervisor.look()
        assert len(post.serve.ran) == deployed, state


def test_a_new_supervisor_deploys_its_own_over_what_runs(post: Post) -> None:
    post.serve.state = "RUNNING"
    supervisor = post.supervisor()
    supervisor.look()
    supervisor.look()
    assert len(post.serve.ran) == 1


def test_a_look_that_fails_is_said_and_done_again(post: Post, logs: list[Any]) -> None:
    supervisor = post.supervisor()
    post.serve.failing = [RuntimeError("the controller is away")]
    supervisor.look()
    assert post.serve.ran == []
    supervisor.look()
    assert len(post.serve.ran) == 1
    (entry,) = (entry for entry in logs if entry["event"] == "repair_failed")
    assert entry["error"] == "RuntimeError: the controller is away"


# --- the end --------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [True, False])
def test_taking_down_has_the_coordinator_give_its_lease_back(post: Post, there: bool) -> None:
    if there:
        post.cluster.coordinator = FakeActor(post.cluster, "any")
    post.supervisor().take_down()
    assert post.serve.down == 1
    assert post.cluster.did == (["stop"] if there else [])


# --- Ray itself -----------------------------------------------------------------------------------


@pytest.fixture
def inits(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    fake = SimpleNamespace(init=lambda **given: found.append(given), shutdown=lambda: None)
    monkeypatch.setattr(runtime, "ray", fake)
    return found


def test_without_an_address_a_cluster_is_started_here(
    tmp_path: Path, inits: list[dict[str, Any]]
) -> None:
    cards = [{"name": "NVIDIA X", "vram": 24, "count": 2}]
    config = config_of(tmp_path, simulated_gpus=cards, platform="linux")
    assert runtime.connect(config) is True
    (given,) = inits
    assert (given["address"], given["namespace"]) == ("local", "crynux")
    assert given["resources"] == {"crynux-sim|NVIDIA X+linux|24": 2}


def test_with_an_address_a_cluster_is_joined_as_it_is(
    tmp_path: Path, inits: list[dict[str, Any]]
) -> None:
    assert runtime.connect(config_of(tmp_path, address="auto")) is False
    (given,) = inits
    assert (given["address"], given["namespace"]) == ("auto", "crynux")
    assert "resources" not in given


def test_a_cluster_that_does_not_answer_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_given: object) -> None:
        raise ConnectionError("nobody there")

    monkeypatch.setattr(runtime, "ray", SimpleNamespace(init=init))
    with pytest.raises(ConfigError, match=r"^ray\.address: .* 10\.0\.0\.1:6379"):
        runtime.connect(config_of(tmp_path, address="10.0.0.1:6379"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_stops_in_order_although_ray_has_handlers_of_its_own(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    did: list[str] = []

    class Looking:
        def __init__(self, *_: object) -> None:
            pass

        def look(self) -> None:
            assert not did, "it went on"
            did.append("look")
            os.kill(os.getpid(), number)

        def take_down(self) -> None:
            did.append("take down")

    def connect(_config: Config) -> bool:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, lambda *_: did.append("aborted"))
        return True

    monkeypatch.setattr(runtime, "ray", SimpleNamespace(shutdown=lambda: did.append("left")))
    monkeypatch.setattr(runtime, "Supervisor", Looking)
    monkeypatch.setattr(runtime, "connect", connect)
    monkeypatch.setattr(runtime, "check", lambda _config: None)
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        assert runtime.up(config_of(tmp_path), tmp_path / "operator.yaml", cast(Any, None)) == 0
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert did == ["look", "take down", "left"]
