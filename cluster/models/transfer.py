"""One file from a source to the disk: in parallel parts, resumed where it broke, checked by hash.

While a file is under way it is `<path>.part`, and `<path>.parts` says how much of which part is
there, for the next one who tries. A file is only ever under its own name when it is what it claims
to be.

A killed process loses nothing that it has written; a machine without power may lose the bytes of a
file that has its name and its length. So what a hash will tell is told in the end, whoever fetched
it, and what none will tell isn't gone on with after the machine was started anew.

Bytes of two answers are put together only where something says that they are of one content: a
hash of the whole, or a tag that the source repeats. Without either a file comes in one stream, and
after a break from its beginning.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import operator
import os
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from cluster.core.errors import ModelUnavailable, ModelUnavailableKind
from cluster.models.refusals import Refused, Rule
from cluster.models.sources import Changed, Listing, Opened, RemoteFile, Source, SourceDown

PART: Final = 16 * 2**20
CONNECTIONS: Final = 4
PIECE = 4 * 2**20
"""Of what is hashed."""
_FORM: Final = 2
_NOTE: Final = struct.Struct("<IQ")


class Gate(Protocol):
    def __call__(self, size: int) -> None:
        """Before so many bytes are taken on: waits for its turn, or raises to stop."""
        ...


class Damaged(ModelUnavailable):
    """What came isn't what its source says it is."""

    def __init__(self, message: str) -> None:
        super().__init__(ModelUnavailableKind.DAMAGED, message)

    def __reduce__(self) -> tuple[type[Damaged], tuple[str]]:  # type: ignore[override]
        return type(self), (str(self),)


