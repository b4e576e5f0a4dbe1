"""Bytes on the disk: whole, in order, of one content, and not asked for twice."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.core.errors import Cancelled
from cluster.models import transfer as transfer_module
from cluster.models.sources import Changed, SourceDown
from cluster.models.throttle import Throttle
from cluster.models.transfer import Transfer
from tests.unit.model_fakes import LORA, Shelf, lora_shelf, weights

FILE = "pytorch_lora_weights.safetensors"


def transfer(shelf: Shelf, part: int = 1000, most: int = 10**6) -> tuple[Transfer, list[int]]:
    gained: list[int] = []
    listing = shelf.list(LORA)
    made = Transfer(shelf, listing, most, lambda _size: None, gained.append, part, 3)
    return made, gained


def fetch(shelf: Shelf, folder: Path, part: int = 1000) -> Path:
    made, _ = transfer(shelf, part)
    return made.fetch(made.listing.files[0], folder)


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("sizes", [True, False])
@pytest.mark.parametrize("size", [0, 1, 900, 1000, 5003])
def test_whole_whatever_the_server_can(
    tmp_path: Path, size: int, sizes: bool, ranges: bool
) -> None:
    shelf = lora_shelf(size, ranges=ranges, sizes=sizes)
    assert fetch(shelf, tmp_path).read_bytes() == shelf.files[LORA][FILE]
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_in_parts_that_are_asked_for_once(tmp_path: Path) -> None:
    shelf = lora_shelf(5000)
    fetch(shelf, tmp_path)
    starts = sorted(start for _, start, _ in shelf.opened)
    assert starts == [0, 1000, 2000, 3000, 4000, 5000]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    size=st.integers(0, 6000),
    cuts=st.lists(st.integers(0, 1200), max_size=8),
    ranges=st.booleans(),
    sizes=st.booleans(),
    hashes=st.booleans(),
    part=st.sampled_from([300, 1000, 10_000]),
)
def test_whole_after_any_breaks(
    tmp_path_factory: pytest.TempPathFactory,
    size: int,
    cuts: list[int],
    ranges: bool,
    sizes: bool,
    hashes: bool,
    part: int,
) -> None:
    folder = tmp_path_factory.mktemp("breaks")
    # Without a size nobody can tell that a stream was cut off, if the server doesn't.
    shelf = lora_shelf(size, ranges=ranges, sizes=sizes, hashes=hashes, cut=cuts if sizes else [])
    for _ in range(len(cuts) + 1):
        try:
            fetch(shelf, folder, part)
            break
        except SourceDown:
            continue
    assert (folder / FILE).read_bytes() == shelf.files[LORA][FILE]


def test_what_arrived_stays_over_a_break(tmp_path: Path) -> None:
    shelf = lora_shelf(4900, cut=[1000, 1000, 400])
    with pytest.raises(SourceDown):
        fetch(shelf, tmp_path)
    before = shelf.sent
    made, gained = transfer(shelf)
    made.fetch(made.listing.files[0], tmp_path)
    size = len(shelf.files[LORA][FILE])
    assert gained[0] >= 1000, "what was there counts first"
    assert sum(gained) == size
    assert shelf.sent - before == size - gained[0]


@pytest.mark.parametrize("part", [1000, 10_000])
def test_another_content_under_way_is_not_mixed_in(tmp_path: Path, part: int) -> None:
    shelf = lora_shelf(4000, hashes=False, cut=[1000, 50, 50, 50] if part == 1000 else [1500])
    made, _ = transfer(shelf, part)
    with pytest.raises(SourceDown):
        made.fetch(made.listing.files[0], tmp_path)
    shelf.etag, shelf.cut = "another", []
    with pytest.raises(Changed):
        made.fetch(made.listing.files[0], tmp_path)
    assert not (tmp_path / FILE).exists()
    assert fetch(shelf, tmp_path, part).read_bytes() == shelf.files[LORA][FILE]


@pytest.mark.parametrize("part", [1000, 10_000])
@pytest.mark.parametrize("etag", ["e", ""])
def test_of_two_contents_of_one_length_one_arrives(tmp_path: Path, part: int, etag: str) -> None:
    """What was begun is gone on with only where something says that it is the same."""
    shelf = lora_shelf(4000, hashes=False, etag=etag)
    shelf.cut = [1000, 50, 50, 50] if part == 1000 and etag else [1500]
    with pytest.raises(SourceDown):
        fetch(shelf, tmp_path, part)
    changed = weights(4000, salt=9)
    shelf.files[LORA][FILE], shelf.etag, shelf.cut = changed, etag and "another", []
    assert fetch(shelf, tmp_path, part).read_bytes() == changed


def test_without_hash_and_tag_one_stream_from_the_beginning(tmp_path: Path) -> None:
    shelf = lora_shelf(5000, hashes=False, etag="")
    fetch(shelf, tmp_path)
    assert shelf.opened == [(FILE, 0, None)]


@pytest.mark.parametrize("hashes", [True, False])
def test_what_came_of_a_part_is_not_asked_for_again(tmp_path: Path, hashes: bool) -> None:
    """However early each connection breaks: on slow lines none lives for a whole part."""
    shelf = lora_shelf(5000, hashes=hashes, cut=[300] * 100)
    size = len(shelf.files[LORA][FILE])
    for _ in range(100):
        try:
            fetch(shelf, tmp_path)
            break
        except SourceDown:
            continue
    assert (tmp_path / FILE).read_bytes() == shelf.files[LORA][FILE]
    assert shelf.sent == size
    assert len(shelf.opened) < size / 300 + 10


def test_a_part_that_was_noted_and_is_not_on_the_disk_comes_again(tmp_path: Path) -> None:
    shelf = lora_shelf(4900, cut=[1000, 1000, 400])
    with pytest.raises(SourceDown):
        fetch(shelf, tmp_path)
    os.truncate(tmp_path / f"{FILE}.part", 700)
    assert fetch(shelf, tmp_path).read_bytes() == shelf.files[LORA][FILE]


def test_without_a_hash_parts_of_before_a_power_cut_are_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = lora_shelf(4900, hashes=False, cut=[1000, 1000, 400])
    with pytest.raises(SourceDown):
        fetch(shelf, tmp_path)
    part = tmp_path / f"{FILE}.part"
    part.write_bytes(bytes(part.stat().st_size))
    monkeypatch.setattr(transfer_module, "boot_id", lambda: "another")
    assert fetch(shelf, tmp_path).read_bytes() == shelf.files[LORA][FILE]


def test_more_bytes_than_announced_are_not_taken(tmp_path: Path) -> None:
    shelf = lora_shelf(400, hashes=False)
    made, _ = transfer(shelf)
    shelf.files[LORA][FILE] += b"more"
    with pytest.raises(Changed):
        made.fetch(made.listing.files[0], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_stopped_by_its_gate(tmp_path: Path) -> None:
    shelf = lora_shelf(4000)

    def gate(size: int) -> None:
        if shelf.sent > 1500:
            raise Cancelled("stop")

    listing = shelf.list(LORA)
    made = Transfer(shelf, listing, 10**6, gate, lambda _size: None, 1000, 2)
    with pytest.raises(Cancelled):
        made.fetch(listing.files[0], tmp_path)
    assert not (tmp_path / FILE).exists()


# --- bandwidth -----------------------------------------------------------------------------------


def test_the_rate_is_one_for_all_who_share_the_file(tmp_path: Path) -> None:
    now = [0.0]
    one, other = (Throttle(tmp_path / "rate", 1000.0, lambda: now[0]) for _ in range(2))
    assert one.take(1000) == 0.0
    assert other.take(500) == pytest.approx(0.5)
    assert one.take(500) == pytest.approx(1.0)
    now[0] = 1.0
    assert other.take(1000) == pytest.approx(1.0)
    now[0] = 100.0
    assert one.take(1000) == 0.0, "no more than a second's worth is saved up"
    assert one.take(1) > 0.0


@given(st.lists(st.tuples(st.integers(1, 5000), st.floats(0, 3)), max_size=30))
def test_never_more_than_the_rate_and_one_second(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, float]]
) -> None:
    now = [0.0]
    throttle = Throttle(tmp_path_factory.mktemp("t") / "rate", 1000.0, lambda: now[0])
    taken = 0
    for size, wait in steps:
        now[0] += throttle.take(size)
        taken += size
        assert taken <= 1000.0 * (now[0] + 1.0) + 1e-6
        now[0] += wait


def test_a_machine_begun_anew_begins_with_a_full_bucket(tmp_path: Path) -> None:
    assert Throttle(tmp_path / "rate", 1000.0, lambda: 1e6).take(1000) == 0.0
    assert Throttle(tmp_path / "rate", 1000.0, lambda: 5.0).take(1000) == 0.0


def test_no_limit_writes_nothing(tmp_path: Path) -> None:
    assert Throttle(tmp_path / "rate", None).take(10**12) == 0.0
    assert list(tmp_path.iterdir()) == []
