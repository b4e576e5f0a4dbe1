"""The S3 mirror against moto's server over HTTP, and against servers that break."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import moto.settings
import pytest
from boto3.session import Session  # type: ignore[import-untyped]
from botocore.exceptions import EndpointConnectionError  # type: ignore[import-untyped]
from botocore.loaders import create_loader  # type: ignore[import-untyped]
from moto.server import ThreadedMotoServer

from cluster.core.errors import ClusterError, ModelUnavailable
from cluster.models.disk import MANIFEST, Manifest, Stored, manifest_from
from cluster.models.mirror import MODELS, MOST_MANIFEST, Mirror, client
from cluster.models.refs import ModelRef
from cluster.models.refusals import Refused
from cluster.models.sources import Absent, Changed, Denied, RemoteFile, SourceDown
from cluster.models.transfer import Damaged, Transfer, sha256_of

BASE = ModelRef("base", "org/tiny")
LORA = ModelRef("lora", "org/lora")
FILES = {
    "model_index.json": b'{"_class_name": "StableDiffusionPipeline"}',
    "scheduler/scheduler_config.json": b"{}",
    "unet/config.json": b"{}",
    "unet/diffusion_pytorch_model.safetensors": bytes(range(256)) * 1200,
    "vae/diffusion_pytorch_model.safetensors": b"v" * 5000,
}
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
LORA_FILES = {"pytorch_lora_weights.safetensors": b"lora" * 500}


LOADER = create_loader()
"""Parses the description of S3, which takes long, once for all tests."""


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Dummy ones, and no others wherever boto3 would look."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr("botocore.session.create_loader", lambda *_: LOADER)


@pytest.fixture
def one_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that nothing waits between two."""
    monkeypatch.setattr("cluster.models.mirror.ATTEMPTS", 1)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


class World:
    """A bucket of its own, a mirror in it, and what was asked of the server."""

    def __init__(self, endpoint: str, bucket: str) -> None:
        self.endpoint, self.bucket = endpoint, bucket
        self.s3 = client(endpoint, "us-east-1")
        self.s3.create_bucket(Bucket=bucket)
        self.asked: list[str] = []
        self.mirror = Mirror(f"s3://{bucket}/site/models", self.make_client)

    def make_client(self) -> Any:
        made = client(self.endpoint, None)
        made.meta.events.register(
            "before-call.s3", lambda model, **_: self.asked.append(model.name)
        )
        return made

    def key(self, ref: ModelRef, path: str) -> str:
        return f"site/models/{MODELS}/{ref.key}/{path}"

    def put(self, key: str, body: bytes, **metadata: str) -> None:
        self.s3.put_object(Bucket=self.bucket, Key=key, Body=body, Metadata=metadata)

    def put_manifest(self, ref: ModelRef, manifest: object) -> None:
        text = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
        self.put(self.key(ref, MANIFEST), text)

    def stored(self) -> set[str]:
        found = self.s3.list_objects_v2(Bucket=self.bucket)
        return {entry["Key"] for entry in found.get("Contents", ())}


@pytest.fixture
def world(endpoint: str, request: pytest.FixtureRequest) -> World:
    made = World(endpoint, f"bucket-{abs(hash(request.node.nodeid))}")
    return made


def laid(folder: Path, files: dict[str, bytes]) -> Path:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def manifest_of(ref: ModelRef, folder: Path, revision: str = "c0ffee") -> Manifest:
    files = []
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        stat, path = file.stat(), file.relative_to(folder).as_posix()
        files.append(Stored(path, stat.st_size, sha256_of(file), stat.st_mtime_ns))
    return Manifest(ref, "hub", revision, tuple(files), 1700000000.5, 12.25)


def uploaded(world: World, folder: Path, ref: ModelRef = BASE) -> Manifest:
    laid(folder, FILES if ref is BASE else LORA_FILES)
    manifest = manifest_of(ref, folder)
    world.mirror.upload(ref, folder, manifest, lambda _: None)
    return manifest


def read(mirror: Mirror, ref: ModelRef, path: str, start: int = 0, stop: int | None = None) -> Any:
    listing = mirror.list(ref)
    (file,) = [file for file in listing.files if file.path == path]
    with mirror.open(listing, file, start, stop) as opened:
        return opened.start, opened.size, b"".join(opened.chunks)


