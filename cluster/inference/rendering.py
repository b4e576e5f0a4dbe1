"""Chat templates: programs that come with a model, run in a process that can be ended.

The library's sandbox keeps them from files and the like, but not from looping for days or from
filling the memory, and a thread that does can't be stopped. So a child of this process runs them,
and stays for the next; the system takes it away where one asks for too much:

    this process ── a line of JSON: template, chat, tools, tokens ──▶ child
                 ◀── a line of JSON: the text, or what was raised ───

What is measured is the child's own computing time, so that a busy machine refuses no more than an
idle one. It ends with this process, whose end closes its input.

Its time zone is UTC, as in the containers of the network's nodes, whatever this machine's is: a
template may write the date. Two nodes that render such a one on either side of midnight differ, and
so do the network's own; nothing that was done here could make one agree with the other.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Final

from cluster.core.errors import TaskUnsupported

MAX_TEXT: Final = 4 * 2**20
"""Characters that are rendered at most; chats are a million at most."""
LOOK_SECONDS: Final = 0.1
_PIECE: Final = 2**16
_KEPT: Final = ("HOME", "LANG", "LD_LIBRARY_PATH", "PATH", "PYTHONHOME")
"""What the child is told of the surroundings: nothing that might be secret."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds of computing that one template may take, and bytes beside what the child needs."""

    seconds: int = 10
    spare_bytes: int = 2**30


@dataclass(frozen=True, slots=True)
class Page:
    """What is to be rendered. `tokens` are the tokenizer's special ones, by name."""

    template: str
    chat: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None
    tokens: Mapping[str, Any]


class Renderer:
    """Holds the child, which is started when it is first needed. Any thread may ask."""

    def __init__(self, limits: Limits = Limits()) -> None:  # noqa: B008 - frozen
        self._limits = limits
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = Lock()

    def render(self, page: Page, look: Callable[[], None]) -> str:
        """The chat as the template writes it. `look` is called while it is waited for, and may
        raise.

        Raises `TaskUnsupported` for a chat that the template refuses, or one that it takes too long
        over: other versions of the libraries may do better. Raises `RuntimeError` where the child
        doesn't start.
        """
        asked = json.dumps(asdict(page)).encode("ascii") + b"\n"
        with self._lock:
            try:
                said = self._ask(self._ready(look), asked, look)
            except BaseException:
                self._end()
                raise
        if not said:
            self._end()
            raise TaskUnsupported("messages: the chat template takes too long or too much memory")
        answer: dict[str, str] = json.loads(said)
        if "raised" in answer:
            raise TaskUnsupported(f"messages: the chat template refuses them ({answer['raised']})")
        return answer["text"]

    def _ready(self, look: Callable[[], None]) -> subprocess.Popen[bytes]:
        child = self._child
        if child is not None and child.poll() is None:
            return child
        self._end()
        self._child = child = _start(self._limits)
        if not _line(child, look):
            raise RuntimeError("the process for chat templates doesn't start")
        return child

    @staticmethod
    def _ask(child: subprocess.Popen[bytes], asked: bytes, look: Callable[[], None]) -> bytes:
        """The child's answer, empty where there is none to come."""
        assert child.stdin is not None, "opened as a pipe"  # noqa: S101
        try:
            child.stdin.write(asked)
            child.stdin.flush()
        except BrokenPipeError:
            return b""
        return _line(child, look)

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:  # what it hadn't read yet
                    continue


def _start(limits: Limits) -> subprocess.Popen[bytes]:
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    return subprocess.Popen(  # noqa: S603 - ourselves
        [sys.executable, "-m", __name__, str(limits.seconds), str(limits.spare_bytes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=kept
        | {
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "TZ": "UTC",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "TRANSFORMERS_VERBOSITY": "error",
        },
    )


def _line(child: subprocess.Popen[bytes], look: Callable[[], None]) -> bytes:
    """The next line that the child says, its end included; empty when it has ended."""
    assert child.stdout is not None, "opened as a pipe"  # noqa: S101
    number = child.stdout.fileno()
    said = bytearray()
    while not said.endswith(b"\n"):
        while not select.select([number], [], [], LOOK_SECONDS)[0]:
            look()
        piece = os.read(number, _PIECE)
        if not piece:
            return b""
        said += piece
    return bytes(said)


# --- the child ------------------------------------------------------------------------------------


def main() -> None:
    seconds, spare = int(sys.argv[1]), int(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends with its input
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing else may be said there
    from transformers.utils.chat_template_utils import render_jinja_template

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _limit(resource.RLIMIT_AS, _own_bytes() + spare)
    answers.write(b"\n")
    answers.flush()
    for line in sys.stdin.buffer:
        used = resource.getrusage(resource.RUSAGE_SELF)
        _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + seconds)
        said = _answer(json.loads(line), render_jinja_template)
        answers.write(json.dumps(said).encode("ascii") + b"\n")
        answers.flush()


def _answer(asked: dict[str, Any], render: Callable[..., Any]) -> dict[str, str]:
    # As the tokenizer does before it renders.
    chat = [
        {key: value for key, value in each.items() if value is not None} for each in asked["chat"]
    ]
    try:
        (text,), _ = render(
            [chat],
            tools=asked["tools"],
            chat_template=asked["template"],
            add_generation_prompt=True,
            **asked["tokens"],
        )
    except MemoryError:
        raise  # there may be none left to go on with
    except Exception as error:  # noqa: BLE001 - whatever a program of strangers comes to
        return {"raised": type(error).__name__}
    return {"text": text} if len(text) <= MAX_TEXT else {"raised": "too long a text"}


def _limit(what: int, most: int) -> None:
    """The soft limit alone: the hard one could never be lifted again."""
    hard = resource.getrlimit(what)[1]
    resource.setrlimit(what, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _own_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    main()
