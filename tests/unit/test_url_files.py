"""URLs that are named by file in the configuration: what is taken, and what is said of bad ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest

from cluster.config import Config, digest, load
from cluster.core.errors import ConfigError
from tests.unit.test_config import MINIMAL

SECRET = "s3cr3t-k3y"
BY_FILE = MINIMAL.replace("rpc_url: http://127.0.0.1:8545/", "rpc_url_file: urls/rpc").replace(
    "relay_url: http://127.0.0.1:9000", "relay_url_file: urls/relay\n  ws_url_file: urls/ws"
)
BY_FILE += "journal: {url_file: urls/journal}\n"
FILES = {
    "rpc": f"# paid\nhttps://rpc.example/{SECRET}\n\n  https://second.example/{SECRET}  \n",
    "ws": f"wss://rpc.example/{SECRET}",
    "relay": f"https://relay.example/{SECRET}\n",
    "journal": f"postgresql://crynux:{SECRET}@db/crynux\n",
}


def loaded(
    folder: Path, text: str = BY_FILE, files: Mapping[str, str | bytes] = MappingProxyType({})
) -> Config:
    (folder / "urls").mkdir(exist_ok=True)
    for name, said in {**FILES, **files}.items():
        data = said if isinstance(said, bytes) else said.encode()
        (folder / "urls" / name).write_bytes(data)
    (folder / "c.yaml").write_text(text, encoding="utf-8")
    return load(folder / "c.yaml")


def test_what_the_files_say_takes_the_urls_place(tmp_path: Path) -> None:
    config = loaded(tmp_path)
    assert config.network.rpc_url == f"https://rpc.example/{SECRET}"
    assert config.network.fallback_rpc_urls == (f"https://second.example/{SECRET}",)
    assert config.network.ws_url == f"wss://rpc.example/{SECRET}"
    assert config.network.relay_url == f"https://relay.example/{SECRET}"
    assert config.journal.url == f"postgresql://crynux:{SECRET}@db/crynux"
    assert SECRET not in repr(config)


def test_further_lines_are_asked_before_the_fallbacks_of_the_configuration(tmp_path: Path) -> None:
    text = BY_FILE.replace("network:\n", "network:\n  fallback_rpc_urls: [https://last.example]\n")
    assert loaded(tmp_path, text).network.fallback_rpc_urls == (
        f"https://second.example/{SECRET}",
        "https://last.example",
    )


def test_another_text_in_a_file_is_another_configuration(tmp_path: Path) -> None:
    before = digest(loaded(tmp_path))
    assert digest(loaded(tmp_path)) == before
    assert digest(loaded(tmp_path, files={"relay": "https://other.example"})) != before


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"rpc": ""}, "network: rpc_url_file: {}/urls/rpc is empty; a URL is expected"),
        ({"rpc": "# none\n"}, "network: rpc_url_file: {}/urls/rpc is empty; a URL is expected"),
        ({"ws": b"\xff\xfe"}, "network: ws_url_file: {}/urls/ws can't be read: it is not text"),
        ({"ws": "wss://a\nwss://b"}, "network: ws_url_file: the file has 2 URLs, and one is exp"),
        ({"journal": "x" * 70_000}, "journal: url_file: {}/urls/journal is too long for URLs"),
        ({"rpc": SECRET}, "network.rpc_url: expected a URL"),
        ({"rpc": f"https://a.example\n{SECRET}"}, "network.fallback_rpc_urls[0]: expected a URL"),
        ({"ws": SECRET}, "network.ws_url: expected a URL"),
        ({"relay": SECRET}, "network.relay_url: expected a URL"),
        ({"journal": SECRET}, "journal.url: expected sqlite:///path or postgresql://"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_without_what_it_says(
    tmp_path: Path, files: dict[str, str | bytes], says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, files=files)
    assert str(caught.value).startswith(f"{tmp_path}/c.yaml: {says.format(tmp_path)}")
    assert SECRET not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"network: rpc_url_file: .*/urls/rpc can't be read: No"):
        loaded(tmp_path, BY_FILE.replace("urls/rpc", "gone/urls/rpc"))


def test_a_url_is_not_said_twice(tmp_path: Path) -> None:
    text = BY_FILE.replace("network:\n", "network:\n  rpc_url: https://a.example\n")
    with pytest.raises(ConfigError, match="rpc_url and rpc_url_file: it is said twice; keep one"):
        loaded(tmp_path, text)