def fetched(
    mirror: Mirror, ref: ModelRef, folder: Path, part: int = 64 * 2**10
) -> dict[str, bytes]:
    """By what the store fetches with, in parallel parts."""
    listing = mirror.list(ref)
    transfer = Transfer(mirror, listing, 2**30, lambda _: None, lambda _: None, part)
    return {file.path: transfer.fetch(file, folder).read_bytes() for file in listing.files}


# --- what is uploaded is there ------------------------------------------------------------------


def test_an_uploaded_model_comes_back_the_same(world: World, tmp_path: Path) -> None:
    manifest = uploaded(world, tmp_path / "here")
    world.asked.clear()
    listing = world.mirror.list(BASE)
    assert world.asked == ["GetObject"]
    assert (listing.source, listing.revision, listing.archive) == ("mirror", "c0ffee", False)
    said = {(file.path, file.size, file.sha256) for file in manifest.files}
    assert {(file.path, file.size, file.sha256) for file in listing.files} == said
    assert fetched(world.mirror, BASE, tmp_path / "there") == FILES


def test_a_real_tiny_model(world: World, tmp_path: Path, tiny_models: Path) -> None:
    ref = ModelRef("base", "crynux-devnet/tiny-llm")
    folder = tiny_models / ref.name
    manifest = manifest_of(ref, folder)
    world.mirror.upload(ref, folder, manifest, lambda _: None)
    files = fetched(world.mirror, ref, tmp_path / "there")
    assert "model.safetensors" in files
    assert files == {path: (folder / path).read_bytes() for path in files}


def test_what_lies_in_the_bucket(world: World, tmp_path: Path) -> None:
    manifest = uploaded(world, tmp_path)
    assert world.stored() == {world.key(BASE, path) for path in (*FILES, MANIFEST)}
    head = world.s3.head_object(Bucket=world.bucket, Key=world.key(BASE, WEIGHTS))
    assert head["Metadata"] == {"sha256": sha256_of(tmp_path / WEIGHTS)}
    text = world.s3.get_object(Bucket=world.bucket, Key=world.key(BASE, MANIFEST))["Body"].read()
    assert manifest_from(text) == manifest


def test_a_mirror_at_the_buckets_root(world: World, tmp_path: Path) -> None:
    mirror = Mirror(f"s3://{world.bucket}", world.make_client)
    laid(tmp_path, LORA_FILES)
    mirror.upload(LORA, tmp_path, manifest_of(LORA, tmp_path), lambda _: None)
    assert f"{MODELS}/{LORA.key}/{MANIFEST}" in world.stored()
    assert mirror.has(LORA)


@pytest.mark.parametrize(
    ("start", "stop"), [(0, None), (0, 10), (7, 100), (300_000, None), (307_199, 307_200)]
)
def test_ranges(world: World, tmp_path: Path, start: int, stop: int | None) -> None:
    uploaded(world, tmp_path)
    content = FILES[WEIGHTS]
    found = read(world.mirror, BASE, WEIGHTS, start, stop)
    assert found == (start, len(content), content[start:stop])


def test_a_range_behind_the_end(world: World, tmp_path: Path) -> None:
    uploaded(world, tmp_path)
    with pytest.raises(Changed):
        read(world.mirror, BASE, WEIGHTS, 400_000, 400_001)


def test_a_link_s_files_under_the_names_they_came_with(world: World, tmp_path: Path) -> None:
    ref = ModelRef("textual_inversion", "https://example.org/style.safetensors?token=x")
    laid(tmp_path, {"style.safetensors": b"s"})
    world.mirror.upload(ref, tmp_path, manifest_of(ref, tmp_path), lambda _: None)
    assert read(world.mirror, ref, "style.safetensors")[2] == b"s"


