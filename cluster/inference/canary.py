"""The canary: a small fixed task, by which a card shows that it computes what its class computes.

Results are the same to the bit on every card of a class with the same software, so a card whose
score differs is at fault. What is expected is shipped, or recorded when the answers of two cards
agree for the first time. Until then nobody knows who is right:

    one card            provisional: it works on, and waits for a second
    two that agree      recorded: from here on, whoever differs is quarantined
    two that differ     both are asked again. Who contradicts itself while another card doesn't is
                        quarantined; if neither does, a third card's answer decides, and until
                        there is one both work on, with an alert
    all contradict themselves: that is the software's doing, so none is quarantined, with an alert

So a card is only ever quarantined on the evidence of other cards, and the only card of its class
only by an answer recorded before. A record may be wrong itself: as soon as others agree against it
that are as many as hold it, and no two cards of one machine only, it quarantines none of them, lets
those out that it had put there before the others came, and an operator decides. Nothing here reads
a clock or does anything.
"""

from __future__ import annotations

import enum
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from types import MappingProxyType
from typing import Final

import cluster
from cluster.core.types import CardUuid, Commitment, GpuClass, Score, Timestamp

TASK: Final = Commitment("canary")
"""Stands where an order has its task; no commitment is spelt so."""
REVISION: Final = 1
"""Goes up with any change of `parameters`, so that old answers aren't held against new ones."""
SIDE, STEPS, SEED = 256, 4, 20_240_229
RUNS: Final = 2
"""How often a card is asked before its answer counts as its last word in a dispute."""
_PACKAGES: Final = ("torch", "diffusers", "transformers", "compel", "bitsandbytes")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A base model on a machine's disk that a canary can be computed with: its base key,
    `name[+variant]`, and a digest of what lies there under that name. `own`: the operator has put
    it there, or has it pinned, so that no task's author has chosen it."""

    model: str
    contents: str = ""
    own: bool = True


@dataclass(frozen=True, slots=True)
class Question:
    """What an expected answer belongs to. `model` is a base key, `contents` a digest of what it is:
    a model that its owner replaces under the same name is another question."""

    gpu_class: GpuClass
    software: str
    model: str
    contents: str = ""

    @staticmethod
    def class_name_of(key: str) -> str:
        return key.split("|")[1]

    @property
    def key(self) -> str:
        """The question's identity in the journal."""
        kind = self.gpu_class
        return f"{REVISION}|{kind.name}|{kind.vram}|{self.model}|{self.contents}|{self.software}"


@dataclass(frozen=True, slots=True)
class Answer:
    """A card's newest score, and which process of its actor gave it.

    `runs`: how often that process has answered. `wavered`: the card has given another score to the
    same question before.
    """

    score: Score
    at: Timestamp
    incarnation: str
    runs: int = 1
    wavered: bool = False


PATIENCE: Final = 4
"""Periods of the schedule after which a canary gives way to no task any more."""
SEVERAL: Final = 3
"""Cards that are believed to differ in more than one machine's files, wherever they are."""

SHIPPED: Final[Mapping[str, Score]] = {}
"""Expected answers by `Question.key`: of classes on which this version was tried."""


class Verdict(enum.Enum):
    """What became of one answer."""

    PASSED = "passed"
    PROVISIONAL = "provisional"
    RECORDED = "recorded"
    DISPUTED = "disputed"
    QUARANTINED = "quarantined"


@dataclass(frozen=True, slots=True)
class Judgement:
    """`record` is what is expected from now on, `odd` go to quarantine, `again` are asked again;
    `released` leave their quarantine, and have to answer anew. `wavers`: the card has contradicted
    itself, and there is no other to tell whether that is its own doing."""

    verdict: Verdict
    record: Score | None = None
    odd: frozenset[CardUuid] = field(default_factory=frozenset)
    again: frozenset[CardUuid] = field(default_factory=frozenset)
    released: frozenset[CardUuid] = field(default_factory=frozenset)
    wavers: bool = False


NOBODY: Final[Mapping[CardUuid, Answer]] = MappingProxyType({})
NOWHERE: Final[Mapping[CardUuid, str]] = MappingProxyType({})


class Due(enum.Enum):
    """Why a card is to be asked."""

    START = "start"
    """Its process hasn't answered yet, or not since a fault."""
    AGAIN = "again"
    SCHEDULE = "schedule"
    OVERDUE = "overdue"
    """The schedule has given way to tasks for long enough."""

    @property
    def urgent(self) -> bool:
        """Whether it comes before any task, on every card at once."""
        return not self.scheduled

    @property
    def scheduled(self) -> bool:
        """Whether nothing is held against the card."""
        return self in {Due.SCHEDULE, Due.OVERDUE}


def parameters(model: str) -> str:
    """The canary's parameters for a base model, as a task's would come."""
    name, _, variant = model.partition("+")
    return json.dumps(
        {
            "version": "2.5.0",
            "base_model": {"name": name, "variant": variant or None},
            "prompt": "a yellow canary++ on a lamp post, a lake behind it, morning light",
            "negative_prompt": "blurred",
            "task_config": {
                "image_width": SIDE,
                "image_height": SIDE,
                "steps": STEPS,
                "seed": SEED,
                "num_images": 1,
                "cfg": 5,
                "safety_checker": False,
            },
        }
    )


