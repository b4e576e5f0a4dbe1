"""The two tiers on small networks of our own: who is where, what is loaded, and whose bits."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.core.errors import ModelUnavailable, ModelUnavailableKind
from cluster.inference import parts, pool
from cluster.inference.blocks import Block
from cluster.inference.packing import Packing
from cluster.inference.parts import PartKey, PartSource, bytes_of, digest_of, source, weights
from cluster.inference.pool import RUNS, MeasuredBudget, Pool, fixed

SIZE = 4 * (16 * 16 + 16)
"""Bytes of one Linear(16, 16)."""


def part(name: str) -> PartSource:
    return PartSource(PartKey(name), Path(name), "Linear", "float32", None, (), SIZE)


def roles(*names: str) -> dict[str, PartSource]:
    return {name: part(name) for name in names}


class Shop:
    """Loads a Linear by name, always with the same weights, and remembers what it was asked for."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.now = 0.0
        self.sizes: dict[str, int] = {}
        """How many outputs a part has, if not 16."""

    def clock(self) -> float:
        self.now += 1.0
        return self.now

    def load(self, source: PartSource) -> torch.nn.Module:
        self.loaded.append(source.key)
        module = torch.nn.Linear(16, self.sizes.get(source.key, 16))
        for tensor in module.parameters():
            tensor.requires_grad_(False).fill_(float(len(source.key)))
        return module

    def pool(self, device: int = 100, host: int = 100) -> Pool:
        """Budgets in parts."""
        cpu = torch.device("cpu")
        return Pool(self.load, cpu, fixed(device * SIZE), host * SIZE, self.clock)


@pytest.fixture
def shop() -> Shop:
    return Shop()


def test_a_part_is_loaded_once_and_held_once(shop: Shop) -> None:
    pool = shop.pool()
    first = pool.hold(roles("unet", "vae"))
    second = pool.hold({"other role": part("vae"), "unet": part("unet2")})
    assert shop.loaded == ["unet", "vae", "unet2"]
    assert second["other role"] is first["vae"]
    assert pool.where().device == {"unet", "vae", "unet2"}
    assert pool.counts.loads == 3


def test_what_left_the_device_comes_back_without_the_disk(shop: Shop) -> None:
    pool = shop.pool(device=1)
    before = pool.hold(roles("a"))["a"]
    pool.hold(roles("bb"))
    assert pool.where().device == {"bb"}
    assert pool.where().host == {"a", "bb"}
    after = pool.hold(roles("a"))["a"]
    assert after is before
    assert all(bool((tensor == 1.0).all()) for tensor in after.parameters())
    assert shop.loaded == ["a", "bb"]
    assert (pool.counts.loads, pool.counts.returns, pool.counts.left_device) == (2, 1, 2)


def test_what_is_quantized_is_gone_as_soon_as_it_has_left(shop: Shop) -> None:
    """bitsandbytes' layers and their weights hold each other."""
    pool, held = shop.pool(device=1), []

    def load(source: PartSource) -> torch.nn.Module:
        module = shop.load(source)
        module.weight.layer = module  # type: ignore[union-attr]
        held.append(weakref.ref(module))
        return module

    pool.load = load
    first, second = (replace(part(name), bits=8, size=2 * SIZE) for name in ("a", "b"))
    pool.hold({"model": first})
    assert held[0]() is not None
    pool.hold({"model": second})
    assert [each() is None for each in held] == [True, False]


def test_host_memory_is_bounded_too(shop: Shop) -> None:
    pool = shop.pool(device=1, host=2)
    for name in ("a", "b", "c", "a"):
        pool.hold(roles(name))
        assert len(pool.where().host) <= 2
        assert pool.where().device == {name}
    assert shop.loaded == ["a", "b", "c", "a"]


