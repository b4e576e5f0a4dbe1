from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.core.errors import ModelUnavailable, ModelUnavailableKind
from cluster.core.types import CardUuid, GigaBytes, GpuClass, Score, TaskType, Timestamp
from cluster.inference import canary, devices, parts
from cluster.inference import parameters as task_parameters
from cluster.inference.canary import (
    Answer,
    Due,
    Judgement,
    Question,
    Verdict,
    due,
    judge,
    next_answer,
)
from cluster.inference.mounted import MountedEngine
from cluster.models.disk import MANIFEST, Manifest, Stored, manifest_text
from cluster.models.keeper import Keeper
from cluster.models.refs import ModelRef
from cluster.models.store import ModelStore
from tests.unit.fake_nvml import FakeCard, FakeNvml, error

if TYPE_CHECKING:
    from cluster.inference.engine import Engine

A, B, C, D = (CardUuid(f"GPU-{name}") for name in "ABCD")
X, Y, Z = Score(b"x" * 8), Score(b"y" * 8), Score(b"z" * 8)
KIND = GpuClass("Card+docker", GigaBytes(8))
NOW = Timestamp(1_000.0)


def once(score: Score) -> Answer:
    return Answer(score, NOW, "p1")


def twice(score: Score) -> Answer:
    return Answer(score, NOW, "p1", runs=2)


def wavering(score: Score, runs: int = 2) -> Answer:
    return Answer(score, NOW, "p1", runs, wavered=True)


def odd(*cards: CardUuid) -> frozenset[CardUuid]:
    return frozenset(cards)


# --- with something recorded ----------------------------------------------------------------------


def test_who_answers_as_recorded_passes() -> None:
    assert judge(A, X, {A: once(X)}) == Judgement(Verdict.PASSED)


def test_who_differs_from_the_record_is_quarantined_even_if_he_is_alone() -> None:
    assert judge(A, X, {A: once(Y)}) == Judgement(Verdict.QUARANTINED, odd=odd(A))


NORTH_AND_SOUTH = {A: "north", B: "north", C: "south", D: "east"}


def test_a_record_stands_against_two_of_one_machine() -> None:
    answers = {A: once(X), B: twice(Y), C: twice(Y)}
    for machines in ({}, {B: "south"}, {B: "south", C: "south"}):
        found = judge(C, X, answers, {}, machines)
        assert found == Judgement(Verdict.QUARANTINED, odd=odd(C))


def test_a_record_stands_against_fewer_than_hold_it() -> None:
    answers = {A: once(X), B: once(X), C: once(Y)}
    found = judge(C, X, answers, {}, NORTH_AND_SOUTH)
    assert found == Judgement(Verdict.QUARANTINED, odd=odd(C))
    more = {CardUuid(f"GPU-{n}"): once(X) for n in range(2)}
    found = judge(D, X, answers | more | {D: once(Y)}, {}, NORTH_AND_SOUTH)
    assert found == Judgement(Verdict.QUARANTINED, odd=odd(D))


def test_a_record_that_as_many_agree_against_quarantines_none_of_them() -> None:
    """Those count, too, that it has put there before the others came."""
    answers = {A: once(X), B: once(X), D: once(Y)}
    found = judge(D, X, answers, {C: once(Y)}, NORTH_AND_SOUTH)
    assert found == Judgement(Verdict.DISPUTED, released=odd(C))
    three = {A: once(Y), B: once(Y), C: once(Y)}
    assert judge(C, X, three) == Judgement(Verdict.DISPUTED)
    # Who says a third thing, or contradicts himself, is at fault all the same.
    for other in (once(Z), wavering(Y)):
        found = judge(D, X, {**three, D: other})
        assert found == Judgement(Verdict.QUARANTINED, odd=odd(D))


def test_one_answer_judges_nobody_else() -> None:
    assert judge(A, X, {A: once(X), B: once(Y)}) == Judgement(Verdict.PASSED)


