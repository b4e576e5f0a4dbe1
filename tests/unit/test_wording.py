"""Texts of strangers: one line, bounded, and nothing that a terminal would obey."""

from __future__ import annotations

import io

import pytest
from rich.console import Console, RenderableType

from actors.dispatcher import event_for
from actors.inference import InferenceWorker
from cluster import gpus_view, logs, status_view, story_view, top_view
from cluster.core.errors import DeviceFault, DeviceFaultKind, TaskInvalid
from cluster.core.record import AttemptFailed, FaultFound
from cluster.core.types import AttemptId, GpuState, NodeStatus
from cluster.core.wording import MOST_SAID, brief, named, printable
from cluster.inference.devices import Card
from cluster.status import DownloadView, GpuClassView, Status, StoreStatus, TaskView
from cluster.steering import ActionView
from cluster.story import EventView, TaskStory, TransactionView
from cluster.story_view import log_text
from tests.unit.metric_fakes import account, gpu, large
from tests.unit.test_inference_worker import FakeEngine

A = AttemptId("a")
ESCAPE = "\x1b]0;taken over\x07 \x9b2J"
SEED = "abandon " * 11 + "about"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("as it is, ü and 漢字 too", "as it is, ü and 漢字 too"),
        ("two\nlines\r\n\tand more ", "two lines and more"),
        (ESCAPE, "\ufffd]0;taken over\ufffd \ufffd2J"),
        ("right\u202eleft\x00", "right\ufffdleft\ufffd"),
        ("", ""),
    ],
)
def test_what_anybody_said_is_one_line_of_letters(text: str, line: str) -> None:
    assert printable(text) == line
    assert brief(text) == line


def test_it_is_no_longer_than_a_line_may_be() -> None:
    for text in ("x" * MOST_SAID, "x" * 10**7, "x\n" * 10**6):
        assert len(brief(text)) <= MOST_SAID
    assert brief("x" * MOST_SAID) == "x" * MOST_SAID
    assert brief("x" * (MOST_SAID + 1)).endswith("x…")
    assert named(KeyError()) == "KeyError"
    assert len(named(ValueError("x" * 10**6))) <= MOST_SAID + len("ValueError: ")


@pytest.mark.parametrize("kind", [DeviceFaultKind.OUT_OF_MEMORY, DeviceFaultKind.OTHER])
def test_what_an_attempt_ended_of_is_kept_in_one_line(kind: DeviceFaultKind) -> None:
    long = f"CUDA error{ESCAPE}\n" + "x" * 10**6
    event = event_for(A, DeviceFault(kind, long))
    assert isinstance(event, AttemptFailed)
    assert event.detail.startswith("CUDA error\ufffd]0;taken over")
    assert len(event.detail) <= MOST_SAID
    invalid = event_for(A, TaskInvalid(long))
    assert isinstance(invalid, FaultFound)
    assert len(invalid.reason) <= MOST_SAID


def test_a_key_phrase_in_an_error_goes_no_further() -> None:
    event = event_for(A, DeviceFault(DeviceFaultKind.OTHER, f"can't parse {SEED} at https://u:p@h"))
    assert isinstance(event, AttemptFailed)
    assert "abandon" not in event.detail
    assert "u:p" not in event.detail


async def test_why_a_card_doesnt_come_up_is_one_line_too() -> None:
    def make() -> FakeEngine:
        raise RuntimeError(f"no driver{ESCAPE}\n" + "x" * 10**6)

    worker = InferenceWorker(make, "1+abc")
    await worker._booting
    problem = (await worker.report()).problem
    assert problem.startswith("RuntimeError: no driver\ufffd]0;")
    assert len(problem) <= MOST_SAID + len("RuntimeError: ")


def test_a_terminal_obeys_nothing_that_a_task_said() -> None:
    text = log_text(
        {
            "event": "attempt_failed",
            "text": f"a1 failed: {ESCAPE}",
            "gpu": "n\n",
        }
    )
    assert text.isprintable()
    assert "a1 failed: \ufffd]0;taken over" in text


