"""`crynux-cluster status`, `top`, `tasks`, `accounts`, `earnings`, `logs` and `audit`: what the
operator's API tells, for people and, by `--json`, for programs."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from pydantic import RootModel, TypeAdapter
from rich.console import Console
from rich.live import Live

from cluster import status_view, story_view, top_view
from cluster.api_client import DEFAULT_URL, ApiClient
from cluster.core.errors import ClusterError, ConfigError
from cluster.earnings import Earnings
from cluster.status import Status
from cluster.steering import ActionView

if TYPE_CHECKING:
    from cluster.story import TaskStory

Actions = RootModel[tuple[ActionView, ...]]
TOP_SECONDS = 2.0
_DAY = 86_400.0
_UNITS = {"h": 3_600.0, "d": _DAY, "w": 7 * _DAY}


def api_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--url`, `--token-file` and `--json`, given on as `api` and `as_json`."""

    def with_api(url: str, token_file: Path | None, **others: Any) -> Any:  # noqa: ANN401
        return command(api=ApiClient(url, token_file), **others)

    with_api.__name__, with_api.__doc__ = command.__name__, command.__doc__
    with_api.__click_params__ = getattr(command, "__click_params__", [])  # type: ignore[attr-defined]
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print JSON instead."),
        click.option(
            "--token-file",
            type=click.Path(dir_okay=False, path_type=Path),
            envvar="CRYNUX_TOKEN_FILE",
            help="The file with the API's token (serve.token_file).  [env: CRYNUX_TOKEN_FILE]",
        ),
        click.option(
            "--url",
            default=DEFAULT_URL,
            show_default=True,
            envvar="CRYNUX_URL",
            help="Where the API answers.  [env: CRYNUX_URL]",
        ),
    ):
        option(with_api)
    return with_api


@click.command()
@api_options
def status(api: ApiClient, as_json: bool) -> None:
    """Show accounts, GPUs and tasks as they are now."""
    now = api.get("/v1/status", Status)
    if as_json:
        click.echo(now.model_dump_json(indent=2))
    else:
        Console().print(status_view.render(now))


@click.command(short_help="Watch accounts, GPUs and tasks.")
@api_options
def top(api: ApiClient, as_json: bool) -> None:
    """Watch it on one screen, until Ctrl-C: what is wrong, how many cards and accounts of each
    class are where, cards that don't serve, the newest tasks; with --json a line for each look."""
    watch(api, as_json)


