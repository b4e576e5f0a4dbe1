"""`crynux-cluster gpus`."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console

from cluster.cli.options import config_option


@click.group(
    short_help="List this machine's cards; let one out of quarantine.",
    invoke_without_command=True,
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--cpu", "with_cpu", is_flag=True, help="List the CPU as a card too.")
@click.option(
    "--platform",
    default="docker",
    show_default=True,
    help="The suffix of GPU names on the network (ray.platform in the configuration).",
)
@click.pass_context
def gpus(context: click.Context, as_json: bool, with_cpu: bool, platform: str) -> None:
    """List this machine's cards as the network will see them.

    Name and whole GB are what a join declares and tasks may ask for. Needs no configuration and no
    running operator. Memory, temperature, ECC errors since the driver was loaded, and what slows a
    card down are those of this moment; "-" is what the driver doesn't say.
    """
    if context.invoked_subcommand is None:
        click.echo(show_gpus(as_json, with_cpu, platform), nl=False)


def show_gpus(as_json: bool, with_cpu: bool, platform: str) -> str:
    """Raises `ClusterError` when there is a driver that fails."""
    from cluster import gpus_view
    from cluster.inference import devices, nvml

    cards: tuple[devices.Card, ...] = ()
    why = "the driver has no card"
    try:
        cards = devices.survey(platform)
    except nvml.NoDriver as error:
        why = str(error)
    none = f"no NVIDIA GPU on this machine: {why}"
    cpu = devices.cpu(platform) if with_cpu else None
    if as_json:
        return json.dumps(gpus_view.plain(cards, cpu, none), indent=2) + "\n"
    console = Console()
    with console.capture() as shown:
        if cards or cpu is not None:
            console.print(gpus_view.render(cards, cpu))
        if not cards:
            console.print(none, soft_wrap=True, markup=False)
    return shown.get()


@gpus.command("clear", short_help="Let a card out of quarantine.")
@click.argument("gpu_id")
@config_option
def gpus_clear(gpu_id: str, config_file: Path) -> None:
    """Let a card out of quarantine, by its id or UUID as `crynux-cluster status` shows them.

    Run this on a machine of the operator's Ray cluster. The card computes the canary again before
    it gets a task, and is quarantined again if its answer is still another one.
    """
    from actors import client
    from cluster import config, steering

    order = steering.ClearQuarantine(card=gpu_id)
    click.echo(client.perform(config.load(config_file), order))
