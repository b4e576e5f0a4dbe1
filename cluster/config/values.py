"""What sections are made of: their base, and the kinds of values that several have."""

from __future__ import annotations

import re
from decimal import Decimal
from pathlib import Path
from typing import Annotated, TypeVar
from urllib.parse import urlsplit

import httpx
from eth_utils.address import is_address, is_checksum_address, to_checksum_address
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo

from cluster.core.types import Wei

WEI_PER_CNX = 10**18
_ZERO_ADDRESS = "0x" + "00" * 20

Item = TypeVar("Item")


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True)


def base_of(info: ValidationInfo) -> Path:
    """What relative paths are relative to."""
    context = info.context
    return context["base"] if isinstance(context, dict) else Path.cwd()


def path_of(value: object, info: ValidationInfo) -> Path:
    if not isinstance(value, str | Path) or not str(value):
        raise ValueError("expected a path")
    return (base_of(info) / Path(value).expanduser()).resolve()


def _optional_path(value: object, info: ValidationInfo) -> Path | None:
    return None if value is None else path_of(value, info)


def _address(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        raise ValueError("YAML took the address for a number; put it in quotes")
    if not isinstance(value, str) or not is_address(value) or not value.startswith("0x"):
        raise ValueError("expected an address: 0x and 40 hex digits")
    checksummed = to_checksum_address(value)
    if value.lower() == _ZERO_ADDRESS:
        raise ValueError("the zero address is a placeholder; put the real one here")
    if value not in (value.lower(), checksummed) and not is_checksum_address(value):
        raise ValueError(
            "the address fails its checksum, so a digit is probably wrong; copy it again"
        )
    return checksummed


def _optional_address(value: object) -> str | None:
    return None if value is None else _address(value)


def http_url(value: object) -> str:
    problem = "expected a URL such as https://host:port/path"
    if not isinstance(value, str):
        raise ValueError(problem)
    try:
        parts = urlsplit(value)
        valid = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
        httpx.URL(value)  # which is what will read it later
    except (ValueError, httpx.InvalidURL):
        valid = False
    if not valid or re.search(r"\s", value):
        raise ValueError(problem)
    return value.rstrip("/")


def _amount(value: object) -> Wei:
    """Wei, from an amount in CNX: text, a whole number or a decimal one."""
    problem = "expected an amount in CNX such as 400 or '400.5'"
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(problem)
    try:
        wei = Decimal(str(value)) * WEI_PER_CNX
    except ArithmeticError:
        raise ValueError(problem) from None
    if not wei.is_finite() or not 0 < wei < 2**256 or wei != wei.to_integral_value():
        raise ValueError(problem)
    return Wei(int(wei))


def _optional_amount(value: object) -> Wei | None:
    return None if value is None else _amount(value)


def _listed(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


Listed = Annotated[tuple[Item, ...], BeforeValidator(_listed)]
ConfigPath = Annotated[Path, BeforeValidator(path_of)]
OptionalPath = Annotated[Path | None, BeforeValidator(_optional_path)]
ConfigAddress = Annotated[str, BeforeValidator(_address)]
OptionalAddress = Annotated[str | None, BeforeValidator(_optional_address)]
HttpUrl = Annotated[str, BeforeValidator(http_url)]
Amount = Annotated[Wei, BeforeValidator(_amount)]
OptionalAmount = Annotated[Wei | None, BeforeValidator(_optional_amount)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
