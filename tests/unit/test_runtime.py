"""What the supervisor finds wrong before anything runs. No ray is started here."""

from __future__ import annotations

import asyncio
import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import ray
from structlog.testing import capture_logs

from cluster import assembly, keystore, runtime
from cluster.config import Config, digest, load
from cluster.core.errors import ChainError, ClusterError, ConfigError
from cluster.core.types import GigaBytes, GpuClass, Timestamp
from cluster.identity import Identity
from cluster.journal import Assignment, SqlJournal
from cluster.releases import Digests, release, release_of

ADDRESS = "0x" + "11" * 20
WORD = "correct horse"
PHRASE = "test test test test test test test test test test test junk"
OTHER_PHRASE = "legal winner thank year wave sausage worth useful legal winner thank yellow"


def config(tmp_path: Path, **ray: object) -> Config:
    seed = tmp_path / "seed"
    seed.write_text(PHRASE)
    seed.chmod(0o600)
    return Config.model_validate(
        {
            "identity": {"seed_file": str(seed)},
            "network": {
                "rpc_url": "http://127.0.0.1:1",
                "chain_id": 31337,
                "devnet": True,
                "contracts": {"task": ADDRESS, "node": ADDRESS, "qos": ADDRESS},
                "relay_url": "http://127.0.0.1:1",
            },
            "ray": ray,
        },
        context={"base": tmp_path},
    )


def test_a_ray_that_is_begun_here_is_told_how_large_its_object_store_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By itself it takes a third of the memory: more than a container's /dev/shm."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr(ray, "init", asked.update)
    assert runtime.connect(config(tmp_path)) is True
    assert asked["object_store_memory"] == runtime.OBJECT_STORE_BYTES
    asked.clear()
    assert runtime.connect(config(tmp_path, address="127.0.0.1:6379")) is False
    assert "object_store_memory" not in asked


def test_simulated_classes_carry_the_platform(tmp_path: Path) -> None:
    cards = [
        {"name": "NVIDIA X", "vram": 24, "count": 2},
        {"name": "NVIDIA Y", "vram": 80},
        {"name": "NVIDIA X", "vram": 24},
    ]
    found = runtime.simulated_classes(config(tmp_path, simulated_gpus=cards, platform="linux"))
    assert {(c.name, c.vram): n for c, n in found.items()} == {
        ("NVIDIA X+linux", 24): 3,
        ("NVIDIA Y+linux", 80): 1,
    }
    assert all(isinstance(each, GpuClass) for each in found)


def test_the_release_follows_version_and_configuration(tmp_path: Path) -> None:
    one, other = config(tmp_path), config(tmp_path, platform="linux")
    assert release(one) == release(config(tmp_path))
    assert release(one) != release(other)


def test_no_key_is_one_line(tmp_path: Path) -> None:
    bare = config(tmp_path).model_copy(
        update={"identity": config(tmp_path).identity.model_copy(update={"seed_file": None})}
    )
    with pytest.raises(ConfigError, match="identity: no key"):
        runtime.check(bare)


def test_a_port_that_cannot_be_had_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def taken(_where: tuple[str, int]) -> None:
        raise OSError(98, "Address already in use")

    monkeypatch.setattr("cluster.runtime.socket.create_server", taken)
    with pytest.raises(ConfigError, match=r"serve\.port: can't listen on 127\.0\.0\.1:8000"):
        runtime.check(config(tmp_path))


def test_another_identitys_journal_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.logs.setup", lambda *_: None)
    mine = config(tmp_path)
    world = assembly.assemble(mine)
    lease = world.journal.acquire("me", Timestamp(0), 1.0)
    assert lease is not None
    assignment = Assignment(1, world.accounts[1], GpuClass("Card", GigaBytes(8)))
    world.journal.assign(lease, assignment)
    assembly.assemble(mine)
    (tmp_path / "seed").write_text(OTHER_PHRASE)
    with pytest.raises(ConfigError, match=r"journal\.url: this journal was begun with"):
        assembly.assemble(mine)


# --- the key is the coordinator's -----------------------------------------------------------------


def sealed(tmp_path: Path, **ray: object) -> Config:
    """With a keystore that `WORD` opens."""
    key = tmp_path / "key.json"
    treasury = Identity.from_phrase(PHRASE).address(0)
    key.write_text(keystore.seal_phrase(PHRASE, WORD, treasury, 2**4))
    key.chmod(0o600)
    plain = config(tmp_path, **ray)
    identity = plain.identity.model_copy(update={"seed_file": None, "keystore_file": key})
    return plain.model_copy(update={"identity": identity})