@dataclass(frozen=True, slots=True)
class Transfer:
    """`gain` hears of bytes that arrived (less when some are dropped again)."""

    source: Source
    listing: Listing
    most: int
    """Bytes of one file."""
    gate: Gate
    gain: Callable[[int], None]
    part: int = PART
    connections: int = CONNECTIONS
    in_one: bool = False
    """Tags tell nothing here: what no hash will tell comes in one stream."""
    look: Callable[[], None] = lambda: None
    """Called between the pieces of what is hashed; may raise to stop."""
    taken: dict[Path, str] = field(default_factory=dict)
    """The sha256 of what was read through just now."""

    def fetch(self, file: RemoteFile, folder: Path) -> Path:
        """The file in `folder`, whole and checked, or as an earlier try has left it (`verify`).

        Raises the source's errors, `Damaged`, `Refused`, what `gate` raises, or `OSError` for our
        own disk. What has arrived stays for the next try, unless it can't be trusted.
        """
        target = folder / file.path
        if target.is_file() and file.size in {None, target.stat().st_size}:
            self.gain(target.stat().st_size)
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        self._check_size(file, file.size)
        under_way = _UnderWay.resume(target, _identity(self.listing, file), file.size, self.part)
        if not self._joins(file):
            under_way.begin_stream(0)
        self.gain(under_way.arrived)
        try:
            self._fill(file, under_way)
            sha256 = _check(file, under_way.path, self.look)
        except (Changed, Damaged, Refused):
            self.gain(-under_way.arrived)
            under_way.drop()
            raise
        finally:
            under_way.close()
        under_way.path.rename(target)
        under_way.forget()
        self.taken[target] = sha256
        return target

    def verify(self, file: RemoteFile, target: Path) -> str:
        """The sha256 of a whole file, held against what the source says unless it just was. Raises
        `Damaged`; the file is then gone."""
        if target not in self.taken:
            try:
                self.taken[target] = _check(file, target, self.look)
            except (Changed, Damaged):
                self.gain(-target.stat().st_size)
                target.unlink()
                raise
        return self.taken[target]

    def _fill(self, file: RemoteFile, under_way: _UnderWay) -> None:
        in_parts = self.connections > 1 and self._joins(file)
        if in_parts and file.size is not None and file.size > self.part:
            missing = under_way.missing()
            # The first alone shows whether the server gives parts at all.
            if not missing or self._takes_part(file, under_way, missing.pop(0)):
                self._in_parts(file, under_way, missing)
                return
        self._in_one(file, under_way)

    def _takes_part(self, file: RemoteFile, under_way: _UnderWay, part: int) -> bool:
        """Fetch what is missing of a part, and note how far that came; whether it is given."""
        start, stop = under_way.bounds(part)
        try:
            with self.source.open(self.listing, file, start, stop) as opened:
                if not opened.ranged or opened.start != start:
                    return False
                self._check_same(opened, file)
                self._write(under_way, start, stop, opened.chunks, part)
        finally:
            under_way.note(part)
        return True

    def _in_parts(self, file: RemoteFile, under_way: _UnderWay, missing: list[int]) -> None:
        """Each connection takes the next part; the first error stops them all."""
        failed = threading.Event()
        lock = threading.Lock()

        def work() -> None:
            while not failed.is_set():
                with lock:
                    if not missing:
                        return
                    part = missing.pop(0)
                try:
                    if not self._takes_part(file, under_way, part):
                        raise SourceDown(f"{file.path}: the range was ignored")
                except BaseException:
                    failed.set()
                    raise

        count = min(self.connections, len(missing))
        if not count:
            return
        with ThreadPoolExecutor(count, thread_name_prefix="fetch") as pool:
            # What looks at what is read goes with each.
            futures = [pool.submit(copy_context().run, work) for _ in range(count)]
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            # One that isn't about the connection says more.
            raise min(errors, key=lambda error: isinstance(error, SourceDown))

    def _in_one(self, file: RemoteFile, under_way: _UnderWay) -> None:
        start = 0 if under_way.have else under_way.arrived
        if file.size is not None and start >= file.size > 0:
            return
        with self.source.open(self.listing, file, start, None) as opened:
            if opened.start not in {0, start}:
                raise SourceDown(f"{file.path}: another range than was asked for")
            self._check_size(file, opened.size)
            self._check_same(opened, file)
            self.gain(opened.start - under_way.arrived)
            under_way.begin_stream(opened.start)
            self._write(under_way, opened.start, opened.size or file.size, opened.chunks)

    def _write(
        self,
        under_way: _UnderWay,
        start: int,
        stop: int | None,
        chunks: Iterator[bytes],
        part: int | None = None,
    ) -> None:
        at = start
        for chunk in chunks:
            self.gate(len(chunk))
            if stop is not None and at + len(chunk) > stop:
                raise Changed(f"{under_way.name}: more bytes than were announced")
            if at + len(chunk) > self.most:
                raise self._too_large(under_way.name)
            under_way.write(chunk, at)
            at += len(chunk)
            if part is not None:
                under_way.have[part] = at - part * self.part
            self.gain(len(chunk))
        if stop is not None and at != stop:
            raise SourceDown(f"{under_way.name}: cut off at byte {at}")

    def _joins(self, file: RemoteFile) -> bool:
        """Whether bytes of two answers may be put together."""
        return file.is_hashed or (bool(file.etag) and not self.in_one)

    def _check_same(self, opened: Opened, file: RemoteFile) -> None:
        """Where no hash will tell, the source's tags must: two contents never mix."""
        if not file.is_hashed and self._joins(file) and opened.etag != file.etag:
            raise Changed(f"{file.path}: changed while it was fetched")

    def _check_size(self, file: RemoteFile, size: int | None) -> None:
        if size is not None and size > self.most:
            raise self._too_large(file.path)

    def _too_large(self, name: str) -> Refused:
        return Refused(Rule.FILE_SIZE, f"{name} is larger than {self.most} bytes")


