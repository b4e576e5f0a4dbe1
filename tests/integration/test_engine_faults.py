"""Every failure of the engine is typed by whose fault it is."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
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
from cluster.inference import engine as engine_module
from cluster.inference.engine import Engine, Limits
from cluster.inference.parameters import SDParameters
from cluster.inference.recipes import Recipe, recipe_for
from cluster.models.store import ModelStore
from devnet.models import SD15, SD15_LORA, SDXL, SDXL_LORA
from tests.integration.engine_world import (
    DEVICE,
    fault_of,
    files,
    new_engine,
    open_png,
    order,
    run,
)


@pytest.fixture(scope="module")
def root(tiny_models: Path) -> Path:
    return tiny_models


@pytest.fixture(scope="module")
def engine(root: Path) -> Engine:
    return new_engine(root)


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
    for name, width in (("narrow", 64), ("wide", 128), ("silent", None)):
        folder = tmp_path / "store" / "org" / name
        folder.mkdir(parents=True)
        _kohya(folder / f"{name}.safetensors", width)
    fresh = new_engine(tmp_path / "store")
    plain = files(fresh)

    def with_lora(name: str) -> Order:
        return order(lora={"model": f"org/{name}", "weight_file_name": f"{name}.safetensors"})

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
    ("rows", "fill"),
    [(63, 1.0), (0, 1.0), (64, float("nan")), (64, float("inf")), (64, 3e38)],
    ids=str,
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
    }
    if rows:
        weights[f"{layer}.lora_B.weight"] = torch.ones(rows, 4)
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


def test_a_named_lora_beside_others_may_be_another_one_elsewhere(
    root: Path, tmp_path: Path
) -> None:
    shutil.copytree(root, tmp_path / "store")
    folder = tmp_path / "store" / "org" / "kohya"
    folder.mkdir(parents=True)
    _kohya(folder / "narrow.safetensors", 64)
    _kohya(folder / "wide.safetensors", 128)
    fresh = new_engine(tmp_path / "store")

    def with_lora(name: str) -> Order:
        return order(lora={"model": "org/kohya", "weight_file_name": f"{name}.safetensors"})

    assert run(fresh, with_lora("narrow")).files != files(fresh)
    assert isinstance(fault_of(fresh, with_lora("wide")), ModelUnavailable)


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
        {
            "dtype": "float16",
            "scheduler": {
                "method": "EulerAncestralDiscreteScheduler",
                "args": {
                    "timestep_spacing": "trailing",
                    "beta_schedule": "linear",
                    "beta_end": 0.05,
                },
            },
        },
        {"prompt": "(a)0.9 b " * 800},
        {"negative_prompt": "a cat, " * 300 + "(b)0.5 c " * 60},
        {"version": "9.0.0"},
        {"prompt": '("a", "b").blend(1)'},
        {"prompt": "(" * 2000},
        {"prompt": "cat" + "+" * 7900},
        {"prompt": "(a cat)" + "9" * 400},
        {"negative_prompt": "(a cat)" + "9" * 400, "base_model": SDXL},
        {"prompt": "()"},
        {"prompt": '""0.5}'},
        {"prompt": '("a", "b").and(1, 0.5)', "base_model": SDXL},
        {"prompt": '("a", "b").blend(0, 0)'},
        {"prompt": '("a", "b").blend(1, -1)'},
        {"prompt": '("a", "b").blend(1, -0.9999)', "dtype": "float16"},
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
        engine.run(what, lambda: 2 in steps, lambda step, _: steps.append(step))
    assert list(filter(None, steps)) == [1, 2], "and none before the first, as the prompt is read"
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


def test_a_vae_of_one_colour_is_no_fault_of_the_card(copy: Path) -> None:
    spoil(copy, "vae", "decoder.conv_out.weight", 0.0)
    fault = fault_of(new_engine(copy), order(base_model="org/model"))
    assert isinstance(fault, TaskUnsupported)


@pytest.mark.parametrize("scale", [None, 0.0, "x", pytest.param(10**400, id="huge")])
def test_a_vae_without_a_scale_is_no_fault_of_the_card(copy: Path, scale: object) -> None:
    file = copy / "org" / "model" / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"scaling_factor": scale}))
    fault = fault_of(new_engine(copy), order(base_model="org/model"))
    assert isinstance(fault, ModelUnavailable)
    assert fault.kind is ModelUnavailableKind.DAMAGED


@pytest.mark.parametrize("role", ["unet", "vae", "text_encoder"])
def test_a_model_that_lacks_a_part_is_no_fault_of_the_card(copy: Path, role: str) -> None:
    index = copy / "org" / "model" / "model_index.json"
    parts = json.loads(index.read_text())
    del parts[role]
    index.write_text(json.dumps(parts))
    fault = fault_of(new_engine(copy), order(base_model="org/model"))
    assert isinstance(fault, ModelUnavailable)
    assert fault.kind is ModelUnavailableKind.DAMAGED


def test_damaged_weights(copy: Path) -> None:
    file = copy / "org" / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    fault = fault_of(new_engine(copy), order(base_model="org/model"))
    assert isinstance(fault, ModelUnavailable)
    assert fault.kind is ModelUnavailableKind.DAMAGED


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("text_encoder/model.safetensors", "layers.0.mlp.fc1.weight"),
        ("unet/diffusion_pytorch_model.safetensors", "conv_in.weight"),
    ],
)
def test_weights_that_are_missing_are_not_made_up(copy: Path, file: str, name: str) -> None:
    from safetensors.torch import load_file

    path = copy / "org" / "model" / file
    kept = {key: value for key, value in load_file(path).items() if not key.endswith(name)}
    save_file(kept, path, metadata={"format": "pt"})
    fault = fault_of(new_engine(copy), order(base_model="org/model"))
    assert isinstance(fault, ModelUnavailable)
    assert fault.kind is ModelUnavailableKind.DAMAGED


def test_the_safety_checker_blanks_when_it_is_on(copy: Path) -> None:
    _add_safety_checker(copy / "org" / "model")
    fresh = new_engine(copy)
    blanked = run(fresh, order(base_model="org/model"))
    assert open_png(blanked.files[0][1]).getextrema() == ((0, 0),) * 3
    seen = files(fresh, base_model="org/model", task_config={"safety_checker": False})
    assert open_png(seen[0][1]).getextrema() != ((0, 0),) * 3
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
