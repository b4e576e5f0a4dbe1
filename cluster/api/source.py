"""Where the API's answers come from, and how that says that there is none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class SourceAway(Exception):
    """The coordinator can't be asked now; the message says why, in one line."""

    @property
    def words(self) -> str:
        return f"the coordinator is away: {self}"


class SourceBusy(SourceAway):
    """The coordinator is there, and asked too much already."""

    @property
    def words(self) -> str:
        return f"the coordinator is {self}"


class NotKnown(Exception):
    """The coordinator knows no such thing; the message says how to name one."""


class Source(Protocol):
    """Where the answers come from; plain JSON values. Each raises `SourceAway`."""

    async def status(self) -> Mapping[str, Any]: ...

    async def metrics_text(self) -> bytes: ...

    async def story(self, name: str) -> Mapping[str, Any]:
        """Raises `NotKnown`."""
        ...

    async def bundle(self, name: str) -> Mapping[str, Any]:
        """Raises `NotKnown`."""
        ...

    async def file(self, name: str, file: str) -> bytes:
        """Raises `NotKnown`."""
        ...

    async def shown(self, who: str, what: str, task: str) -> None:
        """Somebody is given a bundle or a result: to be written down."""
        ...

    async def earnings(self, since: float, step: str) -> Mapping[str, Any]: ...

    async def audit(self, limit: int) -> list[Mapping[str, Any]]: ...

    async def perform(self, order: Mapping[str, Any], who: str) -> Mapping[str, Any]: ...