@dataclass(slots=True)
class _UnderWay:
    """A file that isn't whole yet: a stream from its beginning, or parts in any order.

    The sidecar's first line says what it is of; then come numbers of parts, each with how many of
    its bytes are there, from its beginning. As long as there are none, the file is a stream.
    """

    name: str
    path: Path
    sidecar: Path
    head: bytes
    size: int | None
    part: int
    descriptor: int
    have: dict[int, int]
    lock: threading.Lock

    @classmethod
    def resume(cls, target: Path, identity: str, size: int | None, part: int) -> _UnderWay:
        path = target.with_name(f"{target.name}.part")
        sidecar = target.with_name(f"{target.name}.parts")
        head = json.dumps([_FORM, identity, size, part]).encode() + b"\n"
        noted = _noted(sidecar, head)
        if noted is None:
            path.unlink(missing_ok=True)
            sidecar.write_bytes(head)
        noted = noted or b""
        # The last of a part's counts; of a record that was cut off nothing.
        have = dict(_NOTE.iter_unpack(noted[: len(noted) // _NOTE.size * _NOTE.size]))
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        here = os.fstat(descriptor).st_size
        known = cls(
            target.name, path, sidecar, head, size, part, descriptor, have, threading.Lock()
        )
        if any(number * part + count > here or count > part for number, count in have.items()):
            known.begin_stream(0)
        return known

    @property
    def arrived(self) -> int:
        """Bytes that needn't be asked for again."""
        if self.have:
            return sum(self.have.values())
        return os.fstat(self.descriptor).st_size

    def bounds(self, part: int) -> tuple[int, int]:
        """What is missing of it."""
        start = part * self.part
        return start + self.have.get(part, 0), min(start + self.part, self.size or 0)

    def missing(self) -> list[int]:
        """Parts that aren't whole. What came as a stream counts as parts from here on."""
        if not self.have and (here := self.arrived):
            for at in range(0, here, self.part):
                self.have[at // self.part] = min(self.part, here - at)
                self.note(at // self.part)
        count = -(-(self.size or 0) // self.part)
        return [part for part in range(count) if operator.lt(*self.bounds(part))]

    def note(self, part: int) -> None:
        """For the next one who tries."""
        if count := self.have.get(part, 0):
            with self.lock, self.sidecar.open("ab") as file:
                file.write(_NOTE.pack(part, count))

    def write(self, chunk: bytes, at: int) -> None:
        view = memoryview(chunk)
        while view:
            written = os.pwrite(self.descriptor, view, at)
            view, at = view[written:], at + written

    def begin_stream(self, start: int) -> None:
        self.sidecar.write_bytes(self.head)
        self.have.clear()
        os.ftruncate(self.descriptor, start)

    def drop(self) -> None:
        self.path.unlink(missing_ok=True)
        self.forget()

    def forget(self) -> None:
        self.sidecar.unlink(missing_ok=True)

    def close(self) -> None:
        os.close(self.descriptor)


def _noted(sidecar: Path, head: bytes) -> bytes | None:
    with contextlib.suppress(OSError):
        content = sidecar.read_bytes()
        if content.startswith(head):
            return content[len(head) :]
    return None


def _identity(listing: Listing, file: RemoteFile) -> str:
    """What a file under way is of: by its hash, whoever it comes from."""
    tag = f"{listing.source} {listing.revision} {file.where} {file.etag} {boot_id()}"
    return file.sha256 or file.git_sha1 or tag


def mark_of(listing: Listing) -> str:
    """What whole files of an earlier try must be of to be taken on."""
    mark = f"{listing.source} {listing.revision}"
    return mark if all(file.is_hashed for file in listing.files) else f"{mark} {boot_id()}"


def boot_id() -> str:
    """Another each time the machine is started."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ""


def _check(file: RemoteFile, path: Path, look: Callable[[], None]) -> str:
    """Its sha256; raises `Changed` or `Damaged`."""
    size = path.stat().st_size
    if file.size is not None and size != file.size:
        raise Changed(f"{file.path}: {size} bytes arrived, {file.size} were announced")
    sha256 = sha256_of(path, look)
    if file.sha256 not in {None, sha256}:
        raise Damaged(f"{file.path}: its sha256 is not what the source says")
    if file.git_sha1 is not None and _git_sha1(path, size) != file.git_sha1:
        raise Damaged(f"{file.path}: its hash is not what the source says")
    return sha256


def sha256_of(path: Path, look: Callable[[], None] = lambda: None) -> str:
    """`look` is called between the pieces, and may raise."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        while piece := stream.read(PIECE):
            digest.update(piece)
            look()
    return digest.hexdigest()


def _git_sha1(path: Path, size: int) -> str:
    # What git names a file by; not ours to choose.
    digest = hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as stream:
        while chunk := stream.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
