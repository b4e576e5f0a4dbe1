"""The operator's own S3 mirror: a source that also works where there is no other, and its filling.

    <prefix>/models/<key>/<path>            a model's file, its sha256 in the object's metadata
    <prefix>/models/<key>/.manifest.json    what the model is, as the store writes it on its disk;
                                            put last, so the model is there once this is
    <prefix>/<org>/<name>/<path>            laid by hand, in the hub's form; looked at where there
                                            is no manifest

What the bucket holds is hostile until it is checked: who may write to a bucket may not write to the
store. A mirror lacks what it lacks and proves nothing by it.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from boto3.s3.transfer import TransferConfig  # type: ignore[import-untyped]
from boto3.session import Session  # type: ignore[import-untyped]
from botocore.config import Config  # type: ignore[import-untyped]

from cluster.models.disk import MANIFEST, Manifest, Stored
from cluster.models.http_read import CHUNK
from cluster.models.mirror_answers import asking
from cluster.models.refs import ModelRef
from cluster.models.refusals import Refused, Rule
from cluster.models.selection import MOST_FILES, is_plain, needed
from cluster.models.sources import Absent, Changed, Listing, Opened, RemoteFile, SourceDown

MODELS: Final = "models"
MOST_MANIFEST: Final = 2 * 2**20
MOST_BRACKETS: Final = 2 * MOST_FILES
"""Of a manifest, which has one for each file and three more."""
MOST_KEYS: Final = 10_000
"""Of one tree laid by hand."""
MOST_PAGES: Final = 50
CONNECT_SECONDS: Final = 10.0
READ_SECONDS: Final = 60.0
ATTEMPTS: Final = 2
"""Of one request; the keeper tries again, and another source in between."""

_BUCKET: Final = re.compile(r"[A-Za-z0-9][\w.-]{1,61}[A-Za-z0-9]", re.ASCII)
_WORD: Final = re.compile(r"(?!\.{1,2}$)[\w.=+-]{1,100}", re.ASCII)
_REVISION: Final = re.compile(r"[\w.-]{0,100}", re.ASCII)
_SHA256: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)
_RANGE: Final = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", re.ASCII)
_UPLOAD: Final = TransferConfig(
    multipart_threshold=64 * 2**20,
    multipart_chunksize=16 * 2**20,
    max_concurrency=4,
    preferred_transfer_client="classic",
)


def parse(url: str) -> tuple[str, str]:
    """Bucket and prefix of `s3://bucket/prefix`; the prefix without slashes at its ends, and empty
    where there is none. Raises `ValueError`, whose line doesn't repeat what may hold a secret."""
    scheme, mark, rest = url.partition("://")
    if scheme != "s3" or not mark:
        raise ValueError("a mirror is written as s3://bucket/prefix")
    bucket, _, prefix = rest.partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise ValueError(
            "a mirror's bucket is 3 to 63 letters, digits, dots, hyphens and underscores; "
            "credentials come from the environment, never from the URL"
        )
    prefix = prefix.strip("/")
    if prefix and not all(_WORD.fullmatch(word) for word in prefix.split("/")):
        raise ValueError("a mirror's prefix is made of letters, digits and ._=+- between slashes")
    return bucket, prefix


