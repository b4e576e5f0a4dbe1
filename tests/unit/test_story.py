"""What is told of a task afterwards: its story from any id, its bundle, its trace, and of money."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from rich.console import Console

from cluster import journal_history, story_view
from cluster.chain import outbox_rows
from cluster.chain.outbox_rows import RowState, Signed, task_intent
from cluster.core.ports import Lease
from cluster.core.record import (
    AttemptFailed,
    AttemptStarted,
    Claim,
    Claimed,
    Closed,
    Event,
    Fault,
    Noticed,
    Outcome,
    ParametersFetched,
    ResultStored,
    ResultUploaded,
    Seen,
    fold,
)
from cluster.core.takings import Sums, Takings
from cluster.core.types import (
    Address,
    AttemptId,
    Commitment,
    Effort,
    FileRef,
    GigaBytes,
    GpuClass,
    GpuId,
    ModelId,
    Score,
    Stage,
    TaskType,
    Tier,
    Timestamp,
    Wei,
)
from cluster.earnings import MOST_STEPS, earnings_of, numbers
from cluster.journal import SqlJournal
from cluster.journal_history import Audited, Bundle
from cluster.stages import spans
from cluster.steering import ActionView
from cluster.story import UnknownTask, bundle_of, file_of, story_of
from cluster.tracing import NoTraces, make_traces

TASK = Commitment("0x" + "ab" * 32)
NEIGHBOUR = Commitment("0x" + "ab" * 4 + "cd" * 28)
ALICE, BOB = Address("0x" + "11" * 20), Address("0x" + "22" * 20)
FIRST, SECOND = AttemptId("5fe68c04de8c"), AttemptId("6fe68c04de8c")
SEEN = Seen(ALICE, TaskType.SD, (ModelId("base:a/b"),), Wei(10**18), Timestamp(990.0))
FILE = FileRef("0.png", "12" * 32, 7)
HASH, REPLACED = "0x" + "ef" * 32, "0x" + "ed" * 32
LIFE: tuple[tuple[Event, float], ...] = (
    (SEEN, 1000.0),
    (ParametersFetched('{"prompt": "a secret fox"}'), 1001.0),
    (AttemptStarted(FIRST, GpuId("n-0")), 1002.0),
    (AttemptFailed(FIRST, Fault.DEVICE, "out of memory"), 1005.0),
    (AttemptStarted(SECOND, GpuId("n-1")), 1006.0),
    (ResultStored(SECOND, Score(b"12345678"), (FILE,), Effort(9.0, 2.0, Tier.DISK)), 1016.0),
    (Claimed(Claim.SCORE), 1016.5),
    (Noticed(Stage.ANSWERED), 1019.0),
    (Noticed(Stage.WANTED), 1030.0),
    (ResultUploaded(), 1031.0),
    (Closed(Outcome.SUCCESS, Wei(10**18)), 1040.0),
)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[SqlJournal]:
    opened = SqlJournal(f"sqlite:///{tmp_path / 'journal.db'}")
    yield opened
    opened.close()


def lease_of(journal: SqlJournal) -> Lease:
    lease = journal.acquire("me", Timestamp(0.0), 10.0)
    assert lease is not None
    return lease


@pytest.fixture
def lease(journal: SqlJournal) -> Lease:
    """After a whole life of a task, with a bundle and a transaction."""
    lease = lease_of(journal)
    for event, at in LIFE:
        journal.append(lease, TASK, event, Timestamp(at))
    journal.append(lease, NEIGHBOUR, SEEN, Timestamp(1000.0))
    with journal.write(lease) as connection:
        bundle = Bundle(FIRST, Timestamp(1005.0), {"trace": "Traceback …", "gpu": "n-0"})
        journal_history.keep_bundle(connection, TASK, bundle)
        intent = task_intent(ALICE, TASK, Claim.SCORE, BOB, b"data")
        outbox_rows.add(connection, intent, Timestamp(1016.5))
        (row,) = outbox_rows.of_task(connection, TASK)
        sent = replace(row, state=RowState.SENT, signed=Signed(7, b"less", REPLACED))
        outbox_rows.store(connection, sent)
        signed = Signed(7, b"raw", HASH, replaced=(REPLACED,))
        sent = replace(row, state=RowState.MINED, signed=signed, block=5, cost=Wei(9))
        sent = replace(sent, sent_at=Timestamp(1018.0), updated_at=Timestamp(1019.5))
        outbox_rows.store(connection, sent)
    return lease


NAMES = (TASK, TASK[:14], TASK[2:16], FIRST, SECOND, HASH, HASH[2:], REPLACED)


@pytest.mark.parametrize("name", NAMES)
def test_any_of_its_ids_leads_to_a_task(journal: SqlJournal, lease: Lease, name: str) -> None:
    story = story_of(journal, name, "https://x/tx/{hash}", lambda _: frozenset({"12" * 32}))
    assert story.commitment == TASK
    assert [event.kind for event in story.events][:3] == [
        "seen",
        "parameters_fetched",
        "attempt_started",
    ]
    assert len(story.events) == len(LIFE)
    assert [(each.gpu, each.fault, each.ended_at) for each in story.attempts] == [
        ("n-0", "device", 1005.0),
        ("n-1", None, 1016.0),
    ]
    (sent,) = story.transactions
    assert (sent.write, sent.state, sent.nonce, sent.cost) == ("score", "mined", 7, "9")
    assert (sent.at, sent.sent_at, sent.replaced) == (1019.5, 1018.0, (REPLACED,))
    assert sent.link == f"https://x/tx/{HASH}"
    assert (story.outcome, story.payment, story.tier) == ("EndSuccess", str(10**18), "disk")
    assert [(each.name, each.kept) for each in story.files] == [("0.png", True)]
    assert story.bundles == (FIRST,)
    assert "fox" not in story.model_dump_json()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("0x" + "ab" * 4, "several tasks begin so"),
        ("abababa", "no task is known by it"),
        ("0x" + "99" * 32, "no task is known by it"),
        ("%", "no task is known by it"),
        ("abab%", "no task is known by it"),
        ("", "no task is known by it"),
        ("5fe68c04de8", "no task is known by it"),
    ],
)
def test_a_name_that_means_none_or_several_is_said(
    journal: SqlJournal, lease: Lease, name: str, says: str
) -> None:
    with pytest.raises(UnknownTask, match=says):
        story_of(journal, name)


def test_a_bundle_has_what_a_story_leaves_out(journal: SqlJournal, lease: Lease) -> None:
    bundle = bundle_of(journal, FIRST)
    assert "a secret fox" in bundle["parameters"]
    assert bundle["attempts"] == [
        {"attempt": FIRST, "at": 1005.0, "trace": "Traceback …", "gpu": "n-0"}
    ]
    assert bundle["story"]["commitment"] == TASK


def test_a_file_is_one_of_the_result(journal: SqlJournal, lease: Lease) -> None:
    assert file_of(journal, TASK, "0.png") == (TASK, FILE)
    for name, file in ((TASK, "1.png"), (NEIGHBOUR, "0.png")):
        with pytest.raises(UnknownTask, match="has no file"):
            file_of(journal, name, file)


def failed(number: int, gpu: str = "n-0", fault: str = "DeviceFault") -> Bundle:
    return Bundle(AttemptId(f"a{number}"), Timestamp(0.0), {}, gpu, fault)


def keep_all(journal: SqlJournal, lease: Lease, *bundles: Bundle) -> list[str]:
    """The attempts whose bundles are kept in the end."""
    with journal.write(lease) as connection:
        for bundle in bundles:
            journal_history.keep_bundle(connection, NEIGHBOUR, bundle)
        return [each.attempt for each in journal_history.bundles_of(connection, NEIGHBOUR)]


def test_of_a_card_that_fails_again_and_again_the_first_and_the_newest_bundles_are_kept(
    journal: SqlJournal, lease: Lease
) -> None:
    rest = (failed(100, "n-1"), failed(101, fault="ModelUnavailable"))
    kept = keep_all(journal, lease, *rest, *(failed(number) for number in range(30)))
    newest = [f"a{number}" for number in range(22, 30)]
    assert kept == ["a100", "a101", "a0", "a1", *newest]


def test_a_fault_that_all_cards_have_pushes_out_only_its_like(
    journal: SqlJournal, lease: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_history, "MOST_BUNDLES", 9)
    others = [failed(number, "n-0", "DeviceFault") for number in range(100, 103)]
    flood = [failed(number, f"n-{number}", "ModelUnavailable") for number in range(20)]
    kept = keep_all(journal, lease, *others, *flood)
    # The fixture's bundle is another task's.
    assert kept == ["a100", "a101", "a102", "a0", "a1", "a17", "a18", "a19"]
    assert keep_all(journal, lease, failed(103))[-4:] == ["a1", "a18", "a19", "a103"]
    with journal.write(lease) as connection:
        (bundle,) = journal_history.bundles_of(connection, TASK)
    assert bundle.attempt == FIRST


def test_what_was_done_is_told_the_newest_first(journal: SqlJournal, lease: Lease) -> None:
    with journal.write(lease) as connection:
        for action in ("drain", "resume", "drop_model"):
            done = Audited(Timestamp(5.0), "token 10.0.0.1", action, {"model": "m"}, "as asked")
            journal_history.note_action(connection, done)
        found = journal_history.actions(connection, 2)
    assert [each.action for each in found] == ["drop_model", "resume"]
    assert found[0] == Audited(
        Timestamp(5.0), "token 10.0.0.1", "drop_model", {"model": "m"}, "as asked"
    )


# --- as text --------------------------------------------------------------------------------------


def text_of(found: object) -> str:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(found)
    return console.export_text()


def test_a_story_on_a_terminal(journal: SqlJournal, lease: Lease) -> None:
    text = text_of(story_view.render(story_of(journal, TASK)))
    for words in (TASK, "EndSuccess", "paid 1 CNX", "out of memory", "score", HASH, "compute", "▇"):
        assert words in text, words
    story = story_of(journal, TASK)
    lines = story_view.log_lines(story)
    kinds = [event.kind for event in story.events]
    assert [line["event"] for line in lines] == [*kinds[:8], "transaction", *kinds[8:]]
    times = [str(line["timestamp"]) for line in lines]
    assert times == sorted(times)
    assert all(line["task"] == TASK and line["account"] == ALICE for line in lines)
    assert lines[3]["attempt"] == FIRST
    assert "attempt=5fe68c04de8c" in story_view.log_text(lines[3])
    assert f"tx_hash={HASH}" in story_view.log_text(lines[8])
    assert f"replaced={REPLACED}" in story_view.log_text(lines[8])
    sent = story.transactions[0].model_copy(update={"at": None})
    untold = story_view.log_lines(story.model_copy(update={"transactions": (sent,)}))
    assert "timestamp" not in untold[-1], "of an older coordinator's"


def test_actions_on_a_terminal() -> None:
    action = ActionView(
        at=0.0, who="token [red]", action="drain", arguments={"what": "card"}, outcome="done"
    )
    text = text_of(story_view.actions([action]))
    for words in ("1970-01-01 00:00:00", "token [red]", "drain", "what=card", "done"):
        assert words in text, words


# --- earnings -------------------------------------------------------------------------------------


HOUR = 3_600.0
CLASS = GpuClass("Card", GigaBytes(8))
TAKINGS = Takings(
    {0: Sums(2, Wei(10), Wei(1)), 2: Sums(1, Wei(5), Wei(5))},
    {ALICE: Sums(3, Wei(15), Wei(2)), BOB: Sums(0, Wei(0), Wei(4))},
)


def test_every_hour_is_there_and_adds_up() -> None:
    found = earnings_of(TAKINGS, {ALICE: CLASS}, 0, 3, "hour")
    assert [(each.since, each.tasks, each.paid, each.gas) for each in found.steps] == [
        (0.0, 2, "10", "1"),
        (HOUR, 0, "0", "0"),
        (2 * HOUR, 1, "5", "5"),
        (3 * HOUR, 0, "0", "0"),
    ]
    assert (found.tasks, found.paid, found.gas) == (3, "15", "6")
    assert {each.name: (each.paid, each.gas) for each in found.classes} == {
        "Card": ("15", "2"),
        "": ("0", "4"),
    }
    text = text_of(story_view.earnings(found))
    for words in ("1970-01-01 02:00", "Card 8 GB", "none (treasury)", "3 tasks"):
        assert words in text, words


def test_who_asks_for_more_steps_than_an_answer_has_gets_the_newest() -> None:
    now = Timestamp(400 * 24 * HOUR)
    assert numbers(Timestamp(0.0), now, "day") == (0, 400)
    assert numbers(Timestamp(0.0), now, "hour") == (9_600 - MOST_STEPS + 1, 9_600)
    assert numbers(Timestamp(now - 3 * HOUR - 1.0), now, "hour") == (9_596, 9_600)
    found = earnings_of(Takings({}, {}), {}, 1, 2, "day")
    assert [each.since for each in found.steps] == [24 * HOUR, 48 * HOUR]


# --- stages and traces ----------------------------------------------------------------------------


def test_stages_follow_one_another() -> None:
    record = fold(TASK, tuple((event, Timestamp(at)) for event, at in LIFE))
    assert spans(record) == (
        ("seen", 990.0, 1000.0),
        ("parameters", 1000.0, 1001.0),
        ("queue", 1001.0, 1006.0),
        ("load", 1007.0, 1009.0),
        ("compute", 1009.0, 1016.0),
        ("score_sent", 1016.0, 1016.5),
        ("score_mined", 1016.5, 1019.0),
        ("validated", 1019.0, 1030.0),
        ("uploaded", 1030.0, 1031.0),
        ("paid", 1031.0, 1040.0),
    )


def test_a_task_is_a_trace_that_its_commitment_leads_to() -> None:
    exporter = InMemorySpanExporter()
    traces = make_traces("http://127.0.0.1:1/v1/traces", "1.2.3", exporter)
    traces.closed(fold(TASK, tuple((event, Timestamp(at)) for event, at in LIFE)))
    lost = (SEEN, Timestamp(1000.0)), (Closed(Outcome.ABORTED, Wei(0)), Timestamp(1100.0))
    traces.closed(fold(NEIGHBOUR, lost))
    traces.flush()
    spans_ = exporter.get_finished_spans()
    mine = [span for span in spans_ if f"{span.context.trace_id:032x}" == "ab" * 16]
    (root,) = [span for span in mine if span.parent is None]
    stages = {span.name: span for span in mine if span.parent is not None}
    assert (root.name, root.start_time, root.end_time) == ("task", 990 * 10**9, 1040 * 10**9)
    assert root.attributes is not None
    assert root.attributes["crynux.gpu"] == "n-1"
    assert root.attributes["crynux.attempts"] == 2
    assert root.status.is_ok
    assert len(stages) == 10
    assert (stages["load"].start_time, stages["load"].end_time) == (1007 * 10**9, 1009 * 10**9)
    assert all(
        span.parent.span_id == root.context.span_id for span in stages.values() if span.parent
    )
    assert root.resource.attributes["service.version"] == "1.2.3"
    (other,) = [span for span in spans_ if span not in mine and span.parent is None]
    assert not other.status.is_ok
    assert "fox" not in str([span.to_json() for span in spans_])


def test_without_an_endpoint_nothing_is_loaded() -> None:
    code = (
        "import sys; from cluster.tracing import make_traces; make_traces(None, '1').flush(); "
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0  # noqa: S603
    assert isinstance(make_traces(None, "1"), NoTraces)
