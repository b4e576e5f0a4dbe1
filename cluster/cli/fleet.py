"""`crynux-cluster fleet`, `drain` and `resume`: what an operator tells the running coordinator."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from cluster.cli.options import config_option, typed
from cluster.core.errors import ClusterError, ConfigError
from cluster.core.wording import counted
from cluster.status import ClassStatus, DrainStatus, FleetStatus, Status

POLL_SECONDS = 1.0
_NOTHING = "nothing to do: the accounts are as they should be"
_NOTHING_MORE = "nothing more can be done as it is: crynux-cluster status says why"


@click.group(short_help="See and steer the node accounts.")
def fleet() -> None:
    """See and steer the node accounts.

    The coordinator keeps as many joined as the cards need, within the stake budget. These commands
    are run on a machine of the operator's Ray cluster.
    """


@fleet.command("plan", short_help="Print what would be done; do nothing.")
@config_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def fleet_plan(config_file: Path, as_json: bool) -> None:
    """Print what would be done for the accounts next, and what stands in the way; do nothing."""
    from actors import client
    from cluster import config

    found = _status(client.ask(config.load(config_file), "status")).fleet
    if as_json:
        click.echo(found.model_dump_json(indent=2))
        return
    for line in _lines(found):
        click.echo(line)


@fleet.command("apply", short_help="Act on the plan until nothing is left of it.")
@config_option
def fleet_apply(config_file: Path) -> None:
    """Act on the plan until nothing is left of it, and say what is done.

    Needed where `fleet.auto` is false; else it only shows what is done anyway. Ctrl-C stops the
    showing, not the doing.
    """
    from actors import client
    from cluster import config, steering

    with client.asking(config.load(config_file)) as call:
        client.order_done(call, steering.ApplyFleet())
        _follow(lambda: _status(call("status")).fleet)


@fleet.command("quit", short_help="Have an account leave, and its money come back.")
@click.argument("account", metavar="ADDRESS")
@config_option
def fleet_quit(account: str, config_file: Path) -> None:
    """Have an account finish what it has and quit; what it owns above `fleet.gas_reserve` goes back
    to the treasury. It lasts over restarts: the account isn't joined again until `crynux-cluster
    fleet clear`. Another takes its place where there is one."""
    from actors import client
    from cluster import config, steering

    order = typed(steering.RetireAccount, account=account)
    click.echo(client.perform(config.load(config_file), order))


@fleet.command("clear", short_help="Let a stopped account be used again.")
@click.argument("account", metavar="ADDRESS")
@config_option
def fleet_clear(account: str, config_file: Path) -> None:
    """Let an account be used again that was slashed, kicked out, told to quit, or held because
    somebody else seemed to use its key. Find out why first: `crynux-cluster status` has its
    tasks."""
    from actors import client
    from cluster import config, steering

    order = typed(steering.ClearAccount, account=account)
    click.echo(client.perform(config.load(config_file), order))


@click.command(short_help="Finish what runs and take nothing new.")
@config_option
@click.option("--gpu", help="Only this card, by id or UUID: its work goes to others.")
@click.option("--node", help="Only the cards of this Ray node.")
@click.option("--now", is_flag=True, help="With --gpu or --node: move what is computed there.")
@click.option("--wait/--no-wait", default=True, help="Wait until it is done.  [default: wait]")
@click.option("--timeout", type=click.FloatRange(min=0), help="Seconds to wait; else for ever.")
def drain(
    config_file: Path,
    gpu: str | None,
    node: str | None,
    now: bool,
    wait: bool,
    timeout: float | None,
) -> int:
    """Finish what runs and take nothing new, until `crynux-cluster resume`.

    All accounts are paused, what is computed is finished, and what waits for its validation is
    handed over; the exit code is 0 when that is done, 1 when the timeout or somebody's resume came
    first. With --gpu or --node that one is waited for, not others that are drained too. It lasts
    over restarts.
    """
    from actors import client
    from cluster import config, steering

    what, name = _aim(gpu, node)
    if now and what == "everything":
        raise click.UsageError("--now is for --gpu or --node")
    settings = config.load(config_file)
    order = typed(steering.Drain, what=what, name=name, now=now)
    client.perform(settings, order)
    if not wait:
        return 0
    with client.asking(settings) as call:
        look = lambda: _status(call("status")).drain  # noqa: E731 - as short as its name
        return _wait_drained(look, timeout, what=what, name=name)


@click.command(short_help="End a drain.")
@config_option
@click.option("--gpu", help="Only that of this card, by id or UUID.")
@click.option("--node", help="Only that of this Ray node.")
def resume(config_file: Path, gpu: str | None, node: str | None) -> None:
    """End every drain, or one: cards take tasks again, and accounts resume."""
    from actors import client
    from cluster import config, steering

    what, name = _aim(gpu, node)
    order = typed(steering.EndDrain, what=what, name=name)
    click.echo(client.perform(config.load(config_file), order))


def _aim(gpu: str | None, node: str | None) -> tuple[str, str]:
    """What is meant, and its name."""
    if gpu is not None and node is not None:
        raise click.UsageError("--gpu and --node: name one of them")
    for option, what, name in (("--gpu", "card", gpu), ("--node", "node", node)):
        if name is None:
            continue
        if not name.strip():
            # As of a variable that isn't set: it must not fall on everything.
            raise ConfigError(f"{option} is empty: name a {what}, or leave {option} out for all")
        return what, name
    return "everything", ""


def _status(found: Any) -> Status:  # noqa: ANN401 - plain JSON values
    status = Status.model_validate_json(json.dumps(found))
    if not status.acting:
        raise ClusterError("the coordinator is not acting now; try again")
    return status


def _lines(found: FleetStatus) -> list[str]:
    lines = list(map(_class_line, found.classes))
    lines += [f"  to do: {each}" for each in found.plan]
    lines += [f"  lacking: {each}" for each in found.lacks]
    lines += [f"  leaves, or has left, for good: {each}" for each in found.retired]
    lines += _obstacles(found)
    return lines if found.plan else [*lines, _last_words(found)]


def _class_line(found: ClassStatus) -> str:
    line = (
        f"{found.name} ({found.vram} GB): {counted(found.least, 'account')} wanted, "
        f"{found.slots} for each card"
    )
    return f"{line}, stopped" if found.stopped else line


def _obstacles(found: FleetStatus) -> list[str]:
    lines = [f"  limit: {each}" for each in found.limits]
    lines += [f"  held: {each}" for each in found.held]
    if found.unread:
        lines.append(f"  not read from the chain yet: {counted(found.unread, 'account')}")
    return lines


def _last_words(found: FleetStatus) -> str:
    stopped = any(each.stopped for each in found.classes)
    return _NOTHING_MORE if found.lacks or _obstacles(found) or stopped else _NOTHING


def _follow(look: Callable[[], FleetStatus], sleep: Callable[[float], None] = time.sleep) -> None:
    """Print each new thing that is done, until nothing is left to do or on its way."""
    shown: tuple[str, ...] = ()
    quiet = 0
    while quiet < 3:
        try:
            found = look()
        except ClusterError as error:
            # It goes on in a coordinator that begins anew.
            found = FleetStatus(plan=(f"{error}; waiting for it",))
        for line in found.plan:
            if line not in shown:
                click.echo(line)
        shown = found.plan
        if found.lacks:
            raise ClusterError("; ".join(found.lacks))
        quiet = 0 if found.plan or found.moving or found.unread else quiet + 1
        sleep(POLL_SECONDS)
    for line in (
        *(_class_line(each) for each in found.classes if each.stopped),
        *_obstacles(found),
    ):
        click.echo(line)
    click.echo(_last_words(found))


def _lasts(found: DrainStatus, what: str, name: str) -> bool:
    """Whether what was to be drained still is."""
    named = {"card": found.cards, "node": found.nodes}
    return found.everything or name in named.get(what, ())


def _left(found: DrainStatus, what: str, name: str) -> tuple[bool, tuple[str, ...]]:
    """Whether what was asked for is done, and what is left of it: others may take longer."""
    for part in found.parts:
        if (part.what, part.name) == (what, name):
            return not part.left, part.left
    return found.done, found.left


def _wait_drained(
    look: Callable[[], DrainStatus],
    timeout: float | None,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
    what: str = "everything",
    name: str = "",
) -> int:
    began, shown = clock(), ""
    while True:
        try:
            found = look()
        except ClusterError as error:
            # It lasts over a coordinator that begins anew.
            found = DrainStatus(left=(f"{error}; waiting for it",))
        else:
            if not _lasts(found, what, name):
                raise ClusterError("somebody ended the drain: crynux-cluster audit says who")
        done, left = _left(found, what, name)
        if done:
            click.echo("drained")
            return 0
        words = "; ".join(left) or "waiting"
        if words != shown:
            click.echo(words)
            shown = words
        if timeout is not None and clock() - began >= timeout:
            click.echo("not drained yet; it goes on", err=True)
            return 1
        sleep(POLL_SECONDS)
