"""The keystore's password on its way to the coordinator's process, past every other.

It is typed into a process of its own, which leaves it in two halves and ends. Each half by itself
is random: a file that stays, and a pad that the supervisor keeps, and puts beside the file whenever
a coordinator is to begin. The coordinator removes the pad as it reads it.

    terminal ─▶ this file's main ─┬─ sealed (a file) ──────────────────┐
                                  └─ pad ─▶ supervisor ─▶ pad (a file) ─┴─▶ coordinator

So neither the supervisor nor what Ray starts has the password in its memory or its environment, and
a coordinator that begins anew needn't ask for it.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from cluster.core.errors import ConfigError

_SIZE: Final = 1024
"""Bytes of each half: the password's length in two of them, and the password."""
_SEALED, _PAD = "sealed", "pad"
_MEMORY = Path("/dev/shm")  # noqa: S108 - a folder of our own is made in it
"""Where files are in memory only; elsewhere they are on disk for as long as the operator is up."""


class Handover:
    """The supervisor's half: `folder` is the coordinator's to know."""

    def __init__(self, folder: Path, pad: bytes) -> None:
        self.folder = folder
        self.__pad = pad

    @classmethod
    def of(cls, password: str) -> Handover:
        """Raises `ConfigError`."""
        folder = _make_folder()
        return cls(folder, seal(password, folder))

    @classmethod
    def asked(cls, keystore: Path) -> Handover:
        """From whoever sits at the terminal. Raises `ConfigError`."""
        folder = _make_folder()
        command = [sys.executable, "-m", "cluster.handover", str(folder), str(keystore)]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=False)  # noqa: S603 - ours
        if done.returncode != 0 or len(done.stdout) != _SIZE:
            shutil.rmtree(folder, ignore_errors=True)
            raise ConfigError(f"{keystore}: no password was given for it")
        return cls(folder, done.stdout)

    def offer(self) -> None:
        """Let a coordinator that begins have the password, once."""
        place = self.folder / _PAD
        place.unlink(missing_ok=True)
        _write(place, self.__pad)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def __repr__(self) -> str:
        return f"Handover({self.folder})"


def take(folder: Path) -> str:
    """The password; the pad is removed. Raises `ConfigError` when it isn't there."""
    place = folder / _PAD
    try:
        pad = place.read_bytes()
        place.unlink()
        whole = _combined((folder / _SEALED).read_bytes(), pad)
    except OSError:
        raise ConfigError("the keystore's password was given to the one before: wait") from None
    size = int.from_bytes(whole[:2], "big")
    return whole[2 : 2 + size].decode()


def seal(password: str, folder: Path) -> bytes:
    """Leave one half in the folder; the other."""
    text = password.encode()
    if len(text) > _SIZE - 2:
        raise ConfigError(f"the password is longer than {_SIZE - 2} bytes")
    pad = os.urandom(_SIZE)
    whole = (len(text).to_bytes(2, "big") + text).ljust(_SIZE, b"\0")
    _write(folder / _SEALED, _combined(whole, pad))
    return pad


def _combined(one: bytes, other: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(one, other, strict=True))


def _write(place: Path, data: bytes) -> None:
    try:
        handle = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(handle, "wb") as opened:
            opened.write(data)
    except OSError as error:
        raise ConfigError(f"{place}: can't be written: {error.strerror}") from None


def _make_folder() -> Path:
    """Only ours: mode 0700."""
    where = _MEMORY if os.access(_MEMORY, os.W_OK) else None
    return Path(tempfile.mkdtemp(prefix=f"crynux-{os.getpid()}-", dir=where))


def main() -> int:
    folder, keystore = Path(sys.argv[1]), sys.argv[2]
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        if password := getpass.getpass(f"Password of {keystore}: "):
            sys.stdout.buffer.write(seal(password, folder))
            return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
