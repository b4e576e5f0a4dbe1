"""What the journal keeps of cards: who is in quarantine, what each answered to the canary, what is
expected, which scores of a task were in dispute, and what failed on each.

Every function works within a transaction of the caller's: one under the lease where it writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    Double,
    Integer,
    LargeBinary,
    MetaData,
    Row,
    Table,
    Text,
    and_,
    delete,
    insert,
    select,
    update,
)

from cluster.core.strikes import CardFault, FaultKind
from cluster.core.types import CardUuid, Commitment, GigaBytes, GpuClass, GpuId, Score, Timestamp
from cluster.inference.canary import Answer, Question

metadata = MetaData()

quarantines_table = Table(
    "quarantines",
    metadata,
    Column("uuid", Text, primary_key=True),
    Column("gpu_name", Text, nullable=False),
    Column("gpu_vram", Integer, nullable=False),
    Column("reason", Text, nullable=False),
    Column("since", Double, nullable=False),
    Column("cleared_at", Double),
)
"""A card's last quarantine; it stands until it is cleared, and is known from then on."""
answers_table = Table(
    "canary_answers",
    metadata,
    Column("question", Text, primary_key=True),
    Column("uuid", Text, primary_key=True, index=True),
    Column("score", LargeBinary, nullable=False),
    Column("at", Double, nullable=False),
    Column("incarnation", Text, nullable=False),
    Column("runs", Integer, nullable=False),
    Column("wavered", Boolean, nullable=False),
)
expected_table = Table(
    "canary_expected",
    metadata,
    Column("question", Text, primary_key=True),
    Column("score", LargeBinary, nullable=False),
    Column("at", Double, nullable=False),
)
disputes_table = Table(
    "disputed_scores",
    metadata,
    Column("task", Text, primary_key=True),
    Column("uuid", Text, primary_key=True),
    Column("score", LargeBinary, nullable=False),
)
faults_table = Table(
    "card_faults",
    metadata,
    Column("uuid", Text, primary_key=True),
    Column("cause", Text, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("at", Double, nullable=False),
    Column("gpu_id", Text, nullable=False),
    Column("incarnation", Text, nullable=False),
    Column("task", Text),
    Column("counts", Boolean, nullable=False),
)
"""What may be a strike, and what is one (`cluster.core.strikes`)."""
memory_table = Table(
    "card_memory_errors",
    metadata,
    Column("uuid", Text, primary_key=True),
    Column("uncorrected", BigInteger, nullable=False),
)
"""How many the driver had counted when it was last looked at."""


@dataclass(frozen=True, slots=True)
class Quarantine:
    uuid: CardUuid
    gpu_class: GpuClass
    reason: str
    since: Timestamp


# --- quarantines ----------------------------------------------------------------------------------


def standing(connection: Connection) -> tuple[Quarantine, ...]:
    table = quarantines_table
    query = select(table).where(table.c.cleared_at.is_(None)).order_by(table.c.since)
    return tuple(_quarantine(row) for row in connection.execute(query))


def is_known(connection: Connection, uuid: CardUuid) -> bool:
    """Whether the card is in quarantine, or was."""
    query = select(quarantines_table.c.uuid).where(quarantines_table.c.uuid == uuid)
    return connection.execute(query).first() is not None


def begin(connection: Connection, quarantine: Quarantine) -> None:
    """Put a card in quarantine, or have it there for another reason."""
    values = {
        "gpu_name": quarantine.gpu_class.name,
        "gpu_vram": quarantine.gpu_class.vram,
        "reason": quarantine.reason,
        "since": quarantine.since,
        "cleared_at": None,
    }
    _put(connection, quarantines_table, {"uuid": quarantine.uuid}, values)


def clear(connection: Connection, uuid: CardUuid, now: Timestamp) -> None:
    """End the card's quarantine. Its answers are forgotten, and what failed on it: it is to be
    asked anew."""
    _end(connection, uuid, now)
    for table in (answers_table, faults_table):
        connection.execute(delete(table).where(table.c.uuid == uuid))


def release(connection: Connection, uuid: CardUuid, now: Timestamp) -> None:
    """End the card's quarantine and put it in doubt. What it answered is evidence still."""
    _end(connection, uuid, now)
    suspect(connection, uuid)


# --- canary ---------------------------------------------------------------------------------------


def answers(connection: Connection, question: str) -> dict[CardUuid, Answer]:
    query = select(answers_table).where(answers_table.c.question == question)
    return {CardUuid(row.uuid): _answer(row) for row in connection.execute(query)}


def put_answer(connection: Connection, question: str, uuid: CardUuid, answer: Answer) -> None:
    values = {
        "score": bytes(answer.score),
        "at": answer.at,
        "incarnation": answer.incarnation,
        "runs": answer.runs,
        "wavered": answer.wavered,
    }
    _put(connection, answers_table, {"question": question, "uuid": uuid}, values)


def suspect(connection: Connection, uuid: CardUuid) -> None:
    """The card has yet to answer again, as if its process were a new one."""
    connection.execute(
        update(answers_table).where(answers_table.c.uuid == uuid).values(incarnation="")
    )


def suspected(connection: Connection) -> set[CardUuid]:
    """The cards that haven't answered anything since they were last suspected."""
    table = answers_table
    query = select(table.c.uuid, table.c.incarnation).order_by(table.c.at)
    newest = {CardUuid(row.uuid): row.incarnation for row in connection.execute(query)}
    return {uuid for uuid, incarnation in newest.items() if not incarnation}


def wavering(connection: Connection) -> set[CardUuid]:
    """The cards that have contradicted themselves."""
    query = select(answers_table.c.uuid).where(answers_table.c.wavered).distinct()
    return set(map(CardUuid, connection.execute(query).scalars()))


def expected(connection: Connection, question: str) -> Score | None:
    query = select(expected_table.c.score).where(expected_table.c.question == question)
    found = connection.execute(query).scalar()
    return None if found is None else Score(found)


def expect(connection: Connection, question: str, score: Score, now: Timestamp) -> None:
    values = {"score": bytes(score), "at": now}
    _put(connection, expected_table, {"question": question}, values)


def forget(connection: Connection, class_name: str | None) -> tuple[str, ...]:
    """Forget what is expected of a class, or of all, and what cards answered to it: the names of
    the classes of which there was any of that."""
    classes: set[str] = set()
    for table in (expected_table, answers_table):
        for key in connection.execute(select(table.c.question).distinct()).scalars().all():
            name = Question.class_name_of(key)
            if class_name in {None, name}:
                connection.execute(delete(table).where(table.c.question == key))
                classes.add(name)
    return tuple(sorted(classes))


# --- disputed scores of tasks ---------------------------------------------------------------------


def disputed(connection: Connection, task: Commitment) -> dict[CardUuid, Score]:
    query = select(disputes_table).where(disputes_table.c.task == task)
    return {CardUuid(row.uuid): Score(row.score) for row in connection.execute(query)}


def dispute(connection: Connection, task: Commitment, scores: Mapping[CardUuid, Score]) -> None:
    for uuid, score in scores.items():
        values = {"score": bytes(score)}
        _put(connection, disputes_table, {"task": task, "uuid": uuid}, values)


# --- what failed on cards -------------------------------------------------------------------------


def faults(connection: Connection) -> tuple[CardFault, ...]:
    query = select(faults_table).order_by(faults_table.c.at)
    return tuple(_fault(row) for row in connection.execute(query))


def put_fault(connection: Connection, fault: CardFault) -> None:
    values = {
        "kind": fault.kind.name,
        "at": fault.at,
        "gpu_id": fault.gpu_id,
        "incarnation": fault.incarnation,
        "task": fault.task,
        "counts": fault.counts,
    }
    _put(connection, faults_table, {"uuid": fault.card, "cause": fault.cause}, values)


def drop_faults(connection: Connection, gone: Iterable[CardFault]) -> None:
    table = faults_table
    for each in gone:
        which = and_(table.c.uuid == each.card, table.c.cause == each.cause)
        connection.execute(delete(table).where(which))


def memory_errors(connection: Connection) -> dict[CardUuid, int]:
    found = connection.execute(select(memory_table))
    return {CardUuid(row.uuid): row.uncorrected for row in found}


def put_memory_errors(connection: Connection, uuid: CardUuid, uncorrected: int) -> None:
    _put(connection, memory_table, {"uuid": uuid}, {"uncorrected": uncorrected})


# --- inside ---------------------------------------------------------------------------------------


def _end(connection: Connection, uuid: CardUuid, now: Timestamp) -> None:
    table = quarantines_table
    connection.execute(
        update(table)
        .where(table.c.uuid == uuid, table.c.cleared_at.is_(None))
        .values(cleared_at=now)
    )


def _put(
    connection: Connection, table: Table, key: Mapping[str, str], values: Mapping[str, Any]
) -> None:
    same = and_(*(table.c[name] == value for name, value in key.items()))
    if connection.execute(update(table).where(same).values(**values)).rowcount == 0:
        connection.execute(insert(table).values(**key, **values))


def _quarantine(row: Row[Any]) -> Quarantine:
    kind = GpuClass(row.gpu_name, GigaBytes(row.gpu_vram))
    return Quarantine(CardUuid(row.uuid), kind, row.reason, Timestamp(row.since))


def _answer(row: Row[Any]) -> Answer:
    score, at = Score(row.score), Timestamp(row.at)
    return Answer(score, at, row.incarnation, row.runs, row.wavered)


def _fault(row: Row[Any]) -> CardFault:
    return CardFault(
        CardUuid(row.uuid),
        row.cause,
        FaultKind[row.kind],
        Timestamp(row.at),
        GpuId(row.gpu_id),
        row.incarnation,
        None if row.task is None else Commitment(row.task),
        row.counts,
    )
