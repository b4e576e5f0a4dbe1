"""`crynux-cluster gpus`."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console

from cluster import status_view
from cluster.api_client import ApiClient
from cluster.cli.look import api_options
from cluster.cli.options import config_option
from cluster.status import Status


@click.group(
    short_help="List this machine's cards, or the cluster's; undo what a canary did.",
    invoke_without_command=True,
)
@click.option("--cluster", "all_of_it", is_flag=True, help="The operator's, as its API tells.")
@api_options
@click.option("--cpu", "with_cpu", is_flag=True, help="List the CPU as a card too.")
@click.option(
    "--platform",
    default="docker",
    show_default=True,
    help="The suffix of GPU names on the network (ray.platform in the configuration).",
)
@click.pass_context
def gpus(
    context: click.Context,
    api: ApiClient,
    as_json: bool,
    all_of_it: bool,
    with_cpu: bool,
    platform: str,
) -> None:
    """List this machine's cards as the network will see them; with --cluster those of all machines
    of the operator that runs, with what each does and what is wrong with it.

    Name and whole GB are what a join declares and tasks may ask for. Needs no configuration and no
    running operator. Memory, temperature, ECC errors since the driver was loaded, and what slows a
    card down are those of this moment; "-" is what the driver doesn't say.
    """
    if context.invoked_subcommand is not None:
        return
    if all_of_it:
        click.echo(cluster_gpus(api, as_json), nl=False)
    else:
        click.echo(show_gpus(as_json, with_cpu, platform), nl=False)


def cluster_gpus(api: ApiClient, as_json: bool) -> str:
    """Raises `ClusterError` when the operator can't be asked."""
    found = api.get("/v1/status", Status).gpus
    if as_json:
        return json.dumps([gpu.model_dump(mode="json") for gpu in found], indent=2) + "\n"
    console = Console()
    with console.capture() as shown:
        console.print(status_view.cards_table(found))
    return shown.get()


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


@gpus.command("forget-canary", short_help="Have what a class answers to the canary recorded anew.")
@click.argument("gpu_class", metavar="[CLASS]", required=False)
@config_option
def gpus_forget_canary(gpu_class: str | None, config_file: Path) -> None:
    """Forget what the cards of CLASS, or of every class, are held to by their canary.

    For when the status says that cards agree against what is recorded, and it is the record that is
    wrong: most often two cards that read the same spoilt file were the first to agree. Take their
    machine out, or mend it, before. CLASS is the name on the network, as `crynux-cluster gpus
    --cluster` shows it. Every card of it computes the canary before it gets a task, and the first
    two that agree are the record. So does one that is in quarantine only because it differed from
    what is forgotten; others stay there until `gpus clear`.

    Run this on a machine of the operator's Ray cluster.
    """
    from actors import client
    from cluster import config, steering

    order = steering.ForgetCanary(gpu_class=gpu_class)
    click.echo(client.perform(config.load(config_file), order))
