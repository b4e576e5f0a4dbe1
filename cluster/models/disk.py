"""The store's own folder, shared by all processes of a machine: what is published, and in use.

    <root>/<org>/<name>/          laid there by the operator, never touched
    <root>/.store/models/<key>/   fetched: the model's files and the manifest, published by a rename
    <root>/.store/partial/<key>/  being fetched, by whoever holds the lock `<key>`
    <root>/.store/locks/          `<key>` for who fetches, `<key>.wait` and `<key>.use` shared by
                                  all who wait for it and who read it
    <root>/.store/uses/<key>      how often it was needed of late, for choosing what leaves
    <root>/.store/progress/<key>  how far a download is, for those who watch
    <root>/.store/refused/<key>   why what was fetched was refused, for a while

Locks are the kernel's (flock), so a killed process leaves none behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from cluster.models import strict_json
from cluster.models.refs import ModelRef

MANIFEST: Final = ".manifest.json"
WRITING: Final = "~"
"""How a small file's name ends that isn't whole yet."""
_TRASH_LOCK: Final = ".trash"
_NOT_THERE: Final = (FileNotFoundError, NotADirectoryError)
HALF_LIFE: Final = 7 * 86400.0
"""Seconds after which a use counts half."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One file as it was when its hash was taken."""

    path: str
    size: int
    sha256: str
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a published model is and where it came from. `seconds`: what fetching it took."""

    ref: ModelRef
    source: str
    revision: str
    files: tuple[Stored, ...]
    fetched_at: float
    seconds: float

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


@dataclass(frozen=True, slots=True)
class Progress:
    """Of one download; bytes, `total` 0 where it isn't known, `rate` in bytes a second."""

    ref: ModelRef
    source: str
    done: int
    total: int
    rate: float
    started_at: float
    background: bool

    @property
    def seconds_left(self) -> float | None:
        if self.rate <= 0 or self.total <= 0:
            return None
        return max(self.total - self.done, 0) / self.rate


