"""The models on this machine's disk: `root/<org>/<name>/`, as diffusers lays them out.

A local folder can never prove that a model doesn't exist, so nothing here is ever the task's
fault: every failure is `ModelUnavailable`. What comes from a task (names, variants, file names) is
hostile until it has passed the patterns here, and nothing but safetensors weights is ever opened.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cluster.core.errors import ModelUnavailable, ModelUnavailableKind

INDEX: Final = "model_index.json"
CONFIG: Final = "config.json"
ADAPTER: Final = "adapter_config.json"
LORA_FILE: Final = "pytorch_lora_weights.safetensors"
INVERSION_FILE: Final = "learned_embeds.safetensors"
KINDS: Final = frozenset(
    {"base", "lora", "controlnet", "unet", "vae", "textual_inversion", "language"}
)
"""The network's model ids name the first three; tasks name the others as well."""

_WORD: Final = r"(?!\.)[\w.-]{1,100}"
_NAME: Final = re.compile(rf"({_WORD})/({_WORD})", re.ASCII)
_VARIANT: Final = re.compile(_WORD, re.ASCII)
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
_MAX_INDEX: Final = 2**20


@dataclass(frozen=True, slots=True)
class ModelStore:
    root: Path

    def resolve(self, kind: str, name: str, variant: str | None = None) -> Path:
        """The model's folder, with nothing in it that leads out of the store or runs code.

        A base model's parts all have safetensors weights, of that variant if one is asked for.
        """
        folder = self._folder(kind, name)
        if variant and not _VARIANT.fullmatch(variant):
            raise _refused(f"{variant!r} is not a variant's name")
        if not folder.is_dir():
            raise _not_here(f"{kind} model {name} is not on this machine")
        self._check_contents(folder)
        if kind == "base":
            self._check_base(folder, variant or None)
        return folder

    def lora_file(self, name: str, weight_file_name: str = "") -> Path:
        """The LoRA's one weights file; of several without a name the conventional one is taken."""
        folder = self.resolve("lora", name)
        if weight_file_name:
            if not _VARIANT.fullmatch(weight_file_name):
                raise _refused(f"{weight_file_name!r} is not a file's name")
            return self._lora_weights(folder / weight_file_name)
        files = sorted(folder.glob("*.safetensors"))
        if (folder / LORA_FILE) in files:
            return self._lora_weights(folder / LORA_FILE)
        if len(files) > 1:
            raise _refused(f"lora model {name} has {len(files)} weights files and none was named")
        return self._lora_weights(files[0] if files else folder / LORA_FILE)

    def inversion_file(self, name: str) -> Path:
        """An inversion's embeddings, under the one name that the network's runner looks for."""
        file = self.resolve("textual_inversion", name) / INVERSION_FILE
        if not file.is_file():
            raise _not_here(f"textual inversion {name} has no {INVERSION_FILE}")
        return file

    def language_folder(self, name: str) -> Path:
        """A language model's folder: configuration, tokenizer and safetensors weights, no code."""
        folder = self.resolve("language", name)
        if not (folder / CONFIG).is_file():
            raise _not_here(f"{name} has no {CONFIG}")
        if (folder / ADAPTER).exists():
            # Transformers would load the model that it names, from wherever that is.
            raise _refused(f"{name} is an adapter to another model")
        _check_weights(folder, None)
        return folder

    def is_language_model(self, name: str) -> bool:
        return _is_language_model(self._folder("language", name) / CONFIG)

    def on_disk(self) -> frozenset[str]:
        """Base models here, as `name` and, for each variant of its UNet, `name+variant`.

        A language model is a folder with weights of its own, beside its configuration.
        """
        keys: set[str] = set()
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

    def _folder(self, kind: str, name: str) -> Path:
        if kind not in KINDS:
            raise _refused(f"{kind!r} is not a kind of model")
        if "://" in name:
            raise _refused("models are not fetched by URL")
        match = _NAME.fullmatch(name)
        if match is None:
            raise _refused(f"{name[:200]!r} is not a model's name (org/name)")
        folder = self.root / match[1] / match[2]
        if not folder.resolve().is_relative_to(self.root.resolve()):
            raise _refused(f"{name} leads out of the store")
        return folder

    def _check_contents(self, folder: Path) -> None:
        root = self.root.resolve()
        for path in folder.rglob("*"):
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                raise _refused(f"{path.name} leads out of the store")
            if path.suffix == ".py":
                raise _refused(f"{path.name} is code")

    def _check_base(self, folder: Path, variant: str | None) -> None:
        for part, (library, _) in read_index(folder).parts.items():
            if library not in _LIBRARIES:
                raise _refused(f"{part} is made of foreign code ({library})")
            if part not in _WITHOUT_WEIGHTS:
                _check_weights(folder / part, variant)

    def _lora_weights(self, file: Path) -> Path:
        if file.suffix != ".safetensors":
            raise _refused(f"{file.name} is not a safetensors file")
        if not file.is_file():
            raise _not_here(f"{file.parent.name} has no {file.name}")
        return file


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
            raise _refused(f"{part[:100]!r} is not a part's name")
        parts[part] = (what[0], what[1])
    return Index(pipeline, parts)


def read_json(file: Path) -> dict[str, object]:
    """A small JSON object from a model's folder; raises `ModelUnavailable`."""
    if not file.is_file():
        raise _not_here(f"{file.parent.name} has no {file.name}")
    if file.stat().st_size > _MAX_INDEX:
        raise _refused(f"{file.name} is too long")
    try:
        data = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        raise _damaged(f"{file.parent.name}/{file.name} is not JSON") from None
    if not isinstance(data, dict):
        raise _damaged(f"{file.parent.name}/{file.name} is not a JSON object")
    return data


def _is_language_model(config: Path) -> bool:
    """Transformers writes what a model is into its configuration; diffusers' parts don't say so."""
    try:
        said = read_json(config)
    except ModelUnavailable:
        return False
    return "architectures" in said and any(config.parent.glob("*.safetensors"))


def _check_weights(part: Path, variant: str | None) -> None:
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


def _refused(message: str) -> ModelUnavailable:
    return ModelUnavailable(ModelUnavailableKind.REFUSED, message)


def _not_here(message: str) -> ModelUnavailable:
    return ModelUnavailable(ModelUnavailableKind.NOT_HERE, message)


def _damaged(message: str) -> ModelUnavailable:
    return ModelUnavailable(ModelUnavailableKind.DAMAGED, message)
