"""The store on disk: what is there, what isn't, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.core.errors import ModelUnavailable, ModelUnavailableKind
from cluster.models.store import LORA_FILE, ModelStore

REFUSED = ModelUnavailableKind.REFUSED
NOT_HERE = ModelUnavailableKind.NOT_HERE
DAMAGED = ModelUnavailableKind.DAMAGED


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    base = tmp_path / "store" / "org" / "base"
    (base / "unet").mkdir(parents=True)
    (base / "scheduler").mkdir()
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "LCMScheduler"],
        "safety_checker": [None, None],
    }
    (base / "model_index.json").write_text(json.dumps(index))
    (base / "unet" / "diffusion_pytorch_model.safetensors").touch()
    (base / "unet" / "diffusion_pytorch_model.fp16.safetensors").touch()
    lora = tmp_path / "store" / "org" / "lora"
    lora.mkdir()
    (lora / LORA_FILE).touch()
    return ModelStore(tmp_path / "store")


def kind_of(store: ModelStore, kind: str, name: str, variant: str | None = None) -> object:
    with pytest.raises(ModelUnavailable) as caught:
        store.resolve(kind, name, variant)
    assert "\n" not in str(caught.value)
    return caught.value.kind


def edit(store: ModelStore, **changes: object) -> None:
    file = store.root / "org" / "base" / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_what_is_here(store: ModelStore) -> None:
    assert store.resolve("base", "org/base") == store.root / "org" / "base"
    assert store.resolve("base", "org/base", "fp16") == store.root / "org" / "base"
    assert store.lora_file("org/lora") == store.root / "org" / "lora" / LORA_FILE
    assert store.lora_file("org/lora", LORA_FILE).name == LORA_FILE
    assert store.on_disk() == {"org/base", "org/base+fp16"}


def test_an_empty_store(tmp_path: Path) -> None:
    assert ModelStore(tmp_path / "none").on_disk() == frozenset()
    assert kind_of(ModelStore(tmp_path / "none"), "base", "org/base") is NOT_HERE


def test_a_folder_that_goes_while_it_is_looked_at_is_not_here(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    look, gone = Path.glob, ["unet", "unet"]

    def glob(self: Path, pattern: str) -> Iterator[Path]:
        if self.name in gone:
            gone.remove(self.name)
            raise FileNotFoundError(self)
        return iter(look(self, pattern))

    monkeypatch.setattr(Path, "glob", glob)
    assert store.on_disk() == {"org/base", "org/base+fp16"}
    gone[:] = ["unet"] * 3
    with pytest.raises(FileNotFoundError):
        store.on_disk()


def test_a_listing_that_another_thread_drops_is_given_all_the_same(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dropped(dict[Any, Any]):
        def __setitem__(self, key: Any, value: Any) -> None:
            """Another thread clears it right after."""

    (store.disk.base / "models").mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr("cluster.models.store._listings", Dropped())
    assert store.on_disk() == {"org/base", "org/base+fp16"}


def test_what_is_not_here(store: ModelStore) -> None:
    assert kind_of(store, "base", "org/other") is NOT_HERE
    assert kind_of(store, "base", "org/lora") is NOT_HERE
    assert kind_of(store, "base", "org/base", "bf16") is NOT_HERE
    with pytest.raises(ModelUnavailable, match="has no other.safetensors"):
        store.lora_file("org/lora", "other.safetensors")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/etc/passwd",
        "../org/base",
        "org/../../etc",
        "./base",
        "org/..",
        ".hidden/base",
        "org/base/unet",
        "org//base",
        "org/ba se",
        "org/base\n",
        "org\\base",
        "org/b\0",
        "file:///etc/passwd",
        "ftp://host/org/base",
        "org/" + "x" * 1000,
        "örg/base",
    ],
)
def test_tricky_names_are_refused(store: ModelStore, name: str) -> None:
    assert kind_of(store, "base", name) is REFUSED
    assert kind_of(store, "lora", name) is REFUSED


@pytest.mark.parametrize("name", ["base", "https://host/org/base", "https://host/../../base"])
def test_what_is_only_ever_fetched_is_not_looked_for_among_the_folders(
    store: ModelStore, name: str
) -> None:
    for kind in ("base", "lora"):
        assert kind_of(store, kind, name) is NOT_HERE


def test_tricky_variants_and_kinds_are_refused(store: ModelStore) -> None:
    assert kind_of(store, "base", "org/base", "../x") is REFUSED
    assert kind_of(store, "pickle", "org/base") is REFUSED


@pytest.mark.parametrize(
    "name", ["../lora.safetensors", "/x.safetensors", "w.bin", "w.ckpt", "w.pt"]
)
def test_tricky_weight_files_are_refused(store: ModelStore, name: str) -> None:
    (store.root / "org" / "lora" / Path(name).name).touch()
    with pytest.raises(ModelUnavailable) as caught:
        store.lora_file("org/lora", name)
    assert caught.value.kind is REFUSED


def test_several_loras_need_a_name(store: ModelStore) -> None:
    folder = store.root / "org" / "lora"
    (folder / LORA_FILE).rename(folder / "a.safetensors")
    assert store.lora_file("org/lora").name == "a.safetensors"
    (folder / "b.safetensors").touch()
    with pytest.raises(ModelUnavailable) as caught:
        store.lora_file("org/lora")
    assert caught.value.kind is REFUSED
    assert store.lora_file("org/lora", "b.safetensors").name == "b.safetensors"


def test_a_lora_in_whose_place_others_take_another_file_is_refused(store: ModelStore) -> None:
    folder = store.root / "org" / "lora"
    (folder / "checkpoint-1.safetensors").touch()
    assert store.lora_file("org/lora").name == LORA_FILE
    with pytest.raises(ModelUnavailable, match=f"other nodes take {LORA_FILE}") as caught:
        store.lora_file("org/lora", "checkpoint-1.safetensors")
    assert caught.value.kind is REFUSED
    (folder / "b.safetensors").touch()
    assert store.lora_file("org/lora", "checkpoint-1.safetensors").name.startswith("checkpoint")


def test_links_out_of_the_store_are_refused(store: ModelStore, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (store.root / "org" / "away").symlink_to(tmp_path / "outside")
    assert kind_of(store, "lora", "org/away") is REFUSED
    (store.root / "org" / "lora" / "w.safetensors").symlink_to(tmp_path / "outside" / "w")
    assert kind_of(store, "lora", "org/lora") is REFUSED


def test_links_within_the_store_are_fine(store: ModelStore) -> None:
    folder = store.root / "org" / "base" / "unet"
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.rename(store.root / "blob")
    weights.symlink_to(store.root / "blob")
    assert store.resolve("base", "org/base")


def test_pickles_and_code_are_refused(store: ModelStore) -> None:
    folder = store.root / "org" / "base" / "unet"
    for weights in folder.glob("*.safetensors"):
        weights.rename(weights.with_suffix(".bin"))
    assert kind_of(store, "base", "org/base") is REFUSED
    (store.root / "org" / "lora" / "loader.py").touch()
    assert kind_of(store, "lora", "org/lora") is REFUSED


def test_a_part_that_is_an_adapter_to_another_model_is_refused(store: ModelStore) -> None:
    (store.root / "org" / "base" / "unet" / "adapter_config.json").write_text("{}")
    assert kind_of(store, "base", "org/base") is REFUSED


def test_foreign_pipelines_and_parts_are_refused(store: ModelStore) -> None:
    edit(store, unet=["my_code", "UNet"])
    assert kind_of(store, "base", "org/base") is REFUSED
    edit(store, _class_name="MyPipeline")
    assert kind_of(store, "base", "org/base") is REFUSED
    edit(store, _class_name=["my_code", "StableDiffusionPipeline"])
    assert kind_of(store, "base", "org/base") is REFUSED


def test_a_damaged_index(store: ModelStore) -> None:
    edit(store, unet=["diffusers"])
    assert kind_of(store, "base", "org/base") is DAMAGED
    (store.root / "org" / "base" / "model_index.json").write_text("{")
    assert kind_of(store, "base", "org/base") is DAMAGED


# --- language models --------------------------------------------------------------------------


@pytest.fixture
def chat(store: ModelStore) -> Path:
    folder = store.root / "org" / "chat"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (folder / "model-00001-of-00002.safetensors").touch()
    (folder / "model-00002-of-00002.safetensors").touch()
    return folder


def language_fault(store: ModelStore, name: str = "org/chat") -> object:
    with pytest.raises(ModelUnavailable) as caught:
        store.language_folder(name)
    assert "\n" not in str(caught.value)
    return caught.value.kind


def test_a_language_model_is_a_folder_of_its_own(store: ModelStore, chat: Path) -> None:
    assert store.language_folder("org/chat") == chat
    assert store.on_disk() == {"org/base", "org/base+fp16", "org/chat"}
    assert store.is_language_model("org/chat")
    assert not store.is_language_model("org/base")
    assert not store.is_language_model("org/none")


def test_what_is_no_language_model_is_not_listed_as_one(store: ModelStore, chat: Path) -> None:
    (chat / "config.json").write_text('{"_class_name": "ControlNetModel"}')
    assert "org/chat" not in store.on_disk()
    (chat / "config.json").write_text("{")
    assert "org/chat" not in store.on_disk()


def test_language_models_that_arent_here(store: ModelStore, chat: Path) -> None:
    assert language_fault(store, "org/none") is NOT_HERE
    assert language_fault(store, "org/base") is NOT_HERE
    for weights in chat.glob("*.safetensors"):
        weights.unlink()
    assert language_fault(store) is NOT_HERE
    assert "org/chat" not in store.on_disk()


def test_language_models_that_are_refused(store: ModelStore, chat: Path, tmp_path: Path) -> None:
    for name in ("../chat", "org/chat/..", "file://host/org/chat", "/etc"):
        assert language_fault(store, name) is REFUSED
    for name in ("adapter_config.json", "modeling.py"):
        (chat / name).write_text("{}")
        assert language_fault(store) is REFUSED
        (chat / name).unlink()
    (chat / "tokenizer.json").symlink_to(tmp_path / "outside")
    assert language_fault(store) is REFUSED
    (chat / "tokenizer.json").unlink()
    for weights in chat.glob("*.safetensors"):
        weights.rename(weights.with_suffix(".bin"))
    assert language_fault(store) is REFUSED
