"""What is near the card and may have gone bad there is read from disk anew."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.core.errors import Cancelled, DeviceFault, DeviceFaultKind
from cluster.core.types import TaskType, Tier
from cluster.inference import canary, diffusion
from cluster.inference.engine import Engine
from cluster.inference.packing import Packing
from cluster.inference.pipelines import Pipeline
from cluster.inference.pool import Pool, _Part
from devnet.models import (
    INVERSION_TOKEN,
    LLM,
    SD15,
    SD15_INVERSION,
    SD15_LORA,
    SDXL,
    SDXL_LORA,
)
from tests.integration.engine_world import ONE_PIPELINE, ROOMY, fault_of, new_engine, order, run


def go_bad(engine: Engine, part: str, value: float) -> None:
    """As when memory fails: the weights of the part are another number, wherever they lie."""
    for there in engine._pool._parts.values():
        if there.source.folder.name == part:
            for tensor in (*there.module.parameters(), *(there.host or ())):
                if tensor.is_floating_point():
                    tensor.data.fill_(value)


@pytest.mark.parametrize(("part", "host"), [("unet", 0), ("text_encoder", ROOMY)])
def test_what_gave_a_bad_result_is_not_used_again(tiny_models: Path, part: str, host: int) -> None:
    fresh = new_engine(tiny_models, host_bytes=host)
    expected = run(fresh, order()).files
    go_bad(fresh, part, float("nan"))
    loads = fresh.counts.loads
    fault = fault_of(fresh, order())
    assert isinstance(fault, DeviceFault)
    assert fault.kind is DeviceFaultKind.BAD_RESULT
    assert run(fresh, order()).files == expected
    assert fresh.counts.loads == 2 * loads


def test_a_language_model_that_gave_a_bad_result_is_not_used_again(tiny_models: Path) -> None:
    said = {"messages": [{"role": "user", "content": "a cat"}]}
    task = {"model": LLM, "generation_config": {"max_new_tokens": 3}} | said
    chat = replace(order(), task_type=TaskType.LLM, parameters=json.dumps(task))
    fresh = new_engine(tiny_models)
    expected = run(fresh, chat).files
    go_bad(fresh, LLM.partition("/")[2], float("nan"))
    fault = fault_of(fresh, chat)
    assert isinstance(fault, DeviceFault)
    assert fault.kind is DeviceFaultKind.BAD_RESULT
    assert run(fresh, chat).files == expected


def test_an_order_of_a_card_in_doubt_uses_nothing_from_before(tiny_models: Path) -> None:
    fresh = new_engine(tiny_models)
    assert fresh.preload([SD15[0]]) == ()
    loads = fresh.counts.loads
    expected = run(fresh, replace(order(), afresh=True)).files
    assert fresh.counts.loads == loads, "no order has computed with it yet"
    go_bad(fresh, "unet", 0.01)
    assert run(fresh, order()).files != expected
    assert run(fresh, replace(order(), afresh=True)).files == expected
    assert run(fresh, order()).files == expected
    assert fresh.counts.loads == 2 * loads


def test_what_a_run_changed_is_thrown_away(
    tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = new_engine(tiny_models)
    expected, real = run(fresh, order()).files, diffusion.make_images
    loads = fresh.counts.loads

    def make_images(pipeline: Pipeline, *others: Any) -> None:
        real(pipeline, *others)
        layer = pipeline.base.unet.conv_out
        layer.bias = torch.nn.Parameter(layer.bias.detach() + 1, requires_grad=False)

    monkeypatch.setattr("cluster.inference.engine.make_images", make_images)
    assert run(fresh, order()).files == expected
    monkeypatch.undo()
    assert run(fresh, order()).files == expected
    assert fresh.counts.loads == loads + 1


def test_a_look_through_the_weights_after_a_bad_result_is_progress(tiny_models: Path) -> None:
    """On a slow disk it takes longer than a card may be silent."""
    fresh, told = new_engine(tiny_models), list[tuple[int, int]]()
    run(fresh, order())
    go_bad(fresh, "unet", float("nan"))
    with pytest.raises(DeviceFault) as caught:
        fresh.run(order(), lambda: False, lambda *step: told.append(step))
    assert caught.value.kind is DeviceFaultKind.BAD_RESULT
    assert told.count(told[-1]) > 2, "where it had come to, again and again"


# --- memory that fails ----------------------------------------------------------------------------


def flip(values: Iterable[torch.Tensor]) -> None:
    """One low bit of a weight."""
    largest = max(values, key=lambda each: each.numel())
    largest.data.view(torch.uint8).view(-1)[0] ^= 1


def unet_of(engine: Engine, model: str) -> _Part:
    wanted = f"{model}/unet"
    (found,) = (
        part
        for part in engine._pool._parts.values()
        if part.source.folder.as_posix().endswith(wanted)
    )
    return found


@pytest.mark.parametrize("afresh", [False, True], ids=["by schedule", "in doubt"])
def test_a_canary_finds_what_has_gone_bad_on_the_card(tiny_models: Path, afresh: bool) -> None:
    """In the weights of another model than its own."""
    fresh = new_engine(tiny_models, host_bytes=0)
    asked = replace(order(base_model=SD15[1]), task=canary.TASK, afresh=afresh)
    said = run(fresh, asked).score
    expected = run(fresh, order()).files
    held = fresh.state().warm
    flip(unet_of(fresh, SD15[0]).module.parameters())
    fault = fault_of(fresh, asked)
    assert isinstance(fault, DeviceFault)
    assert fault.kind is DeviceFaultKind.MEMORY_CHANGED
    assert "/unet no longer holds what was read: on the card" in str(fault)
    assert fresh.state().warm < held, "the part is gone"
    assert fresh.usage().spoilt == 1
    assert run(fresh, asked).score == said
    assert run(fresh, order()).files == expected


def test_a_canary_finds_what_has_gone_bad_in_host_memory(tiny_models: Path) -> None:
    fresh = new_engine(tiny_models, ONE_PIPELINE)
    expected = run(fresh, order()).files
    asked = replace(order(base_model=SD15[1]), task=canary.TASK)
    said = run(fresh, asked).score
    part = unet_of(fresh, SD15[0])
    assert not part.on_device
    flip(part.host or ())
    assert run(fresh, asked).score == said, "it is no card's fault"
    assert fresh.usage().spoilt == 1
    again = run(fresh, order())
    assert (again.files, again.tier) == (expected, Tier.DISK)


def test_what_went_bad_in_host_memory_is_read_anew(tiny_models: Path) -> None:
    fresh = new_engine(tiny_models, ONE_PIPELINE)
    expected = run(fresh, order()).files
    run(fresh, order(base_model=SD15[1]))
    flip(unet_of(fresh, SD15[0]).host or ())
    again = run(fresh, order())
    assert (again.files, again.tier) == (expected, Tier.DISK)
    assert fresh.usage().spoilt == 1


def test_no_task_leaves_anything_that_looks_like_bad_memory(tiny_models: Path) -> None:
    """Not a LoRA, not words of its own, not a VAE that was made wider for an image."""
    said = {"messages": [{"role": "user", "content": "a cat"}]}
    chat = {"model": LLM, "generation_config": {"max_new_tokens": 3}} | said
    orders = [
        order(lora={"model": SD15_LORA}),
        order(textual_inversion=SD15_INVERSION, prompt=f"a {INVERSION_TOKEN} cat"),
        order(base_model=SDXL, dtype="float16"),
        order(base_model=SDXL, dtype="float16", lora={"model": SDXL_LORA}),
        replace(order(), task_type=TaskType.LLM, parameters=json.dumps(chat)),
        order(base_model=SD15[1]),
    ]
    asked = replace(order(), task=canary.TASK)
    for device, host in ((ONE_PIPELINE, 0), (ONE_PIPELINE, ROOMY), (ROOMY, 0)):
        fresh = new_engine(tiny_models, device, host)
        expected = run(fresh, asked).score
        for each in orders:
            run(fresh, each)
            assert run(fresh, asked).score == expected
        assert fresh.usage().spoilt == 0


def test_proving_gives_way_to_who_cancels_it(
    tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = new_engine(tiny_models)
    run(fresh, order())
    monkeypatch.setattr(Pool, "hold", lambda *_: pytest.fail("it has gone on"))
    looks: list[int] = []
    asked = replace(order(), task=canary.TASK)
    with pytest.raises(Cancelled):
        fresh.run(asked, lambda: len(looks) >= 2, lambda step, _steps: looks.append(step))
    assert looks == [0, 0]


def test_nothing_is_proven_for_a_task(tiny_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = new_engine(tiny_models)
    expected = run(fresh, order()).files
    monkeypatch.delattr(Packing, "digest")
    assert run(fresh, order()).files == expected


# --- preloaded ------------------------------------------------------------------------------------


def test_a_preloaded_models_old_files_leave_the_card(tiny_models: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_models / SD15[0], tmp_path / "org" / "model")
    file = tmp_path / "org" / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    small = new_engine(tmp_path, ONE_PIPELINE, 0)
    for change in range(3):
        weights = load_file(file)
        weights["conv_out.bias"] += change
        save_file(weights, file, metadata={"format": "pt"})
        assert small.preload(["org/model"]) == ()
        assert small.preloaded == {"org/model"}
        assert small.usage().device_bytes <= ONE_PIPELINE


def test_what_is_distrusted_is_to_be_preloaded_again(tiny_models: Path) -> None:
    fresh = new_engine(tiny_models)
    assert fresh.preload([SD15[0], LLM]) == ()
    go_bad(fresh, "unet", float("nan"))
    fault_of(fresh, order())
    assert fresh.preloaded == {LLM}
    fresh.distrust()
    assert fresh.preloaded == frozenset()
    assert fresh.usage().device_bytes == 0


# --- read ahead -----------------------------------------------------------------------------------


def test_a_key_that_nobody_wants_any_more_is_not_made(tiny_models: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_models / SD15[0], tmp_path / "org" / "model")
    fresh, asked = new_engine(tmp_path), []

    def wanted() -> bool:
        asked.append(1)
        return len(asked) < 3

    with pytest.raises(Cancelled):
        fresh.prefetch(order(base_model="org/model"), wanted)
    assert len(asked) == 3
