"""The operator's own S3 mirror: a source that also works where there is no other, and its filling.

    <prefix>/models/<key>/<path>            a model's file, its sha256 in the object's metadata
    <prefix>/models/<key>/.manifest.json    what the model is, as the store writes it on its disk;
                                            put last, so the model is there once this is
    <prefix>/<org>/<name>/<path>            laid by hand, in the hub's form (`<name>/<path>` where
                                            it has one word); looked at where there is no manifest

What the bucket holds is hostile until it is checked: who may write to a bucket may not write to the
store. A mirror lacks what it lacks and proves nothing by it.
"""

from __future__ import annotations

import atexit
import hashlib
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final, NoReturn

from boto3.s3.transfer import TransferConfig  # type: ignore[import-untyped]
from boto3.session import Session  # type: ignore[import-untyped]
from botocore.config import Config  # type: ignore[import-untyped]
from botocore.exceptions import ClientError  # type: ignore[import-untyped]
from botocore.httpsession import DEFAULT_CA_BUNDLE  # type: ignore[import-untyped]

from cluster.core.errors import ModelUnavailable
from cluster.models.disk import MANIFEST, Manifest, Stored, manifest_from, manifest_text
from cluster.models.http_read import CHUNK
from cluster.models.mirror_answers import asking
from cluster.models.refs import ModelRef
from cluster.models.refusals import Refused, Rule
from cluster.models.selection import is_plain, needed
from cluster.models.settings import parse_s3
from cluster.models.sources import (
    Absent,
    Changed,
    Listing,
    Opened,
    RemoteFile,
    SourceDown,
    promised,
)

MODELS: Final = "models"
MOST_MANIFEST: Final = 2 * 2**20
MOST_KEYS: Final = 10_000
"""Of one tree laid by hand."""
MOST_PAGES: Final = 50
CONNECT_SECONDS: Final = 10.0
READ_SECONDS: Final = 60.0
ATTEMPTS: Final = 2
"""Of one request; the keeper tries again, and another source in between."""

_REVISION: Final = re.compile(r"[\w.-]{0,100}", re.ASCII)
_SHA256: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)
_RANGE: Final = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", re.ASCII)
_UPLOAD: Final = TransferConfig(
    multipart_threshold=64 * 2**20,
    multipart_chunksize=16 * 2**20,
    max_concurrency=4,
    preferred_transfer_client="classic",
)


