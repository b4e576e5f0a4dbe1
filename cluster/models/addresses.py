"""Which addresses may be asked for a model: public ones, and no others.

The table names the networks that IANA has set apart, so that a refusal can say what an address is.
"""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Final

_METADATA: Final = frozenset(
    {
        IPv4Address("169.254.169.254"),
        IPv4Address("169.254.170.2"),
        IPv4Address("100.100.100.200"),
        IPv4Address("168.63.129.16"),
        IPv4Address("192.0.0.192"),
        IPv6Address("fd00:ec2::254"),
    }
)
"""Where clouds tell a machine its secrets; some of these are in nobody's reserved network."""
_V4: Final = tuple(
    (IPv4Network(network), name)
    for network, name in (
        ("0.0.0.0/8", "unspecified"),
        ("10.0.0.0/8", "private"),
        ("100.64.0.0/10", "shared (CGNAT)"),
        ("127.0.0.0/8", "loopback"),
        ("169.254.0.0/16", "link-local"),
        ("172.16.0.0/12", "private"),
        ("192.0.0.0/24", "reserved"),
        ("192.0.2.0/24", "documentation"),
        ("192.31.196.0/24", "reserved"),
        ("192.52.193.0/24", "reserved"),
        ("192.88.99.0/24", "6to4 relay"),
        ("192.168.0.0/16", "private"),
        ("192.175.48.0/24", "reserved"),
        ("198.18.0.0/15", "benchmarking"),
        ("198.51.100.0/24", "documentation"),
        ("203.0.113.0/24", "documentation"),
        ("224.0.0.0/4", "multicast"),
        ("240.0.0.0/4", "reserved"),
    )
)
_V6: Final = tuple(
    (IPv6Network(network), name)
    for network, name in (
        ("::/128", "unspecified"),
        ("::1/128", "loopback"),
        ("64:ff9b:1::/48", "local NAT64"),
        ("100::/64", "discard"),
        ("100:0:0:1::/64", "discard"),
        ("2001::/23", "reserved"),
        ("2001:db8::/32", "documentation"),
        ("2620:4f:8000::/48", "reserved"),
        ("3fff::/20", "documentation"),
        ("5f00::/16", "segment routing"),
        ("fc00::/7", "unique-local"),
        ("fe80::/10", "link-local"),
        ("fec0::/10", "site-local"),
        ("ff00::/8", "multicast"),
    )
)
_GLOBAL: Final = IPv6Network("2000::/3")
_NAT64: Final = IPv6Network("64:ff9b::/96")


def not_public(address: IPv4Address | IPv6Address) -> str | None:
    """What kind of address it is in a word or two, None for a public one.

    An IPv4 address inside an IPv6 one is judged as what it is.
    """
    if isinstance(address, IPv6Address) and address.scope_id is not None:
        return "scoped"
    if address in _METADATA:
        return "cloud metadata"
    if isinstance(address, IPv4Address):
        return next((name for network, name in _V4 if address in network), None)
    for form, inner in _inside(address):
        if (kind := not_public(inner)) is not None:
            return f"{kind} in {form}"
    named = next((name for network, name in _V6 if address in network), None)
    if named is not None or address in _NAT64:
        return named
    return None if address in _GLOBAL else "reserved"


def _inside(address: IPv6Address) -> Sequence[tuple[str, IPv4Address]]:
    """IPv4 addresses that packets to this one may end at."""
    low, found = IPv4Address(int(address) & 0xFFFFFFFF), []
    if address.ipv4_mapped is not None:
        found.append(("IPv4-mapped", address.ipv4_mapped))
    elif int(address) >> 32 == 0 and int(address) > 1:
        found.append(("IPv4-compatible", low))
    if address.sixtofour is not None:
        found.append(("6to4", address.sixtofour))
    if address.teredo is not None:
        found.extend(("Teredo", each) for each in address.teredo)
    if address in _NAT64:
        found.append(("NAT64", low))
    if (int(address) >> 32) & 0xFCFFFFFF == 0x00005EFE:
        found.append(("ISATAP", low))
    return found
