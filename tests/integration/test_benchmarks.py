"""What the benchmarks are made of, in little: they are run by hand, and a change elsewhere that
breaks them would not be seen until then."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import engine_bench, engine_overhead, utilisation, warm_pool
from benchmarks.bare_loop import OURS, BareTask, at_torchs_defaults
from benchmarks.chain_world import Cards, chain_room, specs
from cluster.core.types import GigaBytes, GpuClass
from cluster.inference.determinism import make_deterministic
from cluster.inference.devices import Device, prepare, simulated
from devnet.models import SD15

pytestmark = pytest.mark.timeout(600)


async def test_a_coordinator_with_stand_in_cards_has_its_tasks_paid() -> None:
    async with chain_room(2, 0.5) as room:
        await room.until_joined()
        await room.send(specs(3, SD15[0]))
        assert len(room.cards.busy) == 3
        assert room.calls["eth_getLogs"] > 0
        assert len(room.fetches) >= 3, "each is asked for until the relay has it"


def test_how_busy_cards_were_is_counted_within_the_window() -> None:
    cards = Cards(utilisation.CARDS)
    # Before it, into it, within it, beyond it and after it.
    cards.busy += [(0.0, 9.0), (9.0, 11.0), (12.0, 16.0), (19.0, 30.0), (20.0, 24.0)]
    assert utilisation.share(cards, 10.0, 20.0) == (1.0 + 4.0 + 1.0) / (utilisation.CARDS * 10.0)


@pytest.mark.parametrize("benchmark", [warm_pool, engine_overhead])
def test_a_card_that_is_not_there_is_not_replaced_by_the_cpu(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", "--device", "cuda:1000"])
    with pytest.raises(SystemExit, match="--device cuda:1000"):
        benchmark.main()


CPU = simulated(0, "CPU+bench", GigaBytes(16))


def options(*words: str) -> argparse.Namespace:
    return engine_overhead.options().parse_args(words)


def test_cards_are_measured_on_models_of_the_real_sizes() -> None:
    gpu = Device("GPU-1", "cuda:0", GpuClass("NVIDIA H100+bench", GigaBytes(80)))
    full = engine_overhead.chosen(options(), gpu)
    tiny = engine_overhead.chosen(options(), CPU)
    assert [(each.size, each.dtype) for each in (full, tiny)] == [
        ("full", "float16"),
        ("tiny", "float32"),
    ]
    assert full.root != tiny.root
    asked = engine_overhead.chosen(options("--size", "tiny", "--dtype", "bfloat16"), gpu)
    assert (asked.size, asked.dtype, asked.root) == ("tiny", "bfloat16", tiny.root)


@pytest.mark.parametrize("family", sorted(engine_overhead.FAMILIES))
def test_the_engine_and_the_bare_loop_make_the_same(family: str, tiny_models: Path) -> None:
    words = ("--steps", "1", "--images", "1", "--models", str(tiny_models))
    what = engine_overhead.chosen(options(*words), CPU)
    bench = engine_bench.prepare(engine_overhead.FAMILIES[family], what, CPU, side=64)
    found = engine_bench.measure(bench, rounds=1)
    assert found["same_score"] is True
    assert found["peak_device_bytes"] is None, "counted on cards only"
    assert {name for name, figure in found.items() if isinstance(figure, float)} == {
        "ratio_seconds",
        "ratio_seconds_default",
        "ratio_seconds_determinism",
        "images_per_second",
        "seconds_engine",
        "seconds_bare",
        "seconds_default",
        "seconds_first",
        "seconds_load",
        "seconds_host_return",
        "seconds_lora_switch",
    }


def test_a_loop_in_another_process_that_ends_is_noticed(tmp_path: Path) -> None:
    gone = BareTask(str(tmp_path / "none"), False, "float32", "cpu", 64, 1, 1)
    with pytest.raises(RuntimeError, match="has ended"), at_torchs_defaults(gone):
        pass


def test_the_other_process_has_torchs_own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", os.environ | {"CUDA_VISIBLE_DEVICES": "GPU-1"})
    prepare(os.environ)
    make_deterministic(threads=None)
    started: list[dict[str, str]] = []

    def popen(*_: object, env: dict[str, str], **__: object) -> None:
        started.append(env)
        raise OSError("none here")

    monkeypatch.setattr(subprocess, "Popen", popen)
    task = BareTask("/none", False, "float32", "cpu", 64, 1, 1)
    with pytest.raises(OSError, match="none here"), at_torchs_defaults(task):
        pass
    assert os.environ.keys() > OURS
    (given,) = started
    assert given == {name: value for name, value in os.environ.items() if name not in OURS}
    assert given["CUDA_VISIBLE_DEVICES"] == "GPU-1"
    assert given["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
