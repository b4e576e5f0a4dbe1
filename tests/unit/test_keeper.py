"""Who may be blamed, who is asked next, and what is on the disk afterwards."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from cluster.core.errors import (
    Cancelled,
    ClusterError,
    DeadlinePassed,
    ModelUnavailable,
    ModelUnavailableKind,
    TaskInvalid,
)
from cluster.models import transfer
from cluster.models.keeper import Keeper, Wanted
from cluster.models.refs import ModelRef, ref
from cluster.models.refusals import Refused, Rule
from cluster.models.settings import Limits
from cluster.models.sources import Changed, Denied, Listing, Opened, RemoteFile, SourceDown
from cluster.models.store import ModelStore
from tests.unit.model_fakes import (
    LIMITS,
    LORA,
    Shelf,
    Time,
    content_of,
    keeper,
    lora_shelf,
    weights,
)

NOBODY = Wanted()
FILE = "pytorch_lora_weights.safetensors"
CHAT = ref("base", "acme/chat")
CHAT_FILES = {
    "config.json": b'{"architectures": ["X"]}',
    "merges.txt": b"a b\n" * 500,
    "model.safetensors": weights(5000),
}
PIPE = ref("base", "acme/pipe")
PIPE_FILES = {
    "model_index.json": b'{"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "U"]}',
    "unet/config.json": b"{}",
    "unet/diffusion_pytorch_model.safetensors": weights(5000),
}


def raising(error: ClusterError | OSError, times: int = 10**6) -> Callable[[], None]:
    left = [times]

    def act() -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise error

    return act


def kind_of(keeper: Keeper, ref: ModelRef = LORA, wanted: Wanted = NOBODY) -> ModelUnavailableKind:
    with pytest.raises(ModelUnavailable) as caught:
        keeper.ensure(ref, wanted)
    return caught.value.kind


def events(keeper: Keeper) -> list[str]:
    return [str(entry["event"]) for entry, _ in keeper.diary.read()]


# --- the way of a model --------------------------------------------------------------------------


def test_fetched_once_checked_and_published(tmp_path: Path) -> None:
    shelf = lora_shelf()
    store = keeper(tmp_path, shelf)
    store.ensure(LORA, NOBODY)
    store.ensure(LORA, NOBODY)
    assert shelf.listed == 1
    assert content_of(store, LORA) == shelf.files[LORA]
    manifest = store.disk.manifest(LORA.key)
    assert manifest is not None
    assert (manifest.ref, manifest.source, manifest.revision) == (LORA, "hub", "1")
    assert not list((tmp_path / ".store" / "partial").iterdir())
    assert store.disk.downloads() == ()
    assert events(store) == ["fetched"]


def test_what_was_laid_by_hand_is_never_fetched(tmp_path: Path) -> None:
    (tmp_path / "acme" / "style").mkdir(parents=True)
    (tmp_path / "acme" / "style" / FILE).write_bytes(weights())
    shelf = lora_shelf()
    keeper(tmp_path, shelf).ensure(LORA, NOBODY)
    assert shelf.listed == 0


def test_without_a_source_nothing_is_written(tmp_path: Path) -> None:
    assert kind_of(Keeper(ModelStore(tmp_path))) is ModelUnavailableKind.NOT_HERE
    assert list(tmp_path.iterdir()) == []


def test_a_changed_file_is_noticed_and_fetched_again(tmp_path: Path) -> None:
    shelf = lora_shelf()
    store = keeper(tmp_path, shelf)
    store.ensure(LORA, NOBODY)
    file = store.store.lora_file(LORA.name)
    file.write_bytes(weights(4000, salt=9))
    store.ensure(LORA, NOBODY)
    assert shelf.listed == 2
    assert file.read_bytes() == shelf.files[LORA][FILE]
    assert "damaged" in events(store)


def test_a_touched_file_is_read_through_and_stays(tmp_path: Path) -> None:
    shelf = lora_shelf()
    store = keeper(tmp_path, shelf)
    store.ensure(LORA, NOBODY)
    store.store.lora_file(LORA.name).touch()
    store.ensure(LORA, NOBODY)
    assert shelf.listed == 1


def test_a_touched_file_is_read_through_once_for_all_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A restored backup or a moved volume touches them all."""
    store = keeper(tmp_path, lora_shelf())
    store.ensure(LORA, NOBODY)
    file = store.store.lora_file(LORA.name)
    os.utime(file, (1, 1))
    read: list[Path] = []

    def counted(path: Path, *rest: Any) -> str:
        read.append(path)
        return transfer.sha256_of(path, *rest)

    monkeypatch.setattr("cluster.models.store.sha256_of", counted)
    for _ in range(3):
        assert ModelStore(tmp_path).find(LORA)
    assert read == [file]
    changed = weights(4000, salt=3)
    file.write_bytes(changed)
    assert store.has(LORA) is False


