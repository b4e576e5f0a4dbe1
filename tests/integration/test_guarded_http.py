"""Connections as they are made: to the address that was checked, by the name that was asked."""

from __future__ import annotations

import base64
import datetime
import gzip
import ssl
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import httpx2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from huggingface_hub import constants, set_client_factory

from cluster.models.assembly import sources_of
from cluster.models.guarded_http import GuardedTransport, guarded_client
from cluster.models.refs import ref
from cluster.models.refusals import Refused, Rule
from cluster.models.settings import StoreSettings
from cluster.models.sources import Absent, Denied, SourceDown
from cluster.models.urls import UrlRules
from devnet.faulty_http import Fault, FileServer
from tests.integration.hostile_host import HostileHost

NAME = "models.example.com"


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer({"x": b"content"}) as server:
        yield server


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file with a key and a certificate for `NAME`, which signs itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName(NAME), x509.IPAddress(ip_address("127.0.0.1"))]
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    file = tmp_path_factory.mktemp("tls") / "server.pem"
    plain = serialization.NoEncryption()
    form = serialization.PrivateFormat.PKCS8
    file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, form, plain)
        + made.public_bytes(serialization.Encoding.PEM)
    )
    return file


@pytest.fixture
def secure(certificate: Path) -> Iterator[FileServer]:
    server = FileServer({"x": b"content"})
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.wrap(context)
    with server:
        yield server


@pytest.fixture
def the_libraries_own_client() -> Iterator[None]:
    telemetry = constants.HF_HUB_DISABLE_TELEMETRY
    yield
    constants.HF_HUB_DISABLE_TELEMETRY = telemetry
    set_client_factory(httpx2.Client)


def leading_to(*addresses: str) -> tuple[list[str], object]:
    asked: list[str] = []

    def resolve(host: str, _port: int) -> Sequence[str]:
        asked.append(host)
        return addresses

    return asked, resolve


def client(
    server: FileServer, *addresses: str, certificate: Path | None = None, own: bool = True
) -> httpx2.Client:
    names = frozenset({NAME, "other.example.com"}) if own else frozenset[str]()
    rules = UrlRules(allow_http=True, ports=frozenset({server.port}), allow_hosts=names)
    verify: ssl.SSLContext | bool = True
    if certificate is not None:
        verify = ssl.create_default_context(cafile=str(certificate))
    _, resolve = leading_to(*(addresses or ("127.0.0.1",)))
    timeout = httpx2.Timeout(2.0)
    return guarded_client(rules, resolve=resolve, verify=verify, timeout=timeout)  # type: ignore[arg-type]


def test_by_number_and_still_by_name(server: FileServer) -> None:
    answer = client(server).get(f"http://{NAME}:{server.port}/x")
    assert answer.content == b"content"
    assert server.seen[0].headers["Host"] == f"{NAME}:{server.port}"


def test_certificates_are_held_against_the_name(secure: FileServer, certificate: Path) -> None:
    with client(secure, certificate=certificate) as known:
        assert known.get(f"https://{NAME}:{secure.port}/x").content == b"content"
        # The same address under another name, with the first connection still open.
        with pytest.raises(httpx2.ConnectError, match="other.example.com"):
            known.get(f"https://other.example.com:{secure.port}/x")
        assert known.get(f"https://{NAME}:{secure.port}/x").content == b"content"
    with pytest.raises(httpx2.ConnectError):
        client(secure).get(f"https://{NAME}:{secure.port}/x")


def test_one_bad_address_refuses_the_whole_name(server: FileServer) -> None:
    for addresses in (("93.184.216.34", "127.0.0.1"), ("127.0.0.1", "93.184.216.34"), ("::1",)):
        with pytest.raises(Refused) as caught:
            client(server, *addresses, own=False).get(f"http://{NAME}:{server.port}/x")
        assert caught.value.rule is Rule.ADDRESS
    assert server.seen == []


