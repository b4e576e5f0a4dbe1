"""A proxy between a client and its EVM node that breaks on command.

It passes JSON-RPC calls on and does to some of them what real endpoints do: no answer, a slow one,
401, 429 and 500, garbage, a quota or a refusal inside an answer, an old head, blocks of another
fork, logs that come later than their blocks, receipts that aren't kept, and a transaction that is
taken while the answer is lost.
"""

from __future__ import annotations

import json
import random
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Final, Self

KINDS: Final = (
    "drop",
    "delay",
    "429",
    "500",
    "garbage",
    "stale",
    "fork",
    "lose",
    "401",
    "quota",
    "refuse",
    "late logs",
    "no receipts",
)
LOGS: Final = "eth_getLogs"
RECEIPT: Final = "eth_getTransactionReceipt"
LATE: Final = 2
"""Blocks that logs come late."""
SEND: Final = "eth_sendRawTransaction"
HEAD: Final = "eth_getBlockByNumber"


@dataclass(frozen=True)
class Fault:
    """`share` of the calls meet it, until `until` (of `time.monotonic`)."""

    kind: str
    until: float
    share: float = 1.0


class RpcProxy:
    """A context manager; `url` is where it listens. `seed` decides which calls meet a fault."""

    def __init__(self, target: str, seed: int = 0, host: str = "127.0.0.1") -> None:
        self.target = target
        self.calls: Counter[str] = Counter()
        self._random = random.Random(seed)  # noqa: S311 - a schedule
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._old_head: Any = None
        handler = type("Handler", (_Handler,), {"owner": self})
        self._server = ThreadingHTTPServer((host, 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.02,), daemon=True
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fail(self, kind: str, seconds: float, share: float = 1.0) -> None:
        """From now on, for so long."""
        with self._lock:
            self._faults.append(Fault(kind, time.monotonic() + seconds, share))

    def heal(self) -> None:
        with self._lock:
            self._faults.clear()

    # --- for the handler -------------------------------------------------------------------------

    def fault(self, method: str) -> str:
        with self._lock:
            self.calls[method] += 1
            now = time.monotonic()
            self._faults = [each for each in self._faults if each.until > now]
            for each in self._faults:
                if _concerns(each.kind, method) and self._random.random() < each.share:
                    return each.kind
        return ""

    def pass_on(self, body: bytes) -> bytes:
        request = urllib.request.Request(  # noqa: S310 - our own node
            self.target, body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
            return bytes(answer.read())

    def altered(self, kind: str, question: Mapping[str, Any], answer: bytes) -> bytes:
        """A head that is old, or a block that is another's."""
        said = json.loads(answer)
        block = said.get("result")
        latest = question["params"][:1] == ["latest"]
        if kind == "fork" and isinstance(block, dict):
            said["result"] = block | {"hash": "0x" + "ee" * 32, "parentHash": "0x" + "dd" * 32}
        elif latest:
            if kind == "stale" and self._old_head is not None:
                said["result"] = self._old_head
            else:
                self._old_head = block
        return json.dumps(said).encode()


_ONLY: Final = {
    "lose": SEND,
    "stale": HEAD,
    "fork": HEAD,
    "late logs": LOGS,
    "no receipts": RECEIPT,
}


def _concerns(kind: str, method: str) -> bool:
    return _ONLY.get(kind, method) == method


def _result(question: Mapping[str, Any], result: object) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "id": question["id"], "result": result}).encode()


def _error(question: Mapping[str, Any], code: int, message: str) -> bytes:
    error = {"code": code, "message": message}
    return json.dumps({"jsonrpc": "2.0", "id": question["id"], "error": error}).encode()


class _Handler(BaseHTTPRequestHandler):
    owner: RpcProxy
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        question = json.loads(body)
        kind = self.owner.fault(question["method"])
        act: Callable[[bytes, Mapping[str, Any]], None] | None = {
            "drop": self._drop,
            "lose": self._lose,
            "429": lambda _b, _q: self._say(429, b"", {"Retry-After": "1"}),
            "401": lambda _b, _q: self._say(401, b'{"message": "invalid key"}'),
            "500": lambda _b, _q: self._say(500, b"internal error"),
            "quota": lambda _b, q: self._say(
                200, _error(q, -32005, "daily request count exceeded")
            ),
            "refuse": lambda _b, q: self._say(200, _error(q, -32603, "Internal error")),
            "no receipts": lambda _b, q: self._say(200, _result(q, None)),
            "late logs": self._late,
            "garbage": lambda _b, _q: self._say(200, b"<html>not JSON"),
        }.get(kind)
        if act is not None:
            act(body, question)
            return
        if kind == "delay":
            time.sleep(0.7)
        try:
            answer = self.owner.pass_on(body)
        except OSError:
            self._say(502, b"")
            return
        if question["method"] == HEAD:
            answer = self.owner.altered(kind, question, answer)
        self._say(200, answer)

    def _drop(self, _body: bytes, _question: Mapping[str, Any]) -> None:
        self.close_connection = True

    def _lose(self, body: bytes, _question: Mapping[str, Any]) -> None:
        self.owner.pass_on(body)
        self.close_connection = True

    def _late(self, _body: bytes, question: Mapping[str, Any]) -> None:
        asked = question["params"][0]
        number = {"jsonrpc": "2.0", "id": 1, "method": "eth_blockNumber", "params": []}
        head = int(json.loads(self.owner.pass_on(json.dumps(number).encode()))["result"], 16)
        last = min(int(asked["toBlock"], 16), head - LATE)
        if last < int(asked["fromBlock"], 16):
            self._say(200, _result(question, []))
            return
        sooner = {**question, "params": [{**asked, "toBlock": hex(last)}]}
        self._say(200, self.owner.pass_on(json.dumps(sooner).encode()))

    def _say(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
