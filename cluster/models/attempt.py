"""One attempt to bring one model from one source: listed, fetched, checked, published.

Who attempts has the model's lock. What arrived stays for the next attempt, unless it is refused.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cluster.core.errors import ModelUnavailable
from cluster.models.archives import unpack
from cluster.models.arrival import Teller
from cluster.models.disk import Disk, Manifest, Stored
from cluster.models.refs import ModelRef
from cluster.models.refusals import Refused, Rule
from cluster.models.room import Room
from cluster.models.selection import needed
from cluster.models.settings import Limits
from cluster.models.shards import is_index, missing_shards
from cluster.models.sources import Changed, Listing, RemoteFile, Source
from cluster.models.store import ModelStore
from cluster.models.throttle import Throttle
from cluster.models.transfer import Damaged, Gate, Transfer, mark_of, sha256_of
from cluster.models.waiting import Watch
from cluster.models.weights_check import check_file, check_table, check_text

MOST_TEXT: Final = 64 * 2**20
LEAST_STEP, MOST_STEP = 2**18, 16 * 2**20
"""Bytes for which room is made ahead, where nobody knows how many there will be."""


@dataclass(slots=True)
class Attempt:
    """`has_progressed` tells afterwards whether more is on the disk than ever before."""

    watch: Watch
    store: ModelStore
    source: Source
    room: Room
    limits: Limits
    in_one: bool = False
    """For a source whose tags differ with each answer."""
    has_progressed: bool = False

    @property
    def _ref(self) -> ModelRef:
        return self.watch.ref

    @property
    def _disk(self) -> Disk:
        return self.watch.disk

    def bring(self) -> Manifest:
        """Raises the source's errors, `Damaged`, `Refused` and other `ModelUnavailable`, what the
        watch raises, and `OSError` of our own disk."""
        began = self.watch.clock()
        listing = self.source.list(self._ref)
        self._check_sizes(listing)
        folder = self._disk.partial(self._ref.key)
        teller = Teller(self.watch, listing)
        before = self.watch.most
        try:
            background = self.watch.wanted.background
            self.room.make(listing.size, self._ref, teller.tell, background)
            folder.mkdir(parents=True, exist_ok=True)
            _forget_other(folder, listing)
            sums = self._fetched(listing, folder, teller)
            _check_all(folder, tuple(sums))
            with refusing(self._ref):
                self.store.judge(self._ref, folder)
            files = tuple(_stored(folder, path, sha256) for path, sha256 in sums.items())
            now = self.watch.clock()
            seconds = round(now - began, 3)
            manifest = Manifest(self._ref, listing.source, listing.revision, files, now, seconds)
            self._disk.publish(self._ref.key, manifest, self.watch.look)
            return manifest
        except Refused:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            self.has_progressed = self.watch.most > before
            teller.end()

    def _check_sizes(self, listing: Listing) -> None:
        most = self.limits.largest_file
        for file in listing.files:
            if file.size is not None and file.size > most:
                raise Refused(
                    Rule.FILE_SIZE,
                    f"{self._ref}: {file.path} has {file.size} bytes, at most {most} are fetched "
                    "(models.largest_file_gb)",
                )

    def _fetched(self, listing: Listing, folder: Path, teller: Teller) -> dict[Path, str]:
        """The model's files, each with its sha256."""
        transfer = Transfer(
            self.source,
            listing,
            self.limits.largest_file,
            self._gate(listing, teller),
            teller.gain,
            self.limits.part,
            self.limits.connections,
            self.in_one,
            self.watch.look,
        )
        if listing.archive:
            (archive,) = _verified(transfer, listing.files, folder)
            unpacked = self._unpacked(archive, teller)
            return {path: sha256_of(path, self.watch.look) for path in unpacked}
        # Texts first: they tell of many a model that its weights needn't be fetched.
        texts = [file for file in listing.files if not file.path.endswith(".safetensors")]
        sums = _verified(transfer, texts, folder)
        _check_texts(tuple(sums))
        with refusing(self._ref):
            self.store.judge_texts(self._ref, folder)
        weights = [file for file in listing.files if file.path.endswith(".safetensors")]
        return sums | _verified(transfer, weights, folder)

    def _gate(self, listing: Listing, teller: Teller) -> Gate:
        throttle = Throttle(self._disk.base / "bandwidth", self.limits.rate)
        room = _Growing(self, 0)
        unknown = any(file.size is None for file in listing.files)

        def gate(size: int) -> None:
            self.watch.check()
            before = self.watch.clock()
            self.watch.stand_back()
            teller.arrived(size)
            if unknown:
                room.reaches(teller.done + size)
            if (pause := throttle.take(size)) > 0:
                self.watch.pause(pause)
            if (waited := self.watch.clock() - before) > 0:
                teller.waited(waited)

        return gate

    def _unpacking_gate(self, packed: int, teller: Teller) -> Gate:
        """What comes out counts beside the archive itself, since both are there at once."""
        out, room = 0, _Growing(self, packed)

        def gate(size: int) -> None:
            nonlocal out
            self.watch.check()
            self.watch.stand_back()
            out += size
            room.reaches(out)
            teller.gain(size)

        return gate

    def _unpacked(self, archive: Path, teller: Teller) -> list[Path]:
        folder = archive.parent
        inside = folder / "unpacked"
        shutil.rmtree(inside, ignore_errors=True)
        gate = self._unpacking_gate(archive.stat().st_size, teller)
        paths = unpack(archive, inside, self.limits.largest_file, gate=gate)
        archive.unlink()
        top = _common_folder(paths, inside)
        chosen = needed(self._ref, [path.relative_to(top).as_posix() for path in paths])
        for name in chosen:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (top / name).rename(folder / name)
        shutil.rmtree(inside)
        return [folder / name for name in chosen]