HOSTILE = "base:x\x1b]52;c;ZXZpbA==\x1b\\\x1b[2J"
STORY = TaskStory(
    commitment="0xaa",
    account=HOSTILE,
    type=HOSTILE,
    models=(HOSTILE, "lora:[bold]y[/bold]"),
    fee="1",
    payment="1",
    progress=HOSTILE,
    outcome=None,
    fault=HOSTILE,
    score=None,
    tier=None,
    seen_at=1.0,
    closed_at=None,
    stages={HOSTILE: 1.0},
    events=(EventView(at=1.0, kind="seen", text=HOSTILE),),
    transactions=(
        TransactionView(write=HOSTILE, state=HOSTILE, account="0xA", reason=HOSTILE, link=HOSTILE),
    ),
)
ACTION = ActionView(
    at=0.0, who=HOSTILE, action=HOSTILE, arguments={"name": HOSTILE}, outcome=HOSTILE
)


def hostile_status() -> Status:
    """In which all that anybody but us says would command a terminal."""
    kind = GpuClassView(name=HOSTILE, vram=8)
    card = gpu(1, GpuState.UNREACHABLE, kind).model_copy(
        update={"problem": HOSTILE, "uuid": HOSTILE, "warm": (HOSTILE, "lora:[bold]y[/bold]")}
    )
    fetched = DownloadView(
        model=HOSTILE,
        source=HOSTILE,
        done_bytes=1,
        total_bytes=2,
        bytes_per_second=1.0,
        background=False,
    )
    store = StoreStatus(
        ray_node=HOSTILE,
        models=1,
        used_bytes=1,
        downloads=(fetched,),
        failed={HOSTILE: HOSTILE},
        trouble=HOSTILE,
    )
    task = TaskView(
        commitment="0xaa",
        account="0xA",
        type="SD",
        stage="answerable",
        progress=HOSTILE,
        action=HOSTILE,
        gpu_id=HOSTILE,
        seen_at=1.0,
    )
    changes = {
        "gpus": (card,),
        "accounts": (account(1, NodeStatus.AVAILABLE, kind),),
        "stores": (store,),
        "tasks": (task,),
        "problems": (HOSTILE,),
        "missing": (HOSTILE,),
    }
    return large(1).model_copy(update=changes)


@pytest.mark.parametrize(
    "view",
    ["status", "top", "cards", "story", "actions", "problem", "gpus"],
)
def test_a_terminal_obeys_nothing_that_is_shown(view: str) -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=400, height=100, color_system=None, force_terminal=True)
    status = hostile_status()
    views: dict[str, RenderableType] = {
        "status": status_view.render(status),
        "top": top_view.render(status, console),
        "cards": status_view.cards_table(status.gpus),
        "story": story_view.render(STORY),
        "actions": story_view.actions([ACTION]),
        "problem": story_view.problem(HOSTILE),
        "gpus": gpus_view.render([Card(0, None, problem=HOSTILE)], None),
    }
    console.print(views[view])
    text = stream.getvalue()
    assert all(each.isprintable() for each in text.replace("\n", ""))
    assert "base:x\ufffd]52;c" in text
    if view in {"status", "story"}:
        assert "lora:[bold]y[/bold]" in text, "nor is it markup"


@pytest.mark.parametrize("form", ["console", "json"])
def test_no_log_line_commands_a_terminal(form: logs.Format) -> None:
    stream = io.StringIO()
    try:
        logs.setup("info", form, stream)
        logs.get("x").info("attempt_ended", detail=f"CUDA{ESCAPE}\nsecond")
    finally:
        logs.setup()
    assert not set("\x1b\x07\x9b") & set(stream.getvalue())
    assert "CUDA" in stream.getvalue()