def test_large_files_go_in_parts(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b"12345678" * (11 * 2**17)
    laid(tmp_path, {"pytorch_lora_weights.safetensors": content})
    monkeypatch.setattr("cluster.models.mirror._UPLOAD.multipart_threshold", 6 * 2**20)
    monkeypatch.setattr("cluster.models.mirror._UPLOAD.multipart_chunksize", 6 * 2**20)
    gained: list[int] = []
    world.mirror.upload(LORA, tmp_path, manifest_of(LORA, tmp_path), gained.append)
    assert world.asked.count("UploadPart") == 2
    assert sum(gained) == len(content)
    there = fetched(world.mirror, LORA, tmp_path / "there", part=2**20)
    assert there == {"pytorch_lora_weights.safetensors": content}


# --- uploading ----------------------------------------------------------------------------------


def test_a_second_upload_sends_nothing_again(world: World, tmp_path: Path) -> None:
    manifest = uploaded(world, tmp_path)
    world.asked.clear()
    gained: list[int] = []
    world.mirror.upload(BASE, tmp_path, manifest, gained.append)
    assert sorted(world.asked) == ["HeadObject"] * len(FILES) + ["PutObject"]
    assert sum(gained) == manifest.size


def test_an_upload_mends_what_is_another(world: World, tmp_path: Path) -> None:
    manifest = uploaded(world, tmp_path)
    same_size = b"x" * len(FILES[WEIGHTS])
    world.put(world.key(BASE, WEIGHTS), same_size)
    world.put(world.key(BASE, "unet/config.json"), b"[0, 1]", sha256="0" * 64)
    world.asked.clear()
    world.mirror.upload(BASE, tmp_path, manifest, lambda _: None)
    assert world.asked.count("PutObject") == 3
    assert read(world.mirror, BASE, WEIGHTS)[2] == FILES[WEIGHTS]
    assert read(world.mirror, BASE, "unet/config.json")[2] == b"{}"


class Breaking:
    """A client whose network goes away at the n-th file."""

    def __init__(self, inner: Any, files: int) -> None:
        self._inner, self._left = inner, files

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def upload_file(self, **asked: Any) -> None:
        self._left -= 1
        if self._left < 0:
            raise EndpointConnectionError(endpoint_url="http://gone")
        self._inner.upload_file(**asked)


@pytest.mark.parametrize("files", range(len(FILES)))
def test_a_broken_upload_leaves_no_model(world: World, tmp_path: Path, files: int) -> None:
    laid(tmp_path, FILES)
    manifest = manifest_of(BASE, tmp_path)
    url = f"s3://{world.bucket}/site/models"
    breaking = Mirror(url, lambda: Breaking(world.make_client(), files))
    with pytest.raises(SourceDown):
        breaking.upload(BASE, tmp_path, manifest, lambda _: None)
    assert world.key(BASE, MANIFEST) not in world.stored()
    assert not world.mirror.has(BASE)
    with pytest.raises(Absent):
        world.mirror.list(BASE)
    world.asked.clear()
    world.mirror.upload(BASE, tmp_path, manifest, lambda _: None)
    assert world.asked.count("PutObject") == len(FILES) - files + 1
    assert world.mirror.has(BASE)


@pytest.mark.parametrize("change", ["content", "size", "gone"])
def test_what_changed_on_our_disk_is_not_uploaded(
    world: World, tmp_path: Path, change: str
) -> None:
    laid(tmp_path, FILES)
    manifest = manifest_of(BASE, tmp_path)
    weights = tmp_path / WEIGHTS
    weights.unlink()
    if change != "gone":
        weights.write_bytes(FILES[WEIGHTS][::-1] if change == "content" else b"short")
    with pytest.raises(Changed):
        world.mirror.upload(BASE, tmp_path, manifest, lambda _: None)
    assert world.stored().isdisjoint({world.key(BASE, WEIGHTS), world.key(BASE, MANIFEST)})


def test_what_could_not_be_read_again_is_not_uploaded(world: World, tmp_path: Path) -> None:
    laid(tmp_path, FILES)
    manifest = manifest_of(BASE, tmp_path)
    with pytest.raises(SourceDown):
        world.mirror.upload(LORA, tmp_path, manifest, lambda _: None)
    up = replace(manifest, files=(replace(manifest.files[0], path="../up.json"),))
    with pytest.raises(SourceDown):
        world.mirror.upload(BASE, tmp_path, up, lambda _: None)
    assert world.asked == []


# --- laid by hand -------------------------------------------------------------------------------


def by_hand(world: World, name: str = BASE.name, more: Mapping[str, bytes] | None = None) -> None:
    for path, content in {**FILES, **(more or {})}.items():
        world.put(f"site/models/{name}/{path}", content)


def test_a_tree_laid_by_hand(world: World, tmp_path: Path) -> None:
    by_hand(world, more={"README.md": b"hello", "unet/model.bin": b"code", "a/b/c.json": b"{}"})
    listing = world.mirror.list(BASE)
    assert {file.path: file.size for file in listing.files} == {
        path: len(content) for path, content in FILES.items()
    }
    assert all(file.sha256 is None and file.etag for file in listing.files)
    assert fetched(world.mirror, BASE, tmp_path) == FILES
    assert not world.mirror.has(BASE)


def test_a_tree_under_an_old_name_of_one_word(world: World, tmp_path: Path) -> None:
    by_hand(world, "tiny")
    assert fetched(world.mirror, ModelRef("base", "tiny"), tmp_path) == FILES


def test_its_revision_is_of_what_it_holds(world: World) -> None:
    by_hand(world)
    revision = world.mirror.list(BASE).revision
    world.put(f"site/models/{BASE.name}/README.md", b"not the model's")
    assert world.mirror.list(BASE).revision == revision
    world.put(f"site/models/{BASE.name}/{WEIGHTS}", FILES[WEIGHTS][::-1])
    assert world.mirror.list(BASE).revision != revision


def test_a_tree_of_more_than_one_page(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moto.settings.get_s3_default_max_keys", lambda: 2)
    by_hand(world)
    assert {file.path for file in world.mirror.list(BASE).files} == set(FILES)
    assert world.asked.count("ListObjectsV2") == 3


@pytest.mark.parametrize("bound", ["MOST_KEYS", "MOST_PAGES"])
def test_a_tree_without_end(world: World, monkeypatch: pytest.MonkeyPatch, bound: str) -> None:
    monkeypatch.setattr("moto.settings.get_s3_default_max_keys", lambda: 1)
    monkeypatch.setattr(f"cluster.models.mirror.{bound}", 2)
    by_hand(world)
    with pytest.raises(Refused):
        world.mirror.list(BASE)
    assert world.asked.count("ListObjectsV2") == 3


def test_a_tree_with_nothing_but_code(world: World) -> None:
    world.put(f"site/models/{LORA.name}/pytorch_lora_weights.bin", b"code")
    with pytest.raises(Refused):
        world.mirror.list(LORA)


def test_a_tree_without_what_is_needed(world: World) -> None:
    world.put(f"site/models/{LORA.name}/README.md", b"hello")
    with pytest.raises(ModelUnavailable):
        world.mirror.list(LORA)


def test_no_name_leads_to_another_models_files(world: World, tmp_path: Path) -> None:
    """`models/<key>` is a name that a task may well write."""
    uploaded(world, tmp_path)
    with pytest.raises(Absent):
        world.mirror.list(ModelRef("base", f"{MODELS}/{BASE.key}"))
    for name in (MODELS, "tiny", "../models/org/tiny", "https://example.org/tiny"):
        with pytest.raises(Absent):
            world.mirror.list(ModelRef("base", name))


# --- what is not there, or not any more ---------------------------------------------------------


def test_a_model_without_its_manifest_is_not_there(world: World, tmp_path: Path) -> None:
    uploaded(world, tmp_path)
    world.s3.delete_object(Bucket=world.bucket, Key=world.key(BASE, MANIFEST))
    assert not world.mirror.has(BASE)
    with pytest.raises(Absent) as caught:
        world.mirror.list(BASE)
    assert not caught.value.certain


def opened_after(world: World, change: Callable[[RemoteFile], None]) -> bytes:
    listing = world.mirror.list(BASE)
    (file,) = [file for file in listing.files if file.path == WEIGHTS]
    change(file)
    with world.mirror.open(listing, file, 0, None) as opened:
        return b"".join(opened.chunks)


def test_overwritten_between_listing_and_reading(world: World, tmp_path: Path) -> None:
    uploaded(world, tmp_path)
    other = b"x" * len(FILES[WEIGHTS])
    with pytest.raises(Changed):
        opened_after(world, lambda file: world.put(file.where, other, sha256="0" * 64))
    with pytest.raises(Changed):
        opened_after(world, lambda file: world.put(file.where, b"shorter"))


def test_overwritten_by_hand_is_found_by_its_hash(world: World, tmp_path: Path) -> None:
    uploaded(world, tmp_path / "here")
    world.put(world.key(BASE, WEIGHTS), b"x" * len(FILES[WEIGHTS]))
    with pytest.raises(Damaged):
        fetched(world.mirror, BASE, tmp_path / "there")


def test_a_tree_overwritten_between_listing_and_reading(world: World) -> None:
    by_hand(world)
    other = b"x" * len(FILES[WEIGHTS])
    with pytest.raises(Changed):
        opened_after(world, lambda file: world.put(file.where, other))


def test_deleted_between_listing_and_reading(world: World, tmp_path: Path) -> None:
    uploaded(world, tmp_path)
    with pytest.raises(Absent) as caught:
        opened_after(world, lambda f: world.s3.delete_object(Bucket=world.bucket, Key=f.where))
    assert not caught.value.certain


# --- hostile manifests --------------------------------------------------------------------------


def good() -> dict[str, Any]:
    file = Stored("pytorch_lora_weights.safetensors", 4, "0" * 64, 0)
    return asdict(Manifest(LORA, "hub", "c0ffee", (file,), 0.0, 0.0))


def with_file(**changes: object) -> dict[str, Any]:
    manifest = good()
    manifest["files"] = [manifest["files"][0] | changes]
    return manifest


def test_the_manifest_that_the_hostile_ones_are_made_of(world: World) -> None:
    world.put_manifest(LORA, good())
    assert [file.size for file in world.mirror.list(LORA).files] == [4]


HOSTILE: dict[str, object] = {
    "empty": b"",
    "not JSON": b"<html>",
    "not UTF-8": b'{"ref": "\xff"}',
    "deep": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "long number": b'{"ref": ' + b"9" * 10_000 + b"}",
    "huge": b" " * (MOST_MANIFEST + 1),
    "a list": [],
    "null": None,
    "nothing in it": {},
    "another model's": good() | {"ref": asdict(BASE)},
    "of no model": good() | {"ref": {"kind": "lora"}},
    "of a model with more": good() | {"ref": asdict(LORA) | {"more": 1}},
    "a revision of two lines": good() | {"revision": "a\nb"},
    "a revision that is no text": good() | {"revision": "\ud800"},
    "a revision that is a number": good() | {"revision": 7},
    "files that are none": good() | {"files": "abc"},
    "the same file twice": good() | {"files": good()["files"] * 2},
    "a parent path": with_file(path="../pytorch_lora_weights.safetensors"),
    "a parent path within": with_file(path="unet/../../x.safetensors"),
    "an absolute path": with_file(path="/etc/pytorch_lora_weights.safetensors"),
    "a hidden path": with_file(path=".manifest.json"),
    "a backslash": with_file(path="..\\pytorch_lora_weights.safetensors"),
    "a NUL": with_file(path="pytorch_lora_weights.safetensors\0"),
    "a line's end": with_file(path="pytorch_lora_weights.safetensors\n"),
    "a path that is a number": with_file(path=7),
    "a deep path": with_file(path="a/b/c.safetensors"),
    "a negative size": with_file(size=-1),
    "a size of text": with_file(size="4"),
    "a size that is a truth": with_file(size=True),
    "a size with a fraction": with_file(size=4.0),
    "a size that is none": with_file(size=None),
    "an endless size": with_file(size=10**18),
    "a short hash": with_file(sha256="0" * 63),
    "a hash in capitals": with_file(sha256="A" * 64),
    "no hash": with_file(sha256=None),
    "code only": with_file(path="pytorch_lora_weights.bin"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_manifests(world: World, name: str) -> None:
    world.put_manifest(LORA, HOSTILE[name])
    with pytest.raises(ClusterError) as caught:
        world.mirror.list(LORA)
    assert type(caught.value) in {SourceDown, Refused}
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300
    assert not world.mirror.has(LORA)


def test_a_manifest_of_too_many_files(world: World) -> None:
    names = ["config.json", "model.safetensors", *(f"tokenizer_{n}.json" for n in range(500))]
    files = tuple(Stored(name, 1, "0" * 64, 0) for name in names)
    world.put_manifest(BASE, asdict(Manifest(BASE, "hub", "c0ffee", files, 0.0, 0.0)))
    with pytest.raises(Refused, match="502 files"):
        world.mirror.list(BASE)


def test_what_the_model_does_not_need_is_not_fetched(world: World) -> None:
    names = ["config.json", "model.safetensors", "modeling.py", "pytorch_model.bin", "a.onnx"]
    files = tuple(Stored(name, 1, "0" * 64, 0) for name in names)
    world.put_manifest(BASE, asdict(Manifest(BASE, "hub", "c0ffee", files, 0.0, 0.0)))
    found = {file.path for file in world.mirror.list(BASE).files}
    assert found == {"config.json", "model.safetensors"}


# --- who may not, and who can't -----------------------------------------------------------------


def everything(mirror: Mirror, tmp_path: Path) -> dict[str, Callable[[], object]]:
    laid(tmp_path, LORA_FILES)
    manifest = manifest_of(LORA, tmp_path)
    file = RemoteFile("x", 1, where="x")

    def opened() -> None:
        with mirror.open(None, file, 0, None):  # type: ignore[arg-type]
            pass

    return {
        "list": lambda: mirror.list(LORA),
        "has": lambda: mirror.has(LORA),
        "upload": lambda: mirror.upload(LORA, tmp_path, manifest, lambda _: None),
        "open": opened,
    }


METHODS = ("list", "has", "upload", "open")


@pytest.mark.parametrize("method", METHODS)
def test_no_credentials(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(Denied, match="no credentials"):
        everything(world.mirror, tmp_path)[method]()


@pytest.mark.parametrize("method", METHODS)
def test_an_unknown_key(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(moto.settings, "INITIAL_NO_AUTH_ACTION_COUNT", 0)
    with pytest.raises(Denied, match=r"InvalidAccessKeyId|403"):
        everything(world.mirror, tmp_path)[method]()


@pytest.fixture
def user_key(world: World) -> tuple[str, str]:
    """Of a user that may do nothing."""
    iam = Session().client("iam", endpoint_url=world.endpoint, region_name="us-east-1")
    iam.create_user(UserName=world.bucket)
    key = iam.create_access_key(UserName=world.bucket)["AccessKey"]
    return key["AccessKeyId"], key["SecretAccessKey"]


@pytest.mark.parametrize("right", [True, False], ids=["may not", "wrong secret"])
def test_a_user_who_may_not(
    world: World, monkeypatch: pytest.MonkeyPatch, user_key: tuple[str, str], right: bool
) -> None:
    monkeypatch.setattr(moto.settings, "INITIAL_NO_AUTH_ACTION_COUNT", 0)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", user_key[0])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", user_key[1] if right else "wrong")
    with pytest.raises(Denied, match="AccessDenied" if right else "SignatureDoesNotMatch"):
        world.mirror.list(LORA)


@pytest.mark.parametrize("method", METHODS)
def test_no_such_bucket(world: World, tmp_path: Path, method: str) -> None:
    mirror = Mirror("s3://another-bucket/site", world.make_client)
    with pytest.raises(Denied, match="NoSuchBucket"):
        everything(mirror, tmp_path)[method]()


@pytest.mark.usefixtures("one_attempt")
@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_server(tmp_path: Path, method: str) -> None:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    mirror = Mirror("s3://bucket/site", lambda: client(f"http://{host}:{port}", None))
    server.stop()
    with pytest.raises(SourceDown):
        everything(mirror, tmp_path)[method]()


def test_a_client_that_can_not_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SourceDown):
        Mirror("s3://bucket", lambda: client("not a url", None)).list(LORA)
    monkeypatch.setenv("AWS_PROFILE", "none")
    with pytest.raises(Denied):
        Mirror("s3://bucket", lambda: client("http://127.0.0.1:9", None)).list(LORA)


def test_the_client_is_made_once_and_late(world: World, tmp_path: Path) -> None:
    made: list[Any] = []

    def make() -> Any:
        made.append(world.make_client())
        return made[-1]

    mirror = Mirror(f"s3://{world.bucket}/x", make)
    assert not made
    threads = [threading.Thread(target=mirror.has, args=(LORA,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1


# --- servers that break -------------------------------------------------------------------------


@contextmanager
def answering(status: int, headers: dict[str, str], body: bytes) -> Iterator[str]:
    """A server with one answer to everything, after which it hangs up."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_PUT = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


ODD: dict[str, tuple[int, dict[str, str], bytes]] = {
    "cut off": (200, {"Content-Length": "100", "ETag": '"e"'}, b"begun"),
    "no length": (200, {"ETag": '"e"'}, b"some"),
    "a length of text": (200, {"Content-Length": "many"}, b"some"),
    "a page": (200, {"Content-Type": "text/html", "Content-Length": "6"}, b"<html>"),
    "an odd date": (200, {"Content-Length": "4", "Last-Modified": "yesterday"}, b"some"),
    "another range": (206, {"Content-Length": "4", "Content-Range": "bytes 9-12/4"}, b"some"),
    "no range": (206, {"Content-Length": "4"}, b"some"),
    "overloaded": (503, {"Content-Length": "0"}, b""),
    "broken": (500, {"Content-Length": "6"}, b"<html>"),
    "teapot": (418, {"Content-Length": "6"}, b"\x00\x01\x02<&>"),
    "around": (307, {"Content-Length": "0", "Location": "/"}, b""),
    "elsewhere": (301, {"Content-Length": "0", "Location": "https://example.org/"}, b""),
    "another region": (301, {"Content-Length": "0", "x-amz-bucket-region": "eu-west-1"}, b""),
}


@pytest.mark.usefixtures("one_attempt")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ODD)
def test_odd_answers(tmp_path: Path, name: str, method: str) -> None:
    """They are this module's errors or none, and never a model."""
    with answering(*ODD[name]) as endpoint:
        mirror = Mirror("s3://bucket/site", lambda: client(endpoint, None))
        try:
            found = everything(mirror, tmp_path)[method]()
        except (SourceDown, Changed) as error:
            assert str(error).isprintable()
        else:
            assert found in {None, False}


@pytest.mark.parametrize(("size", "meant"), [(100, SourceDown), (99, Changed)])
def test_cut_off_while_it_is_read(size: int, meant: type[ClusterError]) -> None:
    with answering(*ODD["cut off"]) as endpoint:
        mirror = Mirror("s3://bucket/site", lambda: client(endpoint, None))
        file = RemoteFile("x", size, where="x")
        with pytest.raises(meant), mirror.open(None, file, 0, None) as opened:  # type: ignore[arg-type]
            b"".join(opened.chunks)


@pytest.mark.parametrize("said", ["bytes 9-12/13", "bytes 5-12/13", "bytes 5-8/*", "5-8/13", ""])
def test_another_range_than_was_asked_for(said: str) -> None:
    with answering(206, {"Content-Length": "4", "Content-Range": said}, b"some") as endpoint:
        mirror = Mirror("s3://bucket/site", lambda: client(endpoint, None))
        file = RemoteFile("x", 13, where="x")
        with pytest.raises(SourceDown, match="another range"), mirror.open(None, file, 5, 9):  # type: ignore[arg-type]
            pass


@pytest.mark.usefixtures("one_attempt")
def test_a_slow_down_says_for_how_long() -> None:
    text = b"<Error><Code>SlowDown</Code><Message>please</Message></Error>"
    headers = {"Content-Length": str(len(text)), "Retry-After": "7"}
    with answering(503, headers, text) as endpoint:
        mirror = Mirror("s3://bucket/site", lambda: client(endpoint, None))
        with pytest.raises(SourceDown, match="SlowDown") as caught:
            mirror.list(LORA)
    assert caught.value.retry_after == 7.0


def test_the_readers_own_errors_pass(world: World, tmp_path: Path) -> None:
    uploaded(world, tmp_path)
    listing = world.mirror.list(BASE)
    with (
        pytest.raises(OSError, match="our disk"),
        world.mirror.open(listing, listing.files[0], 0, 1),
    ):
        raise OSError("our disk is full")


def test_a_client_for_another_server() -> None:
    config = client("http://127.0.0.1:9", "eu-west-1").meta.config
    assert config.s3["addressing_style"] == "path"
    assert config.signature_version == "s3v4"
    assert config.request_checksum_calculation == "when_required"
    assert config.response_checksum_validation == "when_required"
