"""A host on loopback that speaks HTTP as no honest one does: what it says is written by hand."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

HOST_SECONDS = 60.0
"""After which it gives up by itself, so that a test that fails ends too."""


class HostileHost:
    """A context manager; `talk` is called for each request with a way to say something, which is
    False once nobody listens any more. `sent` counts bytes; `ended` says whether it came to what it
    says last before the other side had enough."""

    def __init__(self, talk: Callable[[HostileHost, Callable[[bytes], bool]], None]) -> None:
        self._talk = talk
        self.sent = 0
        self.asked = 0
        self.ended = False
        self.closing = threading.Event()
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self._socket.listen()

    @property
    def port(self) -> int:
        return int(self._socket.getsockname()[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.closing.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def drip(
        self, say: Callable[[bytes], bool], piece: bytes, seconds: float = HOST_SECONDS
    ) -> None:
        """The same again and again, until nobody listens, or to the end."""
        for _ in range(int(seconds / 0.02)):
            if not say(piece) or self.closing.wait(0.02):
                return
        self.ended = True

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        def say(what: bytes) -> bool:
            try:
                connection.sendall(what)
            except OSError:
                return False
            self.sent += len(what)
            return True

        with connection, contextlib.suppress(OSError):
            if connection.recv(65536):
                self.asked += 1
                self._talk(self, say)
