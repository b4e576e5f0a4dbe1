"""The models on this machine's disk, to be read: laid there as `root/<org>/<name>/`, in the form
that diffusers and transformers save, or fetched (`cluster.models.disk`). What was laid goes first.

A local folder can never prove that a model doesn't exist, so nothing here is ever the task's
fault: every failure is `ModelUnavailable`. What comes from a task (names, variants, file names) is
hostile until it has passed the patterns here, and nothing but safetensors weights is ever opened.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from cluster.core.errors import ModelUnavailable, ModelUnavailableKind
from cluster.models import strict_json
from cluster.models.disk import Disk, Manifest, Stored, all_in
from cluster.models.refs import ModelRef
from cluster.models.refusals import Refused, Rule
from cluster.models.shards import is_index, missing_shards
from cluster.models.transfer import sha256_of

INDEX: Final = "model_index.json"
CONFIG: Final = "config.json"
ADAPTER: Final = "adapter_config.json"
LORA_FILE: Final = "pytorch_lora_weights.safetensors"
_NEVER_GUESSED: Final = ("scheduler", "optimizer", "checkpoint")
INVERSION_FILE: Final = "learned_embeds.safetensors"
KINDS: Final = frozenset(
    {"base", "lora", "controlnet", "unet", "vae", "textual_inversion", "language"}
)
"""The network's model ids name the first three; tasks name the others as well."""

_WORD: Final = r"(?!\.)[\w.-]{1,100}"
_NAME: Final = re.compile(rf"({_WORD})/({_WORD})", re.ASCII)
_VARIANT: Final = re.compile(_WORD, re.ASCII)
_MAY_BE_FETCHED_ONLY: Final = re.compile(rf"{_WORD}|https?://.*", re.ASCII | re.DOTALL)
"""Old names of the hub, of one word, and URLs."""
_LIBRARIES: Final = frozenset({"diffusers", "transformers", "stable_diffusion"})
_PIPELINES: Final = frozenset(
    {
        "StableDiffusionPipeline",
        "StableDiffusionXLPipeline",
        "StableDiffusionXLImg2ImgPipeline",
    }
)
_WITHOUT_WEIGHTS: Final = frozenset(
    {"scheduler", "tokenizer", "tokenizer_2", "feature_extractor", "image_processor"}
)
_NETWORKS: Final = frozenset({"unet", "vae", "controlnet"})
_MAX_INDEX: Final = 2**20
_read_through: dict[tuple[str, int, int, int], str] = {}
"""The sha256 of files whose time says that they may have changed, by path and what `stat` says."""
LOOKS: Final = 3
"""At folders that go while they are looked through."""
_listings: dict[tuple[str, int], tuple[Manifest, ...]] = {}


Found = TypeVar("Found")


class Spoilt(ModelUnavailable):
    """What was fetched isn't any more what it was then; to be fetched again."""

    def __init__(self, message: str) -> None:
        super().__init__(ModelUnavailableKind.DAMAGED, message)

    def __reduce__(self) -> tuple[type[Spoilt], tuple[str]]:  # type: ignore[override]
        return type(self), (str(self),)


