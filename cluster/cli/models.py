"""`crynux-cluster models`."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console

from cluster.cli.options import config_option

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
