"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import click
from pydantic import BaseModel, ValidationError

from cluster.core.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)

config_option = click.option(
    "--config",
    "-c",
    "config_file",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="The configuration; configs/ has examples.",
)


def typed(model: type[Model], /, **values: Any) -> Model:  # noqa: ANN401 - as the model says
    """What was typed, checked by its model. Raises `ConfigError`."""
    try:
        return model(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{name}: {first['msg']}, got {str(first['input'])[:80]}") from None