@dataclass(frozen=True, slots=True)
class Disk:
    """Paths and small files; every method may be called by any process at any time."""

    root: Path

    @property
    def base(self) -> Path:
        return self.root / ".store"

    def model(self, key: str) -> Path:
        return self.base / "models" / key

    def partial(self, key: str) -> Path:
        return self.base / "partial" / key

    def prepare(self) -> None:
        """Raises `OSError` where the store can't be written."""
        for name in ("models", "partial", "locks", "uses", "progress", "refused", "trash"):
            (self.base / name).mkdir(parents=True, exist_ok=True)

    # --- what is published -----------------------------------------------------------------------

    def keys(self) -> tuple[str, ...]:
        with contextlib.suppress(*_NOT_THERE):
            return tuple(sorted(os.listdir(self.base / "models")))
        return ()

    def manifest(self, key: str) -> Manifest | None:
        """None where nothing (or nothing whole) is published under the key."""
        try:
            return manifest_from((self.model(key) / MANIFEST).read_bytes())
        except OSError:
            return None

    def manifests(self) -> dict[str, Manifest]:
        found = {key: self.manifest(key) for key in self.keys()}
        return {key: manifest for key, manifest in found.items() if manifest is not None}

    def publish(
        self, key: str, manifest: Manifest, look: Callable[[], None] = lambda: None
    ) -> None:
        """Make the partial folder the model, at once and for all. The caller holds the lock; `look`
        is called between the files, and may raise."""
        folder = self.partial(key)
        _write(folder / MANIFEST, manifest_text(manifest))
        files = [folder / MANIFEST, *(folder / file.path for file in manifest.files)]
        for path in (*files, *sorted({file.parent for file in files}, reverse=True)):
            _sync(path)
            look()
        self.remove(key)
        folder.rename(self.model(key))
        _sync(self.model(key).parent)

    def remove(self, key: str) -> None:
        """Unpublish at once, then delete: nobody sees half of it."""
        if not self.model(key).exists():
            return
        self.prepare()
        with self.lock(_TRASH_LOCK, shared=True):
            trash = Path(tempfile.mkdtemp(dir=self.base / "trash"))
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                self.model(key).rename(trash / key)
            shutil.rmtree(trash, ignore_errors=True)

    def empty_trash(self) -> None:
        """What processes that died were removing; not while others are at it."""
        with self.try_lock(_TRASH_LOCK) as free, contextlib.suppress(OSError):
            # What is in it, and not the folder itself: others put into it what leaves.
            for left in list((self.base / "trash").iterdir()) if free else ():
                shutil.rmtree(left, ignore_errors=True)

    # --- locks -----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def try_lock(self, name: str, shared: bool = False) -> Iterator[bool]:
        """Whether the lock was free; held until the end."""
        how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        file = _locked(self.base / "locks" / name, how | fcntl.LOCK_NB)
        try:
            yield file is not None
        finally:
            if file is not None:
                os.close(file)

    @contextlib.contextmanager
    def lock(self, name: str, shared: bool = False) -> Iterator[None]:
        """Waits for the lock: for those that nobody holds for long."""
        file = _locked(self.base / "locks" / name, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        try:
            yield
        finally:
            if file is not None:
                os.close(file)

    def is_locked(self, name: str) -> bool:
        """For whoever may read the store."""
        try:
            file = os.open(self.base / "locks" / name, os.O_RDONLY | os.O_CLOEXEC)
        except _NOT_THERE:
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(file)
        return False

    # --- small files that nobody needs any more --------------------------------------------------

    def drop_small(self, kind: str, stays: Callable[[Path], bool]) -> None:
        """Of `locks`, `uses`, `progress` or `refused` those that needn't stay."""
        with contextlib.suppress(OSError):
            for path in list((self.base / kind).iterdir()):
                if not path.name.startswith(".") and not stays(path):
                    path.unlink(missing_ok=True)

    def drop_free_locks(self) -> None:
        """Whoever has a file open that goes here notices, and opens it anew (`_locked`)."""

        def is_held(path: Path) -> bool:
            with self.try_lock(path.name) as free:
                if free:
                    path.unlink(missing_ok=True)
            return True

        self.drop_small("locks", is_held)

    # --- use, for choosing what leaves -----------------------------------------------------------

    def used(self, key: str, now: float) -> None:
        count, _ = self.need(key, now)
        _write(self.base / "uses" / key, json.dumps([count + 1.0, now]))

    def need(self, key: str, now: float) -> tuple[float, float]:
        """The decayed count of uses, and when it was last used."""
        try:
            count, at = strict_json.loads((self.base / "uses" / key).read_bytes())
            return float(count) * 0.5 ** (max(now - at, 0.0) / HALF_LIFE), float(at)
        except (OSError, ValueError, TypeError):
            return 0.0, 0.0

    # --- refusals, so that nothing is fetched in vain again and again ----------------------------

    def note_refusal(self, key: str, rule: str, reason: str, until: float) -> None:
        _write(self.base / "refused" / key, json.dumps([rule, reason, until]))

    def forget_refusal(self, key: str) -> None:
        (self.base / "refused" / key).unlink(missing_ok=True)

    def refusal(self, key: str, now: float) -> tuple[str, str] | None:
        """Rule and reason, of one that still holds."""
        try:
            rule, reason, until = strict_json.loads((self.base / "refused" / key).read_bytes())
            return (str(rule), str(reason)) if now < float(until) else None
        except (OSError, ValueError, TypeError):
            return None

    # --- progress --------------------------------------------------------------------------------

    def tell(self, key: str, progress: Progress | None) -> None:
        file = self.base / "progress" / key
        if progress is None:
            file.unlink(missing_ok=True)
        else:
            _write(file, json.dumps(asdict(progress)))

    def progress(self, key: str) -> Progress | None:
        """None when nobody fetches it."""
        try:
            data = strict_json.loads((self.base / "progress" / key).read_bytes())
            told = Progress(ref=ModelRef(**data.pop("ref")), **data)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None
        return told if self.is_locked(key) else None

    def downloads(self) -> tuple[Progress, ...]:
        with contextlib.suppress(*_NOT_THERE):
            told = [self.progress(key) for key in sorted(os.listdir(self.base / "progress"))]
            return tuple(progress for progress in told if progress is not None)
        return ()


def all_in(folder: Path) -> Iterator[Path]:
    """Files and folders, at any depth; of what goes away meanwhile what was seen. Raises `OSError`
    for what can't be read."""

    def unless_gone(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise error

    for parent, folders, files in os.walk(folder, onerror=unless_gone):
        yield from (Path(parent, name) for name in (*folders, *files))


def _locked(path: Path, how: int) -> int | None:
    """The open file, locked; None where another has it and `how` doesn't wait. The file may be
    removed as long as nobody has the lock: then it isn't one any more."""
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except PermissionError:  # made by another user, and locked as well for reading
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(file, how)
            if _is_still(path, file):
                return file
        except BlockingIOError:
            os.close(file)
            return None
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _is_still(path: Path, file: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.stat(path), os.fstat(file))
    return False


def manifest_text(manifest: Manifest) -> str:
    return json.dumps(asdict(manifest))


def manifest_from(raw: bytes) -> Manifest | None:
    """None for what isn't one; the types of what is in it are not checked."""
    try:
        data = strict_json.loads(raw)
        files = tuple(Stored(**file) for file in data.pop("files"))
        return Manifest(ref=ModelRef(**data.pop("ref")), files=files, **data)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _write(file: Path, text: str) -> None:
    """Whole or not at all."""
    new = file.with_name(f"{file.name}.{os.getpid()}.{id(text)}{WRITING}")
    new.write_text(text, encoding="utf-8")
    new.replace(file)


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)