def _verified(transfer: Transfer, files: Sequence[RemoteFile], folder: Path) -> dict[Path, str]:
    """The files, whole, each with its sha256."""
    fetched = [transfer.fetch(file, folder) for file in files]
    sums: dict[Path, str] = {}
    damaged: Damaged | Changed | None = None
    for file, path in zip(files, fetched, strict=True):
        try:
            sums[path] = transfer.verify(file, path)
        except (Damaged, Changed) as error:
            # All of them are to come again, not one after the other.
            damaged = error
    if damaged is not None:
        raise damaged
    return sums


def _common_folder(paths: Sequence[Path], inside: Path) -> Path:
    """The one folder at the top that all files are in, or where they were unpacked."""
    tops = {path.relative_to(inside).parts[0] for path in paths}
    top = inside / tops.pop()
    return top if not tops and top.is_dir() else inside


def _forget_other(folder: Path, listing: Listing) -> None:
    """Whole files of another revision or source; those under way know what they are of."""
    mark, of = folder / ".of", mark_of(listing)
    if mark.is_file() and mark.read_text(encoding="utf-8") == of:
        return
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        if path.suffix not in {".part", ".parts"}:
            path.unlink()
    mark.write_text(of, encoding="utf-8")


class _Growing:
    """Room for what grows to a size that nobody knows, `beside` what is there already: made a step
    ahead, and the steps grow with it."""

    def __init__(self, attempt: Attempt, beside: int) -> None:
        self._attempt = attempt
        self._beside = beside
        self._promised = 0
        self._lock = threading.Lock()

    def reaches(self, size: int) -> None:
        """Raises `Refused` where there is no room for it."""
        with self._lock:
            if size <= self._promised:
                return
            self._promised = size + min(max(size // 8, LEAST_STEP), MOST_STEP)
            gentle = self._attempt.watch.wanted.background
            total = self._beside + self._promised
            self._attempt.room.make(total, self._attempt.watch.ref, gentle=gentle)


@contextlib.contextmanager
def refusing(ref: ModelRef) -> Iterator[None]:
    """What the store wouldn't read isn't taken into it."""
    try:
        yield
    except Refused:
        raise
    except ModelUnavailable as error:
        raise Refused(Rule.FILE_KIND, f"{ref}: {error}") from error


def _check_texts(paths: Sequence[Path]) -> None:
    """Raises `Refused`."""
    for path in paths:
        if path.suffix in {".model", ".spm"}:
            check_table(path, MOST_TEXT)
        else:
            check_text(path, MOST_TEXT)


def _check_all(folder: Path, paths: Sequence[Path]) -> None:
    """Raises `Refused`; what isn't the model's goes."""
    _check_texts([path for path in paths if path.suffix != ".safetensors"])
    for path in paths:
        if path.suffix == ".safetensors":
            check_file(path)
        if is_index(path.name) and (missing := missing_shards(path)):
            raise Refused(Rule.FILE_KIND, f"{path.name}: {missing[0]}, which it names, isn't there")
    keep = {*paths, *(parent for path in paths for parent in path.parents)}
    for path in sorted(folder.rglob("*"), reverse=True):
        if path not in keep:
            path.rmdir() if path.is_dir() else path.unlink()


def _stored(folder: Path, path: Path, sha256: str) -> Stored:
    stat = path.stat()
    name = path.relative_to(folder).as_posix()
    return Stored(name, stat.st_size, sha256, stat.st_mtime_ns)