def test_the_copy_of_what_is_on_the_device_leaves_host_memory_first(shop: Shop) -> None:
    pool = shop.pool(device=2, host=3)
    pool.hold(roles("a", "b"))
    pool.hold(roles("c"))
    (waiting,) = {"a", "b"} - pool.where().device
    pool.hold(roles("d"))
    pool.hold(roles(waiting))
    assert shop.loaded == ["a", "b", "c", "d"]


def test_without_host_memory_only_the_device_holds_parts(shop: Shop) -> None:
    pool = shop.pool(device=1, host=0)
    for name in ("a", "b"):
        pool.hold(roles(name))
        assert pool.where().host == frozenset()
        assert pool.where().device == {name}


def test_what_is_larger_than_host_memory_goes_past_it_and_drives_nobody_out(shop: Shop) -> None:
    pool = shop.pool(device=3, host=1)
    pool.hold(roles("a"))
    big = part("bb")
    shop.sizes["bb"] = 64
    pool.hold({"bb": replace(big, size=5 * SIZE)})
    assert pool.where().host == {"a"}
    assert pool.where().device >= {"bb"}
    assert all(bool((tensor == 2.0).all()) for tensor in pool.hold({"bb": big})["bb"].parameters())
    pool.clear()
    assert pool.where().host == {"a"}, "it is lost when it leaves"


def test_another_tensor_in_a_parts_place_is_seen(shop: Shop) -> None:
    pool = shop.pool()
    module = pool.hold(roles("a"))["a"]
    assert pool.changed(roles("a")) == frozenset()
    assert isinstance(module, torch.nn.Linear)
    module.weight = torch.nn.Parameter(module.weight.detach().clone(), requires_grad=False)
    assert pool.changed(roles("a")) == {"a"}


def test_what_left_the_device_without_a_copy_gets_one(shop: Shop) -> None:
    pool = shop.pool(device=2, host=1)
    pool.hold(roles("a", "bb"))
    assert len(pool.where().host) == 1
    pool.hold(roles("ccc"))
    pool.hold(roles("a", "bb"))
    values = {
        name: next(m.parameters())[0, 0].item() for name, m in pool.hold(roles("a", "bb")).items()
    }
    assert values == {"a": 1.0, "bb": 2.0}


def test_popular_parts_stay(shop: Shop) -> None:
    pool = shop.pool(device=2, host=2)
    for _ in range(4):
        pool.hold(roles("favourite"))
    for name in ("b", "c", "d"):
        pool.hold(roles(name))
    assert "favourite" in pool.where().device
    assert shop.loaded.count("favourite") == 1


def test_what_a_task_needs_is_never_sent_away_for_its_own_sake(shop: Shop) -> None:
    pool = shop.pool(device=1, host=1)
    pool.hold(roles("a", "b", "c"))
    assert pool.where().device == {"a", "b", "c"}


def test_kept_parts_stay(shop: Shop) -> None:
    pool = shop.pool(device=1, host=1)
    pool.kept.add(PartKey("mine"))
    pool.hold(roles("mine"))
    for name in ("b", "c", "d") * 3:
        pool.hold(roles(name))
    assert "mine" in pool.where().device
    assert shop.loaded.count("mine") == 1


def test_clear_empties_the_device_and_loses_nothing(shop: Shop) -> None:
    pool = shop.pool()
    pool.hold(roles("a", "b"))
    pool.clear()
    assert pool.where().device == frozenset()
    pool.hold(roles("a", "b"))
    assert shop.loaded == ["a", "b"]


def test_discard_forgets(shop: Shop) -> None:
    pool = shop.pool()
    pool.hold(roles("a"))
    pool.discard([PartKey("a"), PartKey("never held")])
    assert pool.where().host == frozenset()
    pool.hold(roles("a"))
    assert shop.loaded == ["a", "a"]


def test_a_part_whose_types_changed_is_noticed(shop: Shop) -> None:
    pool = shop.pool()
    held = pool.hold(roles("a", "b"))
    assert pool.changed(roles("a", "b")) == frozenset()
    held["b"].half()
    assert pool.changed(roles("a", "b")) == {"b"}


