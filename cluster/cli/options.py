"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import click
from pydantic import BaseModel, ValidationError

from cluster.core.errors import ClusterError, ConfigError

Model = TypeVar("Model", bound=BaseModel)

config_option = click.option(
    "--config",
    "-c",
    "config_file",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="The configuration; configs/ has examples.",
)

_WRONG_INPUT, _FAILED = 2, 1


def complain(error: ClusterError) -> int:
    """Say it in a line; the exit code that goes with it."""
    line = " ".join(str(error).split())
    click.echo(f"crynux-cluster: {line}", err=True)
    return _WRONG_INPUT if isinstance(error, ConfigError) else _FAILED


def typed(model: type[Model], /, **values: Any) -> Model:  # noqa: ANN401 - as the model says
    """What was typed, checked by its model. Raises `ConfigError`."""
    try:
        return model(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{name}: {first['msg']}, got {str(first['input'])[:80]}") from None
