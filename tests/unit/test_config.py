from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from cluster.assembly import fleet_settings
from cluster.config import Config, digest, load
from cluster.config.models import HubConfig, ModelsConfig
from cluster.core.errors import ConfigError
from cluster.core.lifecycle import Policy
from cluster.core.types import GigaBytes, GpuClass
from cluster.models.refusals import Refused
from cluster.models.urls import check

ROOT = Path(__file__).parents[2]
ADDRESS = "0x5FbDB2315678afecb367f032d93F642f64180aa3"
MINIMAL = f"""\
network:
  rpc_url: http://127.0.0.1:8545/
  chain_id: 31337
  devnet: true
  contracts:
    task: "{ADDRESS}"
    node: "{ADDRESS.lower()}"
    qos: "{ADDRESS}"
  relay_url: http://127.0.0.1:9000
ray:
  simulated_gpus:
    - {{name: Card, vram: 8, count: 2}}
"""


def loaded(folder: Path, text: str) -> Config:
    file = folder / "c.yaml"
    file.write_text(text, encoding="utf-8")
    return load(file)


def complaint(folder: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        loaded(folder, text)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(str(folder / "c.yaml"))
    return line


def test_a_minimal_file_gets_the_defaults(tmp_path: Path) -> None:
    config = loaded(tmp_path, MINIMAL)
    assert config.network.rpc_url == "http://127.0.0.1:8545"
    assert config.network.contracts.addresses == (ADDRESS, ADDRESS, ADDRESS)
    assert config.network.stake == 400 * 10**18
    assert config.network.version == (2, 5, 0)
    assert config.policy.policy == Policy()
    assert config.journal.url == f"sqlite:///{tmp_path}/data/journal.db"
    assert config.artifacts.path == tmp_path / "data/artifacts"
    assert config.ray.simulated_gpus[0].count == 2
    assert config.identity.seed_file is None


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    more = "identity: {seed_file: ../seed}\nmodels: {root: /models}\n"
    config = loaded(tmp_path, MINIMAL + more + "journal: {url: 'sqlite:///j.db'}\n")
    assert config.identity.seed_file == tmp_path.parent / "seed"
    assert config.models.root == Path("/models")
    assert config.journal.url == f"sqlite:///{tmp_path}/j.db"


@pytest.mark.parametrize(
    ("endpoint", "beside"),
    [
        ("http://10.0.0.5:8080", ["http://10.0.0.5:6379/x", "http://10.0.0.5:8080/x"]),
        ("https://hub.corp/a", ["http://hub.corp:9200/_all", "https://hub.corp/x"]),
        ("http://[fd00::5]", ["http://[fd00::5]/x", "http://[fd00::5]:22/x"]),
    ],
)
def test_the_hubs_endpoint_is_opened_to_the_hub_and_to_no_link(
    endpoint: str, beside: list[str]
) -> None:
    store = ModelsConfig(hub=HubConfig(endpoint=endpoint)).store()
    assert check(f"{endpoint}/api/models/x", store.hub_rules)
    for url in beside:
        with pytest.raises(Refused):
            check(url, store.rules)
    with pytest.raises(Refused):
        check(beside[0].replace("6379", "1"), ModelsConfig().store().hub_rules)


@pytest.mark.parametrize(
    ("host", "read"),
    [
        ("mirror.lan", "mirror.lan"),
        ("MIRROR.lan:8080", "mirror.lan:8080"),
        ("10.0.0.5:81", "10.0.0.5:81"),
        ("[fd00::5]:81", "[fd00::5]:81"),
        ("fd00::5", "[fd00::5]"),
        ("http://mirror.lan", None),
        ("mirror.lan/x", None),
        ("mirror.lan:0", None),
        ("mirror.lan:99999", None),
        ("*", None),
        ("", None),
    ],
)
def test_a_host_is_written_with_or_without_its_port(
    tmp_path: Path, host: str, read: str | None
) -> None:
    text = f"{MINIMAL}models: {{web: {{allow_hosts: ['{host}']}}}}\n"
    if read is not None:
        assert loaded(tmp_path, text).models.store().rules.allow_hosts == {read}
    else:
        assert "expected a host such as" in complaint(tmp_path, text)


def test_denied_is_a_whole_host(tmp_path: Path) -> None:
    text = f"{MINIMAL}models: {{web: {{deny_hosts: ['BAD.example', '::1']}}}}\n"
    rules = loaded(tmp_path, text).models.store().rules
    assert rules.deny_hosts == {"bad.example", "[::1]"}
    assert "expected a host such as" in complaint(tmp_path, text.replace("BAD.example", "x.y:81"))


@pytest.mark.parametrize(("text", "wei"), [("400.5", 4005 * 10**17), ("'1e2'", 10**20), ("7", 7)])
def test_the_stake_is_written_in_cnx(tmp_path: Path, text: str, wei: int) -> None:
    stake = loaded(tmp_path, MINIMAL.replace("31337", f"31337\n  stake: {text}")).network.stake
    assert stake == (wei if text != "7" else 7 * 10**18)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("rpc_url", "rpc_ulr", "network.rpc_ulr: unknown key; did you mean rpc_url?"),
        ("vram", "vrm", "ray.simulated_gpus[0].vrm: unknown key; did you mean vram?"),
        ("ray:", "rya:", "rya: unknown key; did you mean ray?"),
        ("  chain_id: 31337\n", "", "network.chain_id: missing"),
        ("31337", "abc", 'network.chain_id: expected a valid integer, got "abc"'),
        ("31337", "true", "network.chain_id: expected a valid integer, got true"),
        ("31337", "31337\n  stake: -1", "network.stake: expected an amount in CNX"),
        ("31337", "31337\n  stake: many", "network.stake: expected an amount in CNX"),
        ("31337", "31337\n  node_version: 2.5", "network.node_version: expected three numbers"),
        ("31337", "31337\n  block_poll_seconds: 0", "expected greater than 0, got 0"),
        (f'"{ADDRESS}"', ADDRESS, "YAML took the address for a number; put it in quotes"),
        ("0x5FbD", "0x5FbE", "network.contracts.task: the address fails its checksum"),
        (ADDRESS, "0x" + "0" * 40, "the zero address is a placeholder"),
        (ADDRESS, "0x12", "expected an address"),
        ("http://127.0.0.1:9000", "127.0.0.1:9000", "network.relay_url: expected a URL"),
        ("http://127.0.0.1:9000", "http://h:99999", "network.relay_url: expected a URL"),
        ("{name: Card, vram: 8, count: 2}", "3", "simulated_gpus[0]: expected keys and values"),
        ("devnet: true", "devnet: false", "isn't marked a devnet"),
        ("ray:", "journal: {url: 'oracle://x'}\nray:", "journal.url: expected sqlite:///path"),
        (
            "ray:",
            "identity: {accounts: 1001}\nray:",
            "accounts: expected less than or equal to 1000",
        ),
        ("ray:", "logs: {level: loud}\nray:", "logs.level: expected 'debug', 'info'"),
        ("ray:", "models: {root: 3}\nray:", "models.root: expected a path, got 3"),
        ("ray:", "network:", "the key network stands twice"),
        ("ray:", "ray: [", "not valid YAML"),
        ("ray:", "? [a, b]\n: c\nray:", "not valid YAML: a key that is a list or a mapping"),
        ("ray:", "? {a: b}\n: c\nray:", "not valid YAML: a key that is a list or a mapping"),
        ("31337", "31337\n  stake: '1e999999'", "network.stake: expected an amount in CNX"),
        ("31337", "31337\n  stake: '1e60'", "network.stake: expected an amount in CNX"),
        ("31337", "31337\n  stake: nan", "network.stake: expected an amount in CNX"),
        ("http://127.0.0.1:8545/", "http://é..x", "network.rpc_url: expected a URL"),
        ("http://127.0.0.1:9000", "http://é..x", "network.relay_url: expected a URL"),
        *(
            ("ray:\n", f"ray:\n  address: '{address}'\n", "ray.address: expected null, auto, or")
            for address in ("", "nonsense", "local", "ray://h:1", "h:0", "h:99999", "h:1:2", "h: 1")
        ),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, old: str, new: str, says: str) -> None:
    assert says in complaint(tmp_path, MINIMAL.replace(old, new, 1))


