"""A language task's parameters (protocol.md section 5); the head of `parameters` has the verdicts.

The network's schema bounds no number here and leaves most keys out of its checks. What newer
versions of it have besides, or read differently (content in blocks, template arguments, a null
among the generation settings), is `TaskUnsupported`: some nodes heed it and some don't.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.core.errors import TaskUnsupported
from cluster.inference.reading import verdict

MAX_MESSAGES: Final = 1_000
MAX_CONTENT: Final = 1_000_000
"""Characters of all messages and tools."""
MAX_NEW_TOKENS: Final = 16_384
MAX_SEQUENCES: Final = 16
MAX_BEAMS: Final = 16
MAX_SEED: Final = 2**32 - 1
"""The largest that numpy's generator takes."""
SMALLEST: Final = 1e-9
LARGEST: Final = 1e9
"""Scores are multiplied and divided by the fractional settings: within these they stay finite, and
beyond them a card would be blamed for what the task asks."""
_NEWER_KEYS: Final = frozenset({"template_args"})
_NEWER_SETTINGS: Final = frozenset({"stop_strings", "min_p"})


class _Schema(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Message(_Schema):
    role: Literal["system", "user", "assistant", "tool"] | None = None
    content: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[dict[str, Any]] | None = None

    def as_given(self) -> dict[str, Any]:
        """For the chat template: only the keys that the task has."""
        return self.model_dump(exclude_unset=True)


class GenerationConfig(_Schema):
    """Only what the task sets is passed on; the model's own settings stand for the rest."""

    max_new_tokens: int = 256
    do_sample: bool | None = None
    num_beams: int | None = None
    temperature: float | None = None
    typical_p: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    num_return_sequences: int = 1

    def settings(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True)


class LLMParameters(_Schema):
    model: Annotated[str, Field(min_length=1)]
    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    generation_config: GenerationConfig = GenerationConfig()
    seed: int = 0
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    quantize_bits: Literal[4, 8] | None = None

    @property
    def characters(self) -> int:
        return sum(len(str(message.as_given())) for message in self.messages) + len(
            str(self.tools or "")
        )

    @property
    def tokens(self) -> float:
        """To be generated at most, and to be read, at four characters each and a fiftieth of the
        effort."""
        config = self.generation_config
        rows = max(config.num_return_sequences, config.num_beams or 1)
        return config.max_new_tokens * rows + self.characters / 200


def parse(data: dict[str, Any]) -> LLMParameters:
    """Raises `TaskInvalid` or `TaskUnsupported`."""
    _refuse_what_readers_differ_on(data)
    given = {key: value for key, value in data.items() if value is not None or key == "model"}
    try:
        params = LLMParameters.model_validate(given)
    except ValidationError as error:
        raise verdict(error) from None
    _check_bounds(params)
    return params


def _refuse_what_readers_differ_on(data: dict[str, Any]) -> None:
    for key in _NEWER_KEYS & data.keys():
        if data[key] is not None:
            raise TaskUnsupported(f"{key}: not heeded by all versions")
    for key in ("messages", "seed", "dtype"):
        if key in data and data[key] is None:
            raise TaskUnsupported(f"{key}: null, which nodes differ on")
    if isinstance(data.get("quantize_bits"), float):
        raise TaskUnsupported("quantize_bits: a fraction, which only some versions take")
    settings = data.get("generation_config")
    for key, value in settings.items() if isinstance(settings, dict) else ():
        if value is None or key in _NEWER_SETTINGS:
            raise TaskUnsupported(f"generation_config.{key}: nodes differ on what it means")
    messages = data.get("messages")
    for message in messages if isinstance(messages, list) else ():
        if isinstance(message, dict):
            _refuse_newer_message(message)


def _refuse_newer_message(message: dict[str, Any]) -> None:
    if isinstance(message.get("content"), list):
        raise TaskUnsupported("messages: content in blocks, which not all versions read")
    if "role" in message and message["role"] is None:
        raise TaskUnsupported("messages: a role of null, which nodes differ on")


def _check_bounds(params: LLMParameters) -> None:
    """Our own: the schema has none here, so crossing them is never the task's fault."""
    config = params.generation_config
    bounds: dict[str, tuple[int, int, int]] = {
        "messages": (len(params.messages), 1, MAX_MESSAGES),
        "characters": (params.characters, 0, MAX_CONTENT),
        "seed": (params.seed, 0, MAX_SEED),
        "max_new_tokens": (config.max_new_tokens, 1, MAX_NEW_TOKENS),
        "num_return_sequences": (config.num_return_sequences, 1, MAX_SEQUENCES),
        "num_beams": (config.num_beams or 1, 1, MAX_BEAMS),
    }
    for name, (value, least, most) in bounds.items():
        if not least <= value <= most:
            raise TaskUnsupported(f"{name}: {value} is not within {least} to {most}")
    for name in ("temperature", "typical_p", "top_p", "repetition_penalty"):
        fraction: float | None = getattr(config, name)
        # Zero is left to the library, which knows where it may stand.
        if fraction and not SMALLEST <= abs(fraction) <= LARGEST:
            raise TaskUnsupported(f"{name}: {fraction:g} is not within {SMALLEST:g} to {LARGEST:g}")