# --- with nothing recorded ------------------------------------------------------------------------


def test_one_card_is_believed_for_the_time_being() -> None:
    assert judge(A, None, {A: once(X)}) == Judgement(Verdict.PROVISIONAL)
    assert judge(A, None, {A: twice(X)}) == Judgement(Verdict.PROVISIONAL)


def test_two_that_agree_are_the_record() -> None:
    assert judge(B, None, {A: once(X), B: once(X)}) == Judgement(Verdict.RECORDED, X)


def test_two_that_differ_are_both_asked_again() -> None:
    found = judge(B, None, {A: once(X), B: once(Y)})
    assert found == Judgement(Verdict.DISPUTED, again=odd(A, B))
    found = judge(A, None, {A: twice(X), B: once(Y)})
    assert found == Judgement(Verdict.DISPUTED, again=odd(B))


def test_two_that_insist_both_work_on() -> None:
    assert judge(B, None, {A: twice(X), B: twice(Y)}) == Judgement(Verdict.DISPUTED)


@pytest.mark.parametrize(("third", "faulty"), [(X, B), (Y, A)])
def test_a_third_card_decides(third: Score, faulty: CardUuid) -> None:
    found = judge(C, None, {A: twice(X), B: twice(Y), C: once(third)})
    assert found == Judgement(Verdict.RECORDED, third, odd(faulty))


def test_three_that_all_differ_all_work_on() -> None:
    answers = {A: twice(X), B: twice(Y), C: once(Z)}
    assert judge(C, None, answers) == Judgement(Verdict.DISPUTED, again=odd(C))
    assert judge(C, None, answers | {C: twice(Z)}) == Judgement(Verdict.DISPUTED)


def test_two_pairs_decide_nothing() -> None:
    answers = {A: twice(X), B: twice(X), C: twice(Y), D: twice(Y)}
    assert judge(D, None, answers) == Judgement(Verdict.DISPUTED)


def test_who_contradicts_himself_is_at_fault_if_another_does_not() -> None:
    answers = {A: twice(X), B: wavering(Z)}
    assert judge(B, None, answers) == Judgement(Verdict.QUARANTINED, odd=odd(B))
    assert judge(A, None, answers) == Judgement(Verdict.PROVISIONAL, odd=odd(B))


def test_who_came_round_is_at_fault_all_the_same() -> None:
    found = judge(B, None, {A: twice(X), B: wavering(X)})
    assert found == Judgement(Verdict.QUARANTINED, X, odd(B))


def test_before_one_is_blamed_the_other_is_asked_again() -> None:
    for last in (X, Y):
        found = judge(B, None, {A: once(X), B: wavering(last)})
        assert found == Judgement(Verdict.DISPUTED, again=odd(A))


def test_if_all_contradict_themselves_it_is_not_the_cards_doing() -> None:
    assert judge(A, None, {A: wavering(X)}) == Judgement(Verdict.DISPUTED)
    assert judge(B, None, {A: wavering(X), B: wavering(X)}) == Judgement(Verdict.DISPUTED)
    assert judge(B, None, {A: wavering(X), B: wavering(Y)}) == Judgement(Verdict.DISPUTED)


ANSWERS = st.dictionaries(
    st.sampled_from([A, B, C, D]),
    st.builds(
        Answer,
        st.sampled_from([X, Y, Z]),
        st.just(NOW),
        st.sampled_from(["p1", "p2"]),
        st.integers(1, 3),
        st.booleans(),
    ),
    min_size=1,
)


