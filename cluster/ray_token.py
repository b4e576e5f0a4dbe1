"""How this process speaks to Ray, said before Ray is imported, which reads it then.

A Ray that is begun here asks for a token, and keeps it in the user's folder. Who only joins one
doesn't show it unless told to: commands of another shell would be turned away by the operator that
they are for. `ray start` goes by the same rule.
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Final

MODE: Final = "RAY_AUTH_MODE"
_TOKENS: Final = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
FILE: Final = Path(".ray") / "auth_token"


def show(environment: MutableMapping[str, str] = os.environ, home: Path | None = None) -> None:
    """Show the token where there is one, unless it is said otherwise or too late."""
    if MODE in environment or "ray" in sys.modules:
        return
    if any(environment.get(name) for name in _TOKENS) or _is_there(home):
        environment[MODE] = "token"


def _is_there(home: Path | None) -> bool:
    try:
        return ((home or Path.home()) / FILE).is_file()
    except (OSError, RuntimeError):  # no home, or one that may not be looked into
        return False