@dataclass(frozen=True, slots=True)
class ModelStore:
    """`look` is called between the pieces of what has to be read through, and may raise."""

    root: Path
    look: Callable[[], None] = lambda: None

    @property
    def disk(self) -> Disk:
        return Disk(self.root)

    def resolve(self, kind: str, name: str, variant: str | None = None) -> Path:
        """The model's folder, with nothing in it that leads out of the store or runs code.

        A base model's parts all have safetensors weights, of that variant if one is asked for.
        """
        if variant and not _VARIANT.fullmatch(variant):
            raise _refused(f"{variant!r} is not a variant's name", Rule.NAME)

        ref = ModelRef(_stored_as(kind), name, variant or "")
        look = _pipeline_in if kind == "base" else _network_in if kind in _NETWORKS else _any_in
        return self._first(kind, name, ref, partial(look, variant=variant or ""))

    def lora_file(self, name: str, weight_file_name: str = "") -> Path:
        """The LoRA's one weights file; of several without a name the conventional one is taken."""
        if weight_file_name and not _VARIANT.fullmatch(weight_file_name):
            raise _refused(f"{weight_file_name!r} is not a file's name", Rule.NAME)
        ref = ModelRef("lora", name, "", weight_file_name)
        return self._first("lora", name, ref, lambda folder: _lora_in(folder, weight_file_name))

    def inversion_file(self, name: str) -> Path:
        """An inversion's embeddings, under the one name that the network's runner looks for, or
        whatever name they have where they come by URL."""

        ref = ModelRef("textual_inversion", name)
        return self._first("textual_inversion", name, ref, partial(_inversion_in, ref))

    def language_folder(self, name: str) -> Path:
        """A language model's folder: configuration, tokenizer and safetensors weights, no code."""

        return self._first("language", name, ModelRef("base", name), _language_model_in)

    def find(self, ref: ModelRef) -> Path:
        """Where the model is, as the methods above look for it. Raises as they do."""
        if ref.kind == "lora":
            return self.lora_file(ref.name, ref.file).parent
        if ref.kind == "textual_inversion":
            return self.inversion_file(ref.name).parent
        if ref.kind == "base":
            return self._first("base", ref.name, ref, partial(_base_in, variant=ref.variant))
        return self.resolve(ref.kind, ref.name, ref.variant)

    def judge_texts(self, ref: ModelRef, folder: Path) -> None:
        """What can be said of a model before its weights are there. Raises `ModelUnavailable`."""
        if ref.kind == "base":
            _base_by_its_texts(folder, ref.variant)

    def judge(self, ref: ModelRef, folder: Path) -> None:
        """What `find` would say of a folder that isn't published yet. Raises `ModelUnavailable`."""
        self._check_contents(folder)
        if ref.kind == "lora":
            _lora_in(folder, ref.file)
        elif ref.kind == "textual_inversion":
            _inversion_in(ref, folder)
        elif ref.kind == "base":
            _base_in(folder, ref.variant)
        else:
            _network_in(folder, ref.variant)

    def is_language_model(self, name: str) -> bool:
        """Whether what is here under the name is one."""
        places = [self.disk.model(ModelRef("base", name).key)]
        if _NAME.fullmatch(name):
            places.insert(0, self.root / name)
        there = next((folder for folder in places if folder.is_dir()), None)
        return there is not None and _is_language_model(there / CONFIG)

    def on_disk(self) -> frozenset[str]:
        """Base models here, as `name` and, for each variant of its UNet, `name+variant`.

        A language model is a folder with weights of its own, beside its configuration.
        """
        for _ in range(LOOKS - 1):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                return self._seen_on_disk()
        return self._seen_on_disk()

    def _seen_on_disk(self) -> frozenset[str]:
        keys = {each.ref.base_key for each in self._fetched() if each.ref.kind == "base"}
        for config in self.root.glob(f"*/*/{CONFIG}"):
            if _is_language_model(config):
                keys.add("/".join(config.parent.relative_to(self.root).parts))
        for index in self.root.glob(f"*/*/{INDEX}"):
            name = "/".join(index.parent.relative_to(self.root).parts)
            for weights in (index.parent / "unet").glob("*.safetensors"):
                stem, _, variant = weights.stem.partition(".")
                if "-of-" not in stem:
                    keys.add(f"{name}+{variant}" if variant else name)
        return frozenset(keys)

    def _fetched(self) -> tuple[Manifest, ...]:
        """All manifests, read again only when something was published or removed."""
        folder = self.disk.base / "models"
        try:
            seen = (str(folder), folder.stat().st_mtime_ns)
        except FileNotFoundError:
            return ()
        listing = _listings.get(seen)
        if listing is None:
            listing = tuple(self.disk.manifests().values())
            _listings.clear()  # another thread may do so at any time
            _listings[seen] = listing
        return listing

    def _first(self, kind: str, name: str, ref: ModelRef, look: Callable[[Path], Found]) -> Found:
        """What `look` finds in the folder laid here, or else in the one that was fetched."""
        laid, problem = None, _not_here(f"{kind} model {name[:200]} is not on this machine")
        if not _MAY_BE_FETCHED_ONLY.fullmatch(name) or kind not in KINDS:
            laid = self._folder(kind, name)
        for folder in (laid, self.disk.model(ref.key)):
            try:
                if folder is None or not folder.is_dir():
                    continue
                if folder is not laid:
                    self._check_unchanged(ref)
                self._check_contents(folder)
                return look(folder)
            except (FileNotFoundError, NotADirectoryError):
                problem = _not_here(f"{kind} model {name[:200]} has just gone")
            except OSError as error:
                line = f"{kind} model {name[:200]} can't be read: {error.strerror}"
                raise ModelUnavailable(ModelUnavailableKind.UNREACHABLE, line) from error
            except ModelUnavailable as error:
                problem = error
                if error.kind is not ModelUnavailableKind.NOT_HERE:
                    break
        raise problem

    def _check_unchanged(self, ref: ModelRef) -> None:
        """What was fetched is as it was when its hashes were taken; read through only where size or
        time say that it may not be."""
        manifest = self.disk.manifest(ref.key)
        if manifest is None or manifest.ref != ref:
            raise Spoilt(f"{ref} has lost its manifest")
        folder = self.disk.model(ref.key)
        for file in manifest.files:
            if not _is_as_stored(folder, file, self.look):
                raise Spoilt(f"{ref}: {file.path} isn't what was fetched")

    def _folder(self, kind: str, name: str) -> Path:
        if kind not in KINDS:
            raise _refused(f"{kind!r} is not a kind of model", Rule.NAME)
        match = _NAME.fullmatch(name)
        if match is None:
            raise _refused(f"{name[:200]!r} is not a model's name (org/name)", Rule.NAME)
        folder = self.root / match[1] / match[2]
        if not folder.resolve().is_relative_to(self.root.resolve()):
            raise _refused(f"{name} leads out of the store", Rule.LINK)
        return folder

    def _check_contents(self, folder: Path) -> None:
        root = self.root.resolve()
        for path in all_in(folder):
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                raise _refused(f"{path.name} leads out of the store", Rule.LINK)
            if path.suffix == ".py":
                raise _refused(f"{path.name} is code", Rule.CODE)
            if is_index(path.name) and (missing := missing_shards(path)):
                raise _not_here(f"{folder.name}: {missing[0]}, which {path.name} names, isn't here")


