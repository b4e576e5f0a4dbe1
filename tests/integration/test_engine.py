"""The engine on tiny models: the same bits always, and every failure by whose fault it is."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from cluster.core.errors import (
    Cancelled,
    ClusterError,
    DeadlinePassed,
    DeviceFault,
    DeviceFaultKind,
    ModelUnavailable,
    ModelUnavailableKind,
    TaskInvalid,
    TaskUnsupported,
)
from cluster.core.ports import Computed, Order
from cluster.core.types import AttemptId, Commitment, GigaBytes, TaskType, Timestamp
from cluster.inference import engine as engine_module
from cluster.inference.devices import simulated
from cluster.inference.engine import Engine, Limits
from cluster.inference.parameters import SDParameters
from cluster.inference.recipes import Recipe, recipe_for
from cluster.inference.scoring import score_images
from cluster.models.store import ModelStore
from devnet.models import BASES, SD15, SD15_LORA, SDXL, SDXL_LORA, make_models

DEVICE = simulated(0, "NVIDIA GeForce RTX 4090+docker", GigaBytes(24))
SIDE = 128
STEPS = 3


@pytest.fixture(scope="module")
def root(tiny_models: Path) -> Path:
    return tiny_models


@pytest.fixture(scope="module")
def engine(root: Path) -> Engine:
    return new_engine(root)


ROOMY = 2**30
ONE_PIPELINE = 7 * 2**20
"""Any of the tiny pipelines fits into that, and no two of them."""


def new_engine(root: Path, device_bytes: int = ROOMY, host_bytes: int = ROOMY) -> Engine:
    limits = Limits(device_bytes, host_bytes, threads=1)
    return Engine(DEVICE, ModelStore(root), time.time, limits)


def order(deadline: float | None = None, **changes: Any) -> Order:
    task = {"image_width": SIDE, "image_height": SIDE, "steps": STEPS, "num_images": 1, "seed": 5}
    task |= changes.pop("task_config", {})
    fields = {"base_model": SD15[0], "prompt": "a photo of a cat", "task_config": task} | changes
    return Order(
        AttemptId("attempt"),
        Commitment("0x01"),
        TaskType.SD,
        json.dumps(fields),
        None if deadline is None else Timestamp(deadline),
    )


def run(engine: Engine, what: Order) -> Computed:
    return engine.run(what, lambda: False, lambda _step, _steps: None)


def files(engine: Engine, **changes: Any) -> tuple[tuple[str, bytes], ...]:
    return run(engine, order(**changes)).files


def fault_of(engine: Engine, what: Order) -> ClusterError:
    with pytest.raises(ClusterError) as caught:
        run(engine, what)
    return caught.value


def two_images(**changes: Any) -> Order:
    return order(task_config={"num_images": 2}, **changes)


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
    image = _open(computed.files[0][1])
    assert (image.mode, image.size) == ("RGB", (136, 96))


def _open(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png))


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
from tests.integration.test_engine import new_engine, run, two_images
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


# --- the task's fault -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "model"), [(SD15[0], SDXL_LORA), (SDXL, SD15_LORA)], ids=["xl on 1.5", "1.5 on xl"]
)
def test_a_lora_of_the_wrong_family_is_the_tasks_fault(
    engine: Engine, base: str, model: str
) -> None:
    fault = fault_of(engine, order(base_model=base, lora={"model": model}))
    assert isinstance(fault, TaskInvalid)


def test_wrong_family_in_the_kohya_format(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "store")
    folder = tmp_path / "store" / "org" / "kohya"
    folder.mkdir(parents=True)
    _kohya(folder / "narrow.safetensors", 64)
    _kohya(folder / "wide.safetensors", 128)
    _kohya(folder / "silent.safetensors", None)
    fresh = new_engine(tmp_path / "store")
    plain = files(fresh)

    def with_lora(name: str) -> Order:
        return order(lora={"model": "org/kohya", "weight_file_name": f"{name}.safetensors"})

    assert run(fresh, with_lora("narrow")).files != plain
    assert isinstance(fault_of(fresh, with_lora("wide")), TaskInvalid)
    assert not isinstance(_outcome(fresh, with_lora("silent")), TaskInvalid)
    assert files(fresh) == plain


@pytest.mark.parametrize("prefix", ["unet.nowhere.", "unet.junk.down_blocks.1."])
def test_what_a_lora_holds_for_layers_that_the_base_has_not_is_nobodys_fault(
    root: Path, tmp_path: Path, prefix: str
) -> None:
    """Others compute with it: to report an error would cost the stake."""
    shutil.copytree(root, tmp_path / "store")
    folder = tmp_path / "store" / "org" / "odd"
    folder.mkdir(parents=True)
    torch.manual_seed(3)
    real = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k"
    nowhere = f"{prefix}attentions.0.transformer_blocks.0.attn2.to_k"
    weights = {
        f"{real}.lora_A.weight": torch.randn(4, 64),
        f"{real}.lora_B.weight": torch.randn(64, 4),
        f"{nowhere}.lora_A.weight": torch.randn(4, 999),
        f"{nowhere}.lora_B.weight": torch.randn(64, 4),
    }
    save_file(weights, folder / "odd.safetensors")
    fresh = new_engine(tmp_path / "store")
    plain = files(fresh)
    named = {"model": "org/odd", "weight_file_name": "odd.safetensors"}
    assert run(fresh, order(lora=named)).files != plain
    assert files(fresh) == plain


@pytest.mark.parametrize(
    ("rows", "fill"), [(63, 1.0), (64, float("nan")), (64, float("inf"))], ids=str
)
def test_a_lora_that_no_card_can_compute_with_is_no_fault_of_the_card(
    root: Path, tmp_path: Path, rows: int, fill: float
) -> None:
    shutil.copytree(root, tmp_path / "store")
    folder = tmp_path / "store" / "org" / "broken"
    folder.mkdir(parents=True)
    layer = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k"
    weights = {
        f"{layer}.lora_A.weight": torch.full((4, 64), fill),
        f"{layer}.lora_B.weight": torch.ones(rows, 4),
    }
    save_file(weights, folder / "broken.safetensors")
    fresh = new_engine(tmp_path / "store")
    plain = files(fresh)
    named = {"model": "org/broken", "weight_file_name": "broken.safetensors"}
    fault = fault_of(fresh, order(lora=named))
    assert isinstance(fault, ModelUnavailable)
    assert fault.kind is ModelUnavailableKind.DAMAGED
    assert files(fresh) == plain


def test_a_lora_that_nobody_named_may_be_another_one_elsewhere(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "store")
    folder = tmp_path / "store" / "org" / "kohya"
    folder.mkdir(parents=True)
    _kohya(folder / "the_only_one_here.safetensors", 128)
    fault = fault_of(new_engine(tmp_path / "store"), order(lora={"model": "org/kohya"}))
    assert isinstance(fault, ModelUnavailable)


def test_a_lora_by_link_may_be_another_one_for_others(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(root, tmp_path / "store")
    folder = tmp_path / "store" / "org" / "kohya"
    folder.mkdir(parents=True)
    _kohya(folder / "wide.safetensors", 128)

    def as_if_fetched(params: SDParameters, store: ModelStore) -> Recipe:
        assert params.lora is not None
        here = params.lora.model_copy(update={"model": "org/kohya"})
        return recipe_for(params.model_copy(update={"lora": here}), store)

    monkeypatch.setattr(engine_module, "recipe_for", as_if_fetched)
    link = {"model": "https://host/wide.safetensors", "weight_file_name": "wide.safetensors"}
    fault = fault_of(new_engine(tmp_path / "store"), order(lora=link))
    assert isinstance(fault, ModelUnavailable)


def _outcome(engine: Engine, what: Order) -> Computed | ClusterError:
    try:
        return run(engine, what)
    except ClusterError as error:
        return error


def _kohya(file: Path, width: int | None) -> None:
    torch.manual_seed(3)
    block = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_"
    layer = f"{block}attn1_to_k" if width is None else f"{block}attn2_to_k"
    save_file(
        {
            f"{layer}.lora_down.weight": torch.randn(4, width or 64),
            f"{layer}.lora_up.weight": torch.randn(64, 4),
            f"{layer}.alpha": torch.tensor(4.0),
        },
        file,
    )


def test_bad_parameters_are_the_tasks_fault(engine: Engine) -> None:
    assert isinstance(fault_of(engine, order(task_config={"steps": 0})), TaskInvalid)
    bad = order(scheduler={"method": "DDIMScheduler"})
    assert isinstance(fault_of(engine, bad), TaskInvalid)


# --- not the task's fault ---------------------------------------------------------------------


def _dpm(**args: object) -> dict[str, object]:
    return {"scheduler": {"method": "DPMSolverMultistepScheduler", "args": args}}


@pytest.mark.parametrize(
    "changes",
    [
        {"refiner": {"model": SDXL}},
        {"scheduler": {"method": "LCMScheduler", "args": {"beta_schedule": "wavy"}}},
        {"scheduler": {"method": "LCMScheduler", "args": {"original_inference_steps": 1}}},
        _dpm(prediction_type="x"),
        _dpm(solver_order=0),
        _dpm(thresholding=True, dynamic_thresholding_ratio=5.0),
        _dpm(beta_start=-1.0),
        _dpm(beta_end=3.0),
        {"prompt": "(a)0.9 b " * 800},
        {"negative_prompt": "a cat, " * 300 + "(b)0.5 c " * 60},
        {"version": "9.0.0"},
        {"prompt": '("a", "b").blend(1)'},
        {"prompt": "(" * 2000},
        {"prompt": "cat" + "+" * 7900},
        {"prompt": "(a cat)" + "9" * 400},
        {"negative_prompt": "(a cat)" + "9" * 400, "base_model": SDXL},
    ],
    ids=lambda changes: str(changes)[:60],
)
def test_what_is_not_run_is_unsupported(engine: Engine, changes: dict[str, Any]) -> None:
    assert isinstance(fault_of(engine, order(**changes)), TaskUnsupported)


def test_missing_models(engine: Engine) -> None:
    picture = "data:image/png;base64,iVBORw0KGgo="
    for what in (
        order(base_model="org/none"),
        order(lora={"model": "org/none"}),
        order(unet="org/none"),
        order(vae="org/none"),
        order(textual_inversion="org/none"),
        order(controlnet={"model": "org/none", "image_dataurl": picture}),
        order(base_model=SDXL, refiner={"model": "org/none"}),
    ):
        fault = fault_of(engine, what)
        assert isinstance(fault, ModelUnavailable)
        assert fault.kind is ModelUnavailableKind.NOT_HERE


def test_cancelled_between_steps(engine: Engine) -> None:
    steps: list[int] = []
    what = order(task_config={"steps": 20})
    with pytest.raises(Cancelled):
        engine.run(what, lambda: len(steps) >= 2, lambda step, _: steps.append(step))
    assert steps == [1, 2]
    assert engine.state().step == 0


def test_deadline(engine: Engine, root: Path) -> None:
    assert isinstance(fault_of(engine, order(deadline=time.time() - 1)), DeadlinePassed)
    ticks = iter(range(1000))
    slow = Engine(DEVICE, ModelStore(root), lambda: next(ticks), Limits(threads=1))
    assert isinstance(fault_of(slow, order(deadline=4.0)), DeadlinePassed)


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Iterator[Path]:
    """A store of its own with `org/model`, to be spoilt."""
    shutil.copytree(root / SD15[0], tmp_path / "org" / "model")
    yield tmp_path


def spoil(root: Path, part: str, name: str, value: float) -> None:
    from safetensors.torch import load_file, save_file

    file = root / "org" / "model" / part / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors[name].fill_(value)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("text_encoder", "final_layer_norm.weight", float("nan")),
        ("unet", "conv_out.weight", float("nan")),
        ("vae", "decoder.conv_out.weight", float("nan")),
        ("vae", "decoder.conv_out.weight", 0.0),
    ],
)
def test_a_bad_result_is_the_devices_fault(root: Path, part: str, name: str, value: float) -> None:
    """As of a card whose memory fails, on which the same files were well before."""
    fresh = new_engine(root)
    run(fresh, order())
    for there in fresh._pool._parts.values():
        if there.source.folder.name == part:
            there.module.get_parameter(name).data.fill_(value)
    fault = fault_of(fresh, order())
    assert isinstance(fault, DeviceFault)
    assert fault.kind is DeviceFaultKind.BAD_RESULT


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_weights_that_are_no_numbers_are_no_fault_of_the_card(copy: Path, part: str) -> None:
    """Whoever sends tasks may name a model of his own."""
    name = "conv_out.weight" if part == "unet" else "decoder.conv_out.weight"
    spoil(copy, part, name, float("nan"))
    fault = fault_of(new_engine(copy), order(base_model="org/model"))
    assert isinstance(fault, ModelUnavailable)
    assert fault.kind is ModelUnavailableKind.DAMAGED
    assert f"{part}/diffusion_pytorch_model.safetensors" in str(fault)


def test_a_result_of_one_colour_is_the_devices_fault(copy: Path) -> None:
    spoil(copy, "vae", "decoder.conv_out.weight", 0.0)
    fault = fault_of(new_engine(copy), order(base_model="org/model"))
    assert isinstance(fault, DeviceFault)
    assert fault.kind is DeviceFaultKind.BAD_RESULT


def test_damaged_weights(copy: Path) -> None:
    file = copy / "org" / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    fault = fault_of(new_engine(copy), order(base_model="org/model"))
    assert isinstance(fault, ModelUnavailable)
    assert fault.kind is ModelUnavailableKind.DAMAGED


def test_the_safety_checker_blanks_when_it_is_on(copy: Path) -> None:
    _add_safety_checker(copy / "org" / "model")
    fresh = new_engine(copy)
    blanked = run(fresh, order(base_model="org/model"))
    assert _open(blanked.files[0][1]).getextrema() == ((0, 0),) * 3
    seen = files(fresh, base_model="org/model", task_config={"safety_checker": False})
    assert _open(seen[0][1]).getextrema() != ((0, 0),) * 3
    assert fresh.counts.loads == 4


def _add_safety_checker(folder: Path) -> None:
    """One that flags everything: its thresholds are below any similarity."""
    from diffusers.pipelines.stable_diffusion.safety_checker import (
        StableDiffusionSafetyChecker,
    )
    from transformers import CLIPConfig, CLIPImageProcessor

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision = sizes | {"num_attention_heads": 2, "image_size": 32, "patch_size": 16}
    config = CLIPConfig(vision_config=vision, projection_dim=8)
    checker: Any = StableDiffusionSafetyChecker(config)
    checker.concept_embeds_weights.data.fill_(-2)
    checker.save_pretrained(folder / "safety_checker")
    size = {"height": 32, "width": 32}
    processor: Any = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    processor.save_pretrained(folder / "feature_extractor")
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))


def test_a_bug_of_ours_is_the_devices_fault(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make_images(*_: Any) -> Any:
        raise ZeroDivisionError("ours\nalone")

    monkeypatch.setattr("cluster.inference.engine.make_images", make_images)
    fault = fault_of(new_engine(root), order())
    assert isinstance(fault, DeviceFault)
    assert fault.kind is DeviceFaultKind.OTHER
    assert "\n" not in str(fault)


def test_models_are_made_once(root: Path) -> None:
    stamp = root / "crynux-devnet" / "stamp"
    before = stamp.stat().st_mtime_ns
    make_models(root)
    assert stamp.stat().st_mtime_ns == before
