"""Whatever a host answers and a library makes of it, a source raises what it may raise."""

from __future__ import annotations

import asyncio
import json
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import httpx2
import pytest
import yaml
from huggingface_hub import constants, set_client_factory
from hypothesis import given
from hypothesis import strategies as st

from actors.keeping import StoreWorker
from cluster.config.models import ModelsConfig
from cluster.core.errors import ModelUnavailable, ModelUnavailableKind
from cluster.models import http_read
from cluster.models.assembly import open_keeper, sources_of
from cluster.models.hub import Hub
from cluster.models.keeper import Wanted
from cluster.models.mirror import Mirror
from cluster.models.refs import ModelRef, ref
from cluster.models.refusals import Refused, Rule
from cluster.models.settings import StoreSettings
from cluster.models.sources import Absent, Changed, Denied, Listing, RemoteFile, Source, SourceDown
from cluster.models.urls import UrlRules, check
from cluster.models.web import Web
from tests.unit.model_fakes import LORA, Shelf, keeper, lora_shelf, weights

LINK = ref("lora", "https://host.example/a.safetensors")
PROMISED = (Absent, Denied, SourceDown, Changed, ModelUnavailable)
Answer = Callable[[httpx2.Request], httpx2.Response]


def client(answer: Answer) -> httpx2.Client:
    return httpx2.Client(transport=httpx2.MockTransport(answer))


def web(answer: Answer) -> tuple[Source, ModelRef]:
    return Web(client(answer), UrlRules()), LINK


def hub(answer: Answer) -> tuple[Source, ModelRef]:
    return Hub(lambda: client(answer), "https://hub.example"), LORA


class _Bucket:
    """As boto3's client is asked."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.exceptions: Any = None

    def get_object(self, **_: object) -> Any:
        said = self._answer(httpx2.Request("GET", "https://s3.example"))
        return {"Body": said, "ContentLength": 1, "ResponseMetadata": {"HTTPStatusCode": 200}}

    def get_paginator(self, _: str) -> Any:
        return self

    def paginate(self, **_: object) -> Any:
        return [{"Contents": [self._answer(httpx2.Request("GET", "https://s3.example"))]}]


def mirror(answer: Answer) -> tuple[Source, ModelRef]:
    return Mirror("s3://bucket", lambda: _Bucket(answer)), LORA


SOURCES = pytest.mark.parametrize("make", [web, hub, mirror], ids=lambda make: make.__name__)


@pytest.fixture(autouse=True)
def the_libraries_own_client() -> Iterator[None]:
    telemetry = constants.HF_HUB_DISABLE_TELEMETRY
    yield
    constants.HF_HUB_DISABLE_TELEMETRY = telemetry
    set_client_factory(httpx2.Client)


def raising(error: Exception) -> Answer:
    def answer(_request: httpx2.Request) -> NoReturn:
        raise error

    return answer


def read(source: Source, listing: Listing) -> bytes:
    with source.open(listing, listing.files[0], 0, None) as opened:
        return b"".join(opened.chunks)


ONE = Listing("x", "1", (RemoteFile("a.safetensors", 1, where="https://host.example/a"),))


@SOURCES
@pytest.mark.parametrize(
    "error",
    [RuntimeError("x"), TypeError("x"), RecursionError(), AssertionError(), OSError("x"),
     UnicodeDecodeError("utf-8", b"", 0, 1, "x"), httpx2.ReadError("x"), StopIteration()],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_whatever_a_library_raises_the_source_is_down(
    make: Callable[[Answer], tuple[Source, ModelRef]], error: Exception
) -> None:
    source, asked = make(raising(error))
    with pytest.raises(SourceDown):
        source.list(asked)
    with pytest.raises(SourceDown):
        read(source, ONE)


@SOURCES
@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"null", b'{"id": 1}', b"\xff\xfe"])
@pytest.mark.parametrize("status", [200, 206, 299, 401, 404, 418, 500])
def test_whatever_is_answered(
    make: Callable[[Answer], tuple[Source, ModelRef]], content: bytes, status: int
) -> None:
    source, asked = make(lambda _: httpx2.Response(status, content=content))
    with suppress(*PROMISED):
        source.list(asked)


def test_what_drips_is_handed_on_each_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else nobody would look at a deadline until a whole piece is there."""
    now = [0.0]
    monkeypatch.setattr(http_read, "monotonic", lambda: now[0])

    def bytes_of_a_second() -> Iterator[bytes]:
        for _ in range(6):
            now[0] += 0.5
            yield b"a"

    source, _ = web(lambda _: httpx2.Response(200, content=bytes_of_a_second()))
    with source.open(ONE, ONE.files[0], 0, None) as opened:
        assert list(opened.chunks) == [b"aa", b"aa", b"aa"]