def _any_in(folder: Path, variant: str) -> Path:
    return folder


def _base_in(folder: Path, variant: str) -> Path:
    """A pipeline or a language model, whichever its files make of it."""
    if _base_by_its_texts(folder, variant) is None:
        return _language_model_in(folder)
    return _pipeline_in(folder, variant)


def _base_by_its_texts(folder: Path, variant: str) -> Index | None:
    """The pipeline's index, checked; None for a language model."""
    if (folder / INDEX).exists() or not (folder / CONFIG).exists():
        return _checked_index(folder)
    _check_no_code(folder)
    if not _says_language_model(read_json(folder / CONFIG)):
        raise _refused(f"{folder.name} is neither a pipeline nor a language model")
    if variant:
        raise _refused(f"{folder.name} is a language model, and tasks know no variants of those")
    return None


def _check_no_code(folder: Path) -> None:
    for name in (CONFIG, "tokenizer_config.json"):
        if (folder / name).exists() and "auto_map" in read_json(folder / name):
            raise _refused(f"{folder.name} comes with code of its own ({name})", Rule.CODE)


def _checked_index(folder: Path) -> Index:
    index = read_index(folder)
    for part, (library, _) in index.parts.items():
        if library not in _LIBRARIES:
            raise _refused(f"{part} is made of foreign code ({library})", Rule.CODE)
    return index


def _pipeline_in(folder: Path, variant: str) -> Path:
    for part in _checked_index(folder).parts:
        if (folder / part / ADAPTER).exists():
            raise _refused(f"{part} is an adapter to another model")
        if part not in _WITHOUT_WEIGHTS:
            _check_weights(folder / part, variant)
    return folder


def _network_in(folder: Path, variant: str) -> Path:
    if variant:
        _check_weights(folder, variant)
    return folder


def _language_model_in(folder: Path) -> Path:
    if not (folder / CONFIG).is_file():
        raise _not_here(f"{folder.name} has no {CONFIG}")
    if (folder / ADAPTER).exists():
        # Transformers would load the model that it names, from wherever that is.
        raise _refused(f"{folder.name} is an adapter to another model")
    _check_weights(folder, "")
    return folder


def _inversion_in(ref: ModelRef, folder: Path) -> Path:
    if ref.is_url:
        return _lora_in(folder, "")
    if not (folder / INVERSION_FILE).is_file():
        raise _not_here(f"{ref} has no {INVERSION_FILE}")
    return folder / INVERSION_FILE


def _stored_as(kind: str) -> str:
    return "base" if kind == "language" else kind


def _is_as_stored(folder: Path, file: Stored, look: Callable[[], None]) -> bool:
    path = folder / file.path
    try:
        stat = path.stat()
        if stat.st_size != file.size:
            return False
        seen = (str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino)
        if stat.st_mtime_ns == file.mtime_ns or _read_through.get(seen) == file.sha256:
            return True
        if sha256_of(path, look) != file.sha256:
            return False
        _read_through[seen] = file.sha256
        with contextlib.suppress(OSError):
            # Only touched: nobody need read it through for that again.
            os.utime(path, ns=(stat.st_atime_ns, file.mtime_ns))
    except OSError:
        return False
    return True