def client(endpoint: str | None, region: str | None) -> Any:
    """A boto3 client of S3, or of what speaks like it at `endpoint`; credentials by boto3's chain.

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
    return Session().client("s3", region_name=region, endpoint_url=endpoint, config=config)


class Mirror:
    """`url` is `s3://bucket/prefix` (raises `ValueError`, see `parse`)."""

    name = "mirror"

    def __init__(self, url: str, make_client: Callable[[], Any]) -> None:
        self._bucket, self._prefix = parse(url)
        self._make_client = make_client
        self._made: Any = None
        self._lock = threading.Lock()

    def serves(self, ref: ModelRef) -> bool:
        return True

    def list(self, ref: ModelRef) -> Listing:
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
        with asking(file.path):
            answer = self._client().get_object(**asked)
            body = answer["Body"]
        with closing(body):
            with asking(file.path):
                found = _checked(file, answer, start, stop)
            yield found

    def has(self, ref: ModelRef) -> bool:
        """Whether the model was uploaded whole. What can't be read there may be uploaded anew."""
        manifest = self._manifest(ref)
        if manifest is None:
            return False
        try:
            _listing(ref, manifest, "")
        except (SourceDown, Refused):
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
        text = json.dumps(asdict(manifest)).encode()
        # What couldn't be read again isn't written.
        _listing(ref, text, "")
        for file in manifest.files:
            self._upload(ref, folder / file.path, file, gain)
        if self._manifest(ref) != text:
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
        org, slash, _ = ref.name.partition("/")
        # Under `models/` are other models' files: no name may lead there.
        if not slash or org == MODELS or not is_plain(ref.name):
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
    if answer["ResponseMetadata"]["HTTPStatusCode"] == 206:
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
    etag = answer.get("ETag", "").strip('"')
    return Opened(begin, size, etag, _chunks(file.path, answer["Body"]))


def _chunks(what: str, body: Any) -> Iterator[bytes]:
    with asking(what):
        yield from body.iter_chunks(CHUNK)


def _listing(ref: ModelRef, manifest: bytes, folder: str) -> Listing:
    """What the manifest says, of which nothing is believed unchecked.

    Raises `SourceDown` where it isn't one of this model, `Refused` for paths that could lead
    elsewhere, and what `needed` raises.
    """
    if len(manifest) > MOST_MANIFEST:
        raise SourceDown(f"{ref}: its manifest in the mirror has more than {MOST_MANIFEST} bytes")
    if manifest.count(b"[") + manifest.count(b"{") > MOST_BRACKETS:
        # web3 raises the recursion limit so far that the reader would run out of its stack.
        raise SourceDown(f"{ref}: its manifest in the mirror is nested too deep, or too long")
    try:
        said = json.loads(manifest)
        of = ModelRef(**said["ref"])
        revision = said["revision"]
        files = [(file["path"], file["size"], file["sha256"]) for file in said["files"]]
    except (ValueError, TypeError, LookupError) as error:
        kind = type(error).__name__
        raise SourceDown(f"{ref}: its manifest in the mirror can't be read ({kind})") from error
    if of != ref:
        raise SourceDown(f"{ref}: its manifest in the mirror is another model's")
    if not isinstance(revision, str) or not _REVISION.fullmatch(revision):
        raise SourceDown(f"{ref}: its manifest in the mirror names no revision")
    if len(files) > MOST_FILES:
        raise Refused(Rule.FILE_KIND, f"{ref} has {len(files)} files, {MOST_FILES} at most")
    found: dict[str, RemoteFile] = {}
    for path, size, sha256 in files:
        if not isinstance(path, str) or not is_plain(path) or path in found:
            shown = ascii(str(path)[:100])
            raise Refused(Rule.NAME, f"{ref}: the mirror's manifest has a file {shown}")
        if type(size) is not int or not 0 <= size < 10**18:
            raise SourceDown(f"{ref}: the mirror's manifest has no size for {path}")
        if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
            raise SourceDown(f"{ref}: the mirror's manifest has no sha256 for {path}")
        found[path] = RemoteFile(path, size, sha256, where=f"{folder}/{path}")
    return Listing(Mirror.name, revision, tuple(found[path] for path in _chosen(ref, found)))


def _chosen(ref: ModelRef, found: dict[str, RemoteFile]) -> tuple[str, ...]:
    only = next(iter(found)) if len(found) == 1 else ""
    if ref.is_url and ref.kind == "textual_inversion" and only.endswith(".safetensors"):
        # By a link it has the name that the link gave it.
        return (only,)
    return needed(ref, found.keys())
