"""Tasks to send: the file format of `devnet send FILE`, and a task as the chain tells it.

A file holds a list of tasks, or `tasks:` with one, in YAML or JSON; unknown keys are refused.

    - name: cats
      type: SD
      model_ids: [base:crynux-ai/sd-tiny]
      parameters: {base_model: {name: crynux-ai/sd-tiny}, prompt: two cats}
      expected_end: [EndSuccess]
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from cluster.core.errors import ConfigError
from cluster.core.types import ENDED, TaskError, TaskStatus, TaskType

END_LABELS = frozenset(status.label for status in ENDED)


class TaskSpec(BaseModel):
    """One task, or one group of three, to create. Amounts in wei, VRAM in whole GB.

    `parameters` given as text go as they are, valid or not. A `group` spec makes a group whenever
    its first task is sampled; `Application` with an `owner` sees to it that it is.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    type: TaskType
    parameters: dict[str, Any] | str
    model_ids: tuple[str, ...]
    min_vram: int = Field(default=0, ge=0)
    required_gpu: str = ""
    required_gpu_vram: int = Field(default=0, ge=0)
    version: tuple[int, int, int] = (2, 5, 0)
    size: int = Field(default=1, ge=1)
    fee: int = Field(default=10**16, gt=0)
    encrypted: bool = True
    upload: bool = True
    """False: the application never uploads the parameters."""
    group: bool = False
    timeout: int | None = Field(default=None, gt=0)
    """In seconds; None: the network's. An `Application` without an `owner` can't change it."""
    expected_end: frozenset[str] = frozenset({TaskStatus.END_SUCCESS.label})
    expected_report: bool = False
    """Whether the node should report an error on its way to that end."""

    @field_validator("type", mode="before")
    @classmethod
    def _type_by_name(cls, value: object) -> object:
        if isinstance(value, str) and value in TaskType.__members__:
            return TaskType[value]
        return value

    @field_validator("expected_end")
    @classmethod
    def _known_ends(cls, value: frozenset[str]) -> frozenset[str]:
        unknown = sorted(value - END_LABELS)
        if unknown or not value:
            raise ValueError(f"no such end: {unknown}; one or more of {sorted(END_LABELS)}")
        return value

    @model_validator(mode="after")
    def _groups_have_the_networks_timeout(self) -> Self:
        # Its other two tasks are created later, when the timeout is the network's again.
        if self.group and self.timeout is not None:
            raise ValueError("a group can't have a timeout of its own")
        return self

    @property
    def text(self) -> str:
        """The parameters as the node gets them."""
        return self.parameters if isinstance(self.parameters, str) else json.dumps(self.parameters)


_SPECS = TypeAdapter(tuple[TaskSpec, ...])


def parse_tasks(text: str, source: str) -> tuple[TaskSpec, ...]:
    """The tasks in YAML or JSON text; raises `ConfigError`, which names `source`."""
    try:
        content = yaml.safe_load(text)
        if isinstance(content, dict) and content.keys() == {"tasks"}:
            content = content["tasks"]
        specs = _SPECS.validate_python(content, strict=False)
    except (yaml.YAMLError, ValidationError) as error:
        raise ConfigError(f"{source}: {error}") from error
    names = [spec.name for spec in specs]
    if len(set(names)) != len(names):
        raise ConfigError(f"{source}: two tasks of one name")
    return specs


def load_tasks(path: Path) -> tuple[TaskSpec, ...]:
    """The tasks in a file; raises `ConfigError`."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    return parse_tasks(text, str(path))


@dataclass(frozen=True, slots=True)
class ChainTask:
    """What the relay and the application read of `getTask`. Times are unix seconds, 0 if unset."""

    task_type: TaskType
    creator: str
    sampling_seed: bytes
    status: TaskStatus
    error: TaskError
    selected_node: str
    timeout: int
    score: bytes
    fee: int
    model_ids: tuple[str, ...]
    min_vram: int
    required_gpu: str
    required_gpu_vram: int
    created_at: int
    started_at: int
    score_ready_at: int


def from_chain(info: Sequence[Any]) -> ChainTask | None:
    """A task from the struct that `getTask` returns; None for one that the chain doesn't know."""
    if not any(info[2]):
        return None
    return ChainTask(
        task_type=TaskType(info[0]),
        creator=info[1],
        sampling_seed=bytes(info[3]),
        status=TaskStatus(info[6]),
        error=TaskError(info[18]),
        selected_node=info[7],
        timeout=info[8],
        score=bytes(info[9]),
        fee=info[10],
        model_ids=tuple(info[12]),
        min_vram=info[13],
        required_gpu=info[14],
        required_gpu_vram=info[15],
        created_at=info[21],
        started_at=info[22],
        score_ready_at=info[23],
    )


TIP = 10**9


def fees(latest: Mapping[str, Any]) -> dict[str, int]:
    """What a transaction after the block `latest` offers, in wei.

    Not from `eth_gasPrice`: that one follows the tips that were paid, so offering a multiple of it
    makes it grow with every transaction.
    """
    return {"maxPriorityFeePerGas": TIP, "maxFeePerGas": 2 * int(latest["baseFeePerGas"]) + TIP}