def test_what_comes_fast_is_handed_on_in_large_pieces() -> None:
    source, _ = web(lambda _: httpx2.Response(200, content=iter([b"a" * 1000] * 1000)))
    with source.open(ONE, ONE.files[0], 0, None) as opened:
        assert sorted(map(len, opened.chunks), reverse=True)[0] >= http_read.CHUNK


def test_what_breaks_while_it_is_read_is_the_sources() -> None:
    def chunks() -> Iterator[bytes]:
        yield b"a"
        raise RuntimeError("an odd one")

    source, _ = web(lambda _: httpx2.Response(200, content=chunks()))
    with pytest.raises(SourceDown):
        read(source, ONE)


def test_what_is_raised_while_it_is_read_stays_what_it_is() -> None:
    """The disk's own trouble isn't the host's."""
    source, _ = web(lambda _: httpx2.Response(200, content=b"a"))
    with pytest.raises(OSError, match="full"), source.open(ONE, ONE.files[0], 0, None):
        raise OSError("full")


@pytest.mark.parametrize(
    "said",
    ["add_detail!.safetensors", "style@v2.safetensors", "アニメ.safetensors", "a~b#1.safetensors",
     "Foo.SAFETENSORS", "a  b (1).safetensors", "ü.safetensors"],
)  # fmt: skip
def test_a_files_name_is_its_hosts_own_affair(said: str) -> None:
    """Only how it ends matters; on the disk it has a name of ours."""
    quoted = urllib.parse.quote(said)
    for header in (f'attachment; filename="{said}"', f"attachment; filename*=UTF-8''{quoted}"):
        headers = [(b"Content-Disposition", header.encode())]
        answer = httpx2.Response(200, headers=headers, content=b"a")
        source, asked = web(partial(same, answer))
        assert [file.path for file in source.list(asked).files] == ["linked.safetensors"]
        named = ref("lora", LINK.name, file="named.safetensors")
        assert [file.path for file in source.list(named).files] == ["named.safetensors"]


@pytest.mark.parametrize(
    "said", ["../x.safetensors", "a/b.safetensors", "a\\b.safetensors", ".x.safetensors",
             "a\tb.safetensors", "x" * 300 + ".safetensors"],
)  # fmt: skip
def test_a_files_name_that_could_be_a_path_is_refused_all_the_same(said: str) -> None:
    quoted = urllib.parse.quote(said)
    headers = {"Content-Disposition": f"attachment; filename*=UTF-8''{quoted}"}
    source, asked = web(lambda _: httpx2.Response(200, headers=headers, content=b"a"))
    with pytest.raises(Refused) as caught:
        source.list(asked)
    assert caught.value.rule is Rule.NAME
    assert str(caught.value).isprintable()


def same(answer: httpx2.Response, _: httpx2.Request) -> httpx2.Response:
    return answer


PIECES = st.sampled_from(
    ["attachment", "inline", ";", " ", "filename", "filename*", "filename*0", "filename*0*",
     "filename*1*", "=", '"', "'", "utf-8", "latin-1", "''", "%", "%zz", "%00", "x", "\\", "(", ")",
     "<", "\t", "0", "*", ".safetensors", ".zip", "a"]
)  # fmt: skip


@given(st.one_of(st.lists(PIECES, max_size=14).map("".join), st.text(max_size=60)))
def test_any_header_names_a_file_or_is_refused(said: str) -> None:
    headers = [(b"Content-Disposition", said.encode())]
    source, asked = web(lambda _: httpx2.Response(200, headers=headers, content=b"a"))
    try:
        listing = source.list(asked)
    except Refused as refused:
        assert str(refused).isprintable()
        return
    except SourceDown:
        raise AssertionError(said) from None
    (file,) = listing.files
    assert file.path.isascii()
    assert "/" not in file.path


async def test_an_odd_header_ends_nobodys_fetching(tmp_path: Path) -> None:
    odd = {"Content-Disposition": "attachment; filename*0=a; filename*=b"}
    source, _ = web(lambda _: httpx2.Response(200, headers=odd, content=b"a"))
    worker = StoreWorker(lambda: keeper(tmp_path, source, lora_shelf()), "1", ())
    await worker.want((str(LINK), "lora:acme/style"))
    for _ in range(500):
        report = await worker.report()
        if report.here == {"lora:acme/style"}:
            break
        await asyncio.sleep(0.01)
    assert report.here == {"lora:acme/style"}
    assert set(report.failed) == {str(LINK)}
    await worker.stop()