@pytest.mark.parametrize("text", ["", "just words", "- a\n- b", "a: b: c", "\tx: 1"])
def test_what_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    complaint(tmp_path, text)


@pytest.mark.parametrize("address", ["null", "auto", "head:6379", "10.0.0.1:6379", "'[::1]:6379'"])
def test_where_the_ray_cluster_is(tmp_path: Path, address: str) -> None:
    config = loaded(tmp_path, MINIMAL.replace("ray:\n", f"ray:\n  address: {address}\n"))
    assert config.ray.address == (None if address == "null" else address.strip("'"))


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        load(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="can't be read"):
        load(tmp_path)


def test_a_proxys_password_is_in_a_file_that_only_its_name_is_told_of(tmp_path: Path) -> None:
    secret = "models: {proxy: 'http://me:SECRET@proxy.lan:3128'}\nray:"
    line = complaint(tmp_path, MINIMAL.replace("ray:", secret))
    assert "models: proxy: a URL with a user or password belongs into proxy_file" in line
    assert "SECRET" not in line
    both = "models: {proxy: 'http://proxy.lan:3128', proxy_file: p}\nray:"
    assert "not both" in complaint(tmp_path, MINIMAL.replace("ray:", both))
    (tmp_path / "p").write_text("http://me:SECRET@proxy.lan:3128\n")
    found = loaded(tmp_path, MINIMAL.replace("ray:", "models: {proxy_file: p, ca_file: c}\nray:"))
    store = found.models.store()
    assert (store.proxy, store.proxy_file, store.ca_file) == (None, tmp_path / "p", tmp_path / "c")
    assert "SECRET" not in repr(store) + repr(found)
    assert b"SECRET" not in pickle.dumps(store)


