"""Where models come from, and what a source may answer. A source reads; it decides nothing.

Its answers are errors by what may follow from them:

* `Absent`: it hasn't got the model. `certain` when it says so for the whole network (404 or 410
  from the host that the name itself leads to), which another look may make the task's fault.
* `Denied`: it won't give it (401, 403, 451, gated). Another node may hold a token.
* `SourceDown`: it can't now. To be tried again, not before `retry_after` seconds.
* `Changed`: the file isn't what it was when it was listed.
* `Refused`: the store doesn't take it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

from cluster.core.errors import ClusterError
from cluster.models.refs import ModelRef


class Absent(ClusterError):
    """The source hasn't got it."""

    def __init__(self, message: str, certain: bool = False) -> None:
        super().__init__(message)
        self.certain = certain


class Denied(ClusterError):
    """The source won't give it to us."""


class SourceDown(ClusterError):
    """The source doesn't answer as it should."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Changed(ClusterError):
    """The file is another one than was listed, or than was begun."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """`path` is in the model's folder, with `/`. `size` in bytes, None where it isn't known before
    the file is read to its end; `sha256` and `git_sha1` (of git's blob) in lower-case hex where the
    source says them. `where` is the source's own. `etag` tells this content from another, as each
    read of it says again (`Opened`); empty where the source says nothing of the kind."""

    path: str
    size: int | None
    sha256: str | None = None
    git_sha1: str | None = None
    where: str = ""
    etag: str = ""

    @property
    def is_hashed(self) -> bool:
        return self.sha256 is not None or self.git_sha1 is not None


@dataclass(frozen=True, slots=True)
class Listing:
    """What the source has of a model: the files to be fetched, all of one `revision`.

    `archive`: the one file is an archive, whose members are the model's files.
    """

    source: str
    revision: str
    files: tuple[RemoteFile, ...]
    archive: bool = False

    @property
    def size(self) -> int:
        """Bytes, as far as they are known."""
        return sum(file.size or 0 for file in self.files)


@dataclass(frozen=True, slots=True)
class Opened:
    """A file being read. `start` is where it really begins: 0 when ranges are ignored, and then it
    goes on to the end, whatever `stop` was; `ranged` says that they are not. `size` is the whole
    file's, None where the source doesn't say."""

    start: int
    size: int | None
    etag: str
    chunks: Iterator[bytes]
    ranged: bool = True


@contextmanager
def promised(what: str) -> Iterator[None]:
    """What a library raises of an answer that nobody foresaw is the source's trouble, and neither
    a card's nor a task's."""
    try:
        yield
    except ClusterError:
        raise
    except Exception as error:
        raise SourceDown(f"{what}: {type(error).__name__}") from error


class Source(Protocol):
    """Every method may be called from several threads, and raises nothing but this module's
    errors, `Refused` and `ModelUnavailable`."""

    @property
    def name(self) -> str:
        """For logs and metrics: `mirror`, `hub`, `web`."""
        ...

    def serves(self, ref: ModelRef) -> bool:
        """Whether it makes sense to ask."""
        ...

    def list(self, ref: ModelRef) -> Listing: ...

    def open(
        self, listing: Listing, file: RemoteFile, start: int, stop: int | None
    ) -> AbstractContextManager[Opened]:
        """The file's bytes from `start` up to but without `stop`."""
        ...
