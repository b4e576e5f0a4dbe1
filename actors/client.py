"""What an operator asks of the coordinator that acts, from a process of his own."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import Any, cast

import ray
from ray.exceptions import RayError

from actors.coordinator import NAME, RAY_ADDRESS
from cluster.config import Config
from cluster.core.errors import ClusterError, ConfigError
from cluster.journal import SqlJournal

REACH_SECONDS = 5.0
ANSWER_SECONDS = 10.0
AUTO = "auto"


def clear_quarantine(config: Config, card: str) -> str:
    """Have the coordinator let a card out of quarantine; what it did, in one line.

    Raises `ConfigError` for a card that it doesn't know, `ClusterError` when it can't be asked.
    """
    done = ask(config, "clear_quarantine", card)
    if done == "unknown":
        raise ConfigError(f"no card is known as {card}; crynux-cluster status --json shows them")
    if done == "free":
        return f"{card} is in no quarantine"
    return f"{card} is out of quarantine; it computes the canary before it gets a task"


def clear_account(config: Config, account: str) -> str:
    """Have what stops an account forgotten; raises as `clear_quarantine` does."""
    done = ask(config, "clear_account", account)
    if done == "unknown":
        raise ConfigError(f"{account} is none of the node accounts; crynux-cluster status has them")
    if done == "free":
        return f"nothing stops {account}"
    return f"{account} is cleared; it is joined again when its class has a card for it"


def drain(config: Config, what: str, name: str = "", now: bool = False) -> None:
    """Have everything, a card or a node drained; raises as `clear_quarantine` does."""
    if ask(config, "drain", what, name, now) == "unknown":
        raise ConfigError(f"no {what} is known as {name}; crynux-cluster status --json shows them")


def end_drain(config: Config) -> str:
    """Raises as `clear_quarantine` does."""
    if ask(config, "end_drain") == "free":
        return "nothing was drained"
    return "the drain has ended; accounts resume as their cards are there"


@contextlib.contextmanager
def asking(config: Config) -> Iterator[Callable[..., Any]]:
    """While the operator's cluster is joined: call one of the coordinator's methods by name.

    Raises `ClusterError` when it can't be asked, or doesn't act.
    """
    _join(config)

    def call(method: str, *arguments: object) -> Any:  # noqa: ANN401 - as the method says
        try:
            coordinator = cast(Any, ray.get_actor(NAME, config.ray.namespace))
            remote = getattr(coordinator, method).remote(*arguments)
            done = ray.get(remote, timeout=ANSWER_SECONDS)
        except ValueError:
            raise ClusterError("no coordinator is there; is the operator up?") from None
        except RayError as error:
            raise ClusterError(f"the coordinator doesn't answer: {_line(error)}") from error
        if done == "not acting":
            raise ClusterError("the coordinator is not acting now; try again")
        return done

    try:
        yield call
    finally:
        ray.shutdown()


def ask(config: Config, method: str, *arguments: object) -> Any:  # noqa: ANN401
    """One call of `asking`."""
    with asking(config) as call:
        return call(method, *arguments)


def _join(config: Config) -> None:
    address = address_of(config)
    if address != AUTO:
        _reach(address)
    try:
        ray.init(
            address=address,
            namespace=config.ray.namespace,
            log_to_driver=False,
            configure_logging=False,
        )
    except (ConnectionError, ValueError, RuntimeError, RayError) as error:
        raise ClusterError(f"no Ray cluster answers at {address}: {_line(error)}") from error


def address_of(config: Config) -> str:
    """Where the coordinator's Ray is: as configured, else as the coordinator wrote it down, since
    several may run on this machine."""
    if config.ray.address is not None and config.ray.address != AUTO:
        return config.ray.address
    journal = SqlJournal(config.journal.url)
    try:
        return journal.cursor(RAY_ADDRESS) or AUTO
    finally:
        journal.close()


def _reach(address: str) -> None:
    """Find at once that nothing is there: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), REACH_SECONDS).close()
    except OSError as error:
        raise ClusterError(f"nothing answers at {address} ({error}); is the operator up?") from None


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1][:300]}" if lines else type(error).__name__
