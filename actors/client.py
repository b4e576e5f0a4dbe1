"""What an operator asks of the coordinator that acts, from a process of his own."""

from __future__ import annotations

import socket
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
    _join(config)
    try:
        coordinator = cast(Any, ray.get_actor(NAME, config.ray.namespace))
        done = ray.get(coordinator.clear_quarantine.remote(card), timeout=ANSWER_SECONDS)
    except ValueError:
        raise ClusterError("no coordinator is there; is the operator up?") from None
    except RayError as error:
        raise ClusterError(f"the coordinator doesn't answer: {_line(error)}") from error
    finally:
        ray.shutdown()
    match done:
        case "cleared":
            return f"{card} is out of quarantine; it computes the canary before it gets a task"
        case "free":
            return f"{card} is in no quarantine"
        case "unknown":
            raise ConfigError(
                f"no card is known as {card}; crynux-cluster status --json shows them"
            )
        case _:
            raise ClusterError("the coordinator is not acting now; try again")


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
