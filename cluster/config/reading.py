"""A file becomes a `Config`, or one line that says what is wrong with it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from cluster.config.schema import Config
from cluster.config.values import Section
from cluster.core.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """Refuses a key that is no word, and one that stands twice, where YAML would silently take
    the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                problem = "a key that is a list or a mapping"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            if key.value in seen:
                problem = f"the key {key.value} stands twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def load(path: str | Path) -> Config:
    """The configuration at `path`; raises `ConfigError`."""
    file = Path(path)
    raw = _read_mapping(file)
    try:
        return Config.model_validate(raw, context={"base": file.resolve().parent})
    except ValidationError as error:
        line = _explain(error)
    raise ConfigError(f"{file}: {line}")


def _read_mapping(file: Path) -> dict[str, Any]:
    try:
        # The base class is SafeLoader.
        raw = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506
    except FileNotFoundError:
        raise ConfigError(f"{file}: there is no such file; configs/ has examples") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"{file}: can't be read: {reason}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: {_explain_yaml(error)}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{file}: expected keys and values (YAML), such as 'network:'")
    return {str(key): value for key, value in raw.items()}


def _explain_yaml(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}: " if mark is not None else ""
    problem = getattr(error, "problem", None) or "check indentation, quotes and brackets"
    return f"{where}not valid YAML: {problem}"


def _explain(error: ValidationError) -> str:
    # A misspelt key also makes the right one missing: name the misspelt one.
    errors = sorted(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return _explain_one(errors[0]) + more


def _explain_one(error: ErrorDetails) -> str:
    location = error["loc"]
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    key = key.removeprefix(".")
    kind = error["type"]
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    if kind == "extra_forbidden":
        return f"{key}: unknown key{_suggest(location)}"
    if kind == "missing":
        return f"{key}: missing, and there is no default; add it"
    if kind in {"model_type", "model_attributes_type"}:
        return f"{key}: expected keys and values{_got(location, error['input'])}"
    if not key:
        return message
    return f"{key}: {message}{_got(location, error['input'])}"


def _got(location: tuple[int | str, ...], value: object) -> str:
    """The wrong value, unless it is long or may hold a secret."""
    secret = location[0] in {"identity", "journal"} or not {
        "rpc_url",
        "fallback_rpc_urls",
        "endpoints",
        "ws_url",
        "relay_url",
        "proxy",
    }.isdisjoint(location)
    if secret or isinstance(value, Mapping | list | tuple):
        return ""
    text = "null" if value is None else json.dumps(value, default=str)
    return f", got {text}" if len(text) <= 80 else ""


def _suggest(location: tuple[int | str, ...]) -> str:
    known = tuple(_keys_at(Config, location[:-1]))
    close = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known here: {', '.join(known)}"


def _keys_at(model: type[BaseModel], location: tuple[int | str, ...]) -> tuple[str, ...]:
    for part in location:
        if isinstance(part, int):
            continue
        model = _section(model.model_fields[part].annotation)
    return tuple(model.model_fields)


def _section(annotation: object) -> type[BaseModel]:
    """The section model that a field's type is, or is a tuple of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return _section(getattr(annotation, "__args__", (Section,))[0])
