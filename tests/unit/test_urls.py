"""Which URLs are asked: a table of nasty ones, and what holds for all that pass.

`python -m tests.unit.test_urls` adds the table to the corpus.
"""

from __future__ import annotations

import json
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.models.addresses import not_public
from cluster.models.refusals import Refused, Rule
from cluster.models.urls import UrlRules, check, check_address, check_link

RULES = UrlRules()


REFUSED = [
    ("", Rule.URL),
    ("example.com", Rule.URL),
    ("//example.com/x", Rule.URL),
    ("https:/example.com", Rule.URL),
    ("https://", Rule.URL),
    ("https:///etc/passwd", Rule.URL),
    ("https://example.com/" + "x" * 8192, Rule.URL),
    ("https://example.com/a b", Rule.URL),
    ("https://example.com/\n", Rule.URL),
    ("https://example.com\\@10.0.0.1/", Rule.URL),
    ("https://bücher.example/", Rule.URL),
    ("https://example.com%2f@10.0.0.1/", Rule.CREDENTIALS),
    ("https://exa%6dple.com/", Rule.URL),
    ("https://-a.example/", Rule.URL),
    ("https://a..example/", Rule.URL),
    ("https://" + "a" * 64 + ".example/", Rule.URL),
    ("https://0x7f.1/", Rule.URL),
    ("https://0x7f000001/", Rule.URL),
    ("https://2130706433/", Rule.URL),
    ("https://017700000001/", Rule.URL),
    ("https://127.1/", Rule.URL),
    ("https://127.0.0.1.2/", Rule.URL),
    ("https://example.0x1/", Rule.URL),
    ("https://256.1.1.1/", Rule.URL),
    ("https://01.1.1.1/", Rule.URL),
    ("https://[::1/", Rule.URL),
    ("https://[::ffff:1.1.1.1%25eth0]/", Rule.URL),
    ("https://[fe80::1%eth0]/", Rule.URL),
    ("http://example.com/", Rule.SCHEME),
    ("ftp://example.com/", Rule.SCHEME),
    ("file:///etc/passwd", Rule.SCHEME),
    ("gopher://example.com/", Rule.SCHEME),
    ("javascript://example.com/", Rule.SCHEME),
    ("https://user@example.com/", Rule.CREDENTIALS),
    ("https://user:secret@example.com/", Rule.CREDENTIALS),
    ("https://@example.com/", Rule.CREDENTIALS),
    ("https://example.com:22/", Rule.PORT),
    ("https://example.com:0/", Rule.PORT),
    ("https://example.com:65536/", Rule.PORT),
    ("https://example.com:99999999/", Rule.URL),
    ("https://example.com:-1/", Rule.URL),
    ("https://127.0.0.1/", Rule.ADDRESS),
    ("https://[::1]/", Rule.ADDRESS),
    ("https://[::ffff:127.0.0.1]/", Rule.ADDRESS),
    ("https://[64:ff9b::7f00:1]/", Rule.ADDRESS),
    ("https://169.254.169.254/latest/meta-data/", Rule.ADDRESS),
    ("https://localhost/", Rule.ADDRESS),
    ("https://foo.localhost./", Rule.ADDRESS),
    ("https://printer.local/", Rule.ADDRESS),
    ("https://metadata.google.internal/", Rule.ADDRESS),
    ("https://intranet/", Rule.ADDRESS),
    ("https://1.0.0.10.in-addr.arpa/", Rule.ADDRESS),
]
CORPUS = Path(__file__).parents[1] / "corpus" / "urls" / "refused.json"


def write_corpus(file: Path) -> None:
    """What is refused, and what fuzzing has found to be worth keeping."""
    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    urls = dict.fromkeys([*kept, *(url for url, _ in REFUSED)])
    file.write_text(json.dumps(list(urls), indent=1) + "\n", encoding="utf-8")


def corpus() -> list[str]:
    found: list[str] = json.loads(CORPUS.read_text(encoding="utf-8"))
    return found


def rule_of(url: str, rules: UrlRules = RULES) -> Rule:
    with pytest.raises(Refused) as caught:
        check(url, rules)
    return caught.value.rule


