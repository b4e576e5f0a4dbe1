"""Parts: what pipelines are made of, each loaded once and shared by all that need the same.

A part is one network (a UNet, a VAE, a text encoder, a whole language model) in one dtype. Its key
is made of its class, its configuration's and its weights' contents and the dtype, never of a name:
two models with the same text encoder share it, and a file that was changed under the same name is
another part.

Only the classes named here are ever made, from local folders, from safetensors, and with no code
but the libraries'.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Final, NewType

import diffusers
import torch
import transformers
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from cluster.core.errors import ModelUnavailable, ModelUnavailableKind
from cluster.inference import own_settings

PartKey = NewType("PartKey", str)
PIECE: Final = 32 * 2**20
"""Bytes that are read between two looks at whether it is still wanted."""

LANGUAGE_MODEL: Final = "AutoModelForCausalLM"
CLASSES: Final[Mapping[str, Any]] = {
    "UNet2DConditionModel": diffusers.UNet2DConditionModel,
    "AutoencoderKL": diffusers.AutoencoderKL,
    "ControlNetModel": diffusers.ControlNetModel,
    "CLIPTextModel": transformers.CLIPTextModel,
    "CLIPTextModelWithProjection": transformers.CLIPTextModelWithProjection,
    "StableDiffusionSafetyChecker": StableDiffusionSafetyChecker,
    LANGUAGE_MODEL: transformers.AutoModelForCausalLM,
}
_DIFFUSERS: Final = frozenset({"UNet2DConditionModel", "AutoencoderKL", "ControlNetModel"})
DTYPES: Final = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}


Seen = tuple[str, int, int, int]
"""A file's path, and what `stat` says of it: size, nanoseconds of its last change, inode."""


@dataclass(frozen=True, slots=True)
class PartSource:
    """Where a part comes from. `files` are its weights; `size` is theirs on disk, in bytes.

    `bits`: what a language model's weights are quantized to as they arrive on the card, 4 or 8.
    """

    key: PartKey
    folder: Path
    class_name: str
    dtype: str
    variant: str | None
    files: tuple[Path, ...]
    size: int
    bits: int | None = None
    seen: tuple[Seen, ...] = ()
    """All files that its key was made of, as they were then."""

    def is_as_seen(self) -> bool:
        """Whether none of its files has changed since its key was made."""
        try:
            return all(_look_at(Path(each[0])) == each for each in self.seen)
        except OSError:
            return False

    @property
    def device_size(self) -> int:
        """About what it takes on the card, in bytes, until it was measured."""
        return self.size if self.bits is None else self.size * self.bits // 16


def source(
    folder: Path,
    class_name: str,
    dtype: str,
    variant: str | None = None,
    bits: int | None = None,
) -> PartSource:
    """The part in `folder`, whose weights are read through once to make its key.

    Raises `ModelUnavailable` for a class that isn't run, or files that aren't there or can't be
    read.
    """
    with disk(folder):
        return _source(folder, class_name, dtype, variant, bits)


def _source(
    folder: Path, class_name: str, dtype: str, variant: str | None, bits: int | None
) -> PartSource:
    if class_name not in CLASSES:
        raise _refused(f"{folder.parent.name}/{folder.name} is a {class_name[:80]}, not run here")
    files = weights(folder, variant)
    config = folder / "config.json"
    if not config.is_file():
        raise ModelUnavailable(
            ModelUnavailableKind.NOT_HERE, f"{folder.parent.name}/{folder.name} has no config.json"
        )
    digest = hashlib.sha256(f"{class_name}|{dtype}|{bits or ''}".encode())
    # A language model carries its settings with it: two of the same weights may differ in them, and
    # in the table that says which of the shards are read.
    settings = folder / own_settings.FILE
    tables = sorted(folder.glob("*.safetensors.index*.json"))
    seen: list[Seen] = []
    for file in (config, *((settings,) if settings.is_file() else ()), *tables, *files):
        seen.append(_look_at(file))
        digest.update(_digest(file, seen[-1]))
    key = PartKey(f"{class_name}:{dtype}:{digest.hexdigest()}")
    size = sum(each[1] for each in seen[-len(files) :])
    return PartSource(
        key, folder, class_name, dtype, variant or None, files, size, bits, tuple(seen)
    )


