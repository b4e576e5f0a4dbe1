"""What others know the coordinator by. Here, since they needn't import all that it is made of."""

from __future__ import annotations

from typing import Final

NAME: Final = "coordinator"
"""The actor's name in its Ray namespace."""
REFUSED: Final = "refused: "
"""Begins the answer of one that can't act for what the operator has to mend, and says what."""
RAY_ADDRESS: Final = "ray_address"
"""The journal's cursor for where the acting coordinator's Ray cluster is."""
