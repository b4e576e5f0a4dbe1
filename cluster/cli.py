"""The command line. Thin: it reads what was typed, calls, and shows.

Exit codes: 0 well; 1 it did not work, and the line on stderr says why; 2 what was typed or
configured is wrong, and the line says how to mend it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import httpx
from pydantic import ValidationError
from rich.console import Console

import cluster
from cluster.core.errors import ClusterError, ConfigError
from cluster.status import Status
from cluster.status_view import render

DEFAULT_URL = "http://127.0.0.1:8000"
DEVNET_DIR = Path(".devnet/run")
_WRONG_INPUT, _FAILED = 2, 1

devnet_dir = click.option(
    "--dir",
    "directory",
    type=click.Path(file_okay=False, path_type=Path),
    default=DEVNET_DIR,
    show_default=True,
    help="Where the devnet keeps its state.",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script: no traceback for what this software raises on purpose."""
    try:
        # Not click's standalone mode: it would turn a return value into success.
        code = cli.main(args=arguments, prog_name="crynux-cluster", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except click.Abort:
        code = 130
    except ConfigError as error:
        code = _complain(error, _WRONG_INPUT)
    except ClusterError as error:
        code = _complain(error, _FAILED)
    sys.exit(code if isinstance(code, int) else 0)


def _complain(error: Exception, code: int) -> int:
    line = " ".join(str(error).split())
    click.echo(f"crynux-cluster: {line}", err=True)
    return code


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
@click.option(
    "--config",
    "-c",
    "config_file",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="The configuration; configs/ has examples.",
)
def up(config_file: Path) -> int:
    """Start the operator and keep it up, on this machine or in a Ray cluster.

    It makes sure that the coordinator and the HTTP API run with this version and configuration,
    watches them and repairs. Stopping it (Ctrl-C) never pauses, quits or unstakes an account.
    """
    import serve_app
    from cluster import config, runtime

    return runtime.up(config.load(config_file), config_file, serve_app.build)


@cli.command()
@click.option("--url", default=DEFAULT_URL, show_default=True, help="Where the API answers.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def status(url: str, as_json: bool) -> None:
    """Show accounts, GPUs and tasks as they are now."""
    now = fetch_status(url)
    if as_json:
        click.echo(now.model_dump_json(indent=2))
    else:
        Console().print(render(now))


def fetch_status(url: str, transport: httpx.BaseTransport | None = None) -> Status:
    """`Status` from the API at `url`; raises `ClusterError` with one clear line."""
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--url {url}: expected a URL such as {DEFAULT_URL}")
    try:
        with httpx.Client(transport=transport, timeout=10.0) as client:
            answer = client.get(f"{url.rstrip('/')}/v1/status")
        body = answer.json()
    except httpx.InvalidURL as error:
        raise ConfigError(f"--url {url}: {error}") from None
    except httpx.ConnectError:
        raise ClusterError(
            f"nothing answers at {url}; is the operator up (crynux-cluster up), "
            "and is this its address (--url)?"
        ) from None
    except httpx.HTTPError as error:
        raise ClusterError(f"{url}: {error or type(error).__name__}") from None
    except ValueError:
        raise ClusterError(
            f"{url}: this is not the operator's API (its answer isn't JSON)"
        ) from None
    if answer.status_code == 503 and isinstance(body, dict) and "detail" in body:
        raise ClusterError(f"{url}: {body['detail']}")
    try:
        return Status.model_validate(body)
    except ValidationError:
        raise ClusterError(
            f"{url}: HTTP {answer.status_code}, and no status of version {cluster.__version__}; "
            "is this the operator's API, and of the same version?"
        ) from None


@cli.group(
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
@click.option(
    "--config",
    "-c",
    "config_file",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="The configuration of the running operator.",
)
def gpus_clear(gpu_id: str, config_file: Path) -> None:
    """Let a card out of quarantine, by its id or UUID as `crynux-cluster status` shows them.

    Run this on a machine of the operator's Ray cluster. The card computes the canary again before
    it gets a task, and is quarantined again if its answer is still another one.
    """
    from actors import client
    from cluster import config

    click.echo(client.clear_quarantine(config.load(config_file), gpu_id))


config_option = click.option(
    "--config",
    "-c",
    "config_file",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="The configuration; its section models says where from and where to.",
)
model_names = click.argument("models", nargs=-1, required=True, metavar="MODEL...")


@cli.group(short_help="Fetch, mirror, list and drop models.")
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


@cli.group(short_help="Run a whole network on this machine.")
def devnet() -> None:
    """Run a whole network on this machine: chain, contracts, relay and an application.

    Nothing here touches a real network or real money.
    """


@devnet.command("up", short_help="Start a devnet.")
@devnet_dir
@click.option(
    "--block-time",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="How often a block is made.",
)
@click.option(
    "--timeout",
    "task_timeout",
    type=click.IntRange(min=1),
    default=180,
    show_default=True,
    metavar="SECONDS",
    help="When an unanswered task may be aborted.",
)
@click.option("--rpc", metavar="URL", help="Use the EVM node at URL instead of starting anvil.")
@click.option(
    "--models",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where the tiny models are made; .devnet/models if not given.",
)
def devnet_up(
    directory: Path, block_time: float, task_timeout: int, rpc: str | None, models: Path | None
) -> int | None:
    """Start a devnet with fresh contracts and tiny models, and write a configuration for it."""
    from devnet import network

    return network.up(
        directory, block_time=block_time, task_timeout=task_timeout, rpc=rpc, models=models
    )


@devnet.command("down")
@devnet_dir
def devnet_down(directory: Path) -> int | None:
    """Stop the devnet that was started in --dir."""
    from devnet import network

    return network.down(directory)


@devnet.command("send", short_help="Create tasks and wait for their results.")
@devnet_dir
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def devnet_send(directory: Path, file: Path) -> int | None:
    """Create the tasks that FILE describes, as an application, and wait for their results."""
    from devnet import network

    return network.send(file, directory)


@devnet.command("demo", short_help="Watch tasks from chain to paid.")
@click.option(
    "--output",
    "output_dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("demo-output"),
    show_default=True,
    help="Where the images and summary.json go.",
)
@click.option(
    "--svg",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also save what is shown at the end as an SVG picture.",
)
def devnet_demo(output_dir: Path, svg: Path | None) -> int:
    """Start a devnet and an operator with simulated GPUs, send tasks, and watch them get paid."""
    from devnet import demo

    return demo.main(output_dir, svg)


if __name__ == "__main__":
    main()
