"""The rule for URLs that a task may have us ask (https, public hosts, nothing hidden in them).

A URL that two readers could take for two hosts is refused, whatever either would make of it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final
from urllib.parse import urlsplit

from cluster.models.addresses import not_public
from cluster.models.refusals import Refused, Rule

MOST: Final = 8192
"""Characters: what a link leads on to may be signed at length."""
MOST_OF_A_LINK: Final = 2048
_WHOLE: Final = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<authority>[^/?#]*)(?P<rest>[/?][^#]*)?(#.*)?",
    re.ASCII,
)
_PRINTABLE: Final = re.compile(r"[!-~]+", re.ASCII)
_ODD: Final = re.compile(r"[\"<>\\^`{|}]")
_LABEL: Final = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)", re.ASCII)
_LAST_LABEL: Final = re.compile(r"[a-z][a-z0-9-]*[a-z0-9]", re.ASCII)
_INSIDE: Final = ("localhost", "local", "internal", "intranet", "lan", "home", "corp", "arpa")
_DEFAULT: Final = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class UrlRules:
    """`allow_hosts` (exact names or addresses, `host` or `host:port`) may have any address and be
    asked by http, at that port, or at `ports`: they are the operator's own. So may `origins`
    (`scheme://host:port`). `deny_hosts` and their subdomains are never asked; that wins. Where
    there are `only_hosts`, links lead to those and their subdomains or to the operator's own."""

    allow_http: bool = False
    ports: frozenset[int] = frozenset({80, 443})
    allow_hosts: frozenset[str] = frozenset()
    deny_hosts: frozenset[str] = frozenset()
    origins: frozenset[str] = frozenset()
    only_hosts: frozenset[str] = frozenset()

    def is_own(self, scheme: str, host: str, port: int) -> bool:
        """Whether the operator has said that it may be asked, wherever it is."""
        host = _shown(host)
        return (
            f"{scheme}://{host}:{port}" in self.origins
            or f"{host}:{port}" in self.allow_hosts
            or (host in self.allow_hosts and port in self.ports)
        )


def origin_of(url: str) -> str:
    """`scheme://host:port` of a URL that the operator wrote."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{_shown(parts.hostname or '')}:{parts.port or _DEFAULT[parts.scheme]}"


def speaks_for_all(url: str, hosts: frozenset[str], rules: UrlRules) -> bool:
    """Whether what the URL's host hasn't got no node finds there: by https, so that nobody between
    has answered; on the operator's list; and nobody's own."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    known = _shown(host) in hosts and parts.port in {None, 443}
    return known and parts.scheme == "https" and not rules.is_own("https", host, 443)


def listed_host(text: object, ports: bool) -> str:
    """`host`, or `host:port` where `ports` are named, as the operator lists one, in its one form.
    Raises `ValueError`."""
    if not isinstance(text, str):
        raise ValueError("not text")
    try:
        host, port = _host_and_port(f"[{text}]" if text.count(":") > 1 and text[0] != "[" else text)
    except Refused:
        raise ValueError(f"{text[:100]!r} is none") from None
    if port is not None and not ports:
        raise ValueError("a host without its port")
    return _shown(host) if port is None else f"{_shown(host)}:{port}"


def check(url: str, rules: UrlRules) -> str:
    """The URL in its one normal form: scheme and host in lower case, no default port, no fragment.

    Raises `Refused`; the line names the rule and the host, never the query.
    """
    if len(url) > MOST:
        raise Refused(Rule.URL, f"a URL of {len(url)} characters, {MOST} at most")
    whole = _WHOLE.fullmatch(url) if _PRINTABLE.fullmatch(url) else None
    if whole is None or _ODD.search(url):
        raise Refused(Rule.URL, "not a plain URL (ASCII, scheme://host/path)")
    scheme, authority = whole["scheme"].lower(), whole["authority"]
    if scheme not in _DEFAULT:
        raise Refused(Rule.SCHEME, f"{scheme[:20]}: only https is asked")
    if "@" in authority:
        raise Refused(Rule.CREDENTIALS, "a URL with credentials in it")
    host, port = _host_and_port(authority)
    allowed = rules.is_own(scheme, host, port or _DEFAULT[scheme])
    if _is_among(host, rules.deny_hosts):
        raise Refused(Rule.HOST, f"{host}: on the list of hosts that are not asked")
    if scheme == "http" and not (rules.allow_http or allowed):
        raise Refused(Rule.SCHEME, f"{host}: http, and only https is asked")
    if (port or _DEFAULT[scheme]) not in rules.ports and not allowed:
        raise Refused(Rule.PORT, f"{host}: port {port} is not asked")
    if not allowed:
        _check_host(host)
    where = _shown(host) if port in {None, _DEFAULT[scheme]} else f"{_shown(host)}:{port}"
    rest = whole["rest"] or "/"
    normal = f"{scheme}://{where}{rest if rest.startswith('/') else '/' + rest}"
    if urlsplit(normal).hostname != host:
        raise Refused(Rule.URL, f"{host}: a URL that readers differ on")
    return normal


