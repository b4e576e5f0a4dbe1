"""The command line. Thin: it reads what was typed, calls, and shows.

Exit codes: 0 well; 1 it did not work, and the line on stderr says why; 2 what was typed or
configured is wrong, and the line says how to mend it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click

import cluster
from cluster import ray_token
from cluster.cli.config import config
from cluster.cli.devnet import devnet
from cluster.cli.doctor import doctor
from cluster.cli.fleet import drain, fleet, resume
from cluster.cli.gpus import gpus
from cluster.cli.keys import keys
from cluster.cli.leave import leave
from cluster.cli.look import accounts, audit, earnings, logs, status, tasks, top
from cluster.cli.models import models
from cluster.cli.options import complain, config_option
from cluster.core.errors import ClusterError


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script: no traceback for what this software raises on purpose."""
    ray_token.show()
    try:
        # Not click's standalone mode: it would turn a return value into success.
        code = cli.main(args=arguments, prog_name="crynux-cluster", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except click.Abort:
        code = 130
    except ClusterError as error:
        code = complain(error)
    sys.exit(code if isinstance(code, int) else 0)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(cluster.__version__, "--version", message="%(prog)s %(version)s")
def cli() -> None:
    """Serve the Crynux network with a cluster of GPUs.

    One operator, one key, many cards: this takes the tasks that the network assigns, runs each on
    the card that serves it best, and never puts the stake at risk.

    \b
    See it work on this machine:   crynux-cluster devnet demo
    Run it for real:               crynux-cluster up --config configs/single-machine.yaml
    """


@cli.command(short_help="Start the operator and keep it up.")
@config_option
def up(config_file: Path) -> int:
    """Start the operator and keep it up, on this machine or in a Ray cluster.

    It makes sure that the coordinator and the HTTP API run with this version and configuration,
    watches them and repairs. Stopping it (Ctrl-C) never pauses, quits or unstakes an account.
    """
    from cluster import config as configuration
    from cluster import ray_logs

    found = configuration.load(config_file)
    ray_logs.settle(found.logs.format, sys.stderr.isatty(), os.environ)

    import serve_app
    from cluster import runtime

    return runtime.up(found, config_file, serve_app.build)


for _group in (
    keys,
    doctor,
    status,
    top,
    tasks,
    accounts,
    earnings,
    logs,
    audit,
    fleet,
    drain,
    resume,
    leave,
    gpus,
    models,
    config,
    devnet,
):
    cli.add_command(_group)
