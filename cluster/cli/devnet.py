"""`crynux-cluster devnet`."""

from __future__ import annotations

from pathlib import Path

import click

DEVNET_DIR = Path(".devnet/run")

devnet_dir = click.option(
    "--dir",
    "directory",
    type=click.Path(file_okay=False, path_type=Path),
    default=DEVNET_DIR,
    show_default=True,
    help="Where the devnet keeps its state.",
)


@click.group(short_help="Run a whole network on this machine.")
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