def test_a_failure_to_load_leaves_the_rest_as_it_was(shop: Shop) -> None:
    pool = shop.pool()
    pool.hold(roles("a"))

    def fails(_: PartSource) -> torch.nn.Module:
        raise ModelUnavailable(ModelUnavailableKind.DAMAGED, "no")

    pool.load = fails
    with pytest.raises(ModelUnavailable):
        pool.hold(roles("a", "b"))
    assert pool.where().device == {"a"}


def test_a_part_is_in_memory_of_its_own(shop: Shop) -> None:
    """What was read may be a view into a mapped file, which may change under it."""
    shared = torch.ones(16, 16)

    def mapped(_: PartSource) -> torch.nn.Module:
        module = torch.nn.Linear(16, 16, bias=False)
        module.weight = torch.nn.Parameter(shared, requires_grad=False)
        return module

    pool = shop.pool()
    pool.load = mapped
    module = pool.hold(roles("a"))["a"]
    shared.zero_()
    assert bool((next(module.parameters()) == 1.0).all())


def test_bytes_are_counted_once_for_shared_storage() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16))
    assert bytes_of(module) == 2 * SIZE
    first, second = module
    second.weight = first.weight
    assert bytes_of(module) == 2 * SIZE - 4 * 16 * 16


# --- what makes a part's key -------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    made = tmp_path / "model" / "unet"
    made.mkdir(parents=True)
    (made / "config.json").write_text("{}")
    (made / "diffusion_pytorch_model.safetensors").write_bytes(b"plain")
    (made / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"half")
    yield made


def test_the_key_is_made_of_contents(folder: Path, tmp_path: Path) -> None:
    one = source(folder, "UNet2DConditionModel", "float32")
    twin = tmp_path / "twin" / "unet"
    twin.parent.mkdir()
    folder.rename(twin)
    assert source(twin, "UNet2DConditionModel", "float32").key == one.key
    (twin / "config.json").write_text("{ }")
    assert source(twin, "UNet2DConditionModel", "float32").key != one.key


def test_the_key_tells_class_dtype_variant_and_change(folder: Path) -> None:
    one = source(folder, "UNet2DConditionModel", "float32")
    others = [
        source(folder, "ControlNetModel", "float32"),
        source(folder, "UNet2DConditionModel", "float16"),
        source(folder, "UNet2DConditionModel", "float32", "fp16"),
    ]
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"PLAIN")
    others.append(source(folder, "UNet2DConditionModel", "float32"))
    assert len({one.key, *(other.key for other in others)}) == 5


def test_only_known_classes_are_made(folder: Path) -> None:
    with pytest.raises(ModelUnavailable) as caught:
        source(folder, "os.system", "float32")
    assert caught.value.kind is ModelUnavailableKind.REFUSED


def test_weights_by_variant_and_shard(folder: Path) -> None:
    assert [file.name for file in weights(folder, None)] == ["diffusion_pytorch_model.safetensors"]
    assert [file.name for file in weights(folder, "fp16")] == [
        "diffusion_pytorch_model.fp16.safetensors"
    ]
    with pytest.raises(ModelUnavailable):
        weights(folder, "bf16")
    for file in folder.glob("*.safetensors"):
        file.unlink()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    halves = ["model-00001-of-00002.fp16.safetensors", "model.fp16-00002-of-00002.safetensors"]
    for name in (*names, *halves):
        (folder / name).write_bytes(name.encode())
    assert [file.name for file in weights(folder, None)] == names
    assert sorted(file.name for file in weights(folder, "fp16")) == sorted(halves)


def test_a_digest_is_kept_until_the_file_changes(folder: Path) -> None:
    file = folder / "config.json"
    first = digest_of(file)
    assert digest_of(file) == first
    file.write_text("[]")
    assert digest_of(file) != first