def test_the_next_address_when_one_does_not_answer(server: FileServer) -> None:
    answer = client(server, "127.0.0.9", "127.0.0.1").get(f"http://{NAME}:{server.port}/x")
    assert answer.content == b"content"
    with pytest.raises(httpx2.ConnectError):
        client(server, "127.0.0.9").get(f"http://{NAME}:{server.port}/x")


def test_each_request_is_resolved_once_and_each_anew(server: FileServer) -> None:
    asked, resolve = leading_to("127.0.0.1")
    rules = UrlRules(allow_hosts=frozenset({f"{NAME}:{server.port}"}))
    made = guarded_client(rules, resolve=resolve)  # type: ignore[arg-type]
    for _ in range(3):
        made.get(f"http://{NAME}:{server.port}/x")
    assert asked == [NAME] * 3


def test_a_name_without_an_address_is_a_network_error(server: FileServer) -> None:
    def nowhere(_host: str, _port: int) -> Sequence[str]:
        raise OSError("no such name")

    rules = UrlRules(allow_http=True)
    with pytest.raises(httpx2.ConnectError):
        guarded_client(rules, resolve=nowhere).get("http://nowhere.example.com/")
    with pytest.raises(httpx2.ConnectError):
        guarded_client(rules, resolve=lambda _h, _p: ()).get("http://nowhere.example.com/")


def test_a_token_does_not_go_on_to_another_host(server: FileServer) -> None:
    where = f"http://other.example.com:{server.port}/x"
    server.fail("moved", Fault(status=302, headers={"Location": where}))
    secret = {"Authorization": "Bearer SECRET"}
    assert client(server).get(f"http://{NAME}:{server.port}/moved", headers=secret).is_success
    first, second = server.seen
    assert first.headers["Authorization"] == "Bearer SECRET"
    assert "Authorization" not in second.headers
    assert second.headers["Host"] == f"other.example.com:{server.port}"


def test_cookies_are_not_kept(server: FileServer) -> None:
    server.fail("x", Fault(headers={"Set-Cookie": "a=b; Path=/"}))
    made = client(server)
    for _ in range(2):
        made.get(f"http://{NAME}:{server.port}/x")
    assert not any("Cookie" in seen.headers for seen in server.seen)


def test_redirects_end(server: FileServer) -> None:
    server.fail("loop", Fault(status=302, headers={"Location": "/loop"}), times=99)
    with pytest.raises(Refused) as caught:
        client(server).get(f"http://{NAME}:{server.port}/loop")
    assert caught.value.rule is Rule.REDIRECTS
    assert len(server.seen) <= 9


MOST_OF_A_REDIRECT = 2**20
"""Bytes that the kernel takes for us unread, and some."""


def moved_without_end(host: HostileHost, say: Callable[[bytes], bool]) -> None:
    say(b"HTTP/1.1 302 Found\r\nLocation: /there\r\nTransfer-Encoding: chunked\r\n\r\n")
    piece = b"10000\r\n" + bytes(0x10000) + b"\r\n"
    while host.sent < 100 * MOST_OF_A_REDIRECT and say(piece):
        pass


def test_a_redirects_body_is_not_read() -> None:
    with HostileHost(moved_without_end) as host:
        rules = UrlRules(allow_hosts=frozenset({f"127.0.0.1:{host.port}"}))
        made = guarded_client(rules, max_redirects=1)
        with pytest.raises(Refused) as caught:
            made.get(f"{host.url}/x")
        assert caught.value.rule is Rule.REDIRECTS
        assert host.asked == 2
        assert host.sent < 20 * MOST_OF_A_REDIRECT


def test_a_redirects_body_is_not_unpacked(server: FileServer) -> None:
    headers = {"Location": "/x", "Content-Encoding": "gzip"}
    server.fail("moved", Fault(status=302, headers=headers, body=gzip.compress(bytes(2**20))))
    answer = client(server).get(f"http://{NAME}:{server.port}/moved")
    assert answer.content == b"content"
    assert [(each.status_code, each.content) for each in answer.history] == [(302, b"")]