def software(libraries: Mapping[str, str] = MappingProxyType({})) -> str:
    """What results depend on beside the card and the model, as installed here. `libraries`: the
    versions of what stands between torch and the card, by name."""
    found = [f"crynux-cluster={cluster.__version__}"]
    for package in _PACKAGES:
        try:
            found.append(f"{package}={version(package)}")
        except PackageNotFoundError:
            continue
    found += [f"{name}={libraries[name]}" for name in sorted(libraries)]
    return " ".join(found)


def next_answer(before: Answer | None, score: Score, at: Timestamp, incarnation: str) -> Answer:
    if before is None:
        return Answer(score, at, incarnation)
    runs = before.runs + 1 if before.incarnation == incarnation else 1
    return Answer(score, at, incarnation, runs, before.wavered or before.score != score)


def doubted(answer: Answer) -> Answer:
    """The answer after something failed on the card: as if from a process before this one."""
    return replace(answer, incarnation="")


def due(
    answer: Answer | None,
    incarnation: str,
    again: bool,
    now: Timestamp,
    interval: float,
    proven: Timestamp | None = None,
) -> Due | None:
    """Why a card is to be asked now; `interval` is in seconds. `proven`: when its process has last
    answered any question, so that a new one is no new doubt: it works on until there is time."""
    if answer is None and proven is not None:
        return Due.OVERDUE if now - proven >= interval * PATIENCE else Due.SCHEDULE
    if answer is None or answer.incarnation != incarnation:
        return Due.START
    if again:
        return Due.AGAIN
    if now - answer.at >= interval * PATIENCE:
        return Due.OVERDUE
    return Due.SCHEDULE if now - answer.at >= interval else None


def judge(
    card: CardUuid,
    expected: Score | None,
    answers: Mapping[CardUuid, Answer],
    convicted: Mapping[CardUuid, Answer] = NOBODY,
    machines: Mapping[CardUuid, str] = NOWHERE,
) -> Judgement:
    """What the answer of `card` means, which is in `answers` already.

    `answers` are those of the cards of one class to one question, none of them in quarantine;
    `convicted` those of the cards that are there for such an answer; `machines` of cards that are
    here now.
    """
    if expected is not None:
        if answers[card].score == expected:
            return Judgement(Verdict.PASSED)
        cards = against(expected, {**convicted, **answers}, machines)
        if card in cards:
            return Judgement(Verdict.DISPUTED, released=cards & convicted.keys())
        return Judgement(Verdict.QUARANTINED, odd=frozenset({card}))
    steady = {uuid: answer for uuid, answer in answers.items() if not answer.wavered}
    if not steady:
        return Judgement(Verdict.DISPUTED)
    agreed = _agreed(answers, steady)
    if len(agreed) == 1:
        (record,) = agreed
        holders = [answer for answer in steady.values() if answer.score == record]
        if len(holders) == 1 and holders[0].runs < RUNS:
            # The other one has contradicted itself: would this one, too?
            return Judgement(Verdict.DISPUTED, again=_unsettled(answers))
        odd = {uuid for uuid in answers if uuid not in steady or steady[uuid].score != record}
        verdict = Verdict.QUARANTINED if card in odd else Verdict.RECORDED
        return Judgement(verdict, record, frozenset(odd))
    if len(answers) == 1:
        return Judgement(Verdict.PROVISIONAL)
    again = _unsettled(answers)
    if again or agreed:
        return Judgement(Verdict.DISPUTED, again=again)
    odd = answers.keys() - steady.keys()
    if card in odd:
        return Judgement(Verdict.QUARANTINED, odd=frozenset(odd))
    alone = len(steady) == 1
    return Judgement(Verdict.PROVISIONAL if alone else Verdict.DISPUTED, odd=frozenset(odd))


def against(
    expected: Score, answers: Mapping[CardUuid, Answer], machines: Mapping[CardUuid, str]
) -> frozenset[CardUuid]:
    """Cards that agree on another answer than the record, and are enough for it to be in doubt."""
    steady = {uuid: answer.score for uuid, answer in answers.items() if not answer.wavered}
    hold = sum(score == expected for score in steady.values())
    found: set[CardUuid] = set()
    for score in set(steady.values()) - {expected}:
        cards = {uuid for uuid, said in steady.items() if said == score}
        apart = {machines[uuid] for uuid in cards if uuid in machines}
        if len(cards) >= hold and (len(cards) >= SEVERAL or len(apart) > 1):
            found |= cards
    return frozenset(found)


def _unsettled(answers: Mapping[CardUuid, Answer]) -> frozenset[CardUuid]:
    return frozenset(uuid for uuid, answer in answers.items() if answer.runs < RUNS)


def _agreed(
    answers: Mapping[CardUuid, Answer], steady: Mapping[CardUuid, Answer]
) -> frozenset[Score]:
    """Scores that two cards gave, one of them without ever having said anything else."""
    votes = Counter(answer.score for answer in answers.values())
    vouched = {answer.score for answer in steady.values()}
    return frozenset(score for score, count in votes.items() if count >= 2 and score in vouched)
