"""A source of models in memory, which breaks on command, and files in the forms that it has."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cluster.models.keeper import Keeper
from cluster.models.refs import ModelRef, ref
from cluster.models.settings import Limits
from cluster.models.sources import Absent, Listing, Opened, RemoteFile, Source
from cluster.models.store import ModelStore

LORA = ref("lora", "acme/style")
LIMITS = Limits(spare=0, part=1000, connections=3, rounds=3)


def weights(size: int = 40, salt: int = 0) -> bytes:
    """A safetensors file with one tensor of so many bytes."""
    header = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    data = bytes((salt + i) % 251 for i in range(size))
    return len(header).to_bytes(8, "little") + header + data


def git_sha1_of(content: bytes) -> str:
    blob = b"blob %d\0" % len(content) + content
    return hashlib.sha1(blob, usedforsecurity=False).hexdigest()


@dataclass
class Shelf:
    """`opening` and `listing` are called before each answer and may raise; `cut` holds how many
    bytes the next answers give before they end."""

    files: dict[ModelRef, dict[str, bytes]] = field(default_factory=dict)
    name: str = "hub"
    hashes: bool = True
    git: bool = False
    """Whether the hashes are git's."""
    ranges: bool = True
    sizes: bool = True
    certain: bool = False
    archive: bool = False
    revision: str = "1"
    listed: int = 0
    opened: list[tuple[str, int, int | None]] = field(default_factory=list)
    sent: int = 0
    cut: list[int] = field(default_factory=list)
    listing: Callable[[], None] = lambda: None
    opening: Callable[[], None] = lambda: None
    etag: str = "e"
    """What tells one content from another; empty where the server says nothing of it."""

    def serves(self, ref: ModelRef) -> bool:
        return True

    def list(self, ref: ModelRef) -> Listing:
        self.listed += 1
        self.listing()
        if ref not in self.files:
            raise Absent(f"{ref} isn't there", certain=self.certain)
        found = tuple(
            RemoteFile(
                path,
                len(content) if self.sizes else None,
                hashlib.sha256(content).hexdigest() if self.hashes and not self.git else None,
                git_sha1_of(content) if self.hashes and self.git else None,
                where=ref.key,
                etag=self.etag,
            )
            for path, content in self.files[ref].items()
        )
        return Listing(self.name, self.revision, found, self.archive)

    @contextmanager
    def open(
        self, listing: Listing, file: RemoteFile, start: int, stop: int | None
    ) -> Iterator[Opened]:
        self.opened.append((file.path, start, stop))
        self.opening()
        content = next(
            c
            for r, all_ in self.files.items()
            for p, c in all_.items()
            if r.key == file.where and p == file.path
        )
        begin = start if self.ranges else 0
        end = stop if self.ranges and stop is not None else len(content)
        limit = self.cut.pop(0) if self.cut else None
        size = len(content) if self.sizes else None
        yield Opened(begin, size, self.etag, self._chunks(content[begin:end], limit), self.ranges)

    def _chunks(self, content: bytes, limit: int | None) -> Iterator[bytes]:
        given = content if limit is None else content[:limit]
        for at in range(0, len(given), 100):
            self.sent += len(given[at : at + 100])
            yield given[at : at + 100]


@dataclass
class Time:
    """A clock that only sleeping moves."""

    now: float = 1_000_000.0
    slept: list[float] = field(default_factory=list)

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def keeper(
    root: Path,
    *sources: Source,
    limits: Limits = LIMITS,
    pinned: frozenset[ModelRef] = frozenset(),
    time: Time | None = None,
) -> Keeper:
    time = time or Time()
    made = Keeper(ModelStore(root), sources, limits, pinned, time.clock, time.sleep, lambda: 0.5)
    made.room.tidy()
    return made


def lora_shelf(size: int = 4000, **options: object) -> Shelf:
    shelf = Shelf({LORA: {"pytorch_lora_weights.safetensors": weights(size)}})
    for name, value in options.items():
        setattr(shelf, name, value)
    return shelf


def content_of(keeper: Keeper, ref: ModelRef) -> Mapping[str, bytes]:
    folder = keeper.store.find(ref)
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }
