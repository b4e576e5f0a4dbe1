"""The engine on tiny models: the same bits always."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from cluster.core.errors import (
    DeadlinePassed,
    TaskInvalid,
)
from cluster.core.ports import Order
from cluster.inference.engine import Engine
from cluster.inference.scoring import score_images
from devnet.models import BASES, SD15, SD15_LORA, SDXL, SDXL_LORA, make_models
from tests.integration.engine_world import (
    DEVICE,
    ONE_PIPELINE,
    ROOMY,
    STEPS,
    files,
    new_engine,
    open_png,
    order,
    run,
    two_images,
)


@pytest.fixture(scope="module")
def root(tiny_models: Path) -> Path:
    return tiny_models


@pytest.fixture(scope="module")
def engine(root: Path) -> Engine:
    return new_engine(root)


# --- what comes out ---------------------------------------------------------------------------


def test_files_and_score(engine: Engine) -> None:
    steps: list[tuple[int, int]] = []
    what = order(task_config={"num_images": 2, "image_width": 136, "image_height": 96})
    computed = engine.run(what, lambda: False, lambda *step: steps.append(step))
    assert [name for name, _ in computed.files] == ["0.png", "1.png"]
    assert computed.score == score_images([content for _, content in computed.files])
    assert len(computed.score) == 16
    assert computed.score[:8] != computed.score[8:]
    made = [(step, 2 * STEPS) for step in range(1, 2 * STEPS + 1)]
    reading = len(steps) - len(made)
    assert steps == [(0, 0)] * reading + made, "and none before: the models are being read"
    assert reading > 0
    assert computed.seconds > 0
    image = open_png(computed.files[0][1])
    assert (image.mode, image.size) == ("RGB", (136, 96))


def test_the_first_image_does_not_depend_on_how_many_follow(engine: Engine) -> None:
    assert run(engine, two_images()).files[0] == files(engine)[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"task_config": {"seed": 6}},
        {"task_config": {"cfg": 12}},
        {"task_config": {"steps": 4}},
        {"prompt": "a red dog in the forest"},
        {"prompt": "a photo of a cat++"},
        {"prompt": "a photo++ of a cat"},
        {"negative_prompt": "bad, blurry"},
        {"prompt": "a cat in the forest, " * 40},
        {"base_model": SD15[1]},
        {"lora": {"model": SD15_LORA}},
        {"lora": {"model": SD15_LORA, "weight": 30}},
        {"scheduler": {"method": "EulerAncestralDiscreteScheduler"}},
        {"scheduler": {"method": "LCMScheduler"}},
        {"scheduler": {"method": "DPMSolverMultistepScheduler", "args": {"solver_order": 1}}},
    ],
    ids=str,
)
def test_every_parameter_counts(engine: Engine, changes: dict[str, Any]) -> None:
    plain = run(engine, order())
    changed = run(engine, order(**changes))
    assert changed.files != plain.files
    if "prompt" in changes or "seed" in changes.get("task_config", {}):
        assert changed.score != plain.score
    assert run(engine, order()).files == plain.files


def test_long_prompts_are_not_truncated(engine: Engine) -> None:
    long = "a cat in the forest, " * 40
    assert files(engine, prompt=long + "a red dog") != files(engine, prompt=long + "a blue fish")


@pytest.mark.timeout(60)
def test_nested_brackets_dont_hang_the_card(engine: Engine) -> None:
    """A parser that remembers nothing needs hours for these."""
    assert files(engine, prompt="(" * 20 + "a cat" + ")" * 20, negative_prompt="(" * 20)


def test_sdxl(engine: Engine) -> None:
    plain = files(engine, base_model=SDXL)
    assert files(engine, base_model=SDXL, prompt="a photo++ of a cat") != plain
    assert files(engine, base_model=SDXL, negative_prompt="bad") != plain
    assert files(engine, base_model=SDXL, lora={"model": SDXL_LORA}) != plain
    assert files(engine, base_model=SDXL) == plain


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dtypes(engine: Engine, dtype: str) -> None:
    made = files(engine, dtype=dtype)
    assert (made == files(engine)) is (dtype == "float32")


# --- the same bits ----------------------------------------------------------------------------

SCRIPT = """
import sys
from pathlib import Path
from tests.integration.engine_world import new_engine, run, two_images
from devnet.models import SDXL
engine = new_engine(Path(sys.argv[1]))
print(run(engine, two_images()).score.hex(), run(engine, two_images(base_model=SDXL)).score.hex())
"""


@pytest.mark.parametrize(("host_bytes", "loads"), [(0, range(8, 11)), (ROOMY, [7])])
def test_same_bits_cold_warm_evicted_and_in_another_process(
    root: Path, host_bytes: int, loads: Collection[int]
) -> None:
    fresh = new_engine(root, ONE_PIPELINE, host_bytes)
    cold = run(fresh, two_images())
    warm = run(fresh, two_images())
    xl = run(fresh, two_images(base_model=SDXL))
    back = run(fresh, two_images())
    assert fresh.counts.loads in loads
    assert cold.files == warm.files == back.files
    if host_bytes:
        return
    made = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(root)],
        env=os.environ | {"PYTHONPATH": "."},
        capture_output=True,
        text=True,
        check=True,
    )
    assert made.stdout.split() == [cold.score.hex(), xl.score.hex()]


def test_same_bits_after_anything_else(root: Path) -> None:
    fresh = new_engine(root)
    plain = run(fresh, two_images()).files
    others: list[Order] = [
        two_images(lora={"model": SD15_LORA, "weight": 70}),
        two_images(scheduler={"method": "LCMScheduler", "args": {"beta_schedule": "linear"}}),
        two_images(lora={"model": SDXL_LORA}),
        two_images(base_model=SD15[1]),
        order(deadline=1.0),
    ]
    for other in others:
        try:
            run(fresh, other)
        except (TaskInvalid, DeadlinePassed):
            continue
        finally:
            assert run(fresh, two_images()).files == plain
    assert fresh.counts.loads == 4, "the two share all but their UNets"


def test_lora_on_a_warm_base_equals_one_on_a_cold_base(engine: Engine, root: Path) -> None:
    with_lora = order(lora={"model": SD15_LORA})
    run(engine, order())
    assert run(engine, with_lora).files == run(new_engine(root), with_lora).files


def test_state_names_what_is_warm_and_on_disk(root: Path) -> None:
    fresh = new_engine(root, ONE_PIPELINE)
    assert fresh.state().warm == fresh.state().in_host_memory == frozenset()
    assert fresh.state().on_disk == BASES
    seen: list[tuple[int, int]] = []

    def on_step(_step: int, steps: int) -> None:
        if steps:
            seen.append((fresh.state().step, fresh.state().steps))

    for base in (*SD15, SDXL):
        fresh.run(order(base_model=base), lambda: False, on_step)
    assert seen[:STEPS] == [(step, STEPS) for step in range(1, STEPS + 1)]
    state = fresh.state()
    assert (state.step, state.steps) == (0, 0)
    assert [key.split("|")[0] for key in state.warm] == [SDXL]
    assert state.in_host_memory == {*SD15, SDXL}
    assert fresh.gpu_class == DEVICE.gpu_class


def test_models_are_made_once(root: Path) -> None:
    stamp = root / "crynux-devnet" / "stamp"
    before = stamp.stat().st_mtime_ns
    make_models(root)
    assert stamp.stat().st_mtime_ns == before