def guessed(paths: Iterable[str]) -> str | None:
    """Of a LoRA's repository, the file that the network's nodes compute with whatever their task
    names: as they download, they put the only safetensors file whose path has none of these words
    in the name's place (sd_task's `best_guess_weight_name`).

    None where there is no such file, or several: those that download stop there, and others take
    the named one.
    """
    found = [
        path
        for path in paths
        if path.endswith(".safetensors") and not any(word in path for word in _NEVER_GUESSED)
    ]
    return found[0] if len(found) == 1 else None


def guessed_in(folder: Path) -> str | None:
    """`guessed`, of what lies here."""
    return guessed(file.relative_to(folder).as_posix() for file in all_in(folder))


def _lora_in(folder: Path, weight_file_name: str) -> Path:
    """That file, or the one there is; of several the one with the conventional name. None that
    others wouldn't take (`guessed`)."""
    files = sorted(folder.glob("*.safetensors"))
    if weight_file_name:
        wanted = folder / weight_file_name
    elif (folder / LORA_FILE) in files or not files:
        wanted = folder / LORA_FILE
    elif len(files) > 1:
        raise _refused(f"{folder.name} has {len(files)} weights files and none was named")
    else:
        wanted = files[0]
    if wanted.suffix != ".safetensors":
        raise _refused(f"{wanted.name} is not a safetensors file")
    if not wanted.is_file():
        raise _not_here(f"{folder.name} has no {wanted.name}")
    if (guess := guessed_in(folder)) not in (None, wanted.name):
        raise _refused(f"{folder.name}: other nodes take {guess[:100]} for {wanted.name}")
    return wanted


@dataclass(frozen=True, slots=True)
class Index:
    """A diffusers folder's contents: the pipeline's class and each part's (library, class)."""

    pipeline: str
    parts: dict[str, tuple[str, str]]


def read_index(folder: Path) -> Index:
    """Raises `ModelUnavailable` where the file is missing, damaged, or of a foreign pipeline."""
    data = read_json(folder / INDEX)
    pipeline = data.get("_class_name")
    if not isinstance(pipeline, str) or pipeline not in _PIPELINES:
        raise _refused(f"{folder.name} is of a pipeline that is not run: {str(pipeline)[:100]!r}")
    parts: dict[str, tuple[str, str]] = {}
    for part, what in data.items():
        if not isinstance(what, list) or what == [None, None]:
            continue
        if len(what) != 2 or not all(isinstance(word, str) for word in what):
            raise _damaged(f"{folder.name}/{INDEX} is damaged at {part[:100]!r}")
        if not _VARIANT.fullmatch(part):
            raise _refused(f"{part[:100]!r} is not a part's name", Rule.NAME)
        parts[part] = (what[0], what[1])
    return Index(pipeline, parts)


def read_json(file: Path) -> dict[str, object]:
    """A small JSON object from a model's folder; raises `ModelUnavailable`."""
    try:
        if file.stat().st_size > _MAX_INDEX:
            raise _refused(f"{file.name} is too long")
        data = strict_json.loads(file.read_bytes())
    except OSError:
        raise _not_here(f"{file.parent.name} has no {file.name}") from None
    except ValueError:
        raise _damaged(f"{file.parent.name}/{file.name} is not JSON") from None
    if not isinstance(data, dict):
        raise _damaged(f"{file.parent.name}/{file.name} is not a JSON object")
    return data


def _says_language_model(config: dict[str, object]) -> bool:
    """Transformers writes what a model is into its configuration; diffusers' parts don't say so."""
    return "architectures" in config or "model_type" in config


def _is_language_model(config: Path) -> bool:
    try:
        said = read_json(config)
        return _says_language_model(said) and any(config.parent.glob("*.safetensors"))
    except (ModelUnavailable, OSError):
        return False


def _check_weights(part: Path, variant: str) -> None:
    names = [file.name for file in part.glob("*.safetensors")]
    if not names:
        if any(part.glob("*.bin")) or any(part.glob("*.ckpt")) or any(part.glob("*.pt")):
            raise _refused(f"{part.parent.name}/{part.name} has no safetensors weights")
        raise _not_here(f"{part.parent.name}/{part.name} has no weights")
    wanted = f".{variant}" if variant else ""
    if not any(
        re.fullmatch(rf"\w+{re.escape(wanted)}(-\d+-of-\d+)?\.safetensors", n) for n in names
    ):
        raise _not_here(f"{part.parent.name}/{part.name} has no variant {variant or 'by default'}")


def _refused(message: str, rule: Rule = Rule.FILE_KIND) -> ModelUnavailable:
    return Refused(rule, message)


def _not_here(message: str) -> ModelUnavailable:
    return ModelUnavailable(ModelUnavailableKind.NOT_HERE, message)


def _damaged(message: str) -> ModelUnavailable:
    return ModelUnavailable(ModelUnavailableKind.DAMAGED, message)
