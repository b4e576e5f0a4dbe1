"""What an actor's process finds in its environment: nothing that only the coordinator needs."""

from __future__ import annotations

import os
from typing import Any

from cluster.keystore import PASSWORD


def without_password(always: bool = False) -> dict[str, Any]:
    """Options for an actor that Ray may begin with the keystore's password: it hands its own
    environment down to every process of the machine. Our own environment tells whether it has it;
    it doesn't where Ray was begun by others, which is what `always` is for."""
    if PASSWORD not in os.environ and not always:
        return {}
    return {"runtime_env": {"env_vars": {PASSWORD: ""}}}