async def test_nothing_unforeseen_ends_the_fetching(tmp_path: Path) -> None:
    def broken(*_: object) -> bool:
        raise ZeroDivisionError("a bug of ours")

    made = keeper(tmp_path, lora_shelf())
    made.ensure = broken  # type: ignore[method-assign, assignment]
    worker = StoreWorker(lambda: made, "1", ())
    await worker.want(("lora:acme/other", "lora:acme/style"))
    for _ in range(500):
        report = await worker.report()
        if len(report.failed) == 2:
            break
        await asyncio.sleep(0.01)
    assert set(report.failed) == {"lora:acme/other", "lora:acme/style"}
    await worker.stop()


def test_a_bug_while_a_model_is_fetched_is_not_the_cards(tmp_path: Path) -> None:
    def broken() -> None:
        raise ZeroDivisionError("a bug of ours")

    with pytest.raises(ModelUnavailable) as caught:
        keeper(tmp_path, lora_shelf(listing=broken)).ensure(LORA, Wanted())
    assert caught.value.kind is ModelUnavailableKind.UNREACHABLE
    assert "ZeroDivisionError" in str(caught.value)


def test_a_manifest_of_nonsense_in_the_mirror_is_the_mirrors(tmp_path: Path) -> None:
    text = json.dumps({"files": [{"path": [1]}], "ref": {"kind": {}}}).encode()
    source, asked = mirror(lambda _: httpx2.Response(200, content=text))
    with suppress(*PROMISED):
        source.list(asked)


@pytest.mark.parametrize(
    ("headers", "told"),
    [
        ({"ETag": '"a"', "Last-Modified": "x"}, '"a"'),
        ({"ETag": 'W/"a"', "Last-Modified": "Tue, 15 Nov 1994"}, "Tue, 15 Nov 1994"),
        ({"ETag": 'W/"a"'}, ""),
        ({"Last-Modified": "Tue, 15 Nov 1994"}, "Tue, 15 Nov 1994"),
        ({}, ""),
    ],
)
def test_what_tells_a_links_content_from_another(headers: dict[str, str], told: str) -> None:
    """A weak tag is one for contents that only mean the same."""
    source, asked = web(lambda _: httpx2.Response(200, headers=headers, content=b"a"))
    listing = source.list(asked)
    assert listing.files[0].etag == told
    with source.open(listing, listing.files[0], 0, None) as opened:
        assert opened.etag == told


# --- how they are reached ------------------------------------------------------------------------


def test_sources_are_reached_as_the_files_say_and_not_otherwise(tmp_path: Path) -> None:
    made: list[dict[str, object]] = []

    def make(_rules: UrlRules, **how: object) -> httpx2.Client:
        made.append(how)
        return client(gone)

    file = tmp_path / "proxy"
    file.write_text("http://me:word@proxy.lan:3128\n")
    sources_of(StoreSettings(tmp_path, ("hub", "web"), proxy_file=file), make)
    assert made == [{"proxy": "http://me:word@proxy.lan:3128", "verify": True}] * 2
    made.clear()
    sources_of(StoreSettings(tmp_path, ("web",), proxy="http://proxy.lan:3128"), make)
    assert made == [{"proxy": "http://proxy.lan:3128", "verify": True}]


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "SECRET",
        "socks5://me:SECRET@x:1",
        "http://",
        "http://me:SECRET@[",
        "http://a:b@c:x",
    ],
)
def test_without_the_proxy_that_is_configured_nothing_is_fetched(
    tmp_path: Path, text: str | None
) -> None:
    file = tmp_path / "proxy"
    if text is not None:
        file.write_text(text)
    made = open_keeper(StoreSettings(tmp_path, ("hub", "web"), proxy_file=file))
    assert made.sources == ()
    assert made.trouble.startswith("models.proxy_file: ")
    assert "SECRET" not in made.trouble
    with pytest.raises(ModelUnavailable, match=r"models\.proxy_file"):
        made.ensure(LORA, Wanted())


@pytest.mark.parametrize("text", [None, "", "no certificate"])
def test_without_the_certificates_that_are_configured_nothing_is_fetched(
    tmp_path: Path, text: str | None
) -> None:
    file = tmp_path / "ca.pem"
    if text is not None:
        file.write_text(text)
    made = open_keeper(StoreSettings(tmp_path, ("hub", "web"), ca_file=file))
    assert "models.ca_file" in made.trouble


# --- whose 404 holds for every node --------------------------------------------------------------


