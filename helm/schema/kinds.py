"""Kinds of values, as JSON Schema: each with its meaning and its bounds, each object closed."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

NAME = r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$"
"""Of a Kubernetes object."""
KEY = r"^[A-Za-z0-9._-]{1,253}$"
"""Within a Secret."""
LABEL = r"^([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?$"
LABEL_KEY = r"^([a-z0-9.-]{1,253}/)?[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?$"
MEMORY = r"^[1-9][0-9]*(Mi|Gi|Ti)$"
CPU = r"^([1-9][0-9]*m|[1-9][0-9]*(\.[0-9]+)?|0\.[0-9]*[1-9][0-9]*)$"
URL = r"^https?://[^@\s/]+(/\S*)?$"
"""Without a user and password in it: values are no place for secrets."""
ADDRESS = r"^0x[0-9a-fA-F]{40}$"


def text(about: str, pattern: str | None = None, most: int = 253, least: int = 0) -> Schema:
    found: Schema = {"description": about, "type": "string", "minLength": least, "maxLength": most}
    return found if pattern is None else found | {"pattern": pattern}


def maybe(about: str, pattern: str) -> Schema:
    """Text that may be empty, for none."""
    return text(about, f"^$|{pattern}")


def secret(about: str) -> Schema:
    return maybe(f"The Secret that holds {about}.", NAME)


def key_in(about: str) -> Schema:
    return text(f"Its key for {about}.", KEY)


def whole(about: str, least: int, most: int) -> Schema:
    return {"description": about, "type": "integer", "minimum": least, "maximum": most}


def flag(about: str) -> Schema:
    return {"description": about, "type": "boolean"}


def choice(about: str, *values: str) -> Schema:
    return {"description": about, "type": "string", "enum": list(values)}


def every(about: str, items: Schema, most: int = 64) -> Schema:
    return {"description": about, "type": "array", "items": items, "maxItems": most}


def obj(about: str, need: tuple[str, ...] = (), /, **keys: Schema) -> Schema:
    found: Schema = {
        "description": about,
        "type": "object",
        "properties": keys,
        "additionalProperties": False,
    }
    return found | {"required": list(need)} if need else found


def labels(about: str, value: str = LABEL, most: int = 63) -> Schema:
    return {
        "description": about,
        "type": "object",
        "propertyNames": {"pattern": LABEL_KEY},
        "additionalProperties": text("Its value.", value, most),
        "maxProperties": 64,
    }


def notes(about: str) -> Schema:
    return labels(about, r"^[^\x00]*$", 65_536)


def ref(about: str, name: str) -> Schema:
    return {"description": about, "$ref": f"#/definitions/{name}"}
