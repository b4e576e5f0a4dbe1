"""`crynux-cluster models`."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console

from cluster.cli.options import config_option, typed

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
def models_preload(config_file: Path, models: tuple[str, ...]) -> None:
    """Have the running operator's machines fetch models, behind what tasks need.

    MODEL is a model id as the network writes it: base:, lora: or controlnet:, and a name.
    """
    from actors import client
    from cluster import config, steering

    settings = config.load(config_file)
    for model in models:
        click.echo(client.perform(settings, typed(steering.PreloadModel, model=model)))


@models.command("drop-everywhere", short_help="Remove models from every machine.")
@config_option
@model_names
def models_drop_everywhere(config_file: Path, models: tuple[str, ...]) -> None:
    """Remove models from the disks of the running operator's machines; where a task uses one, it
    stays, and what is configured to stay does."""
    from actors import client
    from cluster import config, steering

    settings = config.load(config_file)
    for model in models:
        click.echo(client.perform(settings, typed(steering.DropModel, model=model)))
