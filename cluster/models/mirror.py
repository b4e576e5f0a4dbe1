"""An S3 mirror as a source, and how it is filled. Any S3-compatible server.

    <prefix>/models/<key>/<path>            a model's files, each with its sha256 as metadata
    <prefix>/models/<key>/.manifest.json    written last: the model is there once this is
    <prefix>/<org>/<name>/<path>            a tree laid by hand

Credentials come by boto3's usual chain and are never seen here. What the mirror hasn't got proves
nothing about the network.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import boto3  # type: ignore[import-untyped]
from boto3.exceptions import Boto3Error  # type: ignore[import-untyped]
from botocore.config import Config as ClientConfig  # type: ignore[import-untyped]
from botocore.exceptions import (  # type: ignore[import-untyped]
    BotoCoreError,
    ClientError,
    NoCredentialsError,
    PartialCredentialsError,
)

from cluster.core.errors import ClusterError
from cluster.models.disk import MANIFEST, Manifest, manifest_from, manifest_text
from cluster.models.refs import ModelRef
from cluster.models.selection import is_plain, needed
from cluster.models.settings import parse_s3
from cluster.models.sources import Absent, Changed, Denied, Listing, Opened, RemoteFile, SourceDown

CHUNK: Final = 256 * 2**10
MOST_MANIFEST: Final = 4 * 2**20
MOST_KEYS: Final = 5_000
_DENIED: Final = frozenset(
    {
        "AccessDenied",
        "AllAccessDisabled",
        "ExpiredToken",
        "InvalidAccessKeyId",
        "InvalidToken",
        "NoSuchBucket",
        "SignatureDoesNotMatch",
        "TokenRefreshRequired",
        "401",
        "403",
    }
)
_ABSENT: Final = frozenset({"NoSuchKey", "NotFound", "404"})
_CHANGED: Final = frozenset({"PreconditionFailed", "412", "InvalidRange", "416"})
_SHA256: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)


def client(endpoint: str | None, region: str | None) -> Any:
    """A boto3 client; other servers than Amazon's are asked by path and without its newer sums."""
    config = ClientConfig(
        connect_timeout=10,
        read_timeout=30,
        retries={"mode": "standard", "total_max_attempts": 2},
        max_pool_connections=32,
        signature_version="s3v4",
        s3={"addressing_style": "path" if endpoint else "auto"},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    # A session of its own: the shared one isn't made for threads, and keeps old credentials.
    session = boto3.session.Session()
    return session.client("s3", endpoint_url=endpoint, region_name=region, config=config)


class Mirror:
    """`url` is s3://bucket/prefix; the client is made when it is first needed."""

    name = "mirror"

    def __init__(self, url: str, make_client: Callable[[], Any]) -> None:
        self._bucket, self._prefix = parse_s3(url)
        self._make_client = make_client

    @cached_property
    def _s3(self) -> Any:
        return self._make_client()

    def serves(self, ref: ModelRef) -> bool:
        return True

    def list(self, ref: ModelRef) -> Listing:
        with _errors(str(ref)):
            raw = self._manifest(ref)
            return self._by_hand(ref) if raw is None else self._filled(ref, raw)

    @contextmanager
    def open(
        self, listing: Listing, file: RemoteFile, start: int, stop: int | None
    ) -> Iterator[Opened]:
        asked: dict[str, str] = {"Bucket": self._bucket, "Key": file.where}
        if file.etag:
            asked["IfMatch"] = f'"{file.etag}"'
        if start or stop is not None:
            asked["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
        with _errors(file.path):
            found = self._s3.get_object(**asked)
            ranged = "ContentRange" in found
            said = found.get("ContentRange", "").rpartition("/")[2]
            size = int(said) if said.isdecimal() else found.get("ContentLength")
            if file.size is not None and size != file.size:
                raise Changed(f"{file.path}: {size} bytes, and {file.size} were announced")
            etag = found.get("ETag", "").strip('"')
            with closing(found["Body"]) as body:
                chunks = body.iter_chunks(CHUNK)
                yield Opened(start if ranged else 0, size, etag, chunks, ranged)

    # --- filling ---------------------------------------------------------------------------------

    def has(self, ref: ModelRef) -> bool:
        """Whether the model was put there whole. Raises `Denied` or `SourceDown`."""
        with _errors(str(ref)):
            return self._manifest(ref) is not None

    def upload(
        self, ref: ModelRef, folder: Path, manifest: Manifest, gain: Callable[[int], None]
    ) -> None:
        """Put a model there, the manifest last; what is there already isn't sent again.

        `gain` hears of bytes that are there. Raises `Denied` or `SourceDown`.
        """
        with _errors(str(ref)):
            for file in manifest.files:
                key = self._key(ref, file.path)
                if self._is_there(key, file.size, file.sha256):
                    gain(file.size)
                    continue
                self._s3.upload_file(
                    str(folder / file.path),
                    self._bucket,
                    key,
                    ExtraArgs={"Metadata": {"sha256": file.sha256}},
                    Callback=gain,
                )
            text = manifest_text(manifest).encode()
            self._s3.put_object(Bucket=self._bucket, Key=self._key(ref, MANIFEST), Body=text)

    def _is_there(self, key: str, size: int, sha256: str) -> bool:
        try:
            found = self._s3.head_object(Bucket=self._bucket, Key=key)
        except ClientError as error:
            if _code(error) in _ABSENT:
                return False
            raise
        same = found.get("Metadata", {}).get("sha256") == sha256
        return bool(same and found.get("ContentLength") == size)

    # --- reading ---------------------------------------------------------------------------------

    def _key(self, ref: ModelRef, path: str) -> str:
        return "/".join(filter(None, (self._prefix, "models", ref.key, path)))

    def _manifest(self, ref: ModelRef) -> bytes | None:
        try:
            found = self._s3.get_object(Bucket=self._bucket, Key=self._key(ref, MANIFEST))
        except ClientError as error:
            if _code(error) in _ABSENT:
                return None
            raise
        with closing(found["Body"]) as body:
            raw: bytes = body.read(MOST_MANIFEST + 1)
        return raw

    def _filled(self, ref: ModelRef, raw: bytes) -> Listing:
        manifest = manifest_from(raw) if len(raw) <= MOST_MANIFEST else None
        if manifest is None or manifest.ref != ref or not manifest.files:
            raise SourceDown(f"{ref}: the mirror's manifest is none")
        files = []
        for file in manifest.files:
            plain = isinstance(file.path, str) and is_plain(file.path)
            whole = type(file.size) is int and file.size >= 0
            if not (plain and whole and _SHA256.fullmatch(str(file.sha256))):
                raise SourceDown(f"{ref}: the mirror's manifest is none")
            where = self._key(ref, file.path)
            files.append(RemoteFile(file.path, file.size, file.sha256, where=where))
        return Listing(self.name, str(manifest.revision)[:100], tuple(files))

    def _by_hand(self, ref: ModelRef) -> Listing:
        if ref.is_url:
            raise Absent(f"{ref} is not in the mirror")
        root = "/".join(filter(None, (self._prefix, ref.name))) + "/"
        found: dict[str, Mapping[str, Any]] = {}
        pages = self._s3.get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=self._bucket, Prefix=root):
            for entry in page.get("Contents", ()):
                found[str(entry["Key"]).removeprefix(root)] = entry
                if len(found) > MOST_KEYS:
                    raise SourceDown(f"{ref}: more than {MOST_KEYS} files in the mirror")
        if not found:
            raise Absent(f"{ref} is not in the mirror")
        files = [
            RemoteFile(
                path,
                int(found[path]["Size"]),
                where=root + path,
                etag=str(found[path].get("ETag", "")).strip('"'),
            )
            for path in needed(ref, found.keys())
        ]
        text = json.dumps([[file.path, file.size, file.etag] for file in files])
        return Listing(self.name, hashlib.sha256(text.encode()).hexdigest()[:40], tuple(files))


@contextmanager
def _errors(what: str) -> Iterator[None]:
    """The library's errors by what may follow from them."""
    try:
        yield
    except ClientError as error:
        raise _meaning(what, _code(error)) from error
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise Denied(f"{what}: no credentials for the mirror") from error
    except (BotoCoreError, Boto3Error, OSError) as error:
        cause = error.__cause__ or error.__context__
        if isinstance(error, Boto3Error) and isinstance(cause, ClientError):
            raise _meaning(what, _code(cause)) from error
        raise SourceDown(f"{what}: the mirror doesn't answer: {type(error).__name__}") from error


def _meaning(what: str, code: str) -> ClusterError:
    if code in _ABSENT:
        return Absent(f"{what}: not in the mirror")
    if code in _DENIED:
        return Denied(f"{what}: the mirror says {code}")
    if code in _CHANGED:
        return Changed(f"{what}: another one in the mirror now")
    return SourceDown(f"{what}: the mirror says {code}")


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))[:60]