def test_a_touched_file_that_is_not_ours_is_read_through_once_in_each_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = keeper(tmp_path, lora_shelf())
    store.ensure(LORA, NOBODY)
    os.utime(store.store.lora_file(LORA.name), (1, 1))
    read: list[Path] = []

    def counted(path: Path, *rest: Any) -> str:
        read.append(path)
        return transfer.sha256_of(path, *rest)

    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr("cluster.models.store.sha256_of", counted)
    monkeypatch.setattr(os, "utime", forbidden)
    for _ in range(3):
        assert store.has(LORA)
    assert len(read) == 1


@pytest.mark.parametrize("manifest", ["", "[]", "{}", '{"files": 3}', None])
def test_a_folder_without_its_manifest_is_no_model(tmp_path: Path, manifest: str | None) -> None:
    store = keeper(tmp_path, lora_shelf())
    store.ensure(LORA, NOBODY)
    file = store.disk.model(LORA.key) / ".manifest.json"
    file.write_text(manifest) if manifest is not None else file.unlink()
    assert store.disk.manifests() == {}
    with pytest.raises(ModelUnavailable) as caught:
        store.store.lora_file(LORA.name)
    assert caught.value.kind is ModelUnavailableKind.DAMAGED
    assert store.ensure(LORA, NOBODY) is True
    assert store.store.lora_file(LORA.name).is_file()
    assert events(store) == ["fetched", "damaged", "fetched"]


def test_what_was_laid_and_is_damaged_costs_no_fetched_model(tmp_path: Path) -> None:
    base = ref("base", "acme/pipe")
    shelf = Shelf(
        {base: {"config.json": b'{"architectures": ["X"]}', "model.safetensors": weights()}}
    )
    store = keeper(tmp_path, shelf)
    store.ensure(base, NOBODY)
    laid = tmp_path / "acme" / "pipe"
    laid.mkdir(parents=True)
    (laid / "model_index.json").write_text("{")
    assert kind_of(store, base) is ModelUnavailableKind.DAMAGED
    assert shelf.listed == 1
    assert base.key in store.disk.manifests()


def test_all_that_is_published_has_reached_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[str] = set()
    sync = os.fsync

    def noted(file: int) -> None:
        synced.add(os.path.basename(os.readlink(f"/proc/self/fd/{file}")))
        sync(file)

    monkeypatch.setattr(os, "fsync", noted)
    base = ref("base", "acme/pipe")
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "U"]}
    files = {
        "model_index.json": json.dumps(index).encode(),
        "unet/config.json": b"{}",
        "unet/diffusion_pytorch_model.safetensors": weights(),
    }
    keeper(tmp_path, Shelf({base: files})).ensure(base, NOBODY)
    assert {"model_index.json", "config.json", "diffusion_pytorch_model.safetensors"} <= synced
    assert {"unet", base.key, "models", ".manifest.json"} <= synced


@pytest.mark.parametrize("top", ["", "vae/", "my-vae 2/"])
def test_an_archive_of_a_folder_and_one_of_its_files(tmp_path: Path, top: str) -> None:
    """`zip -r x.zip vae/` makes the former."""
    link = ref("vae", "https://host.example/vae.zip")
    contents = {"config.json": b"{}", "diffusion_pytorch_model.safetensors": weights(50)}
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as packed:
        for name, content in contents.items():
            packed.writestr(top + name, content)
    store = keeper(tmp_path, Shelf({link: {"archive": file.getvalue()}}, archive=True))
    store.ensure(link, NOBODY)
    assert content_of(store, link) == contents


# --- two who want the same ----------------------------------------------------------------------


def test_a_task_does_not_wait_out_the_pause_of_the_background(tmp_path: Path) -> None:
    shelf = lora_shelf(listing=raising(SourceDown("429", retry_after=3600.0), times=1))
    background, task = Time(), Time()
    behind = keeper(tmp_path, shelf, time=background)
    ahead = keeper(tmp_path, lora_shelf(), time=task)
    pausing, done = threading.Event(), threading.Event()

    def sleep(seconds: float) -> None:
        background.sleep(seconds)
        pausing.set()
        # Real time only goes by where the two meet.
        done.wait(0.01)

    behind.sleep = sleep

    def fetch() -> None:
        behind.ensure(LORA, Wanted(background=True))

    thread = threading.Thread(target=fetch)
    thread.start()
    assert pausing.wait(30)

    def wait(seconds: float) -> None:
        task.sleep(seconds)
        time.sleep(0.001)

    ahead.sleep = wait
    ahead.ensure(LORA, Wanted(deadline=task.now + 600))
    done.set()
    thread.join(30)
    assert not thread.is_alive()
    assert shelf.listed == 1, "the background found it there"
    assert background.now < 1_000_000 + 3600