@pytest.mark.parametrize(
    ("url", "normal"),
    [
        ("https://example.com", "https://example.com/"),
        ("HTTPS://EXAMPLE.com:443/A?b=C#d", "https://example.com/A?b=C"),
        ("https://example.com./x", "https://example.com/x"),
        ("https://example.com?x=1", "https://example.com/?x=1"),
        ("https://example.com:80/x", "https://example.com:80/x"),
        ("https://1.1.1.1:/x:y@z", "https://1.1.1.1/x:y@z"),
        ("https://[2606:4700:4700:0::1111]/x", "https://[2606:4700:4700::1111]/x"),
        ("https://xn--bcher-kva.example/%20", "https://xn--bcher-kva.example/%20"),
        ("https://civitai.com/api/download/models/1?type=Model&format=SafeTensor",
         "https://civitai.com/api/download/models/1?type=Model&format=SafeTensor"),
    ],
)  # fmt: skip
def test_one_normal_form(url: str, normal: str) -> None:
    assert check(url, RULES) == normal


@pytest.mark.parametrize(("url", "rule"), REFUSED)
def test_what_is_refused_and_by_which_rule(url: str, rule: Rule) -> None:
    assert rule_of(url) is rule


def test_a_link_is_shorter_than_what_it_may_lead_on_to() -> None:
    """Presigned links carry a policy, a signature and a session's token."""
    signed = "https://cdn.example/x?signature=" + "a" * 6000
    assert check(signed, RULES) == signed
    with pytest.raises(Refused) as caught:
        check_link(signed, RULES)
    assert caught.value.rule is Rule.URL


def test_no_secret_in_the_line() -> None:
    for url in ("https://user:SECRET@x.example/", "https://10.0.0.1/?token=SECRET"):
        with pytest.raises(Refused) as caught:
            check(url, RULES)
        assert "SECRET" not in str(caught.value)


def test_what_the_operator_allows_and_denies() -> None:
    own = UrlRules(allow_hosts=frozenset({"mirror.lan:8080", "10.0.0.5", "[fd00::5]:81"}))
    assert check("http://mirror.lan:8080/x", own) == "http://mirror.lan:8080/x"
    assert check("http://10.0.0.5/x", own) == "http://10.0.0.5/x"
    assert check("http://[fd00::5]:81/x", own) == "http://[fd00::5]:81/x"
    check_address("http", "mirror.lan", 8080, "10.0.0.9", own)
    assert rule_of("http://sub.mirror.lan/x", own) is Rule.SCHEME
    plain = UrlRules(allow_http=True, ports=frozenset({80, 8080}))
    assert check("http://example.com:8080/x", plain) == "http://example.com:8080/x"
    assert rule_of("https://example.com/x", plain) is Rule.PORT
    denied = UrlRules(deny_hosts=frozenset({"bad.example"}), allow_hosts=frozenset({"bad.example"}))
    for host in ("bad.example", "a.bad.example", "BAD.example."):
        assert rule_of(f"https://{host}/x", denied) is Rule.HOST
    assert check("https://notbad.example/", denied)


@pytest.mark.parametrize("port", [22, 6379, 8080, 9200])
def test_a_host_of_ones_own_is_asked_at_its_port_and_no_other(port: int) -> None:
    """Else a task's link could talk to every service of that machine."""
    own = UrlRules(allow_hosts=frozenset({"mirror.lan:8081", "10.0.0.5"}))
    for host in ("mirror.lan", "10.0.0.5"):
        for scheme in ("http", "https"):
            with pytest.raises(Refused):
                check(f"{scheme}://{host}:{port}/x", own)
    with pytest.raises(Refused):
        check_address("https", "mirror.lan", 443, "10.0.0.9", own)


def test_an_origin_is_allowed_as_it_is_and_nothing_beside_it() -> None:
    hub = UrlRules(origins=frozenset({"http://10.0.0.5:8080"}))
    assert check("http://10.0.0.5:8080/x", hub)
    check_address("http", "10.0.0.5", 8080, "10.0.0.5", hub)
    for other in ("https://10.0.0.5:8080/x", "http://10.0.0.5/x", "http://10.0.0.5:6379/x"):
        with pytest.raises(Refused):
            check(other, hub)
    with pytest.raises(Refused):
        check_address("http", "10.0.0.5", 80, "10.0.0.5", hub)


@pytest.mark.parametrize("address", ["10.0.0.1", "::1", "169.254.169.254", "nonsense", ""])
def test_a_name_that_leads_inside_is_refused(address: str) -> None:
    with pytest.raises(Refused) as caught:
        check_address("https", "example.com", 443, address, RULES)
    assert caught.value.rule is Rule.ADDRESS


@pytest.mark.parametrize("url", corpus(), ids=lambda url: ascii(url)[:60])
def test_the_corpus_is_refused(url: str) -> None:
    with pytest.raises(Refused) as caught:
        check(url, RULES)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


def test_the_corpus_has_what_the_table_has() -> None:
    assert {url for url, _ in REFUSED} <= set(corpus())


def spoilt(url: str, at: int, text: str) -> str:
    at %= len(url) + 1
    return url[:at] + text + url[at:]