def is_certain(settings: StoreSettings, asked: ModelRef, answer: Answer) -> bool:
    sources = sources_of(settings, lambda _rules, **_: client(answer))
    source = next(source for source in sources if source.serves(asked))
    with pytest.raises((Absent, Denied)) as caught:
        source.list(asked)
    return isinstance(caught.value, Absent) and caught.value.certain


def gone(_: httpx2.Request) -> httpx2.Response:
    return httpx2.Response(404, headers={"X-Error-Code": "RepoNotFound"})


def configured(tmp_path: Path, text: str) -> StoreSettings:
    said = yaml.safe_load(text) or {}
    return ModelsConfig.model_validate({"root": str(tmp_path)} | said).store()


@pytest.mark.parametrize(
    ("text", "certain"),
    [
        ("", True),
        ("report_missing: true", True),
        ("report_missing: false", False),
        ("hub: {endpoint: 'https://copy.example'}", False),
        ("hub: {token_file: token}", False),
        ("hub: {token_file: nothing-there}", True),
    ],
)
def test_when_the_hubs_404_holds_for_every_node(tmp_path: Path, text: str, certain: bool) -> None:
    (tmp_path / "token").write_text("hf_x")
    said = text.replace("token_file: ", f"token_file: {tmp_path}/")
    assert is_certain(configured(tmp_path, said), LORA, gone) is certain


@pytest.mark.parametrize(
    ("url", "text", "certain"),
    [
        ("https://civitai.com/api/download/models/1", "", False),
        ("https://civitai.com/x", "web: {certain_hosts: [civitai.com]}", True),
        ("https://CIVITAI.com/x", "web: {certain_hosts: [Civitai.com]}", True),
        ("https://sub.civitai.com/x", "web: {certain_hosts: [civitai.com]}", False),
        ("https://civitai.com:8443/x", "web: {certain_hosts: [civitai.com], ports: [8443]}", False),
        ("http://civitai.com/x", "web: {certain_hosts: [civitai.com], allow_http: true}", False),
        ("https://a.com/x", "web: {certain_hosts: [a.com], allow_hosts: [a.com]}", False),
        ("https://a.com/x", "{report_missing: false, web: {certain_hosts: [a.com]}}", False),
    ],
)  # fmt: skip
def test_when_a_links_404_holds_for_every_node(
    tmp_path: Path, url: str, text: str, certain: bool
) -> None:
    assert is_certain(configured(tmp_path, text), ref("lora", url), gone) is certain


@pytest.mark.parametrize(
    ("url", "text", "asked"),
    [
        ("https://any.example/x", "", True),
        ("https://any.example/x", "web: {only_hosts: [civitai.com]}", False),
        ("https://notcivitai.com/x", "web: {only_hosts: [civitai.com]}", False),
        ("https://civitai.com.any.example/x", "web: {only_hosts: [civitai.com]}", False),
        ("https://civitai.com/x", "web: {only_hosts: [civitai.com]}", True),
        ("https://www.civitai.com/x", "web: {only_hosts: [Civitai.com]}", True),
        ("https://a.com/x", "web: {only_hosts: [a.com], deny_hosts: [a.com]}", False),
        ("https://own.example/x", "web: {only_hosts: [a.com], allow_hosts: [own.example]}", True),
    ],
)  # fmt: skip
def test_links_to_the_hosts_that_are_named_and_no_others(
    tmp_path: Path, url: str, text: str, asked: bool
) -> None:
    seen: list[str] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        seen.append(str(request.url))
        return httpx2.Response(404)

    settings = configured(tmp_path, text)
    (source,) = [
        each
        for each in sources_of(settings, lambda _rules, **_: client(answer))
        if each.name == "web"
    ]
    with pytest.raises(Absent if asked else Refused) as caught:
        source.list(ref("lora", url))
    assert bool(seen) is asked
    assert asked or getattr(caught.value, "rule", None) is Rule.HOST


def test_where_a_named_host_leads_on_to_is_held_to_the_addresses_only(tmp_path: Path) -> None:
    """Such hosts keep their files elsewhere."""
    rules = configured(tmp_path, "web: {only_hosts: [civitai.com]}").rules
    assert check("https://cdn.example/x?signature=y", rules)


def test_the_next_source_is_asked_after_an_odd_one(tmp_path: Path) -> None:
    source, _ = mirror(raising(RuntimeError("x")))
    shelf = Shelf({LORA: {"pytorch_lora_weights.safetensors": weights()}})
    assert keeper(tmp_path, source, shelf).ensure(LORA, Wanted()) is True
