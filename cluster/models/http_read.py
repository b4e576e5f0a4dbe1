"""One ranged read over HTTP, and what an answer's status means to a source."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from time import monotonic
from typing import Final

import httpx2

from cluster.core.errors import ClusterError
from cluster.models.sources import (
    Absent,
    Changed,
    Denied,
    Opened,
    RemoteFile,
    SourceDown,
    promised,
)

CHUNK: Final = 256 * 2**10
MOST_SECONDS: Final = 1.0
"""After which what has come is handed on, however little it is."""
_RANGE: Final = re.compile(r"bytes (\d{1,20})-(\d{1,20})/(\d{1,20}|\*)", re.ASCII)
MOST_PATIENCE: Final = 3600.0


def answer_error(what: str, status: int, patience: float | None = None) -> ClusterError:
    """What a refusing answer means; 404 and 410 are never certain here."""
    if status in {404, 410}:
        return Absent(f"{what}: {status}")
    if status in {401, 402, 403, 451}:
        return Denied(f"{what}: {status}")
    return SourceDown(f"{what}: {status}", patience)


def retry_after(response: httpx2.Response) -> float | None:
    """Seconds that the answer asks us to wait; only the form in seconds, and within reason."""
    said = response.headers.get("Retry-After", "")
    return min(float(said), MOST_PATIENCE) if re.fullmatch(r"\d{1,6}", said, re.ASCII) else None


@contextmanager
def opened(
    client: httpx2.Client,
    file: RemoteFile,
    headers: Mapping[str, str],
    start: int,
    stop: int | None,
) -> Iterator[Opened]:
    """`file.where` from `start`, up to but without `stop`.

    Raises `SourceDown` for whatever breaks, be it before or while it is read, `Changed` when the
    answer is of another content, and what the status means (`answer_error`).
    """
    asked = dict(headers) | {"Accept-Encoding": "identity"}
    if start or stop is not None:
        asked["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
    try:
        with ExitStack() as stack:
            with promised(file.path):
                response = stack.enter_context(client.stream("GET", file.where, headers=asked))
                found = _checked(file, response, start, stop)
            yield found
    except (httpx2.HTTPError, httpx2.StreamError, httpx2.InvalidURL) as error:
        raise SourceDown(f"{file.path}: {type(error).__name__}") from error


def _checked(file: RemoteFile, response: httpx2.Response, start: int, stop: int | None) -> Opened:
    status = response.status_code
    if status == 416:
        raise Changed(f"{file.path}: no byte {start} in it any more")
    if status not in {200, 206}:
        raise answer_error(file.path, status, retry_after(response))
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise SourceDown(f"{file.path}: came in an encoding that wasn't asked for")
    length = _number(response.headers.get("Content-Length"))
    size, begin = length, 0
    if status == 206:
        match = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if match is None or int(match[1]) != start or (stop and int(match[2]) >= stop):
            raise SourceDown(f"{file.path}: another range than was asked for")
        size, begin = _number(match[3]), start
    if file.size is not None and size is not None and size != file.size:
        raise Changed(f"{file.path}: {size} bytes, and {file.size} were announced")
    told = validator(response)
    return Opened(begin, size, told, _chunks(file.path, response), status == 206)


def validator(response: httpx2.Response) -> str:
    """What tells this content from another: its tag, unless that is a weak one, or when it was last
    changed; empty where the host says neither (RFC 9110, 8.8)."""
    etag = response.headers.get("ETag", "")
    weak = etag.startswith("W/") or not etag
    return response.headers.get("Last-Modified", "") if weak else etag


def _chunks(what: str, response: httpx2.Response) -> Iterator[bytes]:
    """In large pieces, and not seldom: who takes them looks at the deadline in between."""
    held, since = bytearray(), monotonic()
    with promised(what):
        for piece in response.iter_raw():
            held += piece
            if len(held) >= CHUNK or monotonic() - since >= MOST_SECONDS:
                yield bytes(held)
                held, since = bytearray(), monotonic()
    if held:
        yield bytes(held)


def _number(text: str | None) -> int | None:
    return int(text) if text and re.fullmatch(r"\d{1,18}", text, re.ASCII) else None
