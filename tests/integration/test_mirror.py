"""A mirror on moto's S3 server, over HTTP: filled, read, broken."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.core.errors import ModelUnavailable, ModelUnavailableKind
from cluster.models.keeper import Keeper, Wanted
from cluster.models.mirror import Mirror, client
from cluster.models.refs import ref
from cluster.models.settings import Limits
from cluster.models.sources import Absent, Changed, Denied, SourceDown
from tests.integration.mirror_world import served
from tests.unit.model_fakes import LORA, Shelf, content_of, keeper, lora_shelf, weights

URL = "s3://models/some/prefix"
FILE = "pytorch_lora_weights.safetensors"
NOBODY = Wanted()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with served() as url:
        yield url


@pytest.fixture
def s3(server: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    for name, value in {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/nonexistent",
        "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
    }.items():
        monkeypatch.setenv(name, value)
    made = client(server, "us-east-1")
    made.create_bucket(Bucket="models")
    yield made
    for page in made.get_paginator("list_objects_v2").paginate(Bucket="models"):
        for entry in page.get("Contents", ()):
            made.delete_object(Bucket="models", Key=entry["Key"])
    made.delete_bucket(Bucket="models")


def stocked(tmp_path: Path, shelf: Shelf) -> Keeper:
    store = keeper(tmp_path / "source", shelf)
    for each in shelf.files:
        store.ensure(each, NOBODY)
    return store


def fill(mirror: Mirror, store: Keeper) -> int:
    told: list[int] = []
    manifest = store.disk.manifest(LORA.key)
    assert manifest is not None
    mirror.upload(LORA, store.disk.model(LORA.key), manifest, told.append)
    return sum(told)


def keys(s3: Any) -> set[str]:
    return {entry["Key"] for entry in s3.list_objects_v2(Bucket="models").get("Contents", ())}


def test_what_was_put_there_is_what_comes(tmp_path: Path, s3: Any) -> None:
    mirror = Mirror(URL, lambda: s3)
    shelf = lora_shelf(300_000)
    size = fill(mirror, stocked(tmp_path, shelf))
    assert size == len(shelf.files[LORA][FILE])
    assert mirror.has(LORA)
    limits = Limits(spare=0, part=64 * 1024)
    # An air-gapped site: the mirror is all there is.
    other = keeper(tmp_path / "other", mirror, limits=limits)
    other.ensure(LORA, NOBODY)
    assert content_of(other, LORA) == shelf.files[LORA]
    manifest = other.disk.manifest(LORA.key)
    assert manifest is not None
    assert (manifest.source, manifest.revision) == ("mirror", "1")


def test_what_is_there_is_not_sent_again(tmp_path: Path, s3: Any) -> None:
    store = stocked(tmp_path, lora_shelf())
    mirror = Mirror(URL, lambda: s3)
    fill(mirror, store)
    sent: list[str] = []
    s3.meta.events.register("before-call.s3.PutObject", lambda **kw: sent.append("put"))
    fill(mirror, store)
    assert sent == ["put"], "the manifest, and nothing else"


def test_a_model_without_its_manifest_is_not_there(tmp_path: Path, s3: Any) -> None:
    mirror = Mirror(URL, lambda: s3)
    fill(mirror, stocked(tmp_path, lora_shelf()))
    (manifest,) = (key for key in keys(s3) if key.endswith("manifest.json"))
    s3.delete_object(Bucket="models", Key=manifest)
    assert not mirror.has(LORA)
    with pytest.raises(Absent) as caught:
        mirror.list(LORA)
    assert not caught.value.certain


def test_a_tree_laid_by_hand(tmp_path: Path, s3: Any) -> None:
    contents = {"config.json": b"{}", "diffusion_pytorch_model.safetensors": weights(700)}
    for path, content in {**contents, "README.md": b"#", "x.ckpt": b"\x80"}.items():
        s3.put_object(Bucket="models", Key=f"some/prefix/acme/net/{path}", Body=content)
    asked = ref("controlnet", "acme/net")
    store = keeper(tmp_path, Mirror(URL, lambda: s3))
    store.ensure(asked, NOBODY)
    assert content_of(store, asked) == contents


def test_an_object_that_changes_between_two_looks(tmp_path: Path, s3: Any) -> None:
    key = f"some/prefix/acme/style/{FILE}"
    s3.put_object(Bucket="models", Key=key, Body=weights(700))
    mirror = Mirror(URL, lambda: s3)
    listing = mirror.list(LORA)
    s3.put_object(Bucket="models", Key=key, Body=weights(700, salt=1))
    with pytest.raises(Changed), mirror.open(listing, listing.files[0], 0, None):
        pass


@pytest.mark.parametrize(
    "change",
    [
        {"files": [{"path": "../x.safetensors", "size": 1, "sha256": "0" * 64, "mtime_ns": 0}]},
        {"files": [{"path": "/x.safetensors", "size": 1, "sha256": "0" * 64, "mtime_ns": 0}]},
        {"files": [{"path": "a.safetensors", "size": -1, "sha256": "0" * 64, "mtime_ns": 0}]},
        {"files": [{"path": "a.safetensors", "size": True, "sha256": "0" * 64, "mtime_ns": 0}]},
        {"files": [{"path": "a.safetensors", "size": 1, "sha256": "x", "mtime_ns": 0}]},
        {"files": [{"path": ["a"], "size": 1, "sha256": "0" * 64, "mtime_ns": 0}]},
        {"files": []},
        {"ref": {"kind": "lora", "name": "acme/other"}},
        {"ref": 3},
        {"unknown": 1},
        {"revision": "x" * 5_000_000},
    ],
    ids=lambda change: str(change)[:60],
)
def test_a_manifest_is_hostile_until_it_is_checked(
    tmp_path: Path, s3: Any, change: dict[str, Any]
) -> None:
    mirror = Mirror(URL, lambda: s3)
    fill(mirror, stocked(tmp_path, lora_shelf()))
    (key,) = (key for key in keys(s3) if key.endswith("manifest.json"))
    said = json.loads(s3.get_object(Bucket="models", Key=key)["Body"].read())
    s3.put_object(Bucket="models", Key=key, Body=json.dumps(said | change))
    with pytest.raises(SourceDown):
        mirror.list(LORA)


@pytest.mark.parametrize("body", [b"", b"[]", b"\x00", b"[" * 100_000])
def test_a_manifest_that_is_none(tmp_path: Path, s3: Any, body: bytes) -> None:
    key = f"some/prefix/models/{LORA.key}/.manifest.json"
    s3.put_object(Bucket="models", Key=key, Body=body)
    with pytest.raises(SourceDown):
        Mirror(URL, lambda: s3).list(LORA)


def test_a_bucket_that_is_not_there(s3: Any) -> None:
    with pytest.raises(Denied, match="NoSuchBucket"):
        Mirror("s3://another/prefix", lambda: s3).list(LORA)


def test_without_credentials(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/nonexistent")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(Denied, match="credentials"):
        Mirror(URL, lambda: client(server, "us-east-1")).list(LORA)


def test_a_mirror_that_is_away(tmp_path: Path, s3: Any) -> None:
    mirror = Mirror(URL, lambda: client("http://127.0.0.1:9", "us-east-1"))
    with pytest.raises(SourceDown):
        mirror.list(LORA)
    store = keeper(tmp_path, mirror)
    with pytest.raises(ModelUnavailable) as caught:
        store.ensure(LORA, NOBODY)
    assert caught.value.kind is ModelUnavailableKind.UNREACHABLE


def test_an_upload_that_breaks_leaves_no_model(tmp_path: Path, s3: Any) -> None:
    store = stocked(tmp_path, lora_shelf())
    store.store.lora_file(LORA.name).unlink()
    mirror = Mirror(URL, lambda: s3)
    with pytest.raises(Changed):
        fill(mirror, store)
    assert not mirror.has(LORA)