def client(endpoint: str | None, region: str | None, ca_file: Path | None = None) -> Any:
    """A boto3 client of S3, or of what speaks like it at `endpoint`; credentials by boto3's chain,
    and without a `ca_file` whom it believes too.

    Checksums beyond S3's first ones, which newer clients send unasked, are unknown to many other
    servers.
    """
    config = Config(
        signature_version="s3v4",
        connect_timeout=CONNECT_SECONDS,
        read_timeout=READ_SECONDS,
        retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
        max_pool_connections=32,
        s3={"addressing_style": "path" if endpoint else "auto"},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    # A session of its own: the module's default one isn't safe among threads.
    verify = None if ca_file is None else _bundle_file(ca_file)
    made = Session().client(
        "s3", region_name=region, endpoint_url=endpoint, config=config, verify=verify
    )
    made.meta.events.register("before-call.s3.HeadBucket", _never)
    return made


def _bundle_file(ca_file: Path) -> str:
    """With whom boto believes anyhow: it takes one file, which stays as long as the process."""
    with tempfile.NamedTemporaryFile("wb", suffix=".pem", delete=False) as file:
        atexit.register(Path(file.name).unlink, missing_ok=True)
        for part in (Path(DEFAULT_CA_BUNDLE), ca_file):
            file.write(part.read_bytes() + b"\n")
    return file.name


def _never(**_: object) -> NoReturn:
    """botocore asks where a bucket is when an answer redirects, and where that is when the answer
    to it does: without end at a server that redirects everything, as one does that leads to https.
    Amazon's own redirects name the region themselves.
    """
    none = {"Error": {"Code": "NotAsked"}, "ResponseMetadata": {"HTTPHeaders": {}}}
    raise ClientError(none, "HeadBucket")


class Mirror:
    """`url` is `s3://bucket/prefix` (raises `ValueError`)."""

    name = "mirror"

    def __init__(self, url: str, make_client: Callable[[], Any]) -> None:
        self._bucket, self._prefix = parse_s3(url)
        self._make_client = make_client
        self._made: Any = None
        self._lock = threading.Lock()

    def serves(self, ref: ModelRef) -> bool:
        return True

    def list(self, ref: ModelRef) -> Listing:
        with promised(str(ref)):
            return self._listed(ref)

    def _listed(self, ref: ModelRef) -> Listing:
        manifest = self._manifest(ref)
        if manifest is not None:
            return _listing(ref, manifest, self._key(MODELS, ref.key))
        laid = self._laid(ref)
        if not laid:
            raise Absent(f"{ref} is not in the mirror")
        files = tuple(laid[path] for path in needed(ref, laid.keys()))
        tags = "\n".join(f"{file.path} {file.size} {file.etag}" for file in files)
        return Listing(self.name, hashlib.sha256(tags.encode()).hexdigest()[:40], files)

    @contextmanager
    def open(
        self, listing: Listing, file: RemoteFile, start: int, stop: int | None
    ) -> Iterator[Opened]:
        asked = {"Bucket": self._bucket, "Key": file.where}
        if start or stop is not None:
            asked["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
        if file.etag:
            asked["IfMatch"] = file.etag
        with promised(file.path), asking(file.path):
            answer = self._client().get_object(**asked)
            body = answer["Body"]
        with closing(body):
            with promised(file.path), asking(file.path):
                found = _checked(file, answer, start, stop)
            yield found

    def has(self, ref: ModelRef) -> bool:
        """Whether the model was uploaded whole. What can't be read there may be uploaded anew."""
        manifest = self._manifest(ref)
        if manifest is None:
            return False
        try:
            _listing(ref, manifest, "")
        except (SourceDown, ModelUnavailable):
            return False
        return True

    def upload(
        self, ref: ModelRef, folder: Path, manifest: Manifest, gain: Callable[[int], None]
    ) -> None:
        """Put the model in `folder` into the mirror; what is there already isn't sent again.

        `gain` hears of bytes that are there (less when a part is sent anew), from several threads.
        It must not raise. Raises as a source does; `Changed` where a file isn't any more what the
        manifest says.
        """
        text = manifest_text(manifest).encode()
        # What couldn't be read again isn't written.
        _listing(ref, text, "")
        for file in manifest.files:
            self._upload(ref, folder / file.path, file, gain)
        key = self._key(MODELS, ref.key, MANIFEST)
        with asking(str(ref)):
            self._client().put_object(
                Bucket=self._bucket, Key=key, Body=text, ContentType="application/json"
            )

    def _upload(self, ref: ModelRef, path: Path, file: Stored, gain: Callable[[int], None]) -> None:
        key = self._key(MODELS, ref.key, file.path)
        try:
            with asking(file.path):
                there = self._client().head_object(Bucket=self._bucket, Key=key)
                told = there["ContentLength"], there.get("Metadata", {}).get("sha256")
        except Absent:
            told = None
        if told == (file.size, file.sha256):
            gain(file.size)
            return
        try:
            stat = path.stat()
        except OSError as error:
            raise Changed(f"{ref}: {file.path} can't be read any more") from error
        if (stat.st_size, stat.st_mtime_ns) != (file.size, file.mtime_ns):
            raise Changed(f"{ref}: {file.path} has changed since its hash was taken")
        with asking(file.path):
            self._client().upload_file(
                Filename=str(path),
                Bucket=self._bucket,
                Key=key,
                ExtraArgs={"Metadata": {"sha256": file.sha256}},
                Callback=gain,
                Config=_UPLOAD,
            )

    def _client(self) -> Any:
        with self._lock:
            if self._made is None:
                self._made = self._make_client()
            return self._made

    def _key(self, *words: str) -> str:
        return "/".join(filter(None, (self._prefix, *words)))

    def _manifest(self, ref: ModelRef) -> bytes | None:
        """As it is there, or the first bytes of one that is too large; None where there is none."""
        key = self._key(MODELS, ref.key, MANIFEST)
        read = bytearray()
        try:
            with asking(str(ref)):
                body = self._client().get_object(Bucket=self._bucket, Key=key)["Body"]
                with closing(body):
                    for chunk in body.iter_chunks(CHUNK):
                        read += chunk
                        if len(read) > MOST_MANIFEST:
                            break
        except Absent:
            return None
        return bytes(read)

    def _laid(self, ref: ModelRef) -> dict[str, RemoteFile]:
        """What was laid by hand under the model's name; nothing where it can't have been."""
        # Under `models/` are other models' files: no name may lead there.
        if not is_plain(ref.name) or ref.name.partition("/")[0] == MODELS:
            return {}
        folder = self._key(ref.name) + "/"
        found: dict[str, RemoteFile] = {}
        with asking(str(ref)):
            paginator = self._client().get_paginator("list_objects_v2")
            pages = paginator.paginate(Bucket=self._bucket, Prefix=folder)
            for number, page in enumerate(pages, 1):
                for entry in page.get("Contents", ()):
                    key, size, etag = entry["Key"], entry["Size"], entry["ETag"]
                    if not key.startswith(folder) or size < 0:
                        raise SourceDown(f"{ref}: the mirror lists what can't be")
                    path = key.removeprefix(folder)
                    found[path] = RemoteFile(path, size, where=key, etag=etag)
                if len(found) > MOST_KEYS or number > MOST_PAGES:
                    raise Refused(
                        Rule.FILE_KIND, f"{ref}: more than {MOST_KEYS} files in the mirror"
                    )
        return found


def _checked(file: RemoteFile, answer: dict[str, Any], start: int, stop: int | None) -> Opened:
    size, begin = int(answer["ContentLength"]), 0
    ranged = answer["ResponseMetadata"]["HTTPStatusCode"] == 206
    if ranged:
        match = _RANGE.fullmatch(answer.get("ContentRange", ""))
        if match is None or int(match[1]) != start or (stop is not None and int(match[2]) >= stop):
            raise SourceDown(f"{file.path}: another range than was asked for")
        size, begin = int(match[3]), start
    if file.size is not None and size != file.size:
        raise Changed(f"{file.path}: {size} bytes, and {file.size} were announced")
    # Copied by other means it may have none: then the hash of what arrives decides.
    sha256 = answer.get("Metadata", {}).get("sha256", file.sha256)
    if file.sha256 is not None and sha256 != file.sha256:
        raise Changed(f"{file.path}: another content than was announced")
    # It was asked for this content only (`IfMatch`), whether and how it says so again.
    etag = answer.get("ETag", file.etag)
    etag = file.etag if etag.strip('"') == file.etag.strip('"') else etag
    return Opened(begin, size, etag, _chunks(file.path, answer["Body"]), ranged)


def _chunks(what: str, body: Any) -> Iterator[bytes]:
    with promised(what), asking(what):
        yield from body.iter_chunks(CHUNK)


def _listing(ref: ModelRef, raw: bytes, folder: str) -> Listing:
    """What the manifest says, of which nothing is believed unchecked.

    Raises `SourceDown` where it isn't one of this model, or could lead elsewhere, and what `needed`
    raises.
    """
    manifest = manifest_from(raw) if len(raw) <= MOST_MANIFEST else None
    if manifest is None or manifest.ref != ref:
        raise SourceDown(f"{ref}: the mirror's manifest is none, or another model's")
    if not _is(manifest.revision, _REVISION):
        raise SourceDown(f"{ref}: the mirror's manifest names no revision")
    found: dict[str, RemoteFile] = {}
    for file in manifest.files:
        path = file.path
        if not isinstance(path, str) or not is_plain(path) or path in found:
            raise SourceDown(f"{ref}: the mirror's manifest has a file {ascii(path)[:100]}")
        if type(file.size) is not int or not 0 <= file.size < 10**18:
            raise SourceDown(f"{ref}: the mirror's manifest has no size for {path}")
        if not _is(file.sha256, _SHA256):
            raise SourceDown(f"{ref}: the mirror's manifest has no sha256 for {path}")
        found[path] = RemoteFile(path, file.size, file.sha256, where=f"{folder}/{path}")
    if not found:
        raise SourceDown(f"{ref}: the mirror's manifest has no files")
    return Listing(
        Mirror.name, manifest.revision, tuple(found[path] for path in _chosen(ref, found))
    )


def _is(said: object, pattern: re.Pattern[str]) -> bool:
    return isinstance(said, str) and pattern.fullmatch(said) is not None


def _chosen(ref: ModelRef, found: dict[str, RemoteFile]) -> tuple[str, ...]:
    only = next(iter(found)) if len(found) == 1 else ""
    if ref.is_url and ref.kind == "textual_inversion" and only.endswith(".safetensors"):
        # By a link it has the name that the link gave it.
        return (only,)
    return needed(ref, found.keys())