@given(ANSWERS, st.sampled_from([None, X]), st.data())
def test_what_no_judgement_ever_does(
    answers: dict[CardUuid, Answer], expected: Score | None, data: st.DataObject
) -> None:
    card = data.draw(st.sampled_from(sorted(answers)))
    found = judge(card, expected, answers)
    assert (card in found.odd) == (found.verdict is Verdict.QUARANTINED)
    assert not found.odd & found.again
    if expected is not None:
        assert found.record is None
        assert found.odd <= {card}
        return
    # Without a record nobody is blamed but on another card's evidence.
    assert found.odd < answers.keys()
    blameless = answers.keys() - found.odd
    if found.odd:
        assert any(not answers[each].wavered for each in blameless)
    if found.record is not None:
        assert sum(answer.score == found.record for answer in answers.values()) >= 2
        assert all(answers[each].score == found.record for each in blameless)


@given(st.lists(st.tuples(st.sampled_from([A, B, C]), st.sampled_from([X, Y])), max_size=30))
def test_asking_again_comes_to_an_end(said: list[tuple[CardUuid, Score]]) -> None:
    """However the cards answer, one process of a card is asked again a bounded number of times."""
    answers: dict[CardUuid, Answer] = {}
    asked = dict.fromkeys((A, B, C), 0)
    for card, score in said:
        again = judge(min(answers), None, answers).again if answers else frozenset()
        if card in answers and card not in again:
            continue
        asked[card] += 1
        answers[card] = next_answer(answers.get(card), score, NOW, "p1")
    assert max(asked.values()) <= canary.RUNS


# --- answers and when they are due ----------------------------------------------------------------


def test_answers_are_counted_by_process() -> None:
    first = next_answer(None, X, NOW, "p1")
    assert first == once(X)
    second = next_answer(first, X, Timestamp(NOW + 1), "p1")
    assert (second.runs, second.wavered, second.at) == (2, False, NOW + 1)
    assert next_answer(second, X, NOW, "p2") == Answer(X, NOW, "p2")


def test_a_contradiction_is_remembered() -> None:
    changed = next_answer(once(X), Y, NOW, "p2")
    assert changed.wavered
    assert next_answer(changed, Y, NOW, "p3").wavered


def test_when_a_card_is_asked() -> None:
    answer = once(X)
    assert due(None, "p1", False, NOW, 60.0) is Due.START
    assert due(answer, "p2", False, NOW, 60.0) is Due.START
    assert due(canary.doubted(answer), "p1", False, NOW, 60.0) is Due.START
    assert due(answer, "p1", True, NOW, 60.0) is Due.AGAIN
    # A new question to one that has answered another can wait; a doubt can't.
    assert due(None, "p1", False, NOW, 60.0, proven=NOW) is Due.SCHEDULE
    assert due(None, "p1", False, Timestamp(NOW + 240), 60.0, proven=NOW) is Due.OVERDUE
    assert due(canary.doubted(answer), "p1", False, NOW, 60.0, proven=NOW) is Due.START
    assert due(answer, "p1", False, Timestamp(NOW + 59), 60.0) is None
    assert due(answer, "p1", False, Timestamp(NOW + 60), 60.0) is Due.SCHEDULE
    assert due(answer, "p1", False, Timestamp(NOW + 239), 60.0) is Due.SCHEDULE
    assert due(answer, "p1", False, Timestamp(NOW + 240), 60.0) is Due.OVERDUE
    assert [each for each in Due if not each.urgent] == [Due.SCHEDULE, Due.OVERDUE]


# --- the question ---------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["acme/tiny", "acme/tiny+fp16"])
def test_the_canary_is_a_task_like_others(model: str) -> None:
    parsed = task_parameters.parse(TaskType.SD, canary.parameters(model))
    assert isinstance(parsed, task_parameters.SDParameters)
    assert task_parameters.base_key(parsed) == model
    assert canary.parameters(model) == canary.parameters(model)
    assert parsed.task_config.num_images == 1


def test_no_commitment_is_spelt_like_the_canarys_task() -> None:
    assert not re.fullmatch("0x[0-9a-f]{64}", canary.TASK)


