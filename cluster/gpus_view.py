"""A machine's cards as text for a terminal, and as plain values for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.core.wording import printable
from cluster.inference.devices import Card, Device
from cluster.status_view import row

_COLUMNS = ("#", "card", "VRAM GB", "free GB", "°C", "ECC errors", "throttling")


def render(cards: Sequence[Card], cpu: Device | None) -> RenderableType:
    table = Table(*_COLUMNS, box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("UUID", overflow="fold")
    for card in cards:
        row(table, *_row(card))
    if cpu is not None:
        name, vram = cpu.gpu_class.name, str(cpu.gpu_class.vram)
        row(table, "-", name, vram, "-", "-", "-", "-", cpu.uuid)
    problems = [
        Text(printable(f"card {card.index}: {card.problem}"), style="yellow")
        for card in cards
        if card.problem
    ]
    return Group(table, *problems)


def plain(cards: Sequence[Card], cpu: Device | None, none: str) -> dict[str, object]:
    """What `--json` prints; `why_none` is there only when there is no card."""
    found: list[dict[str, object]] = [
        {
            "index": card.index,
            **_identity(card.device),
            **asdict(card.vitals),
            "problem": card.problem or None,
        }
        for card in cards
    ]
    if cpu is not None:
        found.append({"index": None, **_identity(cpu), "problem": None})
    return {"gpus": found} if cards else {"gpus": found, "why_none": none}


def _identity(device: Device | None) -> dict[str, object]:
    if device is None:
        return {"name": None, "vram": None, "uuid": None}
    kind = device.gpu_class
    return {"name": kind.name, "vram": int(kind.vram), "uuid": device.uuid}


def _row(card: Card) -> tuple[str, ...]:
    device, vitals = card.device, card.vitals
    free = "-" if vitals.free_memory is None else f"{vitals.free_memory / 2**30:.1f}"
    return (
        str(card.index),
        "can't be used" if device is None else device.gpu_class.name,
        "-" if device is None else str(device.gpu_class.vram),
        free,
        _shown(vitals.temperature),
        _ecc(vitals.ecc_corrected, vitals.ecc_uncorrected),
        "-" if vitals.throttling is None else ", ".join(vitals.throttling) or "none",
        "-" if device is None else device.uuid,
    )


def _ecc(corrected: int | None, uncorrected: int | None) -> str:
    if corrected is None and uncorrected is None:
        return "-"
    return f"{_shown(uncorrected)} + {_shown(corrected)} corrected"


def _shown(value: int | None) -> str:
    return "-" if value is None else str(value)
