"""What `crynux-cluster keys` does: the operator's key made, brought in, shown and backed up.

A password is read from a file, from the environment or from the terminal, never from an argument.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import click

from cluster.core.errors import ConfigError
from cluster.identity import TREASURY, Identity, load_secret, password_from
from cluster.keystore import (
    LEAST_PASSWORD,
    WORK,
    Secret,
    is_keystore,
    new_phrase,
    open_keystore,
    read_private,
    seal_key,
    seal_phrase,
    write_private,
)

work: int = WORK
"""Of scrypt, for what is made here."""


def new(file: Path, password_file: Path | None, words: int) -> str:
    """Make a key; what was done, in words, as from all of these. They raise `ConfigError`."""
    done = _store(file, Secret(phrase=new_phrase(words, os.urandom)), password_file)
    return f"{done}\nBack it up: crynux-cluster keys export {file} --to PATH writes the phrase."


def bring(
    file: Path, password_file: Path | None, source: Path, source_password_file: Path | None
) -> str:
    """Seal a phrase or another keystore into a new keystore."""
    where = "stdin" if str(source) == "-" else str(source)
    text = _from_terminal() if where == "stdin" else read_private(source, "the key", "--from")
    if is_keystore(text):
        password = _password(source_password_file, f"Password of {where}")
        secret = open_keystore(text, password, where)
    else:
        secret = Secret(phrase=text)
    Identity.of(secret, where)
    return _store(file, secret, password_file)


def show(file: Path, password_file: Path | None, accounts: int) -> list[dict[str, object]]:
    """Addresses and public keys; nothing secret."""
    identity = Identity.load(file, lambda: _password(password_file, f"Password of {file}"))
    return [
        {
            "index": index,
            "role": "treasury" if index == TREASURY else "node",
            "address": identity.address(index),
            "public_key": "0x" + identity.public_key(identity.address(index)).hex(),
        }
        for index in range(accounts + 1)
    ]


def export(
    file: Path,
    password_file: Path | None,
    target: Path,
    account: int | None,
    new_password_file: Path | None,
) -> str:
    """The phrase in plain text, or one account's key in a keystore."""
    if account is None and new_password_file is not None:
        raise ConfigError("--new-password-file is for --account: the phrase is in plain text")
    if account is not None and new_password_file is None and not sys.stdin.isatty():
        raise ConfigError("--account: the new keystore needs a password; name --new-password-file")
    secret = load_secret(file, lambda: _password(password_file, f"Password of {file}"))
    if account is not None:
        identity = Identity.of(secret, str(file))
        sealed = identity.export(account, _new_password(new_password_file, str(target), {}), work)
        write_private(target, sealed)
        return f"{target}: account {account}, {identity.address(account)}, as a keystore"
    if secret.phrase is None:
        raise ConfigError(
            f"{file}: it holds one private key and no phrase; copy the file, or use --account"
        )
    write_private(target, secret.phrase + "\n")
    return f"{target}: the phrase in plain text; whoever reads it owns the stakes"


def _store(file: Path, secret: Secret, password_file: Path | None) -> str:
    """Seal the secret into a new keystore, and say whose it is."""
    if file.exists():
        raise ConfigError(f"{file}: there is one already, and keys are never overwritten")
    password = _new_password(password_file, str(file))
    identity = Identity.of(secret, str(file))
    treasury = identity.address(TREASURY)
    if secret.phrase is not None:
        text = seal_phrase(" ".join(secret.phrase.split()), password, treasury, work)
    else:
        text = seal_key(secret.key or b"", password, work)
    write_private(file, text)
    return f"{file}: a keystore; its treasury is {treasury}"


def _prompt(words: str) -> Callable[[], str] | None:
    if not sys.stdin.isatty():
        return None
    return lambda: str(click.prompt(words, hide_input=True, err=True))


def _password(file: Path | None, words: str) -> str:
    return password_from(file, os.environ, _prompt(words))


def _new_password(file: Path | None, what: str, environment: Mapping[str, str] = os.environ) -> str:
    """A password for something new, asked for twice. Raises `ConfigError` for a short one."""
    words = f"New password for {what}"
    prompt = partial(_twice, words) if sys.stdin.isatty() else None
    found = password_from(file, environment, prompt)
    if len(found) < LEAST_PASSWORD:
        raise ConfigError(f"the password is shorter than {LEAST_PASSWORD} characters; take more")
    return found


def _twice(words: str) -> str:
    return str(click.prompt(words, hide_input=True, confirmation_prompt=True, err=True))


def _from_terminal() -> str:
    if sys.stdin.isatty():
        return str(click.prompt("The phrase", hide_input=True, err=True))
    return sys.stdin.read()
