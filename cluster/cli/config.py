"""`crynux-cluster config`: what changes while the operator runs."""

from __future__ import annotations

from pathlib import Path

import click

from cluster.cli.options import config_option, typed


@click.group(short_help="Change what can change while the operator runs.")
def config() -> None:
    """Change what can change while the operator runs. These commands are run on a machine of the
    operator's Ray cluster."""


@config.command("reload", short_help="Take over what has changed in the file.")
@config_option
def config_reload(config_file: Path) -> None:
    """Have the coordinator read its configuration again and take over what can change while it
    runs: the sections policy, fleet, canary and verify, and logs.level. If anything else has
    changed, nothing is taken over."""
    from actors import client
    from cluster import config as configuration
    from cluster import steering

    settings = configuration.load(config_file)
    click.echo(client.perform(settings, steering.ReloadConfig()))


@config.command("log-level", short_help="Set what the coordinator logs.")
@click.argument("level", type=click.Choice(["debug", "info", "warning", "error"]))
@config_option
def config_log_level(level: str, config_file: Path) -> None:
    """Set what the coordinator logs, until it begins anew."""
    from actors import client
    from cluster import config as configuration
    from cluster import steering

    order = typed(steering.SetLogLevel, level=level)
    click.echo(client.perform(configuration.load(config_file), order))
