"""The S3 mirror against hostile manifests, without rights, and against servers that break."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import moto.settings
import pytest
from boto3.session import Session  # type: ignore[import-untyped]
from moto.server import ThreadedMotoServer

from cluster.core.errors import ClusterError
from cluster.models.disk import Manifest, Stored
from cluster.models.mirror import MOST_MANIFEST, Mirror, client
from cluster.models.refusals import Refused
from cluster.models.sources import Changed, Denied, RemoteFile, SourceDown
from tests.integration.mirror_world import (
    BASE,
    LORA,
    METHODS,
    World,
    everything,
    served,
    set_credentials,
    uploaded,
)


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    set_credentials(monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with served() as url:
        yield url


@pytest.fixture
def world(endpoint: str, request: pytest.FixtureRequest) -> World:
    return World(endpoint, f"bucket-{abs(hash(request.node.nodeid))}")


@pytest.fixture
def one_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that nothing waits between two."""
    monkeypatch.setattr("cluster.models.mirror.ATTEMPTS", 1)


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
