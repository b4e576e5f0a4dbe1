"""Logs: one line per event, JSON for machines or text for a terminal, and no secrets in either.

Everything goes through the standard library's root logger, so what libraries log takes the same
form and the same redaction. Bind ids once and pass the logger on:

    log = logs.get(__name__).bind(task=commitment, account=address)
    log.info("score submitted", attempt=attempt_id)

Works alike in a Ray actor: call `setup` in the actor's constructor.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TextIO

import structlog
from structlog.stdlib import BoundLogger, ProcessorFormatter
from structlog.typing import EventDict, Processor, WrappedLogger

from cluster import url_secrets

Level = Literal["debug", "info", "warning", "error"]
Format = Literal["auto", "json", "console"]

REDACTED = "[redacted]"
READ_BY_A_PERSON = "CRYNUX_LOGS_READ_BY_A_PERSON"
"""In the environment of a process whose lines another one shows on a terminal."""

_HANDLER = "crynux-cluster"
_SECRET_NAME = re.compile(
    r"priv|secret|mnemonic|phrase|passw|token|credential|authorization|keystore|api_?key",
    re.IGNORECASE,
)
_PERHAPS_SECRET_NAME = re.compile(r"(^|_)(seed|keys?)$", re.IGNORECASE)
_PROMPT_NAME = re.compile(r"prompt|task_args|parameters$|^messages$|^content$", re.IGNORECASE)
_KEY_IN_TEXT = re.compile(r"[0-9a-fA-F]{64}")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""All but a tab and a line's end."""
_WORDS = re.compile(r"\b[a-z]{3,8}(?:\s+[a-z]{3,8}){11,}\b")
_NOISY = (
    "httpx", "httpx2", "httpcore", "httpcore2", "urllib3", "web3", "asyncio", "filelock",
    "huggingface_hub", "boto3", "botocore", "s3transfer", "ray.serve",
)  # fmt: skip
"""Of some every request is a line, with the token in its query."""

# --- redaction ----------------------------------------------------------------------------------


def redact(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """A processor: the event without key material, credentials in URLs, or prompts."""
    return {name: clean(value, name) for name, value in event.items()}


def clean(value: object, name: str = "") -> Any:
    """`value` as it may be logged under `name`.

    A 64-digit hex number is a hash nearly everywhere here, so it is masked only under a name that
    speaks of secrets; a run of 12 or more BIP-39 words, and a URL's credentials, under every name.
    """
    if isinstance(value, bytes | bytearray | memoryview):
        return f"[{len(value)} bytes]"
    if isinstance(value, Mapping):
        return {key: clean(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [clean(item, name) for item in value]
    if name.startswith("_") or value is None or isinstance(value, bool):
        return value
    if _is_secret(name, value):
        return REDACTED
    if not isinstance(value, str):
        return value if isinstance(value, int | float) else clean(str(value), name)
    if name != "event" and _PROMPT_NAME.search(name):
        return f"[{len(value)} characters]"
    return scrub(value)


def scrub(text: str) -> str:
    """`text` without mnemonic phrases, URL credentials, and what a terminal would obey."""
    text = _CONTROL.sub("\ufffd", text)
    return _WORDS.sub(_mask_phrase, url_secrets.hide(text, REDACTED))


def _is_secret(name: str, value: object) -> bool:
    """An image's seed is a small number, and a pipeline's key is no 64 hex digits."""
    strong = bool(_SECRET_NAME.search(name))
    if isinstance(value, float) or not (strong or _PERHAPS_SECRET_NAME.search(name)):
        return False
    if isinstance(value, int):
        return value.bit_length() > 64
    text = str(value)
    return bool(_KEY_IN_TEXT.search(text)) or (strong and len(text) >= 6)


def _mask_phrase(match: re.Match[str]) -> str:
    words = match.group().split()
    known = _bip39_words()
    run = longest = 0
    for word in words:
        run = run + 1 if word in known else 0
        longest = max(longest, run)
    return REDACTED if longest >= 12 else match.group()


@functools.cache
def _bip39_words() -> frozenset[str]:
    # Here, since most processes never meet a text that looks like a phrase, and it takes long.
    from eth_account.hdaccount.mnemonic import get_wordlist

    return frozenset(get_wordlist("english"))


# --- set-up -------------------------------------------------------------------------------------


def setup(level: Level = "info", format: Format = "auto", stream: TextIO | None = None) -> None:
    """Send this process's logs to `stream` (stderr); calling it again replaces the set-up.

    `auto` is text on a terminal and JSON elsewhere.
    """
    stream = stream if stream is not None else sys.stderr
    read = stream.isatty() or READ_BY_A_PERSON in os.environ
    as_json = format == "json" or (format == "auto" and not read)
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=BoundLogger,
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(stream)
    handler.set_name(_HANDLER)
    handler.setFormatter(_formatter(shared, as_json, stream.isatty()))
    root = logging.getLogger()
    for old in [h for h in root.handlers if h.get_name() == _HANDLER]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    for name in _NOISY:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))


@dataclass(frozen=True, slots=True)
class Settings:
    """What another process is told, which Ray begins: until it has called `setup`, it prints what
    is logged there as it comes, secrets and all."""

    level: Level = "info"
    format: Format = "auto"

    def setup(self) -> None:
        setup(self.level, self.format)


def get(name: str, **bound: object) -> BoundLogger:
    return structlog.stdlib.get_logger(name, **bound)


def _formatter(shared: list[Processor], as_json: bool, colours: bool) -> ProcessorFormatter:
    renderer: Processor = (
        structlog.processors.JSONRenderer(default=str)
        if as_json
        # The default would print the local variables of every frame, keys among them.
        else structlog.dev.ConsoleRenderer(
            colors=colours, exception_formatter=structlog.dev.plain_traceback
        )
    )
    # Tracebacks become text before the redaction sees them; the event itself stays one line.
    processors: list[Processor] = [
        ProcessorFormatter.remove_processors_meta,
        structlog.processors.format_exc_info,
        redact,
        renderer,
    ]
    return ProcessorFormatter(foreign_pre_chain=shared, processors=processors)