def test_an_answer_belongs_to_class_software_and_model() -> None:
    questions = {
        Question(kind, software, model)
        for kind in (KIND, GpuClass("Card+docker", GigaBytes(16)), GpuClass("X", GigaBytes(8)))
        for software in ("torch=1", "torch=2")
        for model in ("a/b", "a/b+fp16")
    }
    assert len({question.key for question in questions}) == len(questions) == 12


def test_the_software_is_named_with_its_versions() -> None:
    named = dict(each.split("=") for each in canary.software().split())
    assert {"crynux-cluster", "torch", "diffusers", "transformers", "compel"} <= named.keys()
    assert all(re.match(r"\d", version) for version in named.values())
    assert not named.keys() & {"driver", "cuda", "cudnn"}


def test_so_is_what_stands_between_torch_and_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91300)
    nvml = FakeNvml(FakeCard())
    found = devices.libraries("GPU-1111", nvml)
    assert found == {"driver": "580.65.06", "cuda": "13.0", "cudnn": "91300"}
    assert canary.software(found) == f"{canary.software()} cuda=13.0 cudnn=91300 driver=580.65.06"
    for silent in (error("NotSupported"), error("FunctionNotFound")):
        assert "driver" not in devices.libraries("GPU-1111", FakeNvml(driver=silent))
    for none in ("cpu", "simulated-0"):
        assert devices.libraries(none, nvml) == {}
    mounted = MountedEngine(
        cast("Engine", None), CardUuid("simulated-0"), cast(Keeper, None), simulated=True
    )
    assert mounted.software() == canary.software()


SD, XL = "StableDiffusionPipeline", "StableDiffusionXLPipeline"
REFINER = "StableDiffusionXLImg2ImgPipeline"


def plant(root: Path, name: str, size: int, pipeline: str | None = SD) -> None:
    folder = root / name
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "weights.safetensors").write_bytes(bytes(size))
    if pipeline is not None:
        (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))


def test_the_smallest_model_is_that_with_the_least_weights(tmp_path: Path) -> None:
    plant(tmp_path, "acme/large", 30)
    plant(tmp_path, "acme/small", 10, XL)
    plant(tmp_path, "acme/refiner", 5, REFINER)
    plant(tmp_path, "acme/chat", 3, None)
    engine = MountedEngine(cast("Engine", None), A, Keeper(ModelStore(tmp_path)))
    engine.candidates()
    first, second = engine.candidates()
    assert (first.model, second.model) == ("acme/small", "acme/large")
    assert first.own
    assert second.own
    assert engine.candidates() == (first, second)
    # Another model under the same name is another candidate.
    shutil.rmtree(tmp_path / "acme" / "small")
    plant(tmp_path, "acme/small", 10, XL)
    (tmp_path / "acme" / "small" / "unet" / "weights.safetensors").write_bytes(b"x" * 10)
    changed = engine.candidates()[0]
    assert (changed.model, changed.contents != first.contents) == ("acme/small", True)
    for name in ("large", "small"):
        shutil.rmtree(tmp_path / "acme" / name)
    assert engine.candidates() == ()