def test_two_tables_over_the_same_shards_make_two_parts(tmp_path: Path) -> None:
    """The table decides which shards are read, so what one loads isn't the other's."""
    (tmp_path / "config.json").write_text("{}")
    for number in (1, 2):
        (tmp_path / f"model-0000{number}-of-00002.safetensors").write_bytes(b"w")
    table = tmp_path / "model.safetensors.index.json"
    table.write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    before = source(tmp_path, "CLIPTextModel", "float32").key
    table.write_text('{"weight_map": {"a": "model-00002-of-00002.safetensors"}}')
    assert source(tmp_path, "CLIPTextModel", "float32").key != before


def test_one_huge_task_is_not_reckoned_with_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (60, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 20)
    budget = MeasuredBudget(torch.device("cuda"))
    assert budget() == 80 - 25, "a quarter of the card, before anything was measured"
    budget.computed(70)
    assert budget() == 80 - 77
    for _ in range(RUNS):
        budget.computed(10)
    assert budget() == 80 - 11


# --- what only a card has -------------------------------------------------------------------------


def test_what_cannot_be_pinned_is_kept_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    real, asked = torch.empty, []

    def empty(size: int, dtype: torch.dtype, pin_memory: bool = False) -> torch.Tensor:
        asked.append((size, pin_memory))
        if pin_memory:
            raise torch.AcceleratorError("out of memory")
        return real(size, dtype=dtype)

    monkeypatch.setattr(torch, "empty", empty)
    made = Pool(Shop().load, torch.device("cuda"), fixed(0), 0)._host_block(Block(512, 448))
    assert (made.numel(), made.dtype) == (448, torch.uint8)
    assert asked == [(512, True), (448, False)]


def test_a_copy_counts_as_what_is_pinned_for_it(shop: Shop) -> None:
    packing = Packing.of(shop.load(part("a")), torch.device("cuda"))
    on_a_card = Pool(shop.load, torch.device("cuda"), fixed(0), 0)
    assert on_a_card._host_size(packing) == 2048
    assert shop.pool()._host_size(packing) == SIZE


def test_an_older_torch_keeps_its_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    released: list[int] = []
    monkeypatch.setattr(torch.accelerator, "empty_host_cache", lambda: released.append(1))
    pool.release_pinned()
    assert released
    monkeypatch.delattr(torch.accelerator, "empty_host_cache")
    pool.release_pinned()


def test_what_is_discarded_stays_pinned_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    released: list[int] = []
    monkeypatch.setattr(pool, "release_pinned", lambda: released.append(1))
    Pool(Shop().load, torch.device("cuda"), fixed(0), 0).discard([PartKey("a")])
    assert released


# --- reading ahead of what is loaded --------------------------------------------------------------


@pytest.mark.parametrize("cached", [True, False])
def test_there_is_a_look_between_the_pieces_of_what_a_part_is_loaded_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    """The library itself says nothing meanwhile: a large part would pass for a hang."""
    monkeypatch.setattr(parts, "PIECE", 10)
    monkeypatch.setattr(parts, "_is_cached", lambda _file, _at: cached)
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(25))
    looks: list[int] = []
    with parts.looking(lambda: looks.append(1)):
        parts.read_ahead(file)
    assert len(looks) == 3


def test_where_the_file_system_doesnt_say_what_is_cached_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "unreadable").open("wb") as stream:
        assert not parts._is_cached(stream.fileno(), 0)


def test_a_part_is_read_through_before_the_library_gets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    class Library:
        @staticmethod
        def from_pretrained(*_: object, **__: object) -> tuple[torch.nn.Module, dict[str, object]]:
            done.append("loaded")
            return torch.nn.Linear(1, 1), {"missing_keys": []}

    monkeypatch.setattr(parts, "CLASSES", {"Linear": Library})
    monkeypatch.setattr(parts, "read_ahead", lambda file: done.append(file.name))
    files = (tmp_path / "1.safetensors", tmp_path / "2.safetensors")
    parts.load(replace(part("a"), folder=tmp_path, files=files), torch.device("cpu"))
    assert done == ["1.safetensors", "2.safetensors", "loaded"]
