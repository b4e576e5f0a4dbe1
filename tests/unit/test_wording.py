"""Texts of strangers: one line, bounded, and nothing that a terminal would obey."""

from __future__ import annotations

import io

import pytest

from actors.dispatcher import event_for
from actors.inference import InferenceWorker
from cluster import logs
from cluster.core.errors import DeviceFault, DeviceFaultKind, TaskInvalid
from cluster.core.record import AttemptFailed, FaultFound
from cluster.core.types import AttemptId
from cluster.core.wording import MOST_SAID, brief, named, printable
from cluster.story_view import log_text
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
