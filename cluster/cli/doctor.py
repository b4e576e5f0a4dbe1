"""`crynux-cluster doctor`."""

from __future__ import annotations

import getpass
import json
import os
import sys
import time
from pathlib import Path

import click

from cluster.cli.options import config_option

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@click.command(short_help="Find what the operator's surroundings lack.")
@config_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(config_file: Path, as_json: bool) -> int:
    """Find what the operator's surroundings lack: key, journal, disks, models, cards, Ray, chain,
    contracts, relay, clock and money. Each line says ok, warn or fail, and how to mend it.

    The exit code is 1 when a line says fail. Nothing is sent or changed; it may run beside the
    operator.
    """
    from cluster import checks, config, doctor

    settings = config.load(config_file)
    key_file = settings.identity.key_file
    prompt = None
    if sys.stdin.isatty():
        prompt = lambda: getpass.getpass(f"Password of {key_file}: ")  # noqa: E731
    found = doctor.examine(settings, os.environ, time.time, prompt)
    if as_json:
        click.echo(json.dumps([check.plain() for check in found], indent=2))
    else:
        for check in found:
            level = click.style(f"{check.level.value:<4}", fg=_COLOURS[check.level.value])
            click.echo(f"{level}  {check.name}: {check.found}")
            if check.mend:
                click.echo(f"      {check.mend}")
    return 1 if checks.worst(found) is checks.Level.FAIL else 0