def test_the_supervisor_needs_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Kubernetes its container has none."""

    async def reached(_config: Config) -> None:  # noqa: RUF029 - takes the place of one that awaits
        pass

    monkeypatch.setattr(runtime, "_check_port", lambda *_: None)
    monkeypatch.setattr(runtime, "_check_chain", reached)
    mine = sealed(tmp_path)
    (tmp_path / "key.json").unlink()
    (tmp_path / "seed").unlink()
    runtime.check(mine)


def test_a_password_in_the_environment_is_handed_over_and_nothing_inherits_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.handover._MEMORY", tmp_path)
    monkeypatch.setattr("cluster.logs.setup", lambda *_: None)
    monkeypatch.setenv(keystore.PASSWORD, WORD)
    mine = sealed(tmp_path)
    given = runtime.hand_over(mine)
    assert keystore.PASSWORD not in os.environ
    assert given is not None
    given.offer()
    world = assembly.assemble(mine, given.folder)
    assert world.treasury == Identity.from_phrase(PHRASE).address(0)
    with pytest.raises(ConfigError, match="password"):
        assembly.assemble(mine, given.folder)


def test_what_needs_no_password_gets_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(keystore.PASSWORD, WORD)
    assert runtime.hand_over(config(tmp_path)) is None
    assert keystore.PASSWORD not in os.environ
    monkeypatch.setenv(keystore.PASSWORD, WORD)
    file = tmp_path / "word"
    mine = sealed(tmp_path)
    identity = mine.identity.model_copy(update={"password_file": file})
    assert runtime.hand_over(mine.model_copy(update={"identity": identity})) is None


def test_a_cluster_that_runs_already_has_the_password_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    assert runtime.hand_over(sealed(tmp_path, address="auto")) is None


def test_earnings_that_would_go_round_in_a_circle_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.logs.setup", lambda *_: None)
    config(tmp_path)
    file = tmp_path / "c.yaml"
    file.write_text(SECRETIVE)
    world = assembly.assemble_from(file, Digests.of(load(file)))
    own = f'fleet: {{beneficiary: "{world.accounts[2]}"}}\n'
    file.write_text(SECRETIVE + own)
    with pytest.raises(ConfigError, match=r"fleet\.beneficiary: .* is node account 2"):
        world.reload()
    with pytest.raises(ConfigError, match=r"fleet\.beneficiary: .* is node account 2"):
        assembly.assemble(load(file))
    # The treasury may have them, to pay the stakes of others.
    file.write_text(SECRETIVE + f'fleet: {{beneficiary: "{world.treasury}"}}\n')
    assert world.reload()[0].fleet.policy.beneficiary == world.treasury
    assert assembly.assemble(load(file)).fleet.policy.beneficiary == world.treasury


@pytest.mark.parametrize("raised", [ConfigError("wrong chain"), ChainError("it doesn't answer")])
def test_a_wrong_chain_stops_and_an_absent_one_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: Exception
) -> None:
    async def answer(_config: Config) -> None:  # noqa: RUF029 - takes the place of one that awaits
        raise raised

    monkeypatch.setattr(runtime, "_check_port", lambda *_: None)
    monkeypatch.setattr(runtime, "_check_chain", answer)
    if isinstance(raised, ConfigError):
        with pytest.raises(ConfigError, match="wrong chain"):
            runtime.check(config(tmp_path))
    else:
        runtime.check(config(tmp_path))


async def test_the_check_asks_more_than_whether_there_is_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contracts at each other's addresses all have code."""

    async def swapped(_contracts: object, _rpc: object, chain_id: int) -> None:  # noqa: RUF029
        raise ConfigError(f"swapped on {chain_id}")

    async def checked(_endpoints: object) -> None:
        pass

    monkeypatch.setattr("cluster.chain.endpoints.Endpoints.check", checked)
    monkeypatch.setattr("cluster.chain.network.Contracts.check", swapped)
    mine = config(tmp_path)
    with pytest.raises(ConfigError, match=f"^swapped on {mine.network.chain_id}$"):
        await runtime._check_chain(mine)


SECRETIVE = f"""\
identity: {{seed_file: seed}}
network:
  rpc_url: http://127.0.0.1:1/api-key-hunter2
  chain_id: 5
  contracts: {{task: "{ADDRESS}", node: "{ADDRESS}", qos: "{ADDRESS}"}}
  relay_url: http://127.0.0.1:1
journal: {{url: "sqlite:///password-hunter2.db"}}
"""


class FakeActorClass:
    """Keeps what Ray would keep of an actor's making."""

    def __init__(self) -> None:
        self.arguments: list[Any] = []

    def options(self, **_options: object) -> FakeActorClass:
        return self

    def remote(self, *arguments: object) -> object:
        self.arguments += arguments
        return object()