def weights(folder: Path, variant: str | None) -> tuple[Path, ...]:
    """The safetensors files of that variant, or of none, shards in order."""
    wanted = f".{variant}" if variant else ""
    found = [file for file in folder.glob("*.safetensors") if _variant_of(file) == wanted]
    if not found:
        raise ModelUnavailable(
            ModelUnavailableKind.NOT_HERE,
            f"{folder.parent.name}/{folder.name} has no {variant or 'plain'} safetensors weights",
        )
    return tuple(sorted(found))


def _variant_of(file: Path) -> str:
    """`.fp16` of `model.fp16.safetensors` and of its shards, "" where there is none."""
    stem = file.name.removesuffix(".safetensors")
    head, _, tail = stem.rpartition("-of-")
    if head and tail.split(".")[0].isdecimal():
        stem = head.rpartition("-")[0] + tail.lstrip("0123456789")
    return "." + stem.partition(".")[2] if "." in stem else ""


MOST_DIGESTS: Final = 4096
_digests: OrderedDict[Seen, bytes] = OrderedDict()
"""A changed file is read anew. The least recently used leaves first; two threads use it."""
_digests_lock: Final = Lock()


_look: ContextVar[Callable[[], None]] = ContextVar("look", default=lambda: None)


@contextmanager
def looking(look: Callable[[], None]) -> Iterator[None]:
    """While this is open, `look` is called in this thread between the pieces of what is read to
    make keys or ahead of a part that is loaded, and after each; it may raise."""
    token = _look.set(look)
    try:
        yield
    finally:
        _look.reset(token)


def look() -> None:
    """Where something else is waited for than what is read here."""
    _look.get()()


def digest_of(file: Path) -> bytes:
    """The sha256 of a file's contents, read once for as long as the file stays as it is.

    Raises `ModelUnavailable` when it can't be read.
    """
    with disk(file):
        return _digest(file, _look_at(file))


def _look_at(file: Path) -> Seen:
    stat = file.stat()
    return (os.fspath(file), stat.st_size, stat.st_mtime_ns, stat.st_ino)


def _digest(file: Path, seen: Seen) -> bytes:
    with _digests_lock:
        if (known := _digests.get(seen)) is not None:
            _digests.move_to_end(seen)
            return known
    digest = hashlib.sha256()
    with file.open("rb", buffering=0) as stream:
        while piece := stream.read(PIECE):
            digest.update(piece)
            _look.get()()
    with _digests_lock:
        _digests[seen] = digest.digest()
        while len(_digests) > MOST_DIGESTS:
            _digests.popitem(last=False)
    return digest.digest()


@contextmanager
def disk(place: Path) -> Iterator[None]:
    """What the system says against reading there is no card's fault: `ModelUnavailable`."""
    try:
        yield
    except OSError as error:
        line = f"{place.parent.name}/{place.name} can't be read: {error.strerror}"
        raise ModelUnavailable(ModelUnavailableKind.UNREACHABLE, line) from error


