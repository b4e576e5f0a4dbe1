"""A real HTTP server over loopback that breaks on command, for whoever downloads from it.

What it answers is `respond`'s to say; a fault, taken from a queue by path, makes something else of
it. Everything is counted: requests, bytes, connections at one time.
"""

from __future__ import annotations

import contextlib
import re
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

CHUNK = 64 * 1024
SETTLE_SECONDS = 2.0


@dataclass(frozen=True)
class Answer:
    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Fault:
    """What becomes of one answer.

    `status` and `headers` replace the answer's; `cut` ends the connection after so many bytes of
    it, `stall` stops there until the server closes; `lie` is added to the length that is said;
    `chunked` says none; `body` is sent in place of what was asked for; `no_ranges` sends all.
    """

    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: int | None = None
    stall: int | None = None
    lie: int = 0
    chunked: bool = False
    body: bytes | None = None
    no_ranges: bool = False


@dataclass(frozen=True)
class Seen:
    method: str
    path: str
    headers: Mapping[str, str]
    status: int
    sent: int


class FaultyServer:
    """A context manager; `url` is where it listens."""

    def __init__(self) -> None:
        self._seen: list[Seen] = []
        self.most_at_once = 0
        self.bytes_per_second: float | None = None
        self._at_once = 0
        self._faults: list[tuple[str, Fault, int]] = []
        self._lock = threading.Lock()
        self.closing = threading.Event()
        handler = type("Handler", (_Handler,), {"owner": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.02,), daemon=True
        )

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def wrap(self, context: ssl.SSLContext) -> None:
        """Speak TLS from now on."""
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)

    def stop(self) -> None:
        if not self.closing.is_set():
            self.closing.set()
            self._server.shutdown()
            self._server.server_close()

    def fail(self, match: str, fault: Fault, times: int = 1) -> None:
        """The next `times` answers whose path contains `match` are faulty."""
        with self._lock:
            self._faults.append((match, fault, times))

    @property
    def seen(self) -> list[Seen]:
        """The requests that were answered; waits for those that are being answered, if they end."""
        until = time.monotonic() + SETTLE_SECONDS
        while self._at_once and time.monotonic() < until:
            time.sleep(0.002)
        return list(self._seen)

    def sent(self, match: str = "") -> int:
        return sum(seen.sent for seen in self.seen if match in seen.path)

    def requests(self, match: str = "") -> list[Seen]:
        return [seen for seen in self.seen if match in seen.path]

    def respond(self, method: str, target: str, headers: Mapping[str, str]) -> Answer:
        raise NotImplementedError

    # --- for the handler -------------------------------------------------------------------------

    def note(self, seen: Seen) -> None:
        self._seen.append(seen)

    def fault_for(self, path: str) -> Fault:
        with self._lock:
            for index, (match, fault, times) in enumerate(self._faults):
                if match in path:
                    self._faults[index : index + 1] = [(match, fault, times - 1)] * (times > 1)
                    return fault
        return Fault()

    @contextlib.contextmanager
    def counted(self) -> Any:
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            yield
        finally:
            with self._lock:
                self._at_once -= 1


class FileServer(FaultyServer):
    """Files by path, with an ETag that follows their content."""

    def __init__(self, files: Mapping[str, bytes] | None = None) -> None:
        super().__init__()
        self.files = dict(files or {})

    def respond(self, method: str, target: str, headers: Mapping[str, str]) -> Answer:
        content = self.files.get(target.partition("?")[0].lstrip("/"))
        if content is None:
            return Answer(404)
        return Answer(200, content, {"ETag": f'"{hash(content) & 0xFFFFFFFF:x}"'})


class _Handler(BaseHTTPRequestHandler):
    owner: FaultyServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve(body=True)

    def do_HEAD(self) -> None:
        self._serve(body=False)

    def _serve(self, body: bool) -> None:
        with self.owner.counted():
            headers = {name.title(): value for name, value in self.headers.items()}
            answer = self.owner.respond(self.command, self.path, headers)
            fault = self.owner.fault_for(self.path)
            answer = _ranged(_faulty(answer, fault), headers, fault)
            sent = 0
            # Whoever has enough closes the connection.
            with contextlib.suppress(ConnectionError, TimeoutError):
                sent = self._send(answer, fault, body)
            status = answer.status
            self.owner.note(Seen(self.command, self.path, headers, status, sent))

    def _send(self, answer: Answer, fault: Fault, body: bool) -> int:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if fault.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(len(answer.body) + fault.lie))
        self.end_headers()
        if not body:
            return 0
        stop = min(x for x in (fault.cut, fault.stall, len(answer.body)) if x is not None)
        for at in range(0, stop, CHUNK):
            piece = answer.body[at : min(at + CHUNK, stop)]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece) if fault.chunked else piece)
            if self.owner.bytes_per_second is not None:
                self.owner.closing.wait(len(piece) / self.owner.bytes_per_second)
        self.wfile.flush()
        if fault.stall is not None:
            self.owner.closing.wait()
        if fault.chunked and fault.cut is None:
            self.wfile.write(b"0\r\n\r\n")
        if fault.cut is not None or fault.stall is not None or fault.lie:
            self.close_connection = True
        return stop


def _faulty(answer: Answer, fault: Fault) -> Answer:
    if fault.status is not None:
        answer = Answer(fault.status)
    if fault.body is not None:
        answer = replace(answer, body=fault.body)
    return replace(answer, headers={**answer.headers, **fault.headers})


def _ranged(answer: Answer, headers: Mapping[str, str], fault: Fault) -> Answer:
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("Range", ""))
    if match is None or answer.status != 200 or fault.no_ranges:
        return answer
    size = len(answer.body)
    start, stop = int(match[1]), int(match[2]) + 1 if match[2] else size
    if start >= size:
        return Answer(416, b"", {"Content-Range": f"bytes */{size}"})
    said = {"Content-Range": f"bytes {start}-{min(stop, size) - 1}/{size}"}
    return Answer(206, answer.body[start:stop], {**said, **answer.headers})
