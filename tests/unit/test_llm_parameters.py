"""A language task's parameters: the three verdicts, and what is passed on."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.core.errors import TaskInvalid, TaskUnsupported
from cluster.core.types import TaskType
from cluster.inference import llm_parameters
from cluster.inference.llm_parameters import LLMParameters
from cluster.inference.parameters import base_key, model_ids, parse, pipeline_key, work_of

HELLO = {"role": "user", "content": "hello"}


def text(**changes: Any) -> str:
    return json.dumps({"model": "o/m", "messages": [HELLO]} | changes)


def llm(**changes: Any) -> LLMParameters:
    params = parse(TaskType.LLM, text(**changes))
    assert isinstance(params, LLMParameters)
    return params


def test_defaults_are_the_networks() -> None:
    params = llm()
    assert (params.seed, params.dtype, params.quantize_bits, params.tools) == (
        0,
        "auto",
        None,
        None,
    )
    assert params.generation_config.settings() == {"max_new_tokens": 256, "num_return_sequences": 1}
    assert llm(generation_config=None) == llm(generation_config={}) == params


def test_only_what_the_task_sets_is_passed_on() -> None:
    config = llm(generation_config={"top_k": 3, "do_sample": True}).generation_config
    assert config.settings() == {
        "max_new_tokens": 256,
        "num_return_sequences": 1,
        "top_k": 3,
        "do_sample": True,
    }
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    answer = {"role": "tool", "tool_call_id": "1", "content": "2"}
    chat = llm(messages=[HELLO, call, answer]).messages
    assert [message.as_given() for message in chat] == [HELLO, call, answer]


@pytest.mark.parametrize(
    "changes",
    [
        {"model": ""},
        {"model": None},
        {"messages": "hello"},
        {"messages": [{"role": "pirate", "content": "arr"}]},
        {"messages": [{"role": "user", "content": 7}]},
        {"tools": "none"},
        {"tools": ["f"]},
        {"generation_config": {"max_new_tokens": "many"}},
        {"generation_config": []},
        {"dtype": "float8"},
        {"quantize_bits": 2},
        {"seed": "x"},
    ],
    ids=str,
)
def test_what_fails_the_schema_is_the_tasks_fault(changes: dict[str, Any]) -> None:
    with pytest.raises(TaskInvalid) as caught:
        llm(**changes)
    assert "\n" not in str(caught.value)


def test_a_missing_key_is_the_tasks_fault() -> None:
    for key in ("model", "messages"):
        task = json.loads(text())
        del task[key]
        with pytest.raises(TaskInvalid):
            parse(TaskType.LLM, json.dumps(task))


@pytest.mark.parametrize(
    "changes",
    [
        {"messages": []},
        {"messages": None},
        {"seed": None},
        {"seed": -1},
        {"seed": 2**32},
        {"messages": [HELLO] * (llm_parameters.MAX_MESSAGES + 1)},
        {"messages": [{"role": "user", "content": "a" * llm_parameters.MAX_CONTENT}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]},
        {"messages": [{"role": None, "content": "hello"}]},
        {"messages": [{"role": "user", "content": "\ud800"}]},
        {"template_args": {"enable_thinking": False}},
        {"generation_config": {"max_new_tokens": 0}},
        {"generation_config": {"max_new_tokens": 10**9}},
        {"generation_config": {"num_beams": 10**6}},
        {"generation_config": {"num_return_sequences": 0}},
        {"generation_config": {"top_p": None}},
        {"generation_config": {"stop_strings": ["x"]}},
        {"generation_config": {"min_p": 0.1}},
        {"generation_config": {"temperature": 1e-12}},
        {"generation_config": {"temperature": "nan"}},
        {"generation_config": {"temperature": "1e999"}},
        {"generation_config": {"repetition_penalty": 1e12}},
        {"generation_config": {"temperature": 10**400}},
        {"seed": 10**400},
        {"quantize_bits": 4.0},
    ],
    ids=lambda changes: str(changes)[:60],
)
def test_what_others_may_run_is_never_the_tasks_fault(changes: dict[str, Any]) -> None:
    with pytest.raises(TaskUnsupported):
        llm(**changes)


def test_what_readers_ignore_is_ignored() -> None:
    assert llm(novelty=1, generation_config={"other": 2}, template_args=None) == llm()
    odd = llm(messages=[HELLO | {"name": "me"}]).messages[0]
    assert odd.as_given() == HELLO


def test_keys_and_work() -> None:
    plain = llm()
    assert base_key(plain) == "o/m"
    assert model_ids(plain) == ("base:o/m",)
    assert pipeline_key(llm(seed=3, generation_config={"top_k": 1})) == pipeline_key(plain)
    assert len({pipeline_key(p) for p in (plain, llm(dtype="float16"), llm(quantize_bits=4))}) == 3
    beams = work_of(llm(generation_config={"num_beams": 4, "num_return_sequences": 2}))
    assert beams.amount - work_of(plain).amount == pytest.approx(3 * 256)
    more = work_of(llm(generation_config={"max_new_tokens": 512}))
    assert more.kind == work_of(plain).kind == "llm"
    assert more.amount - work_of(plain).amount == pytest.approx(256)


@given(
    st.dictionaries(
        st.sampled_from(sorted(LLMParameters.model_fields)),
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text()
        | st.lists(st.dictionaries(st.sampled_from(["role", "content"]), st.none() | st.text()))
        | st.dictionaries(st.sampled_from(["max_new_tokens", "top_k"]), st.integers() | st.text()),
    )
)
def test_any_object_gets_one_of_the_verdicts(fields: dict[str, Any]) -> None:
    try:
        params = llm(**fields)
    except (TaskInvalid, TaskUnsupported):
        return
    assert params.messages


FAILURES: list[dict[str, Any]] = [
    {"dtype": "fp8"},
    {"model": ""},
    {"messages": "hello"},
    {"generation_config": {"max_new_tokens": "many"}},
    {"quantize_bits": 2},
]


@pytest.mark.parametrize("version", ["9.0.0", "2.5", "", None, 3, ["3.0.0"]], ids=str)
@pytest.mark.parametrize("failure", FAILURES, ids=str)
def test_another_versions_schema_is_not_ours_to_judge(version: Any, failure: Any) -> None:
    with pytest.raises(TaskInvalid):
        llm(**failure)
    with pytest.raises(TaskUnsupported):
        llm(version=version, **failure)


@given(st.sampled_from(range(len(text()))), st.text(max_size=3), st.integers(0, 3))
def test_a_garbled_text_is_read_as_an_object_or_never_reported(
    place: int, noise: str, lost: int
) -> None:
    whole = text()
    garbled = whole[:place] + noise + whole[place + lost :]
    try:
        parse(TaskType.LLM, garbled)
    except TaskInvalid:
        assert isinstance(json.loads(garbled), dict)
    except TaskUnsupported:
        pass


@given(st.integers(0, len(text()) - 1))
def test_a_text_that_was_cut_off_is_never_the_tasks_fault(length: int) -> None:
    with pytest.raises(TaskUnsupported):
        parse(TaskType.LLM, text()[:length])
