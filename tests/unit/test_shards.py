"""Tables of shards: they name safetensors files beside themselves, or the model isn't taken.

`python -m tests.unit.test_shards` writes the corpus anew.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.core.errors import ModelUnavailable, ModelUnavailableKind
from cluster.models.keeper import Wanted
from cluster.models.refs import ref
from cluster.models.refusals import Refused, Rule
from cluster.models.shards import is_index, missing_shards
from cluster.models.store import ModelStore
from tests.unit.model_fakes import Shelf, content_of, keeper, weights

CORPUS = Path(__file__).parents[1] / "corpus" / "indexes"
INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
CHAT = ref("base", "acme/chat")


def table(*names: object) -> bytes:
    return json.dumps(
        {"metadata": {}, "weight_map": dict(zip("abcdef", names, strict=False))}
    ).encode()


HOSTILE: dict[str, bytes] = {
    "absolute": table("/etc/passwd.safetensors"),
    "parent": table("../other/model.safetensors"),
    "partial": table("../../partial/lora-x-0123456789abcdef/x.safetensors.part"),
    "folder": table("unet/model.safetensors"),
    "backslash": table("..\\x.safetensors"),
    "pickle": table("pytorch_model.bin"),
    "pickle-by-suffix": table("model.safetensors.part"),
    "hidden": table(".model.safetensors"),
    "newline": table("model.safetensors\n"),
    "nul": table("model.safetensors\0"),
    "other-script": table("mödel.safetensors"),
    "empty-name": table(""),
    "number": table(3),
    "list": table(["model.safetensors"]),
    "one-of-many": table(FIRST, SECOND, "/x.safetensors"),
    "no-map": b"{}",
    "empty-map": b'{"weight_map": {}}',
    "map-a-list": b'{"weight_map": ["model.safetensors"]}',
    "map-null": b'{"weight_map": null}',
    "no-object": b"[]",
    "no-json": b"{",
    "nothing": b"",
    "nested": b'{"weight_map": ' + b"[" * 1000 + b"]" * 1000 + b"}",
}


def write_corpus(folder: Path) -> None:
    for name, content in HOSTILE.items():
        (folder / f"{name}{INDEX.removeprefix('model')}").write_bytes(content)


def chat(**changes: bytes) -> dict[str, bytes]:
    files = {
        "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
        FIRST: weights(40),
        SECOND: weights(41),
        INDEX: table(FIRST, SECOND),
    }
    return files | {name.replace("_", "."): content for name, content in changes.items()}


def lay(root: Path, files: dict[str, bytes]) -> Path:
    folder = root / "acme" / "chat"
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("file", sorted(CORPUS.iterdir()), ids=lambda file: file.name)
def test_the_corpus_is_refused(file: Path) -> None:
    assert is_index(file.name)
    with pytest.raises(Refused, match=rf"^{file.name}: ") as caught:
        missing_shards(file)
    assert caught.value.rule is Rule.FILE_KIND
    assert str(caught.value).isprintable()


def test_the_corpus_is_what_the_table_makes() -> None:
    kept = {file.name.partition(".")[0]: file.read_bytes() for file in CORPUS.iterdir()}
    assert HOSTILE.items() <= kept.items()


@pytest.mark.parametrize("file", sorted(CORPUS.iterdir()), ids=lambda file: file.name)
def test_a_hostile_table_is_neither_fetched_nor_read_from_the_disk(
    tmp_path: Path, file: Path
) -> None:
    files = chat() | {INDEX: file.read_bytes()}
    store = keeper(tmp_path / "fetched", Shelf({CHAT: files}))
    with pytest.raises(Refused):
        store.ensure(CHAT, Wanted())
    assert store.disk.manifests() == {}
    lay(tmp_path / "laid", files)
    with pytest.raises(ModelUnavailable) as caught:
        ModelStore(tmp_path / "laid").language_folder("acme/chat")
    assert caught.value.kind is ModelUnavailableKind.REFUSED


@pytest.mark.parametrize(
    "name",
    [INDEX, "model.safetensors.index.fp16.json", "diffusion_pytorch_model.safetensors.index.json",
     "x.index.json", "x.index.y.z.json"],
)  # fmt: skip
def test_a_table_in_a_part_of_a_laid_pipeline_is_looked_at(tmp_path: Path, name: str) -> None:
    part = lay(tmp_path, {"config.json": b"{}"}) / "text_encoder"
    part.mkdir()
    (part / name).write_bytes(table("/etc/passwd.safetensors"))
    with pytest.raises(ModelUnavailable) as caught:
        ModelStore(tmp_path).resolve("base", "acme/chat")
    assert caught.value.kind is ModelUnavailableKind.REFUSED


def test_what_is_whole_is_taken(tmp_path: Path) -> None:
    store = keeper(tmp_path, Shelf({CHAT: chat()}))
    store.ensure(CHAT, Wanted())
    assert content_of(store, CHAT) == chat()


def test_a_shard_that_is_missing_is_refused_where_it_comes_from(tmp_path: Path) -> None:
    files = chat()
    del files[SECOND]
    with pytest.raises(Refused, match=SECOND):
        keeper(tmp_path, Shelf({CHAT: files})).ensure(CHAT, Wanted())


def test_what_was_laid_without_all_shards_is_fetched(tmp_path: Path) -> None:
    files = chat()
    del files[SECOND]
    lay(tmp_path, files)
    store = keeper(tmp_path, Shelf({CHAT: chat()}))
    assert store.ensure(CHAT, Wanted()) is True
    assert content_of(store, CHAT) == chat()


def test_the_table_of_pickles_beside_laid_weights_is_nobodys_to_read(tmp_path: Path) -> None:
    """Repositories are cloned whole; with `use_safetensors` the libraries don't look at it."""
    lay(tmp_path, chat() | {"pytorch_model.bin.index.json": table("pytorch_model.bin")})
    assert ModelStore(tmp_path).language_folder("acme/chat")


@given(st.text(max_size=30))
def test_no_name_that_passes_leads_elsewhere(
    tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / INDEX).write_bytes(table(name))
    try:
        missing_shards(folder / INDEX)
    except Refused:
        return
    assert (folder / name).parent == folder
    assert name.endswith(".safetensors")


if __name__ == "__main__":
    write_corpus(CORPUS)