def test_who_waits_for_a_living_process_lives(tmp_path: Path) -> None:
    """Also while that one pauses, hashes or unpacks, and tells of no progress."""
    store = keeper(tmp_path, lora_shelf())
    heard: list[None] = []
    with store.disk.try_lock(LORA.key), pytest.raises(Cancelled):
        store.ensure(
            LORA, Wanted(cancelled=lambda: len(heard) > 3, alive=lambda: heard.append(None))
        )


# --- while nothing comes over the wire -----------------------------------------------------------


class Ears:
    """Hears that somebody lives once all has come; may have had enough of that."""

    def __init__(self, shelf: Shelf, enough: int = 10**9) -> None:
        self.shelf, self.enough, self.heard = shelf, enough, 0
        self.size = sum(map(len, shelf.files[LORA].values()))

    def alive(self) -> None:
        self.heard += self.shelf.sent >= self.size

    def wanted(self) -> Wanted:
        return Wanted(alive=self.alive, cancelled=lambda: self.heard > self.enough)


@pytest.mark.parametrize("hashes", [True, False])
def test_who_hashes_lives_and_looks_whether_it_is_still_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashes: bool
) -> None:
    monkeypatch.setattr(transfer, "PIECE", 100)
    shelf = lora_shelf(4000, hashes=hashes)
    store = keeper(tmp_path, shelf)
    ears = Ears(shelf, enough=10)
    with pytest.raises(Cancelled):
        store.ensure(LORA, ears.wanted())
    assert ears.heard == 11
    assert store.disk.manifests() == {}
    ears.enough = 10**9
    store.ensure(LORA, ears.wanted())
    assert shelf.sent == ears.size, "nothing came twice"
    assert 50 < ears.heard < 60, "and each byte was hashed once more"


def test_who_looks_through_what_was_touched_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "PIECE", 100)
    shelf = lora_shelf(4000)
    store = keeper(tmp_path, shelf)
    store.ensure(LORA, NOBODY)
    os.utime(store.store.lora_file(LORA.name), (1, 1))
    ears = Ears(shelf, enough=10)
    with pytest.raises(Cancelled):
        store.ensure(LORA, ears.wanted())
    ears.enough = 10**9
    with store.held((LORA,), ears.wanted()):
        assert 50 < ears.heard < 60
    assert shelf.listed == 1


def test_who_publishes_many_files_lives(tmp_path: Path) -> None:
    heard: list[int] = []
    files = CHAT_FILES | {f"tokenizer_{number}.json": b"{}" for number in range(30)}
    shelf = Shelf({CHAT: files})
    size = sum(map(len, files.values()))

    def alive() -> None:
        heard.append(shelf.sent)

    keeper(tmp_path, shelf).ensure(CHAT, Wanted(alive=alive))
    assert heard.count(size) >= 30


# --- what can't be used --------------------------------------------------------------------------


def fetched_bytes(tmp_path: Path, asked: ModelRef, files: dict[str, bytes], times: int = 3) -> int:
    """What is sent of a model's weights for so many tasks that all want it in vain."""
    shelf = Shelf({asked: files})
    store = keeper(tmp_path, shelf)
    for _ in range(times):
        with pytest.raises(Refused), store.held((asked,), NOBODY):
            pass
    assert store.disk.manifests() == {}
    assert not list((tmp_path / ".store" / "partial").iterdir())
    return shelf.sent


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ({"_class_name": "FluxPipeline", "unet": ["diffusers", "X"]}, "FluxPipeline"),
        ({"_class_name": "StableDiffusionPipeline", "unet": ["my_code", "X"]}, "my_code"),
        ({"_class_name": "StableDiffusionPipeline", "unet": [3]}, "damaged"),
        (["no object"], "not a JSON object"),
    ],
)
def test_a_foreign_pipelines_weights_are_not_fetched(
    tmp_path: Path, index: object, says: str
) -> None:
    files = PIPE_FILES | {"model_index.json": json.dumps(index).encode()}
    assert fetched_bytes(tmp_path, PIPE, files) < 1000
    with pytest.raises(Refused, match=says):
        keeper(tmp_path / "again", Shelf({PIPE: files})).ensure(PIPE, NOBODY)


