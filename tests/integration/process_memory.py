"""What processes hold, files and the API's answers: to be searched for what must not be there."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
from eth_account.hdaccount import seed_from_mnemonic
from eth_account.hdaccount.deterministic import HDPath

ANSWERS = ("/metrics", "/v1/status", "/readyz")
ANSWER_SECONDS = 60.0


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


def in_files(wanted: dict[str, bytes], *folders: Path) -> dict[Path, list[str]]:
    """What of it lies in which file of the folders and of those in them; links aren't followed.

    What writes there goes on: a file or a folder may vanish before it is read.
    """
    found = {}
    for folder in folders:
        assert folder.is_dir(), folder
        for path in (Path(top, name) for top, _, names in os.walk(folder) for name in names):
            with contextlib.suppress(FileNotFoundError):
                if path.is_symlink() or not path.is_file():
                    continue
                data = path.read_bytes()
                if held := [name for name, secret in wanted.items() if secret in data]:
                    found[path] = held
    return found


def in_answers(wanted: dict[str, bytes], url: str) -> list[str]:
    """What of it the API says, and where: each answer must be whole, the coordinator's words in it.

    What takes tasks is ready; one that is asked while its machine is busy may be late to say so.
    """
    found = []
    for path in ANSWERS:
        deadline = time.monotonic() + ANSWER_SECONDS
        while not (answer := httpx.get(f"{url}{path}", timeout=ANSWER_SECONDS)).is_success:
            assert time.monotonic() < deadline, f"{path}: {answer.status_code} {answer.text[:300]}"
            time.sleep(0.5)
        assert answer.content, path
        found += [f"{name} at {path}" for name, each in wanted.items() if each in answer.content]
    return found
