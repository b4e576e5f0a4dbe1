"""Chat templates in their process: what the library writes, the same everywhere, within limits."""

from __future__ import annotations

import shutil
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from cluster.core.errors import Cancelled, TaskUnsupported
from cluster.inference import language
from cluster.inference.rendering import MAX_TEXT, Limits, Page, Renderer
from devnet.models import LLM
from tests.integration.test_language import CHAT, TOOL, engine_parameters, new_engine, run

SMALL = Limits(seconds=1, spare_bytes=2**28)
DATE = "{{ strftime_now('%Y-%m-%d') }}"
OVER_AND_OVER = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
DOUBLED = (
    "{% set ns = namespace(x='x') %}"
    "{% for _ in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
)
FAR_APART = ("Etc/GMT+12", "Etc/GMT-14")
"""It is never the same day in both."""


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(SMALL)


def page(template: str) -> Page:
    return Page(template, CHAT, None, {"bos_token": "<s>"})


def rendered(renderer: Renderer, template: str) -> str:
    return renderer.render(page(template), lambda: None)


def test_it_is_what_the_library_writes(tiny_models: Path, renderer: Renderer) -> None:
    tokenizer = language.load_tokenizer(tiny_models / LLM)
    call = {"role": "assistant", "content": None, "tool_calls": [TOOL]}
    chat: list[dict[str, Any]] = [
        *CHAT,
        call,
        {"role": "tool", "tool_call_id": "7", "content": "ré\u2028in"},
    ]
    expected = tokenizer.apply_chat_template(
        chat, tools=[TOOL], tokenize=False, add_generation_prompt=True
    )
    params = engine_parameters().model_copy(
        update={"messages": [_message(each) for each in chat], "tools": [TOOL]}
    )
    assert language.prompt_of(tokenizer, params) == expected


def _message(said: dict[str, Any]) -> Any:
    from cluster.inference.llm_parameters import Message

    return Message.model_validate(said)


def _in(zone: str, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("TZ", zone)
    time.tzset()
    patch.setattr(language, "_RENDERER", Renderer())


def test_the_machines_time_zone_changes_no_score(
    tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_models / LLM, tmp_path / "org" / "model")
    template = tmp_path / "org" / "model" / "chat_template.jinja"
    template.write_text(DATE + template.read_text())
    engine = new_engine(tmp_path)
    days: set[str] = set()
    try:
        while len(days) != 1:  # it was midnight
            days = {_today()}
            scores = []
            for zone in FAR_APART:
                _in(zone, monkeypatch)
                assert language._RENDERER.render(page(DATE), lambda: None) in {_today(), *days}
                scores.append(run(engine, model="org/model").score)
            days.add(_today())
    finally:
        monkeypatch.undo()
        time.tzset()
    assert scores[0] == scores[1]


def _today() -> str:
    return f"{datetime.now(UTC):%Y-%m-%d}"


@pytest.mark.parametrize(
    "template",
    [
        OVER_AND_OVER,
        DOUBLED,
        "{{ 'x' * 10 ** 12 }}",
        "{{ 10 ** (10 ** 9) }}",
        "{{ 'x' | center(2**36) }}",
    ],
    ids=lambda template: str(template)[:30],
)
def test_a_template_that_asks_for_too_much_is_never_reported(
    renderer: Renderer, template: str
) -> None:
    with pytest.raises(TaskUnsupported):
        rendered(renderer, template)
    assert rendered(renderer, "{{ messages[1].content }}") == CHAT[1]["content"]


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no') }}",
        "{{ 1 // 0 }}",
        "{% for %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ 'x' * %d }}" % (MAX_TEXT + 1),  # noqa: UP031 - the braces are the template's
    ],
)
def test_what_a_template_refuses_is_never_reported(renderer: Renderer, template: str) -> None:
    rendered(renderer, "")
    child = renderer._child
    with pytest.raises(TaskUnsupported):
        rendered(renderer, template)
    assert rendered(renderer, "{{ bos_token }}") == "<s>"
    assert renderer._child is child


def test_who_waits_may_stop(renderer: Renderer) -> None:
    rendered(renderer, "")

    def stop() -> None:
        raise Cancelled("cancelled")

    with pytest.raises(Cancelled):
        renderer.render(page(OVER_AND_OVER), stop)
    assert rendered(renderer, "{{ bos_token }}") == "<s>"


def test_a_child_that_was_ended_is_replaced(renderer: Renderer) -> None:
    rendered(renderer, "")
    assert renderer._child is not None
    renderer._child.kill()
    renderer._child.wait()
    assert rendered(renderer, "{{ bos_token }}") == "<s>"


def test_a_child_that_doesnt_start_is_not_the_tasks_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(RuntimeError):
        rendered(Renderer(), "")
