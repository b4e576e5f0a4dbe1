"""What an operator asks of the coordinator that acts, from a process of his own."""

from __future__ import annotations

import contextlib
import getpass
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any, cast

import ray
from ray.exceptions import GetTimeoutError, RayError

from actors.names import NAME, RAY_ADDRESS
from cluster.config import Config
from cluster.core.errors import ClusterError, ConfigError
from cluster.journal import SqlJournal
from cluster.journal_engine import file_of
from cluster.steering import Done, Order

REACH_SECONDS = 5.0
ANSWER_SECONDS = 10.0
ORDER_SECONDS = 30.0
"""For what is done meanwhile, on machines of which one may hang."""
AUTO = "auto"
HEAD = "node:__internal_head__"
"""What Ray's head has among its resources."""


class NoAnswer(ClusterError):
    """Of the coordinator in time; what was asked may be done all the same."""


def perform(config: Config, order: Order) -> str:
    """Have the coordinator carry an order out; what it did, in one line.

    Raises `ConfigError` when what it names isn't known, `ClusterError` when it can't be done now.
    """
    with asking(config) as call:
        return order_done(call, order)


def order_done(call: Callable[..., Any], order: Order) -> str:
    """As `perform`, in a cluster that was joined already."""
    said = order.model_dump(mode="json")
    try:
        plain = call("perform", said, _who(), seconds=ORDER_SECONDS)
    except NoAnswer as error:
        unsure = "whether it was done is not known: crynux-cluster audit has what was"
        raise ClusterError(f"{error}; {unsure}") from error
    done = Done.model_validate(plain)
    if done.kind == "unknown":
        raise ConfigError(done.text)
    if done.kind == "refused":
        raise ClusterError(done.text)
    return done.text


def _who() -> str:
    """As it is written down; who has no name is known by number."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    return f"command line {user}@{socket.gethostname()}"


@contextlib.contextmanager
def asking(config: Config) -> Iterator[Callable[..., Any]]:
    """While the operator's cluster is joined: call one of the coordinator's methods by name.

    Raises `ClusterError` when it can't be asked.
    """
    with asking_at(address_of(config), config.ray.namespace) as call:
        yield call


@contextlib.contextmanager
def asking_at(address: str, namespace: str) -> Iterator[Callable[..., Any]]:
    """As `asking`, for who knows where Ray is and needs no configuration."""
    _join(address, namespace)

    def call(method: str, *arguments: object, seconds: float = ANSWER_SECONDS) -> Any:  # noqa: ANN401 - as the method says
        try:
            coordinator = cast(Any, ray.get_actor(NAME, namespace))
            remote = getattr(coordinator, method).remote(*arguments)
            done = ray.get(remote, timeout=seconds)
        except ValueError:
            raise ClusterError("no coordinator is there; is the operator up?") from None
        except GetTimeoutError as error:
            raise NoAnswer(f"the coordinator doesn't answer within {seconds:g} s") from error
        except RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, ClusterError):  # it is there, and says it itself
                raise cause from None
            raise ClusterError(f"the coordinator doesn't answer: {_line(error)}") from error
        return done

    try:
        yield call
    finally:
        ray.shutdown()


def ask(config: Config, method: str, *arguments: object) -> Any:  # noqa: ANN401
    """One call of `asking`."""
    with asking(config) as call:
        return call(method, *arguments)


def this_machine() -> str | None:
    """The Ray node that this process has joined by; None on the head, with which all go."""
    here = ray.get_runtime_context().get_node_id()
    heads = (each["NodeID"] for each in _nodes() if HEAD in each["Resources"])
    return None if here in heads else here


def _nodes() -> list[dict[str, Any]]:
    return cast("list[dict[str, Any]]", ray.nodes())  # type: ignore[no-untyped-call]


def _join(address: str, namespace: str) -> None:
    if address != AUTO:
        _reach(address)
    try:
        ray.init(
            address=address,
            namespace=namespace,
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
    file = file_of(config.journal.url)
    if file is not None and not file.exists():
        return AUTO
    # Only looked at: it is the operator's that runs, perhaps of another version.
    with contextlib.closing(SqlJournal(config.journal.url, look_only=True)) as journal:
        written = None if journal.schema() is None else journal.cursor(RAY_ADDRESS)
    return written or AUTO


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
