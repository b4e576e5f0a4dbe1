"""What processes hold: their memory and environments, to be searched for what must not be there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import psutil
from eth_account.hdaccount import seed_from_mnemonic
from eth_account.hdaccount.deterministic import HDPath


def secrets(phrase: str, accounts: int) -> dict[str, bytes]:
    """All that gives somebody an account: the phrase, its seed, each private key; also as hex."""
    seed = seed_from_mnemonic(phrase, "")
    found = {"the phrase": phrase.encode(), "the seed": seed}
    for index in range(accounts + 1):
        found[f"key {index}"] = bytes(HDPath(f"m/44'/60'/0'/0/{index}").derive(seed))
    return found | {f"{name} as hex": each.hex().encode() for name, each in found.items()}


def memory(process: psutil.Process) -> Iterator[bytes]:
    """The process's writable memory, piece by piece; nothing of one that has ended."""
    with contextlib.suppress(OSError):
        with Path(f"/proc/{process.pid}/maps").open() as maps:
            ranges = [line.split() for line in maps]
        with Path(f"/proc/{process.pid}/mem").open("rb", buffering=0) as opened:
            for (
                where,
                rights,
                *_,
            ) in ranges:
                begin, end = (int(each, 16) for each in where.split("-"))
                if not rights.startswith("rw") or end - begin > 2**30:
                    continue
                with contextlib.suppress(OSError, OverflowError, ValueError):
                    opened.seek(begin)
                    yield opened.read(end - begin)


def environment(process: psutil.Process) -> bytes:
    """As it was begun with."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process.pid}/environ").read_bytes()
    return b""