def check_link(url: str, rules: UrlRules) -> str:
    """A task's own URL, which may be held to `only_hosts` too; where it leads on to isn't."""
    if len(url) > MOST_OF_A_LINK:
        raise Refused(Rule.URL, f"a link of {len(url)} characters, {MOST_OF_A_LINK} at most")
    normal = check(url, rules)
    parts = urlsplit(normal)
    host, port = parts.hostname or "", parts.port or _DEFAULT[parts.scheme]
    if rules.only_hosts and not (
        _is_among(host, rules.only_hosts) or rules.is_own(parts.scheme, host, port)
    ):
        raise Refused(Rule.HOST, f"{host}: not on the list of hosts that links may lead to")
    return normal


def check_address(scheme: str, host: str, port: int, address: str, rules: UrlRules) -> None:
    """What the host's name leads to. Raises `Refused`."""
    if rules.is_own(scheme, host, port):
        return
    try:
        kind = not_public(ip_address(address))
    except ValueError:
        kind = "malformed"
    if kind is not None:
        raise Refused(Rule.ADDRESS, f"{host}: leads to {address}, a {kind} address")


def _is_among(host: str, hosts: frozenset[str]) -> bool:
    """Itself, or as a subdomain."""
    return any(_shown(host) == each or host.endswith(f".{each}") for each in hosts)


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _host_and_port(authority: str) -> tuple[str, int | None]:
    """In lower case and without the root's dot; an IPv6 address without its brackets."""
    match = re.fullmatch(r"(\[[^\[\]]*\]|[^:\[\]]*)(?::(\d{0,5}))?", authority, re.ASCII)
    if match is None or "%" in authority:
        raise Refused(Rule.URL, "not a plain host and port")
    name, port = match[1].lower(), int(match[2]) if match[2] else None
    if port is not None and not 0 < port < 2**16:
        raise Refused(Rule.PORT, f"port {port}")
    if name.startswith("["):
        try:
            return str(IPv6Address(name[1:-1])), port
        except ValueError:
            raise Refused(Rule.URL, "not an IPv6 address in brackets") from None
    host = name.removesuffix(".")
    if re.fullmatch(r"(\d{1,3}\.){3}\d{1,3}", host, re.ASCII):
        try:
            return str(IPv4Address(host)), port
        except ValueError:
            raise Refused(Rule.URL, f"{host}: not an IPv4 address") from None
    labels = host.split(".")
    if len(host) > 253 or not all(map(_LABEL.fullmatch, labels)):
        raise Refused(Rule.URL, f"{host[:100]!r} is not a host's name")
    if not _LAST_LABEL.fullmatch(labels[-1]) or re.fullmatch(r"0x[0-9a-f]*", labels[-1]):
        # Some readers take such a name for a number, and the number for an address.
        raise Refused(Rule.URL, f"{host}: not a host's name that all readers agree on")
    return host, port


def _check_host(host: str) -> None:
    try:
        kind = not_public(ip_address(host))
    except ValueError:
        inside = "." not in host or host.rpartition(".")[2] in _INSIDE
        kind = "name inside a network" if inside else None
    if kind is not None:
        raise Refused(Rule.ADDRESS, f"{host}: not public ({kind})")