def test_no_credential_is_an_argument_of_the_coordinator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    actors = FakeActorClass()
    monkeypatch.setattr(runtime, "CoordinatorActor", actors)
    monkeypatch.setattr("cluster.logs.setup", lambda *_: None)
    config(tmp_path)
    file = tmp_path / "c.yaml"
    file.write_text(SECRETIVE)
    asked = load(file)
    runtime.Supervisor(asked, file, lambda _: cast("Any", None))._create_coordinator()
    assert b"hunter2" not in pickle.dumps(actors.arguments)
    (make_world,) = actors.arguments
    world = make_world()
    assert (world.chain_id, world.config_digest) == (5, digest(asked))


def test_a_coordinator_that_finds_its_file_edited_is_still_the_one_that_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the supervisor, which holds to what it read, would replace it at every look."""
    monkeypatch.setattr("cluster.logs.setup", lambda *_: None)
    config(tmp_path)
    file = tmp_path / "c.yaml"
    file.write_text(SECRETIVE)
    asked = Digests.of(load(file))
    file.write_text(SECRETIVE + "lease: {ttl_seconds: 7}\n")
    with capture_logs() as logs:
        world = assembly.assemble_from(file, asked)
    assert (world.config_digest, world.lease_seconds) == (asked.whole, 7.0)
    assert [entry["event"] for entry in logs] == ["configuration_edited"]
    # What computes isn't ended for it.
    assert world.pool._release == world.stores._release == release_of(asked.cards)


def test_cards_are_the_same_ones_over_all_that_can_be_reloaded(tmp_path: Path) -> None:
    config(tmp_path)
    file = tmp_path / "c.yaml"

    def found(more: str) -> Digests:
        file.write_text(SECRETIVE + more)
        return Digests.of(load(file))

    before = found("")
    for live in (
        "policy: {max_attempts: 7}\n",
        "fleet: {auto: false}\n",
        "canary: {interval_seconds: 5}\n",
        "verify: {fraction: 0.5}\n",
        "logs: {level: debug}\n",
    ):
        after = found(live)
        assert (after.whole != before.whole, after.cards) == (True, before.cards), live
    for other in (
        "logs: {format: json}\n",
        "gpu: {host_memory_gb: 3}\n",
        "gpu: {lora_strength: full}\n",
    ):
        assert found(other).cards != before.cards, other


@pytest.mark.parametrize("address", [None, "auto"])
@pytest.mark.parametrize("error", [ConnectionError, ValueError, RuntimeError])
def test_a_ray_cluster_that_cannot_be_had_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    address: str | None,
    error: type[Exception],
) -> None:
    def init(**_options: object) -> None:
        raise error("another version of Ray")

    monkeypatch.setattr("cluster.runtime.ray.init", init)
    with pytest.raises(ConfigError, match=r"^ray\.address: .*: another version of Ray$"):
        runtime.connect(config(tmp_path, address=address))


def test_a_ray_that_does_not_come_up_in_time_is_one_line_and_not_the_operators_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_options: object) -> None:
        raise Exception("The current node timed out during startup.")  # noqa: TRY002  # as Ray does

    monkeypatch.setattr("cluster.runtime.ray.init", init)
    monkeypatch.setattr("cluster.runtime.ray.shutdown", lambda: None)
    with pytest.raises(ClusterError, match=r"timed out during startup\. .*Start again") as caught:
        runtime.connect(config(tmp_path))
    assert not isinstance(caught.value, ConfigError)


def test_accounts_that_were_ever_assigned_are_tended_beyond_the_configurations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else they would go on taking tasks that nobody answers, with their stakes."""
    monkeypatch.setattr("cluster.logs.setup", lambda *_: None)
    mine = config(tmp_path)
    before = assembly.assemble(mine)
    assert before.fleet.most_accounts == len(before.accounts) == 8
    lease = before.journal.acquire("me", Timestamp(0), 1.0)
    assert lease is not None
    for index in (2, 7):
        assignment = Assignment(index, before.accounts[index], GpuClass("Card", GigaBytes(8)))
        before.journal.assign(lease, assignment)
    fewer = mine.identity.model_copy(update={"accounts": 3})
    after = assembly.assemble(mine.model_copy(update={"identity": fewer}))
    assert after.accounts == {index: before.accounts[index] for index in (1, 2, 3, 7)}
    assert after.fleet.most_accounts == 3


async def test_a_chain_that_hangs_keeps_no_term_from_beginning_before_its_lease_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang(*_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(assembly, "check_contracts", hang)
    mine = config(tmp_path)
    mine = mine.model_copy(update={"lease": mine.lease.model_copy(update={"ttl_seconds": 0.02})})
    identity: Any = SimpleNamespace(address=lambda _: ADDRESS, public_key=lambda _: b"")
    journal = SqlJournal(f"sqlite:///{tmp_path / 'journal.db'}")
    lease = journal.acquire("me", Timestamp(0.0), 10.0)
    assert lease is not None
    async with asyncio.timeout(60):
        async with assembly.open_network(mine, identity, journal, lambda: lease) as network:
            assert network.endpoints()[0].problem == ""
    journal.close()
