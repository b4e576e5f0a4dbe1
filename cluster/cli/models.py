"""`crynux-cluster models`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from cluster.cli.options import complain, config_option, typed
from cluster.core.errors import ClusterError

if TYPE_CHECKING:
    from cluster.steering import Order

model_names = click.argument("models", nargs=-1, required=True, metavar="MODEL...")


@click.group(short_help="Fetch, mirror, list and drop models.")
def models() -> None:
    """Fetch models to this machine's store, fill the mirror, look at what is there.

    MODEL is kind:name[+variant] as the network writes it, such as base:org/name+fp16; without a
    kind it is a base model. Kinds: base (a language model too), lora, controlnet, unet, vae,
    textual_inversion. A name is a hub's id or a URL; lora:org/name+file.safetensors names a file.
    """


@models.command("list", short_help="Show what is on this machine's disk.")
@config_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def models_list(config_file: Path, as_json: bool) -> None:
    """Show the models on this machine's disk: where from, how large, when they were used."""
    from cluster import config, models_cli

    settings = config.load(config_file).models.store()
    if as_json:
        click.echo(json.dumps(models_cli.plain(settings), indent=2))
    else:
        Console().print(models_cli.render(settings))


@models.command("fetch", short_help="Bring models to this machine's disk.")
@config_option
@model_names
def models_fetch(config_file: Path, models: tuple[str, ...]) -> None:
    """Bring models to this machine's disk, from the sources in their order."""
    from cluster import config, models_cli

    models_cli.fetch(config.load(config_file).models.store(), models, Console())


@models.command("mirror", short_help="Put models into the S3 mirror.")
@config_option
@model_names
def models_mirror(config_file: Path, models: tuple[str, ...]) -> None:
    """Put models into the S3 mirror (models.mirror), fetching here first what isn't."""
    from cluster import config, models_cli

    models_cli.mirror(config.load(config_file).models.store(), models, Console())


@models.command("drop", short_help="Remove fetched models from this machine's disk.")
@config_option
@model_names
def models_drop(config_file: Path, models: tuple[str, ...]) -> None:
    """Remove fetched models from this machine's disk; one in use stays."""
    from cluster import config, models_cli

    models_cli.drop(config.load(config_file).models.store(), models, Console())


@models.command("preload", short_help="Have every machine with cards fetch models.")
@config_option
@model_names
def models_preload(config_file: Path, models: tuple[str, ...]) -> int:
    """Have the running operator's machines fetch models, behind what tasks need.

    MODEL is a model id as the network writes it: base:, lora: or controlnet:, and a name. One that
    is refused keeps no other back; the exit code is not 0 then.
    """
    from cluster import steering

    return _each(config_file, [typed(steering.PreloadModel, model=model) for model in models])


@models.command("drop-everywhere", short_help="Remove models from every machine.")
@config_option
@model_names
def models_drop_everywhere(config_file: Path, models: tuple[str, ...]) -> int:
    """Remove models from the disks of the running operator's machines; where a task uses one, it
    stays, and what is configured to stay does. One that is refused keeps no other back; the exit
    code is not 0 then."""
    from cluster import steering

    return _each(config_file, [typed(steering.DropModel, model=model) for model in models])


def _each(config_file: Path, orders: Sequence[Order]) -> int:
    """Have all of them carried out, and say what came of each; the exit code."""
    from actors import client
    from cluster import config

    codes = {0}
    with client.asking(config.load(config_file)) as call:
        for order in orders:
            try:
                click.echo(client.order_done(call, order))
            except ClusterError as error:
                codes.add(complain(error))
    return min(codes - {0}, default=0)