@pytest.mark.parametrize("config", [b"{}", b'{"_class_name": "UNet2DConditionModel"}', b"[]"])
def test_what_is_neither_pipeline_nor_language_model_is_not_fetched(
    tmp_path: Path, config: bytes
) -> None:
    files = {"config.json": config, "model.safetensors": weights(5000)}
    assert fetched_bytes(tmp_path, CHAT, files) < 1000


def test_a_language_model_has_no_variants(tmp_path: Path) -> None:
    """A task names none, so that nobody could use it."""
    asked = ref("base", "acme/chat", "fp16")
    files = {"config.json": b'{"architectures": ["X"]}', "model.fp16.safetensors": weights(5000)}
    assert fetched_bytes(tmp_path, asked, files) < 1000


@pytest.mark.parametrize("config", [{"architectures": ["X"]}, {"model_type": "llama"}])
def test_what_says_its_type_is_a_language_model_and_fetched_once(
    tmp_path: Path, config: object
) -> None:
    said = json.dumps(config).encode()
    shelf = Shelf({CHAT: {"config.json": said, "model.safetensors": weights(5000)}})
    store = keeper(tmp_path, shelf)
    for _ in range(2):
        with store.held((CHAT,), NOBODY):
            pass
    assert shelf.listed == 1


def test_what_was_refused_for_what_it_is_is_not_fetched_again_for_a_while(tmp_path: Path) -> None:
    time = Time()
    shelf = Shelf({LORA: {FILE: b"PK" + bytes(5000)}})
    for _ in range(3):
        store = keeper(tmp_path, shelf, time=time)
        with pytest.raises(Refused) as caught:
            store.ensure(LORA, Wanted(deadline=time.now + 100))
        assert caught.value.rule is Rule.HEADER
    assert shelf.listed == 1
    assert events(store) == ["refused"]
    time.now += 86400
    shelf.files = lora_shelf().files
    store.ensure(LORA, Wanted(deadline=time.now + 100))
    assert shelf.listed == 2


def test_who_asks_by_hand_may_ask_again_at_once(tmp_path: Path) -> None:
    shelf = Shelf({LORA: {FILE: b"PK" + bytes(5000)}})
    store = keeper(tmp_path, shelf)
    with pytest.raises(Refused):
        store.ensure(LORA, Wanted(background=True))
    shelf.files = lora_shelf().files
    store.ensure(LORA, NOBODY)


def test_what_had_no_room_is_tried_again_at_once(tmp_path: Path) -> None:
    shelf = lora_shelf()
    limits = replace(LIMITS, quota=100)
    for _ in range(2):
        with pytest.raises(Refused):
            keeper(tmp_path, shelf, limits=limits).ensure(LORA, Wanted(background=True))
    keeper(tmp_path, shelf).ensure(LORA, Wanted(background=True))


def test_what_one_source_has_in_vain_is_fetched_once_while_another_is_down(tmp_path: Path) -> None:
    bad = Shelf({LORA: {FILE: b"PK" + bytes(5000)}}, name="mirror")
    good = lora_shelf(listing=raising(SourceDown("500"), times=3))
    time = Time()
    keeper(tmp_path, bad, good, time=time).ensure(LORA, Wanted(deadline=time.now + 100))
    assert bad.listed == 1


def told(keeper: Keeper) -> list[tuple[str, str]]:
    return [
        (str(entry["model"]), str(entry["rule"]))
        for entry, _ in keeper.diary.read()
        if entry["event"] == "refused"
    ]


def test_a_refusal_is_told_though_another_source_has_the_model(tmp_path: Path) -> None:
    inside = lora_shelf(listing=raising(Refused(Rule.ADDRESS, "leads to 10.0.0.1")))
    store = keeper(tmp_path, inside, lora_shelf(name="web"))
    store.ensure(LORA, NOBODY)
    assert events(store) == ["refused", "fetched"]
    assert told(store) == [(str(LORA), "address")]


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("loader.py", b"", "code"),
        ("away.safetensors", None, "link"),
        ("adapter_config.json", b"{}", "file_kind"),
        ("tokenizer_config.json", b'{"auto_map": {}}', "code"),
    ],
)
def test_what_is_refused_of_what_was_laid_is_told_by_its_rule(
    tmp_path: Path, name: str, content: bytes | None, rule: str
) -> None:
    laid = tmp_path / "acme" / "chat"
    laid.mkdir(parents=True)
    for path, text in CHAT_FILES.items():
        (laid / path).write_bytes(text)
    store = keeper(tmp_path, Shelf({CHAT: CHAT_FILES}))
    if content is None:
        (laid / name).symlink_to("/etc/passwd")
    else:
        (laid / name).write_bytes(content)
    with pytest.raises(Refused):
        store.ensure(CHAT, NOBODY)
    assert told(store) == [(str(CHAT), rule)]


