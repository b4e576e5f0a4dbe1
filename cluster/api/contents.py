"""Answers that many ask for: made once, and packed once for all who take them so."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Mapping
from functools import cached_property
from typing import Final

from fastapi import Request, Response
from pydantic_core import to_json

from cluster.status import Status

LEAST_BYTES: Final = 1_000
"""What is shorter is sent as it is."""
_LEVEL: Final = 4
_GZIP: Final = 31
"""zlib's `wbits` for its container."""


class Content:
    """An answer's bytes, for as many as ask within a moment."""

    def __init__(self, plain: bytes) -> None:
        self.plain = plain

    @cached_property
    def packed(self) -> bytes:
        return gzip.compress(self.plain, _LEVEL, mtime=0)

    def answer(self, request: Request, headers: Mapping[str, str]) -> Response:
        """`headers` has the content's type."""
        told = {**headers, "vary": "accept-encoding"}
        if len(self.plain) < LEAST_BYTES or not takes_gzip(request):
            return Response(self.plain, headers=told)
        return Response(self.packed, headers=told | {"content-encoding": "gzip"})


class Seen:
    """A status, and the JSON text of each of its fields."""

    def __init__(self, status: Status) -> None:
        self.status = status
        self.fields: Mapping[str, str] = {
            name: to_json(getattr(status, name)).decode() for name in Status.model_fields
        }

    @cached_property
    def content(self) -> Content:
        return Content(joined(self.fields).encode())


def joined(fields: Mapping[str, str]) -> str:
    """A JSON object of fields that are JSON already."""
    return "{" + ",".join(f'"{name}":{text}' for name, text in fields.items()) + "}"


class Packer:
    """Packs a stream: after each `add`, whoever reads it has all of what was added."""

    def __init__(self) -> None:
        self._packing = zlib.compressobj(_LEVEL, zlib.DEFLATED, _GZIP)

    def add(self, data: bytes) -> bytes:
        return self._packing.compress(data) + self._packing.flush(zlib.Z_SYNC_FLUSH)

    def end(self) -> bytes:
        return self._packing.flush()


def takes_gzip(request: Request) -> bool:
    for each in request.headers.get("accept-encoding", "").lower().split(","):
        name, _, quality = each.partition(";")
        if name.strip() == "gzip":
            return quality.replace(" ", "") not in {"q=0", "q=0.0"}
    return False
