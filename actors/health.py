"""What is known of each card beyond its actor's word: quarantines, canary answers, disputes.

Written to the journal under the lease first, then believed. A new term reads it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field, replace

import structlog

from actors.ledger import Ledger
from cluster import quarantine_rows as rows
from cluster.card_metrics import QuarantineCause
from cluster.core.types import CardUuid, Commitment, GpuClass, Score, Timestamp
from cluster.inference import canary
from cluster.inference.canary import SHIPPED, Answer, Judgement, Question, Verdict
from cluster.quarantine_rows import Quarantine


@dataclass(slots=True)
class _Book:
    """One question: what is expected, what each card answered, who is to be asked again."""

    expected: Score | None
    answers: dict[CardUuid, Answer]
    again: frozenset[CardUuid] = field(default_factory=frozenset)
    stuck: tuple[CardUuid, ...] = ()
    """Cards that differ, with nothing left to tell who is right."""


DIFFERS = "its answer to the canary is not what its class computes"
"""Why a card is in quarantine that a canary put there."""


class CardHealth:
    """`changed` hears which cards are in quarantine, at once and whenever that changes; `entered`
    of each that comes there, why. `machines`: where each card is that is here now.

    Every write raises `LeaseLost` when another coordinator acts.
    """

    def __init__(
        self,
        ledger: Ledger,
        clock: Callable[[], float],
        changed: Callable[[frozenset[CardUuid]], None],
        entered: Callable[[QuarantineCause], None],
        machines: Callable[[], Mapping[CardUuid, str]],
    ) -> None:
        self._ledger = ledger
        self._clock = clock
        self._changed = changed
        self._entered = entered
        self._machines = machines
        self._books: dict[Question, _Book] = {}
        self._log = structlog.get_logger("health")
        with ledger.journal.read() as connection:
            self._quarantines = {each.uuid: each for each in rows.standing(connection)}
            self._in_doubt = rows.suspected(connection)
        changed(frozenset(self._quarantines))

    # --- quarantines -----------------------------------------------------------------------------

    def in_quarantine(self, card: CardUuid) -> bool:
        return card in self._quarantines

    def is_known(self, card: CardUuid) -> bool:
        """Whether the card is in quarantine, or ever was."""
        with self._ledger.journal.read() as connection:
            return rows.is_known(connection, card)

    def quarantine(
        self, cards: Iterable[CardUuid], gpu_class: GpuClass, reason: str, by: QuarantineCause
    ) -> None:
        """No task goes to these cards until an operator clears them. What a canary alone had put
        there is there for this from now on: no dispute lets it out any more."""
        named = frozenset(cards)
        new = self._new(named, gpu_class, reason)
        kept = [replace(each, reason=reason) for each in self._differing() if each.uuid in named]
        with self._ledger.journal.write(self._ledger.lease) as connection:
            for each in (*new, *kept):
                rows.begin(connection, each)
        self._quarantines |= {each.uuid: each for each in kept}
        self._enter(new, by)

    def clear(self, card: CardUuid) -> bool:
        """Let the card out; False when it is in no quarantine. It is to be asked anew."""
        if card not in self._quarantines:
            return False
        with self._ledger.journal.write(self._ledger.lease) as connection:
            rows.clear(connection, card, self._now())
        del self._quarantines[card]
        self._in_doubt.discard(card)
        for book in self._books.values():
            book.answers.pop(card, None)
        self._log.info("quarantine_cleared", card=card)
        self._end_of_change()
        return True

    # --- canary ----------------------------------------------------------------------------------

    def is_expected(self, question: Question) -> bool:
        """Whether it is known what a card of the class answers."""
        return self._book(question).expected is not None

    def answer(self, question: Question, card: CardUuid) -> Answer | None:
        return self._book(question).answers.get(card)

    def last_answered(self, card: CardUuid, incarnation: str) -> Timestamp | None:
        """When this process of the card last answered any question; None where it hasn't since it
        was last in doubt."""
        found = (book.answers.get(card) for book in self._books.values())
        ours = (each for each in found if each is not None and each.incarnation == incarnation)
        return max((each.at for each in ours), default=None)

    def in_doubt(self, card: CardUuid) -> bool:
        """Whether something failed on it, and it hasn't answered since."""
        return card in self._in_doubt

    def again(self, question: Question) -> frozenset[CardUuid]:
        """The cards whose answers are in dispute and that are to be asked once more."""
        return self._book(question).again

    def answered(
        self, question: Question, card: CardUuid, score: Score, incarnation: str
    ) -> Judgement:
        """Store a card's answer and all that follows from it, at once."""
        if card in self._quarantines:
            # It came there while it computed: what it says counts no more.
            return Judgement(Verdict.QUARANTINED)
        book = self._book(question)
        before = book.answers.get(card)
        answer = canary.next_answer(before, score, self._now(), incarnation)
        judgement = canary.judge(
            card,
            book.expected,
            self._trusted(book) | {card: answer},
            self._convicted(book),
            self._machines(),
        )
        new = self._new(judgement.odd, question.gpu_class, DIFFERS)
        with self._ledger.journal.write(self._ledger.lease) as connection:
            rows.put_answer(connection, question.key, card, answer)
            if judgement.record is not None:
                rows.expect(connection, question.key, judgement.record, self._now())
            for each in new:
                rows.begin(connection, each)
            for released in judgement.released:
                rows.release(connection, released, self._now())
        self._in_doubt.discard(card)
        book.answers[card] = answer
        book.expected = book.expected if judgement.record is None else judgement.record
        self._enter(new, "canary")
        self._let_out(judgement.released)
        self._review(question)
        changed = before is not None and before.score != score
        alone = book.expected is None and self._trusted(book).keys() == {card}
        return replace(judgement, wavers=changed and alone)

    def forget(self, class_name: str | None) -> tuple[str, ...]:
        """Have what is expected recorded anew, and every card of the class, or of all, asked: the
        classes' names of which anything was recorded. Cards that are in quarantine for nothing but
        having differed from it are asked, too."""
        differing = {
            each.uuid for each in self._differing() if class_name in {None, each.gpu_class.name}
        }
        with self._ledger.journal.write(self._ledger.lease) as connection:
            released = differing - rows.wavering(connection)
            for card in released:
                rows.release(connection, card, self._now())
            found = rows.forget(connection, class_name)
        self._let_out(released)
        for question, book in self._books.items():
            if class_name in {None, question.gpu_class.name}:
                book.expected = SHIPPED.get(question.key)
                book.answers.clear()
                self._review(question)
        self._log.warning("canary_forgotten", classes=found)
        return found

    def passed(self) -> dict[CardUuid, Timestamp]:
        """When each card last gave the answer that is expected of its class."""
        found: dict[CardUuid, Timestamp] = {}
        for book in self._books.values():
            for card, answer in book.answers.items():
                if answer.score == book.expected and not answer.wavered:
                    found[card] = max(answer.at, found.get(card, answer.at))
        return found

    def suspect(self, card: CardUuid) -> None:
        """Something failed on this card: it has to answer again before it gets a task."""
        with self._ledger.journal.write(self._ledger.lease) as connection:
            rows.suspect(connection, card)
        self._doubt(card)

    # --- disputes --------------------------------------------------------------------------------

    def disputed(self, task: Commitment) -> dict[CardUuid, Score]:
        """The scores that cards gave a task when they last differed; not of those in quarantine."""
        with self._ledger.journal.read() as connection:
            found = rows.disputed(connection, task)
        return {card: score for card, score in found.items() if card not in self._quarantines}

    def dispute(self, task: Commitment, scores: Mapping[CardUuid, Score]) -> None:
        with self._ledger.journal.write(self._ledger.lease) as connection:
            rows.dispute(connection, task, scores)

    def alerts(self) -> tuple[str, ...]:
        """What an operator should know, in words."""
        quarantines = [
            f"card {each.uuid} ({each.gpu_class.name}) is in quarantine: {each.reason}; see to it, "
            f"then crynux-cluster gpus clear {each.uuid}"
            for each in self._quarantines.values()
        ]
        disputes = [
            f"the canary's answers differ on {question.gpu_class.name}, and nothing tells which "
            f"card is at fault: {', '.join(book.stuck)}"
            for question, book in self._books.items()
            if book.stuck
        ]
        return (*quarantines, *disputes, *self._doubted_records())

    def _doubted_records(self) -> Iterator[str]:
        machines = self._machines()
        for question, book in self._books.items():
            if book.expected is None:
                continue
            said = self._trusted(book) | self._convicted(book)
            cards = canary.against(book.expected, said, machines)
            if cards:
                name = question.gpu_class.name
                yield (
                    f"{', '.join(sorted(cards))} agree on another answer to the canary than is "
                    f"recorded for {name}; find out which is wrong, and if it is the record: "
                    f"crynux-cluster gpus forget-canary '{name}'"
                )

    # --- inside ----------------------------------------------------------------------------------

    def _now(self) -> Timestamp:
        return Timestamp(self._clock())

    def _book(self, question: Question) -> _Book:
        book = self._books.get(question)
        if book is None:
            with self._ledger.journal.read() as connection:
                expected = rows.expected(connection, question.key)
                answers = rows.answers(connection, question.key)
            expected = SHIPPED.get(question.key, expected)
            book = self._books[question] = _Book(expected, answers)
            self._review(question)
        return book

    def _trusted(self, book: _Book) -> dict[CardUuid, Answer]:
        return {
            card: answer for card, answer in book.answers.items() if card not in self._quarantines
        }

    def _differing(self) -> tuple[Quarantine, ...]:
        """What a canary has put in quarantine, and nothing else."""
        return tuple(each for each in self._quarantines.values() if each.reason == DIFFERS)

    def _let_out(self, cards: Set[CardUuid]) -> None:
        """In memory; their answers stay as evidence, and they have to answer again."""
        for card in sorted(cards):
            del self._quarantines[card]
            self._doubt(card)
            self._log.warning("quarantine_ended", card=card, why="its record is in doubt")
        if cards:
            self._end_of_change()

    def _doubt(self, card: CardUuid) -> None:
        self._in_doubt.add(card)
        for book in self._books.values():
            if card in book.answers:
                book.answers[card] = canary.doubted(book.answers[card])

    def _convicted(self, book: _Book) -> dict[CardUuid, Answer]:
        """The answers of cards that such an answer has put in quarantine."""
        found = {each.uuid for each in self._differing()}
        return {card: answer for card, answer in book.answers.items() if card in found}

    def _review(self, question: Question) -> None:
        book = self._books[question]
        answers = self._trusted(book)
        before, book.again, book.stuck = book.stuck, frozenset(), ()
        if book.expected is not None or not answers:
            return
        judgement = canary.judge(min(answers), None, answers)
        book.again = judgement.again
        if judgement.verdict is Verdict.DISPUTED and not judgement.again:
            book.stuck = tuple(sorted(answers))
        if book.stuck and book.stuck != before:
            self._log.error("canaries_differ", gpu=question.gpu_class.name, cards=book.stuck)

    def _new(
        self, cards: Iterable[CardUuid], gpu_class: GpuClass, reason: str
    ) -> tuple[Quarantine, ...]:
        return tuple(
            Quarantine(card, gpu_class, reason, self._now())
            for card in sorted(cards)
            if card not in self._quarantines
        )

    def _enter(self, new: tuple[Quarantine, ...], by: QuarantineCause) -> None:
        for each in new:
            self._entered(by)
            self._quarantines[each.uuid] = each
            self._log.error(
                "card_quarantined", card=each.uuid, gpu=each.gpu_class.name, reason=each.reason
            )
        if new:
            self._end_of_change()

    def _end_of_change(self) -> None:
        for question in self._books:
            self._review(question)
        self._changed(frozenset(self._quarantines))
