"""`crynux-cluster models` as an operator types it, against a hub and a mirror over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.cli import main
from cluster.models.mirror import client
from devnet.hub import Hub
from tests.integration.mirror_world import served
from tests.unit.model_fakes import weights

FILE = "pytorch_lora_weights.safetensors"
LORA = "lora:acme/style"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with served() as url:
        yield url


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        hub.add("acme/style", {FILE: weights(5000), "other.safetensors": weights(50)})
        yield hub


@pytest.fixture
def config(tmp_path: Path, hub: Hub, server: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}.items():
        monkeypatch.setenv(name, value)
    address = "0x" + "12" * 20
    said: dict[str, Any] = {
        "network": {
            "rpc_url": "http://127.0.0.1:1",
            "chain_id": 1,
            "contracts": dict.fromkeys(("task", "node", "qos"), address),
            "relay_url": "http://127.0.0.1:1",
        },
        "models": {
            "root": "store",
            "hub": {"endpoint": hub.url},
            "web": {"allow_hosts": [f"localhost:{hub.port}"]},
            "mirror": {"url": "s3://models/x", "endpoint": server, "region": "us-east-1"},
            "pin": [LORA],
            "quota_gb": 1,
            "spare_gb": 0.01,
        },
    }
    file = tmp_path / "operator.yaml"
    file.write_text(yaml.safe_dump(said))
    s3 = client(server, "us-east-1")
    s3.create_bucket(Bucket="models")
    for entry in s3.list_objects_v2(Bucket="models").get("Contents", ()):
        s3.delete_object(Bucket="models", Key=entry["Key"])
    return file


def run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["models", *map(str, words)])
    out, err = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, out, err


def test_from_the_hub_to_the_disk_and_away(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = f"{LORA}+other.safetensors"
    code, out, _ = run(capsys, "fetch", "--config", config, LORA, named)
    assert (code, out) == (0, f"{LORA} is here\n{named} is here\n")
    code, out, _ = run(capsys, "list", "--config", config, "--json")
    said = json.loads(out)
    assert [row["model"] for row in said["models"]] == [LORA, named]
    assert [row["pinned"] for row in said["models"]] == [True, False]
    assert {row["source"] for row in said["models"]} == {"hub"}
    assert said["used_bytes"] == sum(row["bytes"] for row in said["models"])
    code, out, _ = run(capsys, "list", "--config", config)
    assert code == 0
    assert LORA in out
    assert "pinned" in out
    assert "2 models fetched" in out
    assert run(capsys, "drop", "--config", config, named)[:2] == (0, f"{named} is removed\n")
    code, out, _ = run(capsys, "list", "--config", config, "--json")
    assert [row["model"] for row in json.loads(out)["models"]] == [LORA]


def test_filled_mirrors_serve_a_site_without_a_hub(
    config: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "mirror", "--config", config, LORA)
    assert code == 0
    assert f"{LORA} is in s3://models/x" in out
    hub.stop()
    said = yaml.safe_load(config.read_text())
    said["models"] |= {"root": "elsewhere", "sources": ["mirror"]}
    config.write_text(yaml.safe_dump(said))
    assert run(capsys, "fetch", "--config", config, LORA)[0] == 0
    code, out, _ = run(capsys, "list", "--config", config, "--json")
    assert [(r["model"], r["source"]) for r in json.loads(out)["models"]] == [(LORA, "mirror")]


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (("fetch", "base:a/b/c"), 2, "neither a hub's id nor a URL"),
        (("fetch", "thing:a/b"), 2, "not a kind of model"),
        (("fetch", "lora:acme/none"), 1, "401"),
        (("fetch", f"{LORA}+none.safetensors"), 1, "has no none.safetensors"),
        (("fetch", "lora:http://example.com/x"), 1, "only https is asked"),
        (("drop", "lora:acme/none"), 2, "not among the fetched models"),
    ],
)
def test_what_goes_wrong_is_one_line(
    config: Path,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    code: int,
    line: str,
) -> None:
    ended, out, err = run(capsys, words[0], "--config", config, *words[1:])
    assert (ended, out.strip()) == (code, "")
    assert line in err
    assert err.count("\n") == 1


def test_without_sources_nothing_is_fetched(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = yaml.safe_load(config.read_text())
    said["models"]["sources"] = []
    config.write_text(yaml.safe_dump(said))
    code, _, err = run(capsys, "fetch", "--config", config, LORA)
    assert code == 2
    assert "models.sources" in err


def test_a_pin_that_is_no_model_is_a_wrong_configuration(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = yaml.safe_load(config.read_text())
    said["models"]["pin"] = ["acme/style"]
    config.write_text(yaml.safe_dump(said))
    code, _, err = run(capsys, "list", "--config", config)
    assert code == 2
    assert "models: pin: 'acme/style' is not a model's id" in err