HOSTILE = st.one_of(
    st.text(max_size=60),
    st.builds(spoilt, st.sampled_from(corpus()), st.integers(0, 200), st.text(max_size=3)),
    st.from_regex(r"https?://[a-z0-9.:@\[\]%\\/?#-]{0,40}", fullmatch=True),
    st.builds(
        "{}://{}{}{}".format,
        st.sampled_from(["https", "http", "HTTPS", "ftp"]),
        st.one_of(
            st.ip_addresses(v=4).map(str),
            st.ip_addresses(v=6).map(lambda a: f"[{a}]"),
            st.from_regex(r"[a-zA-Z0-9._-]{1,30}", fullmatch=True),
            st.integers(0, 2**33).map(str),
            st.integers(0, 2**33).map(hex),
        ),
        st.one_of(st.just(""), st.integers(0, 70000).map(lambda p: f":{p}")),
        st.text(max_size=20),
    ),
)


@given(HOSTILE)
def test_what_passes_all_readers_take_for_the_same(url: str) -> None:
    try:
        normal = check(url, RULES)
    except Refused:
        return
    assert check(normal, RULES) == normal
    read, again = httpx2.URL(normal), urlsplit(normal)
    assert read.scheme == again.scheme == "https"
    assert read.host == again.hostname
    assert (read.port or 443) == (again.port or 443)
    assert (read.port or 443) in RULES.ports
    assert not read.userinfo
    assert again.username is None
    assert not again.fragment
    try:
        address = ip_address(str(again.hostname))
    except ValueError:
        return
    assert not_public(address) is None


# --- addresses -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("0.0.0.1", "unspecified"),
        ("10.1.2.3", "private"),
        ("100.64.0.1", "shared (CGNAT)"),
        ("100.100.100.200", "cloud metadata"),
        ("127.0.0.1", "loopback"),
        ("127.255.255.254", "loopback"),
        ("168.63.129.16", "cloud metadata"),
        ("169.254.1.1", "link-local"),
        ("169.254.169.254", "cloud metadata"),
        ("172.31.255.255", "private"),
        ("192.168.0.1", "private"),
        ("198.18.0.1", "benchmarking"),
        ("203.0.113.5", "documentation"),
        ("224.0.0.1", "multicast"),
        ("255.255.255.255", "reserved"),
        ("::", "unspecified"),
        ("::1", "loopback"),
        ("::7f00:1", "loopback in IPv4-compatible"),
        ("::ffff:10.0.0.1", "private in IPv4-mapped"),
        ("2002:7f00:1::", "loopback in 6to4"),
        ("2002:a00:1::1", "private in 6to4"),
        ("64:ff9b::a9fe:a9fe", "cloud metadata in NAT64"),
        ("64:ff9b:1::1", "local NAT64"),
        ("2001:db8::1", "documentation"),
        ("fc00::1", "unique-local"),
        ("fd00:ec2::254", "cloud metadata"),
        ("fe80::1", "link-local"),
        ("fe80::1%eth0", "scoped"),
        ("fec0::1", "site-local"),
        ("ff02::1", "multicast"),
        ("4000::1", "reserved"),
        ("2606:4700::5efe:a00:1", "private in ISATAP"),
        ("2606:4700::200:5efe:127.0.0.1", "loopback in ISATAP"),
    ],
)
def test_addresses_that_are_not_public(address: str, kind: str) -> None:
    assert not_public(ip_address(address)) == kind


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "93.184.216.34", "2606:4700:4700::1111", "64:ff9b::101:101"]
)
def test_addresses_that_are(address: str) -> None:
    assert not_public(ip_address(address)) is None


def test_teredo_is_judged_by_both_addresses_within() -> None:
    kind = not_public(IPv6Address("2001:0:a00:1::"))
    assert kind is not None


@given(st.ip_addresses())
def test_at_least_as_strict_as_pythons_own_table(address: IPv4Address | IPv6Address) -> None:
    nat64 = isinstance(address, IPv6Address) and str(address).startswith("64:ff9b::")
    if not address.is_global and not nat64:
        assert not_public(address) is not None


@given(st.ip_addresses(v=4))
def test_an_address_inside_another_is_no_better_than_alone(inner: IPv4Address) -> None:
    number = int(inner)
    for outer in (
        IPv6Address(f"::ffff:{inner}"),
        IPv6Address((0x2002 << 112) | (number << 80) | 1),
        IPv6Address(int(IPv6Address("64:ff9b::")) | number),
    ):
        if not_public(inner) is not None:
            assert not_public(outer) is not None


if __name__ == "__main__":
    write_corpus(CORPUS)