def test_a_model_with_code_of_its_own_is_not_fetched(tmp_path: Path) -> None:
    config = b'{"architectures": ["X"], "auto_map": {"AutoModel": "modeling.X"}}'
    files = {"config.json": config, "model.safetensors": weights(5000)}
    assert fetched_bytes(tmp_path, CHAT, files) < 1000


# --- what goes away under a reader ---------------------------------------------------------------


@pytest.mark.parametrize("when", range(1, 40))
def test_who_looks_sees_a_model_or_none_whenever_it_goes_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: int
) -> None:
    """Another process evicts it between any two of a look's system calls."""
    store = keeper(tmp_path, Shelf({PIPE: PIPE_FILES}))
    store.ensure(PIPE, NOBODY)
    calls = [0]
    removing = [False]

    def between(call: Callable[..., object]) -> Callable[..., object]:
        def called(path: object, *args: object, **options: object) -> object:
            if not removing[0] and PIPE.key in str(path):
                calls[0] += 1
                if calls[0] == when:
                    removing[0] = True
                    store.disk.remove(PIPE.key)
            return call(path, *args, **options)

        return called

    monkeypatch.setattr(os, "scandir", between(os.scandir))
    monkeypatch.setattr(os, "stat", between(os.stat))
    monkeypatch.setattr(os, "lstat", between(os.lstat))
    monkeypatch.setattr(io, "open", between(io.open))
    found = store.has(PIPE)
    store.store.is_language_model(PIPE.name)
    monkeypatch.undo()
    assert found or removing[0]
    assert not (removing[0] and store.has(PIPE))


def test_who_looks_removes_nothing_that_another_has_just_published(tmp_path: Path) -> None:
    store = keeper(tmp_path, lora_shelf())
    store.ensure(LORA, NOBODY)
    store.store.lora_file(LORA.name).write_bytes(b"")
    assert store.has(LORA) is False
    assert store.disk.model(LORA.key).is_dir()


def test_what_cannot_be_read_is_unavailable_and_no_bug(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = keeper(tmp_path, lora_shelf())
    store.ensure(LORA, NOBODY)

    def broken(*_: object) -> object:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "scandir", broken)
    assert kind_of(store) is ModelUnavailableKind.UNREACHABLE


# --- what a crash leaves behind ------------------------------------------------------------------


class Killed(BaseException):
    pass


def left_behind(tmp_path: Path, **options: bool) -> tuple[Keeper, Shelf, Path]:
    """A download that ended when all but the weights was whole."""
    shelf = Shelf({CHAT: CHAT_FILES})
    for name, value in options.items():
        setattr(shelf, name, value)

    def kill() -> None:
        if shelf.opened[-1][0] == "model.safetensors":
            raise Killed

    shelf.opening = kill
    store = keeper(tmp_path, shelf)
    with pytest.raises(Killed):
        store.ensure(CHAT, NOBODY)
    shelf.opening = lambda: None
    shelf.opened.clear()
    return store, shelf, store.disk.partial(CHAT.key) / "merges.txt"


def test_what_is_whole_is_not_asked_for_again(tmp_path: Path) -> None:
    store, shelf, _ = left_behind(tmp_path)
    store.ensure(CHAT, NOBODY)
    assert {path for path, _, _ in shelf.opened} == {"model.safetensors"}
    assert content_of(store, CHAT) == CHAT_FILES


@pytest.mark.parametrize("hashes", [True, False])
def test_a_file_that_lost_its_end_is_fetched_again(tmp_path: Path, hashes: bool) -> None:
    store, _, file = left_behind(tmp_path, hashes=hashes)
    os.truncate(file, 1000)
    store.ensure(CHAT, NOBODY)
    assert content_of(store, CHAT) == CHAT_FILES


@pytest.mark.parametrize("git", [True, False])
def test_files_that_lost_their_bytes_are_fetched_again(tmp_path: Path, git: bool) -> None:
    store, _, file = left_behind(tmp_path, git=git)
    for path in (file, file.with_name("config.json")):
        path.write_bytes(bytes(path.stat().st_size))
    store.ensure(CHAT, NOBODY)
    assert content_of(store, CHAT) == CHAT_FILES


def test_without_hashes_nothing_is_taken_on_from_before_a_power_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk may have the file's name and length, and not its bytes."""
    store, _, file = left_behind(tmp_path, hashes=False)
    file.write_bytes(bytes(2000))
    monkeypatch.setattr(transfer, "boot_id", lambda: "another")
    store.ensure(CHAT, NOBODY)
    assert content_of(store, CHAT) == CHAT_FILES


