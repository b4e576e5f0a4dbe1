"""Errors by whose fault they are: that choice decides between a report and silence.

Only `TaskInvalid` may ever become an error report on the network (protocol.md, "What a group does
to a node"); it is raised only where every honest node must find the same. The choice is made by
type, never from an error's text.
"""

from __future__ import annotations

import enum


class ClusterError(Exception):
    """Base of everything this software raises on purpose; the message is one line for a person.

    `trace` is where it came from, for whoever has to mend it: kept as text, because frames hold
    what they worked on and don't travel.
    """

    trace: str = ""


class ConfigError(ClusterError):
    """The operator's input is wrong: says what, and how to mend it. Exit code 2."""


class TaskInvalid(ClusterError):
    """The fault is certainly in the task: every honest node must find the same."""


class TaskUnsupported(ClusterError):
    """A task this software does not run. Our limit, so never reported: it times out."""


class DeviceFaultKind(enum.Enum):
    OUT_OF_MEMORY = "out_of_memory"
    CONTEXT_LOST = "context_lost"
    BAD_RESULT = "bad_result"
    MEMORY_CHANGED = "memory_changed"
    STALLED = "stalled"
    NOT_TAKEN = "not_taken"
    """It didn't take the attempt: it is away, silent, busy or not up, which tells little of it."""
    DISTRUSTED = "distrusted"
    """What it computed looks well, and may not be trusted: another card computed something else."""
    OTHER = "other"


class DeviceFault(ClusterError):
    """This card, or our code on it, failed. The task is tried elsewhere; never reported."""

    def __init__(self, kind: DeviceFaultKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(
        self,
    ) -> tuple[type[DeviceFault], tuple[DeviceFaultKind, str], dict[str, str]]:
        return type(self), (self.kind, str(self)), {"trace": self.trace}


class ModelUnavailableKind(enum.Enum):
    NOT_HERE = "not_here"
    FORBIDDEN = "forbidden"
    UNREACHABLE = "unreachable"
    DAMAGED = "damaged"
    REFUSED = "refused"


class ModelUnavailable(ClusterError):
    """A model can't be had here and now; another node may well hold it, so never reported."""

    def __init__(self, kind: ModelUnavailableKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(
        self,
    ) -> tuple[type[ModelUnavailable], tuple[ModelUnavailableKind, str], dict[str, str]]:
        return type(self), (self.kind, str(self)), {"trace": self.trace}


class Cancelled(ClusterError):
    """The execution was cancelled by the coordinator."""


class DeadlinePassed(ClusterError):
    """The execution ran into its deadline."""


class NetworkUnavailable(ClusterError):
    """The chain or the relay doesn't answer as it should. Wait and try again."""


class ChainError(NetworkUnavailable):
    """The chain's endpoint failed or answered what can't be right."""


class RelayError(NetworkUnavailable):
    """The relay failed or answered what can't be right."""


class RelayRefused(RelayError):
    """The relay answers, and won't do this: the next task may well be served."""


class RelayBroken(RelayError):
    """The relay answers that something broke in it."""


class ParametersNotReady(ClusterError):
    """The relay has no parameters for the task yet: normal, poll again."""


class ResultRefused(ClusterError):
    """The relay refuses the result files (`Wrong result files uploaded`)."""


class LeaseLost(ClusterError):
    """Another coordinator acts; this one must stop at once."""


class IllegalMove(ClusterError):
    """A record was asked to do what the lifecycle doesn't allow: a bug of ours."""


class AttemptLost(ClusterError):
    """The GPU actor that ran the attempt is gone, or doesn't know it any more."""


class ParametersUnreadable(ClusterError):
    """The envelope doesn't open with the node's key, or the text is longer than we keep; others
    may hold another envelope, or room for more: silence."""
