"""Models from real servers, by the real clients: the hub, links, and everything that breaks."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import constants, hf_hub_download, set_client_factory
from huggingface_hub.utils._http import default_client_factory

from cluster.core.errors import ModelUnavailable, ModelUnavailableKind, TaskInvalid
from cluster.models.guarded_http import guarded_client
from cluster.models.hub import Hub as HubSource
from cluster.models.keeper import Keeper, Wanted
from cluster.models.refs import ModelRef, ref
from cluster.models.refusals import Refused, Rule
from cluster.models.settings import Limits
from cluster.models.sources import Source
from cluster.models.store import ModelStore
from cluster.models.urls import UrlRules
from cluster.models.web import ONE_FILE, Web
from devnet.faulty_http import Answer, Fault, FileServer
from devnet.hub import Hub
from devnet.models import LLM, SD15, SD15_LORA
from tests.unit.model_fakes import content_of, weights

RULES = UrlRules(
    ports=frozenset({80, 443, *range(1024, 2**16)}),
    allow_hosts=frozenset({"127.0.0.1", "localhost"}),
)
LIMITS = Limits(spare=0, part=64 * 1024, rounds=4)
NOBODY = Wanted()
LORA = ref("lora", "acme/style")
FILE = "pytorch_lora_weights.safetensors"
LARGE = weights(900_000)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        yield server


@pytest.fixture
def files() -> Iterator[FileServer]:
    with FileServer({"a.safetensors": LARGE}) as server:
        yield server


def hub_source(hub: Hub, token: str | None = None, certain: bool = True) -> HubSource:
    return HubSource(lambda: guarded_client(RULES), hub.url, lambda: token, certain)


def keeper(root: Path, *sources: Source, limits: Limits = LIMITS) -> Keeper:
    """Pauses are skipped: what happens after them is what matters here."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    made = Keeper(ModelStore(root), sources, limits, sleep=sleep, clock=lambda: now[0])
    made.room.tidy()
    return made


def web(root: Path, token: str | None = None) -> Keeper:
    """Its servers, on this machine, are taken for ones that answer all nodes alike."""
    return keeper(root, Web(guarded_client(RULES), RULES, lambda: token, lambda _: True))


def kind_of(keeper: Keeper, asked: ModelRef) -> ModelUnavailableKind:
    with pytest.raises(ModelUnavailable) as caught:
        keeper.ensure(asked, NOBODY)
    return caught.value.kind


def rule_of(keeper: Keeper, asked: ModelRef) -> Rule:
    with pytest.raises(Refused) as caught:
        keeper.ensure(asked, NOBODY)
    return caught.value.rule


# --- the hub -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [SD15[0], LLM])
def test_a_base_model_comes_whole_and_nothing_else_with_it(
    hub: Hub, tmp_path: Path, tiny_models: Path, name: str
) -> None:
    there = {
        path.relative_to(tiny_models / name).as_posix(): path.read_bytes()
        for path in (tiny_models / name).rglob("*")
        if path.is_file() and ".fp16." not in path.name
    }
    junk = {"README.md": b"#", "model.ckpt": b"\x80", "unet/pytorch_model.bin": b"\x80"}
    commit = hub.add(name, there | junk)
    store = keeper(tmp_path, hub_source(hub))
    asked = ref("base", name)
    store.ensure(asked, NOBODY)
    assert content_of(store, asked) == there
    manifest = store.disk.manifest(asked.key)
    assert manifest is not None
    assert manifest.revision == commit
    assert {f.path: f.sha256 for f in manifest.files} == {
        path: hashlib.sha256(content).hexdigest() for path, content in there.items()
    }
    assert store.store.on_disk() == {name}
    assert all("main" not in seen.path for seen in hub.requests("/resolve/"))


