"""The S3 mirror against moto's server: uploads, trees laid by hand, and what changes meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import EndpointConnectionError  # type: ignore[import-untyped]

from cluster.core.errors import ModelUnavailable
from cluster.models.disk import MANIFEST, manifest_from
from cluster.models.mirror import MODELS, Mirror
from cluster.models.refs import ModelRef
from cluster.models.refusals import Refused
from cluster.models.sources import Absent, Changed, RemoteFile, SourceDown
from cluster.models.transfer import Damaged, sha256_of
from tests.integration.mirror_world import (
    BASE,
    FILES,
    LORA,
    LORA_FILES,
    WEIGHTS,
    World,
    fetched,
    laid,
    manifest_of,
    read,
    served,
    set_credentials,
    uploaded,
)


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    set_credentials(monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with served() as url:
        yield url


@pytest.fixture
def world(endpoint: str, request: pytest.FixtureRequest) -> World:
    return World(endpoint, f"bucket-{abs(hash(request.node.nodeid))}")


# --- what is uploaded is there ------------------------------------------------------------------


def test_an_uploaded_model_comes_back_the_same(world: World, tmp_path: Path) -> None:
    manifest = uploaded(world, tmp_path / "here")
    world.asked.clear()
    listing = world.mirror.list(BASE)
    assert world.asked == ["GetObject"]
    assert (listing.source, listing.revision, listing.archive) == ("mirror", "c0ffee", False)
    said = {(file.path, file.size, file.sha256) for file in manifest.files}
    assert {(file.path, file.size, file.sha256) for file in listing.files} == said
    assert fetched(world.mirror, BASE, tmp_path / "there") == FILES


def test_a_real_tiny_model(world: World, tmp_path: Path, tiny_models: Path) -> None:
    ref = ModelRef("base", "crynux-devnet/tiny-llm")
    folder = tiny_models / ref.name
    manifest = manifest_of(ref, folder)
    world.mirror.upload(ref, folder, manifest, lambda _: None)
    files = fetched(world.mirror, ref, tmp_path / "there")
    assert "model.safetensors" in files
    assert files == {path: (folder / path).read_bytes() for path in files}


def test_what_lies_in_the_bucket(world: World, tmp_path: Path) -> None:
    manifest = uploaded(world, tmp_path)
    assert world.stored() == {world.key(BASE, path) for path in (*FILES, MANIFEST)}
    head = world.s3.head_object(Bucket=world.bucket, Key=world.key(BASE, WEIGHTS))
    assert head["Metadata"] == {"sha256": sha256_of(tmp_path / WEIGHTS)}
    text = world.s3.get_object(Bucket=world.bucket, Key=world.key(BASE, MANIFEST))["Body"].read()
    assert manifest_from(text) == manifest


def test_a_mirror_at_the_buckets_root(world: World, tmp_path: Path) -> None:
    mirror = Mirror(f"s3://{world.bucket}", world.make_client)
    laid(tmp_path, LORA_FILES)
    mirror.upload(LORA, tmp_path, manifest_of(LORA, tmp_path), lambda _: None)
    assert f"{MODELS}/{LORA.key}/{MANIFEST}" in world.stored()
    assert mirror.has(LORA)


@pytest.mark.parametrize(
    ("start", "stop"), [(0, None), (0, 10), (7, 100), (300_000, None), (307_199, 307_200)]
)
def test_ranges(world: World, tmp_path: Path, start: int, stop: int | None) -> None:
    uploaded(world, tmp_path)
    content = FILES[WEIGHTS]
    found = read(world.mirror, BASE, WEIGHTS, start, stop)
    assert found == (start, len(content), content[start:stop])


def test_a_range_behind_the_end(world: World, tmp_path: Path) -> None:
    uploaded(world, tmp_path)
    with pytest.raises(Changed):
        read(world.mirror, BASE, WEIGHTS, 400_000, 400_001)


def test_a_link_s_files_under_the_names_they_came_with(world: World, tmp_path: Path) -> None:
    ref = ModelRef("textual_inversion", "https://example.org/style.safetensors?token=x")
    laid(tmp_path, {"style.safetensors": b"s"})
    world.mirror.upload(ref, tmp_path, manifest_of(ref, tmp_path), lambda _: None)
    assert read(world.mirror, ref, "style.safetensors")[2] == b"s"


def test_large_files_go_in_parts(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b"12345678" * (11 * 2**17)
    laid(tmp_path, {"pytorch_lora_weights.safetensors": content})
    monkeypatch.setattr("cluster.models.mirror._UPLOAD.multipart_threshold", 6 * 2**20)
    monkeypatch.setattr("cluster.models.mirror._UPLOAD.multipart_chunksize", 6 * 2**20)
    gained: list[int] = []
    world.mirror.upload(LORA, tmp_path, manifest_of(LORA, tmp_path), gained.append)
    assert world.asked.count("UploadPart") == 2
    assert sum(gained) == len(content)
    there = fetched(world.mirror, LORA, tmp_path / "there", part=2**20)
    assert there == {"pytorch_lora_weights.safetensors": content}


# --- uploading ----------------------------------------------------------------------------------


def test_a_second_upload_sends_nothing_again(world: World, tmp_path: Path) -> None:
    manifest = uploaded(world, tmp_path)
    world.asked.clear()
    gained: list[int] = []
    world.mirror.upload(BASE, tmp_path, manifest, gained.append)
    assert sorted(world.asked) == ["HeadObject"] * len(FILES) + ["PutObject"]
    assert sum(gained) == manifest.size


def test_an_upload_mends_what_is_another(world: World, tmp_path: Path) -> None:
    manifest = uploaded(world, tmp_path)
    same_size = b"x" * len(FILES[WEIGHTS])
    world.put(world.key(BASE, WEIGHTS), same_size)
    world.put(world.key(BASE, "unet/config.json"), b"[0, 1]", sha256="0" * 64)
    world.asked.clear()
    world.mirror.upload(BASE, tmp_path, manifest, lambda _: None)
    assert world.asked.count("PutObject") == 3
    assert read(world.mirror, BASE, WEIGHTS)[2] == FILES[WEIGHTS]
    assert read(world.mirror, BASE, "unet/config.json")[2] == b"{}"


class Breaking:
    """A client whose network goes away at the n-th file."""

    def __init__(self, inner: Any, files: int) -> None:
        self._inner, self._left = inner, files

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def upload_file(self, **asked: Any) -> None:
        self._left -= 1
        if self._left < 0:
            raise EndpointConnectionError(endpoint_url="http://gone")
        self._inner.upload_file(**asked)


@pytest.mark.parametrize("files", range(len(FILES)))
def test_a_broken_upload_leaves_no_model(world: World, tmp_path: Path, files: int) -> None:
    laid(tmp_path, FILES)
    manifest = manifest_of(BASE, tmp_path)
    url = f"s3://{world.bucket}/site/models"
    breaking = Mirror(url, lambda: Breaking(world.make_client(), files))
    with pytest.raises(SourceDown):
        breaking.upload(BASE, tmp_path, manifest, lambda _: None)
    assert world.key(BASE, MANIFEST) not in world.stored()
    assert not world.mirror.has(BASE)
    with pytest.raises(Absent):
        world.mirror.list(BASE)
    world.asked.clear()
    world.mirror.upload(BASE, tmp_path, manifest, lambda _: None)
    assert world.asked.count("PutObject") == len(FILES) - files + 1
    assert world.mirror.has(BASE)


@pytest.mark.parametrize("change", ["content", "size", "gone"])
def test_what_changed_on_our_disk_is_not_uploaded(
    world: World, tmp_path: Path, change: str
) -> None:
    laid(tmp_path, FILES)
    manifest = manifest_of(BASE, tmp_path)
    weights = tmp_path / WEIGHTS
    weights.unlink()
    if change != "gone":
        weights.write_bytes(FILES[WEIGHTS][::-1] if change == "content" else b"short")
    with pytest.raises(Changed):
        world.mirror.upload(BASE, tmp_path, manifest, lambda _: None)
    assert world.stored().isdisjoint({world.key(BASE, WEIGHTS), world.key(BASE, MANIFEST)})


def test_what_could_not_be_read_again_is_not_uploaded(world: World, tmp_path: Path) -> None:
    laid(tmp_path, FILES)
    manifest = manifest_of(BASE, tmp_path)
    with pytest.raises(SourceDown):
        world.mirror.upload(LORA, tmp_path, manifest, lambda _: None)
    up = replace(manifest, files=(replace(manifest.files[0], path="../up.json"),))
    with pytest.raises(SourceDown):
        world.mirror.upload(BASE, tmp_path, up, lambda _: None)
    assert world.asked == []


# --- laid by hand -------------------------------------------------------------------------------


def by_hand(world: World, name: str = BASE.name, more: Mapping[str, bytes] | None = None) -> None:
    for path, content in {**FILES, **(more or {})}.items():
        world.put(f"site/models/{name}/{path}", content)


def test_a_tree_laid_by_hand(world: World, tmp_path: Path) -> None:
    by_hand(world, more={"README.md": b"hello", "unet/model.bin": b"code", "a/b/c.json": b"{}"})
    listing = world.mirror.list(BASE)
    assert {file.path: file.size for file in listing.files} == {
        path: len(content) for path, content in FILES.items()
    }
    assert all(file.sha256 is None and file.etag for file in listing.files)
    assert fetched(world.mirror, BASE, tmp_path) == FILES
    assert not world.mirror.has(BASE)


def test_a_tree_under_an_old_name_of_one_word(world: World, tmp_path: Path) -> None:
    by_hand(world, "tiny")
    assert fetched(world.mirror, ModelRef("base", "tiny"), tmp_path) == FILES


def test_its_revision_is_of_what_it_holds(world: World) -> None:
    by_hand(world)
    revision = world.mirror.list(BASE).revision
    world.put(f"site/models/{BASE.name}/README.md", b"not the model's")
    assert world.mirror.list(BASE).revision == revision
    world.put(f"site/models/{BASE.name}/{WEIGHTS}", FILES[WEIGHTS][::-1])
    assert world.mirror.list(BASE).revision != revision


def test_a_tree_of_more_than_one_page(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moto.settings.get_s3_default_max_keys", lambda: 2)
    by_hand(world)
    assert {file.path for file in world.mirror.list(BASE).files} == set(FILES)
    assert world.asked.count("ListObjectsV2") == 3


@pytest.mark.parametrize("bound", ["MOST_KEYS", "MOST_PAGES"])
def test_a_tree_without_end(world: World, monkeypatch: pytest.MonkeyPatch, bound: str) -> None:
    monkeypatch.setattr("moto.settings.get_s3_default_max_keys", lambda: 1)
    monkeypatch.setattr(f"cluster.models.mirror.{bound}", 2)
    by_hand(world)
    with pytest.raises(Refused):
        world.mirror.list(BASE)
    assert world.asked.count("ListObjectsV2") == 3


def test_a_tree_with_nothing_but_code(world: World) -> None:
    world.put(f"site/models/{LORA.name}/pytorch_lora_weights.bin", b"code")
    with pytest.raises(Refused):
        world.mirror.list(LORA)


def test_a_tree_without_what_is_needed(world: World) -> None:
    world.put(f"site/models/{LORA.name}/README.md", b"hello")
    with pytest.raises(ModelUnavailable):
        world.mirror.list(LORA)


def test_no_name_leads_to_another_models_files(world: World, tmp_path: Path) -> None:
    """`models/<key>` is a name that a task may well write."""
    uploaded(world, tmp_path)
    with pytest.raises(Absent):
        world.mirror.list(ModelRef("base", f"{MODELS}/{BASE.key}"))
    for name in (MODELS, "tiny", "../models/org/tiny", "https://example.org/tiny"):
        with pytest.raises(Absent):
            world.mirror.list(ModelRef("base", name))


# --- what is not there, or not any more ---------------------------------------------------------


def test_a_model_without_its_manifest_is_not_there(world: World, tmp_path: Path) -> None:
    uploaded(world, tmp_path)
    world.s3.delete_object(Bucket=world.bucket, Key=world.key(BASE, MANIFEST))
    assert not world.mirror.has(BASE)
    with pytest.raises(Absent) as caught:
        world.mirror.list(BASE)
    assert not caught.value.certain


def opened_after(world: World, change: Callable[[RemoteFile], None]) -> bytes:
    listing = world.mirror.list(BASE)
    (file,) = [file for file in listing.files if file.path == WEIGHTS]
    change(file)
    with world.mirror.open(listing, file, 0, None) as opened:
        return b"".join(opened.chunks)


def test_overwritten_between_listing_and_reading(world: World, tmp_path: Path) -> None:
    uploaded(world, tmp_path)
    other = b"x" * len(FILES[WEIGHTS])
    with pytest.raises(Changed):
        opened_after(world, lambda file: world.put(file.where, other, sha256="0" * 64))
    with pytest.raises(Changed):
        opened_after(world, lambda file: world.put(file.where, b"shorter"))


def test_overwritten_by_hand_is_found_by_its_hash(world: World, tmp_path: Path) -> None:
    uploaded(world, tmp_path / "here")
    world.put(world.key(BASE, WEIGHTS), b"x" * len(FILES[WEIGHTS]))
    with pytest.raises(Damaged):
        fetched(world.mirror, BASE, tmp_path / "there")


def test_a_tree_overwritten_between_listing_and_reading(world: World) -> None:
    by_hand(world)
    other = b"x" * len(FILES[WEIGHTS])
    with pytest.raises(Changed):
        opened_after(world, lambda file: world.put(file.where, other))


def test_deleted_between_listing_and_reading(world: World, tmp_path: Path) -> None:
    uploaded(world, tmp_path)
    with pytest.raises(Absent) as caught:
        opened_after(world, lambda f: world.s3.delete_object(Bucket=world.bucket, Key=f.where))
    assert not caught.value.certain