def test_no_secret_is_echoed(tmp_path: Path) -> None:
    phrase = "test " * 11 + "junk"
    for more in (
        f"identity: {{seed_file: {phrase}}}\n",
        "journal: {url: 'postgres://me:hunter2@h'}\n",
    ):
        line = complaint(tmp_path, MINIMAL + more)
        assert "junk" not in line
        assert "hunter2" not in line
    line = complaint(tmp_path, MINIMAL.replace("http://127.0.0.1:8545/", "htp://h/hunter2"))
    assert "hunter2" not in line
    config = loaded(tmp_path, MINIMAL + "journal: {url: 'postgresql://me:hunter2@h/db'}\n")
    assert "hunter2" not in repr(config)


def test_endpoints_have_priorities_rates_and_websockets_of_their_own(tmp_path: Path) -> None:
    more = """31337
  ws_url: ws://first/hunter2
  fallback_rpc_urls: [http://second]
  endpoints:
    - {url: http://third/hunter2, priority: 5, calls_per_second: 3, ws_url: wss://third}
    - {url: http://fourth}"""
    config = loaded(tmp_path, MINIMAL.replace("31337", more))
    network = config.network
    assert [(each.url.split("/")[2], each.priority) for each in network.all_endpoints] == [
        ("127.0.0.1:8545", 0),
        ("second", 10),
        ("third", 5),
        ("fourth", 10),
    ]
    assert network.all_endpoints[2].calls_per_second == 3
    assert network.ws_urls == ("ws://first/hunter2", "wss://third")
    assert "hunter2" not in repr(config)
    for old, new in (("url: http://third", "url: hunter2"), ("ws_url: wss:", "ws_url: hunter2:")):
        line = complaint(tmp_path, MINIMAL.replace("31337", more.replace(old, new)))
        assert "network.endpoints[0]" in line
        assert "hunter2" not in line


def test_the_digest_follows_the_values(tmp_path: Path) -> None:
    config = loaded(tmp_path, MINIMAL)
    assert digest(config) == digest(loaded(tmp_path, "# a comment\n" + MINIMAL))
    assert digest(config) != digest(loaded(tmp_path, MINIMAL.replace("count: 2", "count: 3")))
    assert digest(pickle.loads(pickle.dumps(config))) == digest(config)  # noqa: S301


@pytest.mark.parametrize("name", ["single-machine", "ray-cluster"])
def test_the_examples_are_refused_only_for_their_placeholders(tmp_path: Path, name: str) -> None:
    text = (ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8")
    config = loaded(tmp_path, text.replace("0x" + "0" * 40, ADDRESS))
    assert config.identity.key_file is not None
    assert "placeholder" in complaint(tmp_path, text)


def test_the_operator_has_one_key(tmp_path: Path) -> None:
    both = "identity: {seed_file: seed, keystore_file: key}\n"
    assert "seed_file and keystore_file: the operator has one key" in complaint(
        tmp_path, MINIMAL + both
    )
    config = loaded(tmp_path, MINIMAL + "identity: {keystore_file: key}\n")
    assert config.identity.key_file == tmp_path / "key"


def test_slots_of_a_card_are_looked_up_by_the_networks_name(tmp_path: Path) -> None:
    more = "fleet: {slots_by_gpu: [{gpu: Big Card, slots: 3}, {gpu: Odd Card, slots: auto}]}\n"
    settings = fleet_settings(loaded(tmp_path, MINIMAL + more))
    names = ("Big Card+docker", "Odd Card+docker", "Card+docker")
    found = [settings.slots_of(GpuClass(name, GigaBytes(8))) for name in names]
    assert found == [3, None, 1]


@pytest.mark.parametrize(
    ("slots", "says"),
    [
        ("[{gpu: A, slots: 2}, {gpu: A, slots: 3}]", "fleet: slots_by_gpu: A stands twice"),
        ("[{gpu: A, slots: 17}]", "fleet.slots_by_gpu[0].slots: expected auto, or a number"),
        ("[{gpu: A}]", "fleet.slots_by_gpu[0].slots: missing"),
        ("[{gpus: A, slots: 1}]", "fleet.slots_by_gpu[0].gpus: unknown key; did you mean gpu?"),
    ],
)
def test_slots_of_a_card_that_cant_be(tmp_path: Path, slots: str, says: str) -> None:
    assert says in complaint(tmp_path, MINIMAL + f"fleet: {{slots_by_gpu: {slots}}}\n")