def test_nobody_but_the_endpoint_is_asked(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FileServer() as default:
        monkeypatch.setattr(constants, "ENDPOINT", default.url)
        hub.add("acme/style", {FILE: LARGE})
        keeper(tmp_path, hub_source(hub)).ensure(LORA, NOBODY)
        assert default.seen == []


def test_the_local_hub_is_one_to_the_real_client(hub: Hub, tmp_path: Path) -> None:
    content = {"config.json": b"{}", FILE: LARGE}
    commit = hub.add("acme/style", content)
    # Another test of this process may have made our own of it.
    set_client_factory(default_client_factory)
    for name, expected in content.items():
        got = hf_hub_download("acme/style", name, endpoint=hub.url, cache_dir=tmp_path, token=False)
        assert Path(got).parent.name == commit
        assert Path(got).read_bytes() == expected


def test_the_revision_is_pinned_while_the_repository_moves_on(hub: Hub, tmp_path: Path) -> None:
    hub.add("acme/style", {FILE: LARGE, "README.md": b"1"})
    source = hub_source(hub)
    listing = source.list(LORA)
    hub.change("acme/style", FILE, weights(900_000, salt=5))
    with source.open(listing, listing.files[0], 0, None) as opened:
        assert b"".join(opened.chunks) == LARGE


def test_an_old_name_leads_to_the_new_one(hub: Hub, tmp_path: Path) -> None:
    hub.add("acme/gpt", {"config.json": b'{"architectures": ["X"]}', "model.safetensors": LARGE})
    hub.alias("gpt", "acme/gpt")
    store = keeper(tmp_path, hub_source(hub))
    store.ensure(ref("base", "gpt"), NOBODY)
    assert store.store.on_disk() == {"gpt"}


def test_gated_models_come_with_the_token_only(hub: Hub, tmp_path: Path) -> None:
    hub.add("acme/style", {FILE: LARGE}, gated=True)
    assert kind_of(keeper(tmp_path, hub_source(hub)), LORA) is ModelUnavailableKind.FORBIDDEN
    keeper(tmp_path, hub_source(hub, hub.token)).ensure(LORA, NOBODY)
    assert hub.requests("cdn/")
    assert not any("Authorization" in seen.headers for seen in hub.requests("cdn/"))


NO_SUCH = Fault(status=404, headers={"X-Error-Code": "RepoNotFound"})


def test_what_does_not_exist_is_the_tasks_fault_at_the_second_look(
    hub: Hub, tmp_path: Path
) -> None:
    hub.fail("api/models", NO_SUCH, times=2)
    with pytest.raises(TaskInvalid, match="asked twice"):
        keeper(tmp_path, hub_source(hub)).ensure(LORA, NOBODY)


def test_what_the_hub_says_to_a_token_holds_for_nobody_else(hub: Hub, tmp_path: Path) -> None:
    """It says 404 too of what is private and not for this token; another's may read it."""
    store = keeper(tmp_path, hub_source(hub, hub.token))
    assert kind_of(store, LORA) is ModelUnavailableKind.NOT_HERE


def test_what_is_private_or_absent_is_unclear_without_a_token(hub: Hub, tmp_path: Path) -> None:
    assert kind_of(keeper(tmp_path, hub_source(hub)), LORA) is ModelUnavailableKind.FORBIDDEN


def test_a_copy_of_the_hub_never_makes_anything_certain(hub: Hub, tmp_path: Path) -> None:
    hub.fail("api/models", NO_SUCH, times=99)
    source = hub_source(hub, certain=False)
    assert kind_of(keeper(tmp_path, source), LORA) is ModelUnavailableKind.NOT_HERE


@pytest.mark.parametrize("status", [429, 500, 502, 503])
@pytest.mark.parametrize("where", ["api/models", "cdn/", "/resolve/"])
def test_a_hub_that_recovers(hub: Hub, tmp_path: Path, status: int, where: str) -> None:
    hub.add("acme/style", {FILE: LARGE})
    hub.fail(where, Fault(status=status, headers={"Retry-After": "7"}), times=2)
    store = keeper(tmp_path, hub_source(hub))
    store.ensure(LORA, NOBODY)
    assert content_of(store, LORA) == {FILE: LARGE}


@pytest.mark.parametrize("status", [451, 403])
def test_a_file_that_is_not_given(hub: Hub, tmp_path: Path, status: int) -> None:
    hub.add("acme/style", {FILE: LARGE})
    hub.fail("cdn/", Fault(status=status), times=99)
    assert kind_of(keeper(tmp_path, hub_source(hub)), LORA) is ModelUnavailableKind.FORBIDDEN


def test_a_missing_file_under_a_listed_name_is_nobodys_fault(hub: Hub, tmp_path: Path) -> None:
    hub.add("acme/style", {FILE: LARGE})
    hub.fail("cdn/", Fault(status=404), times=99)
    source = hub_source(hub, hub.token)
    assert kind_of(keeper(tmp_path, source), LORA) is ModelUnavailableKind.NOT_HERE


def test_wrong_bytes_of_the_right_length(hub: Hub, tmp_path: Path) -> None:
    hub.add("acme/style", {FILE: LARGE})
    hub.fail("cdn/", Fault(body=weights(900_000, salt=3)), times=99)
    store = keeper(tmp_path, hub_source(hub))
    assert kind_of(store, LORA) is ModelUnavailableKind.DAMAGED
    assert store.disk.manifests() == {}
    assert hub.sent("cdn/") < 2.2 * len(LARGE)


@pytest.mark.parametrize(
    "answer",
    [b"", b"[]", b"{", b'{"siblings": 3}', b'{"id": "x", "siblings": [{"rfilename": "../x"}]}',
     b'{"id": "acme/style", "sha": "x", "siblings": [{"rfilename": 7, "size": "y"}]}'],
)  # fmt: skip
def test_a_hub_that_talks_nonsense_is_down(hub: Hub, tmp_path: Path, answer: bytes) -> None:
    hub.add("acme/style", {FILE: LARGE})
    hub.fail("api/models", Fault(body=answer), times=99)
    assert kind_of(keeper(tmp_path, hub_source(hub)), LORA) in {
        ModelUnavailableKind.UNREACHABLE,
        ModelUnavailableKind.NOT_HERE,
        ModelUnavailableKind.REFUSED,
    }


def test_in_parallel_parts(hub: Hub, tmp_path: Path) -> None:
    hub.add("acme/style", {FILE: LARGE})
    hub.bytes_per_second = 20e6
    keeper(tmp_path, hub_source(hub)).ensure(LORA, NOBODY)
    assert hub.most_at_once > 1
    assert hub.sent("cdn/") == len(LARGE)


def test_a_lora_of_the_tiny_models(hub: Hub, tmp_path: Path, tiny_models: Path) -> None:
    hub.add(SD15_LORA, tiny_models / SD15_LORA)
    asked = ref("lora", SD15_LORA)
    store = keeper(tmp_path, hub_source(hub))
    store.ensure(asked, NOBODY)
    assert (
        store.store.lora_file(SD15_LORA).read_bytes()
        == next((tiny_models / SD15_LORA).glob("*.safetensors")).read_bytes()
    )


# --- links ---------------------------------------------------------------------------------------


def link(server: FileServer, path: str = "a.safetensors") -> ModelRef:
    return ref("lora", f"{server.url}/{path}")


def test_a_link_is_of_the_kind_that_the_answer_names(files: FileServer, tmp_path: Path) -> None:
    files.files["download/77"] = LARGE
    name = 'attachment; filename="My Style (v2).safetensors"'
    files.fail("77", Fault(headers={"Content-Disposition": name}), times=99)
    store = web(tmp_path)
    asked = link(files, "download/77?type=Model&token=x")
    store.ensure(asked, NOBODY)
    assert content_of(store, asked) == {ONE_FILE: LARGE}
    assert store.store.lora_file(asked.name).read_bytes() == LARGE


@pytest.mark.parametrize(
    "fault",
    [
        Fault(cut=300_000),
        Fault(cut=0),
        Fault(lie=1000, cut=500_000),
        Fault(lie=-1000),
        Fault(status=500),
        Fault(no_ranges=True),
        Fault(chunked=True, no_ranges=True),
        Fault(headers={"Content-Range": "bytes 5-9/100"}),
        Fault(headers={"Content-Encoding": "gzip"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("times", [1, 3])
def test_what_breaks_on_the_way_arrives_all_the_same(
    files: FileServer, tmp_path: Path, fault: Fault, times: int
) -> None:
    files.fail("a.safetensors", Fault())  # the look at what it is
    files.fail("a.safetensors", fault, times)
    store = web(tmp_path)
    store.ensure(link(files), NOBODY)
    assert content_of(store, link(files)) == {ONE_FILE: LARGE}


def test_without_a_length_and_without_ranges(files: FileServer, tmp_path: Path) -> None:
    files.fail("a.safetensors", Fault(chunked=True, no_ranges=True), times=99)
    store = web(tmp_path)
    store.ensure(link(files), NOBODY)
    assert content_of(store, link(files)) == {ONE_FILE: LARGE}


@pytest.mark.parametrize("part", [64 * 1024, 10**9], ids=["in parts", "in one"])
@pytest.mark.parametrize("told", ["ETag", "Last-Modified", ""])
def test_content_that_changes_on_the_way_is_never_mixed(
    files: FileServer, tmp_path: Path, told: str, part: int
) -> None:
    changed = weights(900_000, salt=8)
    files.fail("a.safetensors", Fault())
    files.fail("a.safetensors", Fault(cut=30_000))
    limits = replace(LIMITS, part=part)
    store = keeper(tmp_path, Web(guarded_client(RULES), RULES), limits=limits)

    def respond(method: str, target: str, headers: Mapping[str, str]) -> Answer:
        content = changed if len(files._seen) >= 2 else LARGE
        stamp = f"{hash(content):x}"
        said = {"ETag": f'"{stamp}"', "Last-Modified": stamp}
        return Answer(200, content, {told: said[told]} if told else {})

    files.respond = respond  # type: ignore[method-assign]
    store.ensure(link(files), NOBODY)
    assert content_of(store, link(files)) == {ONE_FILE: changed}


@pytest.mark.parametrize("status", [404, 410])
def test_a_dead_link_to_a_certain_host_is_the_tasks_fault_at_the_second_look(
    files: FileServer, tmp_path: Path, status: int
) -> None:
    files.fail("gone", Fault(status=status), times=2)
    with pytest.raises(TaskInvalid, match="asked twice"):
        web(tmp_path).ensure(link(files, "gone"), NOBODY)
    assert len(files.requests("gone")) == 2


@pytest.mark.parametrize("status", [404, 410])
def test_a_dead_link_to_any_other_host_is_nobodys_fault(
    files: FileServer, tmp_path: Path, status: int
) -> None:
    """It may be the task creator's own, and answer another node otherwise."""
    files.fail("gone", Fault(status=status), times=99)
    store = keeper(tmp_path, Web(guarded_client(RULES), RULES))
    assert kind_of(store, link(files, "gone")) is ModelUnavailableKind.NOT_HERE


def test_a_dead_link_that_comes_back(files: FileServer, tmp_path: Path) -> None:
    files.fail("a.safetensors", Fault(status=404))
    web(tmp_path).ensure(link(files), NOBODY)


def test_missing_where_the_link_led_on_to_is_not_certain(files: FileServer, tmp_path: Path) -> None:
    with FileServer() as other:
        where = f"http://localhost:{other.port}/x"
        files.fail("moved", Fault(status=302, headers={"Location": where}), times=99)
        assert kind_of(web(tmp_path), link(files, "moved")) is ModelUnavailableKind.NOT_HERE


@pytest.mark.parametrize("status", [401, 403, 451])
def test_a_link_that_is_not_given(files: FileServer, tmp_path: Path, status: int) -> None:
    files.fail("a.safetensors", Fault(status=status), times=99)
    assert kind_of(web(tmp_path), link(files)) is ModelUnavailableKind.FORBIDDEN


@pytest.mark.parametrize(
    ("where", "rule"),
    [
        ("http://169.254.169.254/latest/meta-data", Rule.SCHEME),
        ("https://169.254.169.254/latest/meta-data", Rule.ADDRESS),
        ("https://[::1]/x", Rule.ADDRESS),
        ("https://printer.local/x", Rule.ADDRESS),
        ("https://user:secret@example.com/x", Rule.CREDENTIALS),
        ("https://example.com:22/x", Rule.PORT),
        ("ftp://example.com/x", Rule.SCHEME),
        ("file:///etc/passwd", Rule.SCHEME),
        ("/a.safetensors/loop", Rule.REDIRECTS),
    ],
)
def test_redirects_are_held_to_the_same_rules(
    files: FileServer, tmp_path: Path, where: str, rule: Rule
) -> None:
    files.fail("a.safetensors", Fault(status=302, headers={"Location": where}), times=99)
    assert rule_of(web(tmp_path), link(files)) is rule


@pytest.mark.parametrize(
    "name",
    ["../../x.safetensors", "..", ".hidden.safetensors", "a/b.safetensors", "C:\\x.safetensors",
     "x" * 5000 + ".safetensors", "a\tb.safetensors"],
)  # fmt: skip
def test_names_that_could_be_paths_are_refused(
    files: FileServer, tmp_path: Path, name: str
) -> None:
    said = {"Content-Disposition": f'attachment; filename="{name}"'}
    files.fail("a.safetensors", Fault(headers=said), times=99)
    assert rule_of(web(tmp_path), link(files)) in {Rule.NAME, Rule.FILE_KIND}
    assert not list(tmp_path.rglob("*x.safetensors"))


@pytest.mark.parametrize("name", ["a.ckpt", "a.pt", "a.bin", "a.exe", "a.py", "a"])
def test_no_other_kinds_of_files(files: FileServer, tmp_path: Path, name: str) -> None:
    files.files[name] = LARGE
    assert rule_of(web(tmp_path), link(files, name)) is Rule.FILE_KIND
    assert files.sent(name) <= 64 * 1024


def test_a_pickle_under_the_right_name(files: FileServer, tmp_path: Path) -> None:
    files.files["a.safetensors"] = b"\x80\x04\x95" + bytes(1000)
    assert rule_of(web(tmp_path), link(files)) is Rule.HEADER


def test_civitais_token_goes_to_civitai_only(files: FileServer, tmp_path: Path) -> None:
    web(tmp_path, token="SECRET").ensure(link(files), NOBODY)
    assert all("Authorization" not in seen.headers for seen in files.seen)


def archived(contents: Mapping[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as packed:
        for name, content in contents.items():
            packed.writestr(name, content)
    return file.getvalue()


def test_an_archive_of_a_network(files: FileServer, tmp_path: Path) -> None:
    contents = {
        "config.json": b"{}",
        "diffusion_pytorch_model.safetensors": weights(500),
        "README.md": b"#",
    }
    files.files["net.zip"] = archived(contents)
    store = web(tmp_path)
    asked = ref("controlnet", f"{files.url}/net.zip")
    store.ensure(asked, NOBODY)
    del contents["README.md"]
    assert content_of(store, asked) == contents


@pytest.mark.parametrize("name", ["../x.json", "/etc/x.json", "evil.py", "a.pkl"])
def test_a_hostile_archive(files: FileServer, tmp_path: Path, name: str) -> None:
    files.files["net.zip"] = archived({"config.json": b"{}", name: b"{}"})
    asked = ref("controlnet", f"{files.url}/net.zip")
    assert rule_of(web(tmp_path), asked) is Rule.ARCHIVE
    assert not [path for path in tmp_path.rglob("*") if path.name in {"x.json", "evil.py"}]


def test_a_whole_file_alone_is_no_network(files: FileServer, tmp_path: Path) -> None:
    asked = ref("unet", f"{files.url}/a.safetensors")
    assert rule_of(web(tmp_path), asked) is Rule.FILE_KIND


def test_an_unreachable_host_is_nobodys_fault(tmp_path: Path) -> None:
    with FileServer() as gone:
        asked = link(gone)
    assert kind_of(web(tmp_path), asked) is ModelUnavailableKind.UNREACHABLE


def test_a_name_that_leads_elsewhere_the_second_time(files: FileServer, tmp_path: Path) -> None:
    """First a public address, then ours: it is the second look that counts, and it is refused."""
    answers = [["93.184.216.34"], ["127.0.0.1"]]
    asked: list[str] = []

    def resolve(host: str, _port: int) -> list[str]:
        asked.append(host)
        return answers[min(len(asked), 2) - 1]

    rules = UrlRules(allow_http=True, ports=frozenset({files.port}))
    source = Web(guarded_client(rules, resolve=resolve, timeout=httpx2.Timeout(0.3)), rules)
    store = keeper(tmp_path, source, limits=Limits(spare=0, rounds=2))
    name = f"http://rebind.example.com:{files.port}/a.safetensors"
    assert rule_of(store, ref("lora", name)) is Rule.ADDRESS
    assert asked == ["rebind.example.com"] * 2
    assert files.seen == []
