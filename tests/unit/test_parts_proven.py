"""Memory that fails: what lies near the card is proven by the checksum of what was read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import pytest
import torch
from structlog.testing import capture_logs

from cluster.core.errors import Cancelled, DeviceFault, DeviceFaultKind
from cluster.inference import pool
from cluster.inference.packing import Packing
from cluster.inference.parts import PartKey
from cluster.inference.pool import Pool, Whereabouts
from tests.unit.test_parts_pool import Shop, part, roles


@pytest.fixture
def shop() -> Shop:
    return Shop()


def nobody_asks() -> None:
    pass


def flip(values: Iterable[torch.Tensor]) -> None:
    """One bit of the first weight, and a low one: nothing of it would be seen."""
    next(iter(values)).data.view(torch.int32)[3, 5] ^= 1


def waiting(pool: Pool, name: str) -> Sequence[torch.Tensor]:
    return pool._parts[PartKey(name)].host or ()


def test_what_was_left_alone_is_what_was_read(shop: Shop) -> None:
    pool = shop.pool(device=2, host=2)
    for name in ("a", "bb", "ccc", "a", "bb"):
        pool.hold(roles(name))
        assert pool.verify(nobody_asks) == {}
    pool.clear()
    assert pool.verify(nobody_asks) == {}
    assert pool.counts.spoilt == 0


def test_a_bit_that_flips_on_the_card_is_found(shop: Shop) -> None:
    pool = shop.pool(host=0)
    held = pool.hold(roles("a", "bb"))
    flip(held["a"].parameters())
    with capture_logs() as logs:
        found = pool.verify(nobody_asks)
    assert found == {"a": "/a no longer holds what was read: on the card"}
    assert [(each["event"], each["problem"]) for each in logs] == [
        ("weights_changed_in_memory", found[PartKey("a")])
    ]
    assert pool.counts.spoilt == 1
    pool.discard(found.keys())
    assert bool((next(pool.hold(roles("a"))["a"].parameters()) == 1.0).all())
    assert shop.loaded == ["a", "bb", "a"]
    assert pool.verify(nobody_asks) == {}


def test_a_bit_that_flips_in_host_memory_is_found(shop: Shop) -> None:
    pool = shop.pool(device=1)
    pool.hold(roles("a"))
    pool.hold(roles("bb"))
    flip(waiting(pool, "a"))
    with capture_logs() as logs:
        assert pool.verify(nobody_asks) == {}, "it is no card's fault"
    assert [each["problem"] for each in logs] == [
        "/a no longer holds what was read: in host memory"
    ]
    assert pool.where().host == {"bb"}
    assert pool.counts.spoilt == 1
    pool.hold(roles("a"))
    assert shop.loaded == ["a", "bb", "a"]


def test_what_went_bad_as_it_waited_is_loaded_anew(shop: Shop) -> None:
    pool = shop.pool(device=1)
    pool.hold(roles("a"))
    pool.hold(roles("bb"))
    flip(waiting(pool, "a"))
    with capture_logs() as logs:
        held = pool.hold(roles("a"))
    assert [each["problem"] for each in logs] == [
        "/a no longer holds what was read: after its return to the card"
    ]
    assert all(bool((tensor == 1.0).all()) for tensor in held["a"].parameters())
    assert shop.loaded == ["a", "bb", "a"]
    assert (pool.counts.loads, pool.counts.spoilt) == (3, 1)
    assert pool.verify(nobody_asks) == {}


@pytest.mark.parametrize("host", [0, 100])
def test_what_never_gets_to_the_card_as_it_was_read_is_the_cards_fault(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, host: int
) -> None:
    made, point = shop.pool(host=host), pool._point

    def badly(module: torch.nn.Module, values: Sequence[torch.Tensor]) -> None:
        point(module, values)
        if made._parts or not host:  # on its way to the card, that is
            flip(module.parameters())

    monkeypatch.setattr(pool, "_point", badly)
    with pytest.raises(DeviceFault) as caught:
        made.hold(roles("a"))
    assert caught.value.kind is DeviceFaultKind.MEMORY_CHANGED
    assert str(caught.value) == "/a no longer holds what was read: as it came to the card"
    assert made.where() == Whereabouts()
    monkeypatch.undo()
    assert made.hold(roles("a"))


def test_what_is_quantized_is_proven_too(shop: Shop) -> None:
    pool = shop.pool()
    held = pool.hold({"a": replace(part("a"), bits=4)})
    assert pool.verify(nobody_asks) == {}
    flip(held["a"].parameters())
    assert pool.verify(nobody_asks).keys() == {"a"}


def test_what_computing_has_made_another_part_of_is_not_memorys_doing(shop: Shop) -> None:
    pool = shop.pool(host=0)
    held = pool.hold(roles("a", "bb"))
    for tensor in held["a"].parameters():
        tensor.data = tensor.data[:2].clone()
    held["bb"].register_buffer("reckoned", torch.ones(3))
    assert pool.verify(nobody_asks) == {}


def test_proving_gives_way_between_pieces(shop: Shop) -> None:
    pool = shop.pool()
    pool.hold(roles("a", "bb", "ccc"))
    looks: list[int] = []

    def look() -> None:
        looks.append(1)
        if len(looks) == 2:
            raise Cancelled("an attempt waits")

    with pytest.raises(Cancelled):
        pool.verify(look)
    assert len(looks) == 2
    assert pool.where().device == {"a", "bb", "ccc"}


def test_nothing_is_proven_again_that_is_there(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be paid for by every task."""
    pool = shop.pool()
    pool.hold(roles("a", "bb"))
    monkeypatch.delattr(Packing, "digest")
    pool.hold(roles("a", "bb"))


def test_proving_changes_nothing(shop: Shop) -> None:
    pool = shop.pool()
    module = pool.hold(roles("a"))["a"]
    before = [(each, each.data_ptr(), each.requires_grad) for each in module.parameters()]
    pool.verify(nobody_asks)
    after = [(each, each.data_ptr(), each.requires_grad) for each in module.parameters()]
    assert [each[1:] for each in after] == [each[1:] for each in before]
    assert pool.changed(roles("a")) == frozenset()
