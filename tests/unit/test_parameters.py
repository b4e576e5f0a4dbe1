"""Three verdicts on hostile text: the task's fault, not ours to run, or parameters."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.core.errors import TaskInvalid, TaskUnsupported
from cluster.core.types import TaskType, Work
from cluster.inference import parameters, reading
from cluster.inference.parameters import SDParameters, base_key, model_ids, parse, pipeline_key


def text(**changes: Any) -> str:
    return json.dumps({"base_model": "o/m", "prompt": "a cat", "task_config": {}} | changes)


def sd(**changes: Any) -> SDParameters:
    params = parse(TaskType.SD, text(**changes))
    assert isinstance(params, SDParameters)
    return params


def config(**changes: Any) -> SDParameters:
    return sd(task_config=changes)


def test_defaults_are_the_networks() -> None:
    params = sd()
    task = params.task_config
    assert (task.image_width, task.image_height, task.steps, task.seed) == (512, 512, 1, 0)
    assert (task.num_images, task.safety_checker, task.cfg) == (6, True, 5)
    assert params.dtype == "auto"
    assert params.scheduler.method == "DPMSolverMultistepScheduler"
    assert params.base_model.variant is None
    assert sd(lora={"model": "o/l"}).lora.weight == 100  # type: ignore[union-attr]
    assert sd(refiner={"model": "o/r"}).refiner.denoising_cutoff == 80  # type: ignore[union-attr]
    assert sd(controlnet={"model": "o/c"}).controlnet.weight == 70  # type: ignore[union-attr]


def test_base_model_as_name_or_object() -> None:
    assert sd(base_model="o/m") == sd(base_model={"name": "o/m"})
    assert sd(base_model={"name": "o/m", "variant": "fp16"}).base_model.variant == "fp16"


def test_unknown_keys_are_ignored() -> None:
    assert sd(novelty=1, task_config={"other": 2}) == sd()


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": ""},
        {"prompt": None},
        {"base_model": ""},
        {"base_model": {"variant": "fp16"}},
        {"base_model": 7},
        {"task_config": None},
        {"task_config": {"steps": 0}},
        {"task_config": {"steps": 101}},
        {"task_config": {"seed": -1}},
        {"task_config": {"seed": 2**31}},
        {"task_config": {"num_images": 0}},
        {"task_config": {"num_images": 11}},
        {"task_config": {"cfg": 20.5}},
        {"task_config": {"cfg": -1}},
        {"task_config": {"image_width": "wide"}},
        {"dtype": "int8"},
        {"lora": {"model": ""}},
        {"lora": {"model": "o/l", "weight": 0}},
        {"lora": {"model": "o/l", "weight": 101}},
        {"refiner": {"model": "o/r", "steps": 101}},
        {"controlnet": {"model": "o/c", "weight": 0}},
        {"scheduler": {"method": "PNDMScheduler"}},
        {"scheduler": {"args": {}}},
        {"scheduler": {"method": "LCMScheduler", "args": {"beta_start": "small"}}},
    ],
)
def test_what_fails_the_schema_is_the_tasks_fault(changes: dict[str, Any]) -> None:
    with pytest.raises(TaskInvalid) as caught:
        sd(**changes)
    assert "\n" not in str(caught.value)
    assert str(caught.value)


NO_OBJECTS = ["", "{", "nothing", "[]", "7", "null", "{'a':1}", text()[:-1], text() + "}"]


@pytest.mark.parametrize("task_type", [TaskType.SD, TaskType.LLM])
@pytest.mark.parametrize("broken", NO_OBJECTS)
def test_what_is_no_object_may_be_one_elsewhere(task_type: TaskType, broken: str) -> None:
    """Each node gets an upload of its own, and a relay may cut one off."""
    with pytest.raises(TaskUnsupported):
        parse(task_type, broken)


@pytest.mark.parametrize("key", ["epk", "ct", "ciphertext", "protected"])
def test_an_envelope_of_an_unknown_kind_is_met_with_silence(key: str) -> None:
    with pytest.raises(TaskUnsupported):
        parse(TaskType.SD, json.dumps({"v": 2, key: "AAAA"}))


@pytest.mark.parametrize("key", ["alg", "nonce"])
def test_what_stands_in_the_parameters_place_may_be_an_envelope(key: str) -> None:
    for task_type in (TaskType.SD, TaskType.LLM):
        with pytest.raises(TaskUnsupported):
            parse(task_type, json.dumps({"v": 2, key: "AAAA", "data": "AAAA"}))
    assert sd(**{key: "AAAA"}) == sd()


FAILURES: list[dict[str, Any]] = [
    {"dtype": "fp8"},
    {"prompt": ""},
    {"base_model": None},
    {"task_config": {"steps": 0}},
    {"scheduler": {"method": "NewScheduler"}},
]


@pytest.mark.parametrize("version", ["9.0.0", "2.5", "", None, 3, ["3.0.0"]], ids=str)
@pytest.mark.parametrize("failure", FAILURES, ids=str)
def test_another_versions_schema_is_not_ours_to_judge(version: Any, failure: Any) -> None:
    with pytest.raises(TaskInvalid):
        sd(**failure)
    with pytest.raises(TaskUnsupported):
        sd(version=version, **failure)


@pytest.mark.parametrize(
    "odd",
    [
        text(version="3.0.1"),
        text(version="4.0.0"),
        text(task_config={"image_width": 500}),
        text(task_config={"image_height": 0}),
        text(task_config={"image_height": 2**20}),
        text(scheduler={"method": "LCMScheduler", "args": {"num_train_timesteps": 10**9}}),
        text(controlnet={"model": "o/c", "image": "data:image/png;base64,AAAA"}),
        text(controlnet={"model": "o/c", "image": {}}),
        text(controlnet={"model": "o/c", "image": False}),
        text(prompt="a" * (parameters.MAX_PROMPT + 1)),
        text(negative_prompt="a" * (parameters.MAX_PROMPT + 1)),
        text(extra=float("nan")),
        text(prompt="\ud800"),
        text().replace("{}", "[" * 100_000 + "]" * 100_000),
        text()[:-1] + ',"x":' + "9" * 5000 + "}",
        text()[:-1] + ',"x":1e999}',
        text(task_config={"cfg": 10**400}),
        " " * (reading.MAX_TEXT + 1),
    ],
    ids=lambda value: value[:40],
)
def test_what_others_may_run_is_never_the_tasks_fault(odd: str) -> None:
    with pytest.raises(TaskUnsupported):
        parse(TaskType.SD, odd)


def test_fine_tuning_is_unsupported() -> None:
    with pytest.raises(TaskUnsupported):
        parse(TaskType.SD_FT, text())


@given(st.text() | st.recursive(st.none() | st.booleans() | st.text(), st.lists).map(json.dumps))
def test_any_text_gets_one_of_the_verdicts(hostile: str) -> None:
    with pytest.raises((TaskInvalid, TaskUnsupported)):
        parse(TaskType.SD, hostile)


@given(
    st.dictionaries(
        st.sampled_from(sorted(SDParameters.model_fields)),
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text()
        | st.dictionaries(st.sampled_from(["model", "name", "method", "args", "steps"]), st.text()),
    )
)
def test_any_object_gets_one_of_the_verdicts(fields: dict[str, Any]) -> None:
    try:
        params = sd(**fields)
    except (TaskInvalid, TaskUnsupported):
        return
    assert params.prompt


def test_a_controlnets_open_image_may_be_null() -> None:
    assert sd(controlnet={"model": "o/c", "image": None}) == sd(controlnet={"model": "o/c"})


def test_keys_name_what_is_loaded() -> None:
    plain = sd()
    assert base_key(plain) == "o/m"
    assert base_key(sd(base_model={"name": "o/m", "variant": "fp16"})) == "o/m+fp16"
    assert pipeline_key(sd(lora={"model": "o/l"})) == pipeline_key(plain)
    assert pipeline_key(config(steps=50, safety_checker=False)) == pipeline_key(plain)
    different = [
        sd(dtype="float16"),
        sd(vae="o/v"),
        sd(unet="o/u"),
        sd(base_model="o/n"),
        sd(controlnet={"model": "o/c", "image_dataurl": "data:"}),
        sd(refiner={"model": "o/r"}),
    ]
    assert len({pipeline_key(params) for params in [plain, *different]}) == 7


def test_model_ids() -> None:
    params = sd(
        base_model={"name": "o/m", "variant": "fp16"},
        lora={"model": "o/l"},
        controlnet={"model": "o/c", "variant": "fp16"},
        refiner={"model": "o/r"},
    )
    assert model_ids(params) == ("base:o/m+fp16", "lora:o/l", "controlnet:o/c+fp16", "base:o/r")


def test_work_grows_with_each_factor() -> None:
    one = parameters.work_of(config(image_width=256, image_height=128, steps=2, num_images=1))
    assert one == Work("sd", 256 * 128 * 2)
    six = parameters.work_of(config(image_width=256, image_height=128, steps=2))
    assert six == Work("sd", 6 * one.amount)


def test_needs_no_torch() -> None:
    code = (
        "import sys, cluster.inference.parameters, cluster.inference.scoring\n"
        "sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "text",
    ["[" * 200_000, '{"a":' * 200_000, "[" * 65 + "]" * 65, "[]," * 60_000],
    ids=["open arrays", "open objects", "just too deep", "too many"],
)
def test_deep_nesting_never_reaches_the_reader(text: str) -> None:
    # What importing web3 does to every process that speaks to the chain.
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(100_000)
    try:
        with pytest.raises(TaskUnsupported, match="nested too deep"):
            parse(TaskType.SD, text)
    finally:
        sys.setrecursionlimit(limit)


def test_brackets_in_a_prompt_are_text() -> None:
    text = json.dumps({"base_model": "org/name", "prompt": "[" * 500 + '\\"{', "task_config": {}})
    params = parse(TaskType.SD, text)
    assert isinstance(params, SDParameters)
    assert params.prompt.startswith("[[[")


def with_fields(**fields: object) -> str:
    return json.dumps({"base_model": "org/name", "prompt": "a cat", "task_config": {}, **fields})


@pytest.mark.parametrize("version", ["2.2.0", "0.0.1", "02.5.0", "3.0.1", "9.9.9"])
def test_a_version_that_is_not_known_is_met_with_silence(version: str) -> None:
    with pytest.raises(TaskUnsupported, match="version"):
        parse(TaskType.SD, with_fields(version=version))


@pytest.mark.parametrize("weight", [0.8, 1, 80.5, "1"])
def test_a_percentage_that_nodes_read_differently_is_met_with_silence(weight: object) -> None:
    with pytest.raises(TaskUnsupported, match="nodes differ"):
        parse(TaskType.SD, with_fields(lora={"model": "org/lora", "weight": weight}))


@pytest.mark.parametrize("weight", [0, -1, 100.5, 101, "x"])
def test_a_percentage_out_of_range_is_the_tasks_fault(weight: object) -> None:
    with pytest.raises(TaskInvalid, match=r"lora\.weight"):
        parse(TaskType.SD, with_fields(lora={"model": "org/lora", "weight": weight}))


@pytest.mark.parametrize("name", ["clip_sample", "clip_samples_range"])
def test_an_argument_that_nodes_spell_differently_is_met_with_silence(name: str) -> None:
    scheduler = {"method": "LCMScheduler", "args": {name: "abc"}}
    with pytest.raises(TaskUnsupported, match=name):
        parse(TaskType.SD, with_fields(scheduler=scheduler))


def test_an_unended_string_is_read_once() -> None:
    # Quadratic reading would take hours here; the length alone bounds the test.
    for text in ('"' + '\\"' * 1_000_000, '"' + '\\"' * 1_000_000 + "\\", '"a' * 500_000):
        with pytest.raises((TaskInvalid, TaskUnsupported)):
            parse(TaskType.SD, text)


@pytest.mark.parametrize(
    "text",
    [
        '{"base_model": "o/m", "prompt": "a", "prompt": "b", "task_config": {}}',
        '{"base_model": "o/m", "prompt": "a", "task_config": {"seed": 1, "cfg": 2, "seed": 1}}',
        '{"base_model": "o/m", "prompt": "a", "task_config": {}, "dtype": "x", "dtype": "auto"}',
        '{"base_model": "o/m", "prompt": "", "task_config": {}, "x": [{"y": 1, "\\u0079": 2}]}',
    ],
    ids=["first level", "second level", "one of them wrong", "escaped, in a list"],
)
def test_a_key_that_comes_twice_is_met_with_silence(text: str) -> None:
    with pytest.raises(TaskUnsupported, match="twice"):
        parse(TaskType.SD, text)


def with_most(digits: str) -> str:
    args = f'{{"method": "DPMSolverMultistepScheduler", "args": {{"sample_max_value": {digits}}}}}'
    return with_fields()[:-1] + f', "scheduler": {args}}}'


@pytest.mark.parametrize("digits", ["1" + "0" * 17, "-1" + "0" * 17, "1e30"])
def test_a_number_that_every_reader_takes(digits: str) -> None:
    params = parse(TaskType.SD, with_most(digits))
    assert isinstance(params, SDParameters)


@pytest.mark.parametrize("digits", ["1" + "0" * 18, "-1" + "0" * 18, "1" + "0" * 30])
def test_a_whole_number_that_some_readers_refuse_is_met_with_silence(digits: str) -> None:
    with pytest.raises(TaskUnsupported, match="digits"):
        parse(TaskType.SD, with_most(digits))


def test_an_argument_of_null_is_no_argument() -> None:
    args = {"clip_samples": None, "clip_samples_range": None, "timestep_scaling": None}
    params = parse(TaskType.SD, with_fields(scheduler={"method": "LCMScheduler", "args": args}))
    assert isinstance(params, SDParameters)