def test_a_model_that_is_spoilt_in_its_middle_is_another_candidate(tmp_path: Path) -> None:
    """Else the cards of one machine would be judged by what the others' file has them compute."""
    size = 2**18
    for each in ("good", "spoilt"):
        plant(tmp_path / each, "acme/small", size)
    weights = tmp_path / "spoilt" / "acme" / "small" / "unet" / "weights.safetensors"
    weights.write_bytes(bytes(size // 2) + b"x" + bytes(size // 2 - 1))
    engines = [
        MountedEngine(cast("Engine", None), A, Keeper(ModelStore(tmp_path / each)))
        for each in ("good", "spoilt")
    ]
    (good,), (spoilt,) = (engine.candidates() for engine in engines)
    assert good.contents != spoilt.contents
    # Mended in its place, by the same process.
    weights.write_bytes(bytes(size))
    assert engines[1].candidates() == (good,)


def test_what_the_disk_has_lost_is_no_candidate_and_no_fault_of_the_cards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(tmp_path, "acme/small", 10)
    plant(tmp_path, "acme/large", 30)
    lost, read = tmp_path / "acme" / "small" / "unet" / "weights.safetensors", parts.digest_of

    def digest(file: Path) -> bytes:
        if file == lost:
            raise ModelUnavailable(ModelUnavailableKind.UNREACHABLE, "input/output error")
        return read(file)

    monkeypatch.setattr(parts, "digest_of", digest)
    engine = MountedEngine(cast("Engine", None), A, Keeper(ModelStore(tmp_path)))
    assert [each.model for each in engine.candidates()] == ["acme/large"]


def test_a_model_is_read_through_but_once_and_one_at_a_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first look is what a card that comes up waits for."""
    for number in range(4):
        plant(tmp_path, f"acme/m{number}", 10 + number)
    read: list[str] = []
    digest_of = parts.digest_of

    def counted(file: Path) -> bytes:
        read.append(file.relative_to(tmp_path).as_posix())
        return digest_of(file)

    monkeypatch.setattr(parts, "digest_of", counted)
    engine = MountedEngine(cast("Engine", None), A, Keeper(ModelStore(tmp_path)))

    def weights() -> list[str]:
        return [each for each in read if each.endswith(".safetensors")]

    first = engine.candidates()
    assert weights() == ["acme/m0/unet/weights.safetensors"]
    second = engine.candidates()
    assert weights()[1:] == ["acme/m1/unet/weights.safetensors"]
    assert [a == b for a, b in zip(first, second, strict=True)] == [True, False, True, True]
    assert engine.candidates() == second
    assert len(weights()) == 2


def test_what_is_no_model_for_a_canary_is_not_looked_into_with_every_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(tmp_path, "acme/small", 10)
    plant(tmp_path, "acme/refiner", 5, REFINER)
    plant(tmp_path, "acme/broken", 3, None)
    looks: list[str] = []
    find = ModelStore.find

    def counted(store: ModelStore, ref: ModelRef) -> Path:
        looks.append(ref.name)
        return find(store, ref)

    monkeypatch.setattr(ModelStore, "find", counted)
    monkeypatch.setattr(
        ModelStore, "on_disk", lambda _: {"acme/small", "acme/refiner", "acme/broken"}
    )
    engine = MountedEngine(cast("Engine", None), A, Keeper(ModelStore(tmp_path)))
    for _ in range(3):
        assert [each.model for each in engine.candidates()] == ["acme/small"]
    assert sorted(looks) == ["acme/broken", "acme/refiner", "acme/small"]


def test_a_model_that_came_with_a_task_is_the_last_choice(tmp_path: Path) -> None:
    """However small it is: whoever sends tasks must not choose what cards are judged by."""
    plant(tmp_path, "acme/large", 30)
    keeper = Keeper(ModelStore(tmp_path))
    refs = [ModelRef("base", name) for name in ("acme/tiny", "acme/pinned")]
    for ref, size in zip(refs, (5, 8), strict=True):
        plant(keeper.disk.model(ref.key).parent, ref.key, size)
        folder = keeper.disk.model(ref.key)
        at = (folder / "unet" / "weights.safetensors").stat().st_mtime_ns
        stored = Stored("unet/weights.safetensors", size, "0" * 64, at)
        manifest = Manifest(ref, "hub", "c0ffee", (stored,), 0.0, 0.0)
        (folder / MANIFEST).write_text(manifest_text(manifest))
    engine = MountedEngine(
        cast("Engine", None), A, Keeper(ModelStore(tmp_path), pinned=frozenset({refs[1]}))
    )
    found = [(each.model, each.own) for each in engine.candidates()]
    assert found == [("acme/pinned", True), ("acme/large", True), ("acme/tiny", False)]
