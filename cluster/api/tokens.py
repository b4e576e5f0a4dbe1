"""The API's token as its server and its clients read it, and which addresses need none."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Final

from cluster.core.errors import ConfigError

LEAST_TOKEN: Final = 16
"""Characters of a token."""


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def read_token(file: Path | None) -> str | None:
    """Raises `ConfigError` for a file that can't be read, or whose token is too short to be one."""
    if file is None:
        return None
    try:
        token = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise ConfigError(f"serve.token_file: {file} can't be read: {reason}") from None
    if len(token) < LEAST_TOKEN or not token.isascii() or any(map(str.isspace, token)):
        raise ConfigError(
            f"serve.token_file: {file} must hold one word of at least {LEAST_TOKEN} characters, "
            "such as `openssl rand -hex 32` makes"
        )
    return token
