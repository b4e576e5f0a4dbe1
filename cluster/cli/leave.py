"""`crynux-cluster leave`: what a machine runs before it goes away."""

from __future__ import annotations

import time
from collections.abc import Callable

import click

from cluster.core.errors import ClusterError

LOOK_SECONDS = 1.0
EMPTY_LOOKS = 3
"""So many looks at nothing: the coordinator itself looks at the cards once a second."""
SILENT_SECONDS = 60.0
"""How long a coordinator that can't be asked is waited for."""


@click.command(short_help="Empty this machine before it goes away.")
@click.option("--namespace", default="crynux", show_default=True, help="As in ray.namespace.")
@click.option(
    "--address",
    default="auto",
    show_default=True,
    envvar="RAY_ADDRESS",
    help="Where Ray's head is.  [env: RAY_ADDRESS]",
)
@click.option(
    "--timeout", type=click.FloatRange(min=0), default=540.0, show_default=True, help="In seconds."
)
def leave(namespace: str, address: str, timeout: float) -> int:
    """Have this machine's cards finish what they compute, and give them nothing new.

    For a preStop hook: it reads no configuration, and leaves nothing to be undone. On the head,
    with which all goes, it waits for every card. Exit code 1 when the timeout came first.
    """
    from actors import client

    with client.asking_at(address, namespace) as call:
        machine = client.this_machine()
        return _wait_empty(lambda: int(call("leave", machine)), timeout)


def _wait_empty(
    look: Callable[[], int],
    timeout: float,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    began = heard = clock()
    shown, empty = -1, 0
    while empty < EMPTY_LOOKS:
        try:
            busy = look()
        except ClusterError:
            if clock() - heard > SILENT_SECONDS:
                raise
            empty = 0
        else:
            heard = clock()
            empty = 0 if busy else empty + 1
            if busy != shown:
                click.echo(f"cards that still compute: {busy}")
                shown = busy
        if clock() - began >= timeout:
            click.echo("it still computes, and the time is over", err=True)
            return 1
        sleep(LOOK_SECONDS)
    click.echo("empty")
    return 0
