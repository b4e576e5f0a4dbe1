"""An S3 mirror in moto's server, over HTTP, for the tests of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from botocore.loaders import create_loader  # type: ignore[import-untyped]
from moto.server import ThreadedMotoServer

from cluster.models.disk import MANIFEST, Manifest, Stored
from cluster.models.mirror import MODELS, Mirror, client
from cluster.models.refs import ModelRef
from cluster.models.sources import RemoteFile
from cluster.models.transfer import Transfer, sha256_of

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


def set_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
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


@contextmanager
def served() -> Iterator[str]:
    """Moto's server, and its address."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
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