def load(part: PartSource, device: torch.device) -> torch.nn.Module:
    """The part in host memory, a quantized one on `device`: its weights are made there, and carry
    what they are unpacked with beside them, so it can't be moved.

    Raises `ModelUnavailable` when its files don't make one, or aren't those of its key any more.

    A language model's dtype may be `auto`: what its weights are stored in. Not for a second thread
    while another computes: the libraries change torch's default dtype and its modules' constructors
    while they load.
    """
    quiet()
    _look.get()()
    with reading(part.folder):
        for file in part.files:
            read_ahead(file)
    module: torch.nn.Module
    with reading(part.folder):
        module, report = CLASSES[part.class_name].from_pretrained(
            str(part.folder),
            dtype=DTYPES.get(part.dtype, "auto"),
            variant=part.variant,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **({} if part.class_name in _DIFFUSERS else {"trust_remote_code": False}),
            **({} if part.bits is None else _quantized(part.bits, device)),
        )
    if report["missing_keys"]:
        # The library makes up what is missing, and differently each time.
        raise ModelUnavailable(
            ModelUnavailableKind.DAMAGED,
            f"{part.folder.parent.name}/{part.folder.name} lacks some of its weights",
        )
    if isinstance(own := getattr(module, "generation_config", None), transformers.GenerationConfig):
        own_settings.choose(own)
    _look.get()()
    if not part.is_as_seen():
        raise ModelUnavailable(
            ModelUnavailableKind.UNREACHABLE,
            f"{part.folder.parent.name}/{part.folder.name} changed while it was read",
        )
    # Gradients stay asked for: nothing makes any in inference mode, and without them torch picks
    # other kernels on a CPU than the network's nodes have.
    return module.eval()


def _quantized(bits: int, device: torch.device) -> dict[str, Any]:
    """The library's defaults for so many bits, as the network's runner asks for them."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line for every layer
    make: Any = transformers.BitsAndBytesConfig
    settings = make(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    return {"quantization_config": settings, "device_map": {"": device}}


_OVER_FILES: Final = (
    ArithmeticError,
    AttributeError,
    LookupError,
    NotImplementedError,
    OSError,
    SafetensorError,
    TypeError,
    ValueError,
)


class reading:  # noqa: N801 - used as a with-statement
    """What the libraries raise over a folder's files becomes `ModelUnavailable`."""

    def __init__(self, folder: Path) -> None:
        self._name = f"{folder.parent.name}/{folder.name}"

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, ImportError):
            raise _refused(f"{self._name} needs a library that isn't here") from error
        if isinstance(error, _OVER_FILES) or (type(error) is RuntimeError):
            raise ModelUnavailable(
                ModelUnavailableKind.DAMAGED,
                f"{self._name} can't be loaded: {type(error).__name__}",
            ) from error


def quiet() -> None:
    """No progress bars or advice from the libraries; what matters is raised."""
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def tensors(module: torch.nn.Module) -> tuple[torch.Tensor, ...]:
    """Everything that moves with the module: parameters and buffers, each once."""
    return (*module.parameters(), *module.buffers())


def bytes_of(module: torch.nn.Module) -> int:
    """What the module's tensors take, shared storage counted once."""
    storages = {
        (tensor.device, tensor.untyped_storage().data_ptr()): tensor.untyped_storage().nbytes()
        for tensor in tensors(module)
    }
    return sum(storages.values())


def read_ahead(file: Path) -> None:
    """Have the system's file cache hold all of `file`, with a look between pieces: as the libraries
    read it there is none, and of a slow disk a large file takes minutes. Costs nothing to speak of
    where it is there already."""
    piece = memoryview(bytearray(PIECE))
    with file.open("rb", buffering=0) as stream:
        for at in range(0, file.stat().st_size, PIECE):
            if not _is_cached(stream.fileno(), at):
                stream.seek(at)
                stream.readinto(piece)
            _look.get()()


def _is_cached(descriptor: int, at: int) -> bool:
    """Whether the piece that begins at `at` seems to be, by a byte of each MiB; False too where the
    file system doesn't say."""
    byte = bytearray(1)
    try:
        for where in range(at, at + PIECE, 2**20):
            os.preadv(descriptor, [byte], where, os.RWF_NOWAIT)
    except OSError:
        return False
    return True


Loader = Callable[[PartSource], torch.nn.Module]


def _refused(message: str) -> ModelUnavailable:
    return ModelUnavailable(ModelUnavailableKind.REFUSED, message)