def test_a_redirect_to_a_name_that_leads_elsewhere_the_second_time() -> None:
    """The name is asked for again with each request, and what it says then is checked."""
    answers = iter((["93.184.216.34"], ["169.254.169.254"]))
    asked: list[tuple[str, str]] = []

    class Public(httpx2.BaseTransport):
        """Stands for a host in the public network."""

        def handle_request(self, request: httpx2.Request) -> httpx2.Response:
            asked.append((request.url.host, request.url.path))
            return httpx2.Response(302, headers={"Location": f"https://{NAME}/there"})

    transport = GuardedTransport(UrlRules(), Public, lambda _host, _port: next(answers))
    made = httpx2.Client(transport=transport, follow_redirects=True)
    with made, pytest.raises(Refused) as caught:
        made.get(f"https://{NAME}/here")
    assert caught.value.rule is Rule.ADDRESS
    assert asked == [("93.184.216.34", "/here")]


def test_no_environment_variable_is_heeded(
    server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert client(server).get(f"http://{NAME}:{server.port}/x").content == b"content"


def test_through_a_proxy_what_is_written_is_still_checked(server: FileServer) -> None:
    rules = UrlRules(allow_http=True)
    made = guarded_client(rules, proxy=server.url)
    # The proxy here is a plain server, which sees the whole URL: the name is its to resolve.
    server.files["http://models.example.com/x"] = b"by proxy"
    assert made.get("http://models.example.com/x").content == b"by proxy"
    for url in ("http://127.0.0.1/x", "http://169.254.169.254/x", "http://localhost/x"):
        with pytest.raises(Refused):
            made.get(url)


def test_a_proxys_password_comes_from_its_file(server: FileServer, tmp_path: Path) -> None:
    file = tmp_path / "proxy"
    file.write_text(f"http://me:word@127.0.0.1:{server.port}\n")
    settings = StoreSettings(tmp_path, ("web",), proxy_file=file, rules=UrlRules(allow_http=True))
    (source,) = sources_of(settings)
    link = "http://models.example.com/a.safetensors"
    server.files[link] = b"by proxy"
    assert source.list(ref("lora", link)).size == len(b"by proxy")
    expected = base64.b64encode(b"me:word").decode()
    assert server.seen[0].headers["Proxy-Authorization"] == f"Basic {expected}"


@pytest.mark.usefixtures("the_libraries_own_client")
def test_certificates_of_ones_own_are_believed_where_they_are_named(
    secure: FileServer, certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By links, the hub and the mirror; none of them has the model, and only who is believed can
    say so."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "x")
    here = f"https://127.0.0.1:{secure.port}"
    own = UrlRules(allow_hosts=frozenset({f"127.0.0.1:{secure.port}"}))
    settings = StoreSettings(
        tmp_path,
        ("mirror", "hub", "web"),
        mirror_url="s3://bucket",
        mirror_endpoint=here,
        hub_endpoint=here,
        rules=own,
        hub_rules=own,
    )
    asked = {"web": ref("lora", f"{here}/none.safetensors")}
    for source in sources_of(settings):
        with pytest.raises(SourceDown):
            source.list(asked.get(source.name, ref("lora", "acme/style")))
    assert secure.seen == []
    for source in sources_of(replace(settings, ca_file=certificate)):
        with pytest.raises((Absent, Denied)):
            source.list(asked.get(source.name, ref("lora", "acme/style")))
    assert len(secure.seen) >= 3


def test_connections_are_kept_for_some_hosts_only() -> None:
    made: list[object] = []

    class Inner(httpx2.BaseTransport):
        def handle_request(self, request: httpx2.Request) -> httpx2.Response:
            return httpx2.Response(200)

    def make() -> httpx2.BaseTransport:
        made.append(1)
        return Inner()

    transport = GuardedTransport(UrlRules(), make, lambda _h, _p: ("1.1.1.1",))
    for number in range(40):
        transport.handle_request(httpx2.Request("GET", f"https://h{number}.example.com/"))
    assert len(made) == 40
    assert len(transport._inner) <= 16
