"""What an actor's process finds in its environment: nothing that only the coordinator needs."""

from __future__ import annotations

import os
from typing import Any

from cluster.keystore import PASSWORD


def without_password() -> dict[str, Any]:
    """Options for an actor that is begun from a process that was given the keystore's password:
    Ray hands its own environment down to every process of the machine."""
    if PASSWORD not in os.environ:
        return {}
    return {"runtime_env": {"env_vars": {PASSWORD: ""}}}