# --- another source, at once ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "trouble",
    [
        SourceDown("500"),
        Denied("401"),
        Refused(Rule.FILE_KIND, "pickles"),
        Changed("another"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("where", ["listing", "opening"])
def test_the_next_source_is_asked_without_waiting(
    tmp_path: Path, trouble: ClusterError, where: str
) -> None:
    time = Time()
    first, second = lora_shelf(name="mirror"), lora_shelf(name="hub")
    setattr(first, where, raising(trouble))
    store = keeper(tmp_path, first, second, time=time)
    store.ensure(LORA, NOBODY)
    assert time.slept == []
    manifest = store.disk.manifest(LORA.key)
    assert manifest is not None
    assert manifest.source == "hub"


def test_a_lack_in_the_mirror_is_made_up_for_by_the_hub(tmp_path: Path) -> None:
    store = keeper(tmp_path, Shelf(name="mirror"), lora_shelf())
    store.ensure(LORA, NOBODY)
    assert events(store) == ["fetched"]


# --- whose fault ---------------------------------------------------------------------------------


def test_certainly_missing_twice_is_the_tasks_fault(tmp_path: Path) -> None:
    time, hub = Time(), Shelf(certain=True)
    with pytest.raises(TaskInvalid, match="asked twice"):
        keeper(tmp_path, Shelf(name="mirror"), hub, time=time).ensure(LORA, NOBODY)
    assert hub.listed == 2
    assert sum(time.slept) == pytest.approx(3.0)


def test_missing_once_and_there_at_the_second_look(tmp_path: Path) -> None:
    hub = Shelf(certain=True)
    found = lora_shelf().files

    def appear() -> None:
        if hub.listed == 2:
            hub.files = found

    hub.listing = appear
    keeper(tmp_path, hub).ensure(LORA, NOBODY)
    assert hub.listed == 2


@pytest.mark.parametrize(
    "trouble",
    [SourceDown("503"), Denied("403"), Refused(Rule.ADDRESS, "private"), Changed("another")],
    ids=lambda error: type(error).__name__,
)
def test_missing_here_and_unclear_there_is_nobodys_fault(
    tmp_path: Path, trouble: ClusterError
) -> None:
    other = Shelf(name="mirror", listing=raising(trouble))
    kind_of(keeper(tmp_path, other, Shelf(certain=True)))


@pytest.mark.parametrize(
    ("trouble", "kind"),
    [
        (Denied("401"), ModelUnavailableKind.FORBIDDEN),
        (SourceDown("500"), ModelUnavailableKind.UNREACHABLE),
        (Changed("another"), ModelUnavailableKind.UNREACHABLE),
        (Refused(Rule.FILE_KIND, "pickles"), ModelUnavailableKind.REFUSED),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_kind_of_what_stands_against_it(
    tmp_path: Path, trouble: ClusterError, kind: ModelUnavailableKind
) -> None:
    assert kind_of(keeper(tmp_path, lora_shelf(listing=raising(trouble)))) is kind


def test_not_there_but_maybe_elsewhere(tmp_path: Path) -> None:
    assert kind_of(keeper(tmp_path, Shelf())) is ModelUnavailableKind.NOT_HERE


def test_a_missing_file_of_a_model_that_exists_is_never_reported(tmp_path: Path) -> None:
    hub = Shelf({LORA: {"pytorch_lora_weights.safetensors": b"x"}}, certain=True)
    hub.listing = raising(ModelUnavailable(ModelUnavailableKind.NOT_HERE, "no such variant"))
    assert kind_of(keeper(tmp_path, hub)) is ModelUnavailableKind.NOT_HERE


# --- patience ------------------------------------------------------------------------------------


def test_tried_again_with_growing_pauses_until_the_deadline(tmp_path: Path) -> None:
    time = Time()
    shelf = lora_shelf(listing=raising(SourceDown("500")))
    with pytest.raises(DeadlinePassed):
        keeper(tmp_path, shelf, time=time).ensure(LORA, Wanted(deadline=time.now + 100))
    assert time.now >= 1_000_100
    assert 5 <= shelf.listed <= 9  # after 1, 2, 4, 8, 16, 32, 60 … seconds


def test_who_has_no_deadline_gives_up_after_some_rounds(tmp_path: Path) -> None:
    shelf = lora_shelf(listing=raising(SourceDown("500")))
    assert kind_of(keeper(tmp_path, shelf)) is ModelUnavailableKind.UNREACHABLE
    assert shelf.listed == LIMITS.rounds


@pytest.mark.parametrize("chance", [0.0, 0.5, 0.99])
def test_at_least_as_long_as_the_source_asks_to_wait(tmp_path: Path, chance: float) -> None:
    time = Time()
    shelf = lora_shelf(listing=raising(SourceDown("429", retry_after=90.0), times=1))
    store = keeper(tmp_path, shelf, time=time)
    store.chance = lambda: chance
    store.ensure(LORA, NOBODY)
    assert 90.0 <= sum(time.slept) <= 92.0


def test_a_break_is_gone_on_from_and_counts_as_progress(tmp_path: Path) -> None:
    shelf = lora_shelf(4000, cut=[1000, 300, 1000, 500, 700, 200, 100, 100])
    store = keeper(tmp_path, shelf)
    store.ensure(LORA, NOBODY)
    size = len(shelf.files[LORA][FILE])
    assert content_of(store, LORA) == shelf.files[LORA]
    assert shelf.sent < 2 * size


def test_what_comes_again_and_again_is_no_progress(tmp_path: Path) -> None:
    """A server without ranges that breaks each time gives the same bytes each time."""
    shelf = lora_shelf(4000, ranges=False, cut=[100] * 1000)
    kind = kind_of(keeper(tmp_path, shelf), wanted=Wanted(background=True))
    assert kind is ModelUnavailableKind.UNREACHABLE
    assert shelf.listed <= LIMITS.rounds + 1


@dataclass
class Drip:
    """A shelf whose bytes come at a rate: the clock goes on with each piece."""

    shelf: Shelf
    time: Time
    rate: float

    name = "hub"

    def serves(self, ref: ModelRef) -> bool:
        return True

    def list(self, ref: ModelRef) -> Listing:
        return self.shelf.list(ref)

    @contextmanager
    def open(
        self, listing: Listing, file: RemoteFile, start: int, stop: int | None
    ) -> Iterator[Opened]:
        with self.shelf.open(listing, file, start, stop) as opened:
            yield replace(opened, chunks=self._slowly(opened.chunks))

    def _slowly(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        piece = b""
        for chunk in chunks:
            piece += chunk
            if len(piece) >= 10 * self.rate:
                self.time.now += len(piece) / self.rate
                yield piece
                piece = b""
        yield piece


def dripping(tmp_path: Path, content: bytes, rate: float) -> tuple[Keeper, Drip, Time]:
    time = Time()
    source = Drip(Shelf({LORA: {FILE: content}}), time, rate)
    limits = replace(LIMITS, connections=1, part=10**9)
    return keeper(tmp_path, source, limits=limits, time=time), source, time


def test_who_drips_is_left_for_another_source(tmp_path: Path) -> None:
    store, drip, time = dripping(tmp_path, weights(400_000), rate=1000)
    other = lora_shelf(400_000)
    other.name = "web"
    store.sources = (drip, other)
    began = time.now
    store.ensure(LORA, Wanted(deadline=began + 180))
    assert time.now - began < 70
    manifest = store.disk.manifest(LORA.key)
    assert manifest is not None
    assert manifest.source == "web"


def test_the_background_gives_up_what_goes_on_for_ever(tmp_path: Path) -> None:
    store, _, time = dripping(tmp_path, bytes(40 * 2**20), rate=5000)
    began = time.now
    with pytest.raises(ModelUnavailable) as caught:
        store.ensure(LORA, Wanted(background=True))
    assert caught.value.kind is ModelUnavailableKind.UNREACHABLE
    assert "too slow" in str(caught.value)
    assert 3600 < time.now - began < 4000
    assert events(store)[-1] == "failed"


def test_what_is_slow_and_gets_on_is_waited_for(tmp_path: Path) -> None:
    store, drip, time = dripping(tmp_path, weights(4 * 2**20), rate=5000)
    began = time.now
    store.ensure(LORA, Wanted(background=True))
    assert time.now - began > 800
    assert content_of(store, LORA) == drip.shelf.files[LORA]


def test_a_rate_of_our_own_choice_is_not_too_slow(tmp_path: Path) -> None:
    time = Time()
    limits = replace(LIMITS, rate=2000.0, connections=1, part=10**9)
    store = keeper(tmp_path, lora_shelf(60_000), limits=limits, time=time)
    began = time.now
    store.ensure(LORA, Wanted(background=True))
    assert time.now - began > 4000


def test_cancelled_between_two_pieces(tmp_path: Path) -> None:
    shelf = lora_shelf()
    store = keeper(tmp_path, shelf)
    with pytest.raises(Cancelled):
        store.ensure(LORA, Wanted(cancelled=lambda: shelf.sent > 500))
    assert shelf.sent < 2000
    assert store.disk.manifests() == {}
    store.ensure(LORA, NOBODY)
    assert content_of(store, LORA) == shelf.files[LORA]


def test_who_waits_hears_that_there_is_progress(tmp_path: Path) -> None:
    heard: list[None] = []
    shelf = lora_shelf(listing=raising(SourceDown("500"), times=2))
    keeper(tmp_path, shelf).ensure(LORA, Wanted(alive=lambda: heard.append(None)))
    assert len(heard) >= 3


@pytest.mark.parametrize("part", [1000, 10**9])
def test_a_server_that_tags_each_answer_otherwise_is_read_in_one_stream(
    tmp_path: Path, part: int
) -> None:
    """Behind one address are several, each with tags of its own."""
    shelf = lora_shelf(4000, hashes=False)
    counter = itertools.count()
    shelf.opening = shelf.listing = lambda: setattr(shelf, "etag", str(next(counter)))
    store = keeper(tmp_path, shelf, limits=replace(LIMITS, part=part))
    store.ensure(LORA, NOBODY)
    assert content_of(store, LORA) == shelf.files[LORA]
    assert shelf.listed <= 3


# --- what isn't what it says ---------------------------------------------------------------------


def test_wrong_bytes_are_given_up_after_two_tries(tmp_path: Path) -> None:
    shelf = lora_shelf()
    content = shelf.files[LORA]

    def lie() -> None:
        shelf.files = {LORA: {FILE: weights(4000, salt=7)}}

    shelf.opening = lie
    shelf.listing = lambda: setattr(shelf, "files", {LORA: content})
    store = keeper(tmp_path, shelf)
    assert kind_of(store) is ModelUnavailableKind.DAMAGED
    assert shelf.listed == 2
    assert store.disk.manifests() == {}


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x04.", weights()[:-1]])
def test_what_is_not_safetensors_is_refused(tmp_path: Path, content: bytes) -> None:
    shelf = Shelf({LORA: {FILE: content}})
    store = keeper(tmp_path, shelf)
    with pytest.raises(Refused) as caught:
        store.ensure(LORA, NOBODY)
    assert caught.value.rule is Rule.HEADER
    assert [str(entry["rule"]) for entry, _ in store.diary.read()] == ["header"]
    assert not list((tmp_path / ".store" / "partial").iterdir())


def test_too_large_a_file_is_not_begun(tmp_path: Path) -> None:
    shelf = lora_shelf()
    with pytest.raises(Refused, match="largest_file_gb") as caught:
        keeper(tmp_path, shelf, limits=Limits(spare=0, largest_file=1000)).ensure(LORA, NOBODY)
    assert caught.value.rule is Rule.FILE_SIZE
    assert shelf.opened == []


def test_a_file_that_grows_beyond_the_largest_is_cut_off(tmp_path: Path) -> None:
    shelf = lora_shelf(20_000, sizes=False, hashes=False)
    limits = Limits(spare=0, largest_file=5000, part=1000)
    with pytest.raises(Refused) as caught:
        keeper(tmp_path, shelf, limits=limits).ensure(LORA, NOBODY)
    assert caught.value.rule is Rule.FILE_SIZE
    assert shelf.sent <= 5200


def test_our_own_disk_is_never_the_models_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = keeper(tmp_path, lora_shelf())
    monkeypatch.setattr(os, "pwrite", full)
    assert kind_of(store) is ModelUnavailableKind.UNREACHABLE


# --- two of one thing ----------------------------------------------------------------------------


def test_variants_and_files_are_models_of_their_own(tmp_path: Path) -> None:
    other = ref("lora", "acme/style", file="other.safetensors")
    shelf = lora_shelf()
    shelf.files[other] = {"other.safetensors": weights(50)}
    store = keeper(tmp_path, shelf)
    for each in (LORA, other):
        store.ensure(each, NOBODY)
        assert content_of(store, each) == shelf.files[each]


def test_what_is_held_is_locked_against_eviction(tmp_path: Path) -> None:
    store = keeper(tmp_path, lora_shelf())
    with store.held((LORA,), NOBODY):
        assert store.disk.is_locked(f"{LORA.key}.use")
    assert not store.disk.is_locked(f"{LORA.key}.use")


def test_the_diary_says_nothing_of_a_links_query(tmp_path: Path) -> None:
    link = ref("lora", "https://host.example/file?token=SECRET")
    store = keeper(tmp_path, Shelf({link: {"a.safetensors": weights()}}))
    store.ensure(link, NOBODY)
    assert "SECRET" not in store.diary.file.read_text()
    assert json.loads(store.diary.file.read_text())["model"] == "lora:https://host.example/file"