def watch(
    api: ApiClient,
    as_json: bool,
    looks: int | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """A look every `TOP_SECONDS`; one that fails is shown, and the next is tried."""
    with _screen(as_json) as (show, trouble):
        done = 0
        while looks is None or done < looks:
            try:
                now = api.get("/v1/status", Status)
            except ConfigError:
                raise
            except ClusterError as error:
                trouble(str(error))
            else:
                show(now)
            done += 1
            if looks is None or done < looks:
                sleep(TOP_SECONDS)


@contextlib.contextmanager
def _screen(as_json: bool) -> Iterator[tuple[Callable[[Status], None], Callable[[str], None]]]:
    """How a look is shown, and how one that failed."""
    if as_json:
        # No live display: where colours are forced, it writes to a pipe as to a terminal.
        yield (
            lambda now: click.echo(now.model_dump_json()),
            lambda why: click.echo(json.dumps({"error": why})),
        )
        return
    console = Console()
    with Live(
        console=console, screen=console.is_terminal, refresh_per_second=1, auto_refresh=False
    ) as live:
        yield (
            lambda now: live.update(top_view.render(now, console), refresh=True),
            lambda why: live.update(story_view.problem(why), refresh=True),
        )


def _story(api: ApiClient, task: str) -> TaskStory:
    from cluster.story import TaskStory  # it brings the database's library along

    return api.get(f"/v1/tasks/{named(task)}", TaskStory)


@click.command(short_help="List tasks, or tell one's whole story.")
@click.argument("task", required=False, metavar="[ID]")
@click.option("--bundle", is_flag=True, help="All that is kept of its failed attempts, as JSON.")
@api_options
def tasks(api: ApiClient, as_json: bool, task: str | None, bundle: bool) -> None:
    """List the newest tasks, or tell the whole story of one.

    ID is a commitment or 8 or more of its first digits, an attempt's id, or a transaction's hash.
    A bundle holds the task's parameters, which are somebody's prompt.
    """
    if bundle and task is None:
        raise click.UsageError("--bundle: which task? Name it")
    if task is None:
        now = api.get("/v1/status", Status)
        if as_json:
            click.echo(TypeAdapter(list[Any]).dump_json(list(now.tasks), indent=2).decode())
        else:
            Console().print(status_view.tasks_table(now))
        return
    if bundle:
        click.echo(json.dumps(api.raw(f"/v1/tasks/{named(task)}/bundle"), indent=2))
        return
    found = _story(api, task)
    if as_json:
        click.echo(found.model_dump_json(indent=2))
    else:
        Console().print(story_view.render(found))


@click.command(short_help="List the node accounts.")
@api_options
def accounts(api: ApiClient, as_json: bool) -> None:
    """List the node accounts: status on the network, class, stake, balance and task."""
    now = api.get("/v1/status", Status)
    if as_json:
        click.echo(TypeAdapter(list[Any]).dump_json(list(now.accounts), indent=2).decode())
    else:
        Console().print(status_view.accounts_table(now))


@click.command(short_help="Show what came in and what gas went out.")
@click.option("--since", default="1d", show_default=True, help="How far back: 12h, 7d, 4w.")
@click.option("--by", type=click.Choice(["hour", "day"]), help="[default: hour up to 2 days]")
@api_options
def earnings(api: ApiClient, as_json: bool, since: str, by: str | None) -> None:
    """Show what came in and what gas went out, by the hour or day (UTC), and by class of card."""
    seconds = seconds_of(since)
    step = by or ("hour" if seconds <= 2 * _DAY else "day")
    found = api.get("/v1/earnings", Earnings, days=seconds / _DAY, step=step)
    if as_json:
        click.echo(found.model_dump_json(indent=2))
    else:
        Console().print(story_view.earnings(found))


@click.command(short_help="Print a task's log, a line for each event.")
@click.option("--task", required=True, help="Any of its ids, as for `tasks`.")
@api_options
def logs(api: ApiClient, as_json: bool, task: str) -> None:
    """Print what happened to a task, a line for each event, attempt and transaction, in order.

    It comes from the journal, so it is whole whatever became of the processes that wrote it.
    """
    found = _story(api, task)
    for line in story_view.log_lines(found):
        click.echo(json.dumps(line) if as_json else story_view.log_text(line))


@click.command(short_help="List what operators had done.")
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True)
@api_options
def audit(api: ApiClient, as_json: bool, limit: int) -> None:
    """List what operators had done, by command or API, the newest first."""
    found = api.get("/v1/audit", Actions, limit=limit)
    if as_json:
        click.echo(found.model_dump_json(indent=2))
    else:
        Console().print(story_view.actions(found.root))


def seconds_of(text: str) -> float:
    """`12h`, `7d`, `4w`; raises `ConfigError`."""
    number, unit = text[:-1], text[-1:]
    try:
        seconds = float(number) * _UNITS[unit]
    except (ValueError, KeyError):
        seconds = 0.0
    if not 0 < seconds <= 400 * _DAY:
        raise ConfigError(f"--since {text}: expected such as 12h, 7d or 4w, up to 400d")
    return seconds


def named(task: str) -> str:
    """As a part of a URL's path; raises `ConfigError` for what names no task."""
    if not task or len(task) > 80 or not task.isalnum() or not task.isascii():
        raise ConfigError(f"{task[:80]}: expected a task's commitment, an attempt's id or a hash")
    return task
