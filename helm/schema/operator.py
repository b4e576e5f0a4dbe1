"""The operator's own configuration among the values: what of it, and within which bounds."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from cluster.config import Config
from helm.schema.kinds import ADDRESS, URL, Schema, obj

ROOT: Final = Path(__file__).parents[2]

OURS: Final = frozenset(
    {
        "identity.seed_file",
        "identity.keystore_file",
        "identity.password_file",
        "identity.accounts",
        "network.rpc_url",
        "network.rpc_url_file",
        "network.fallback_rpc_urls",
        "network.endpoints",
        "network.ws_url",
        "network.ws_url_file",
        "network.relay_url",
        "network.relay_url_file",
        "ray.address",
        "ray.simulated_gpus",
        "journal.url",
        "journal.url_file",
        "artifacts.path",
        "models.root",
        "models.proxy_file",
        "models.ca_file",
        "models.hub.token_file",
        "models.web.civitai_token_file",
        "serve.token_file",
        "serve.open_reads",
        "serve.host",
        "serve.port",
        "fleet.slots_by_gpu",
    }
)
"""Keys that the chart sets, from other values or by itself; and `network.endpoints`, whose URLs may
hold a credential, so that no ConfigMap may have them: all of them come from the Secret, alike."""

_URL: Schema = {"type": "string", "pattern": URL, "maxLength": 2048}
AMOUNT: Schema = {
    "type": ["number", "string"],
    "exclusiveMinimum": 0,
    "pattern": r"^[0-9]+(\.[0-9]{1,18})?$",
}
SLOTS: Schema = {
    "type": ["integer", "string"],
    "minimum": 1,
    "maximum": 16,
    "pattern": "^auto$",
}
_ADDRESS: Schema = {"type": "string", "pattern": ADDRESS}
_MODELS: Schema = {"type": "array", "maxItems": 256, "items": {"type": "string", "maxLength": 600}}
_HOSTS: Schema = {
    "type": "array",
    "maxItems": 256,
    "items": {"type": "string", "pattern": r"^[A-Za-z0-9.:-]{1,253}$"},
}
SHAPES: Final[Mapping[str, Schema]] = {
    "network.contracts.task": _ADDRESS,
    "network.contracts.node": _ADDRESS,
    "network.contracts.qos": _ADDRESS,
    "network.node_version": {"type": "string", "pattern": r"^[0-9]+\.[0-9]+\.[0-9]+$"},
    "network.explorer_url": {"type": "string", "pattern": r"^https?://[^@\s/]+/\S*\{hash\}\S*$"},
    "network.stake": AMOUNT,
    "models.preload": _MODELS,
    "models.pin": _MODELS,
    "models.mirror.url": {"type": "string", "pattern": r"^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]"},
    "models.mirror.endpoint": _URL,
    "models.hub.endpoint": _URL,
    "models.proxy": _URL,
    "models.web.ports": {
        "type": "array",
        "maxItems": 64,
        "items": {"type": "integer", "minimum": 1, "maximum": 65535},
    },
    "models.web.allow_hosts": _HOSTS,
    "models.web.deny_hosts": _HOSTS,
    "tracing.endpoint": _URL,
    "fleet.slots_per_gpu": SLOTS,
    "fleet.stake_budget": AMOUNT,
    "fleet.gas_reserve": AMOUNT,
    "fleet.gas_low": AMOUNT,
    "fleet.gas_target": AMOUNT,
    "fleet.sweep_above": AMOUNT,
    "fleet.beneficiary": _ADDRESS,
}
"""Where pydantic's schema doesn't know what a validator takes."""


def operator_keys() -> Iterator[tuple[str, Schema]]:
    """Every key of the operator's configuration, with what pydantic says of it."""
    found = Config.model_json_schema()

    def walk(node: Schema, prefix: str) -> Iterator[tuple[str, Schema]]:
        for name, field in node["properties"].items():
            link = field.get("$ref") or field.get("allOf", [{}])[0].get("$ref")
            if link:
                yield from walk(found["$defs"][link.rsplit("/", 1)[1]], f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", field

    return walk(found, "")


def operator_words() -> dict[str, tuple[str, str]]:
    """Default and meaning of each key, from the project's README."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Configuration")[1]
    rows = re.findall(r"^\| `([a-z_.]+)` \|([^|]*)\|([^|]*)\|", section, re.MULTILINE)
    return {key: (default.strip(), about.strip()) for key, default, about in rows}


def _shape(key: str, field: Schema) -> Schema:
    if key in SHAPES:
        return dict(SHAPES[key])
    choices = [each for each in field.get("anyOf", [field]) if each.get("type") != "null"]
    kept = {"type", "minimum", "maximum", "exclusiveMinimum", "minLength", "pattern", "enum"}
    (one,) = choices
    shape = {name: value for name, value in one.items() if name in {*kept, "items"}}
    if shape["type"] == "array":
        items = shape["items"]
        more = {"maxLength": 600} if items["type"] == "string" else {}
        return shape | {"maxItems": 256, "items": {**items, **more}}
    return shape | {"maxLength": 253} if shape["type"] == "string" else shape


def operator_config() -> Schema:
    words = operator_words()
    root = obj("The operator's own configuration, with its own names and defaults.")
    for key, field in operator_keys():
        if key in OURS:
            continue
        default, about = words[key]
        *sections, name = key.split(".")
        place, path = root, ""
        for section in sections:
            path = f"{path}.{section}".lstrip(".")
            new = obj(f"The section `{path}` of the operator's configuration.")
            place = place["properties"].setdefault(section, new)
        said = f"{about or name}. Default: {default}"
        place["properties"][name] = {"description": said, **_shape(key, field)}
    return root
