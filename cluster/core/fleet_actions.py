"""What can be done with a node account, one at a time: `cluster.core.fleet` plans it."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.core.types import Address, GpuClass, Wei


@dataclass(frozen=True, slots=True)
class Assign:
    """Write down which class the account belongs to, before anything is done with it."""

    index: int
    address: Address
    gpu_class: GpuClass


@dataclass(frozen=True, slots=True)
class Fund:
    """Send the account, from the treasury, what it lacks to join."""

    address: Address
    amount: Wei


@dataclass(frozen=True, slots=True)
class Join:
    address: Address
    gpu_class: GpuClass


@dataclass(frozen=True, slots=True)
class TopUp:
    """Send a joined account, from the treasury, gas for its transactions."""

    address: Address
    amount: Wei


@dataclass(frozen=True, slots=True)
class Pause:
    address: Address


@dataclass(frozen=True, slots=True)
class Resume:
    address: Address


@dataclass(frozen=True, slots=True)
class Quit:
    """Leave the network, to join for another class: the stake comes back."""

    address: Address


@dataclass(frozen=True, slots=True)
class UpdateVersion:
    """Say which version of tasks it takes now: other tasks fit it (protocol.md section 2)."""

    address: Address


@dataclass(frozen=True, slots=True)
class Sweep:
    """Send what the account has earned to the beneficiary."""

    address: Address
    recipient: Address
    amount: Wei


@dataclass(frozen=True, slots=True)
class BringHome:
    """Send what a retired account owns back to the treasury, but for some gas."""

    address: Address
    amount: Wei


FleetAction = (
    Assign | Fund | Join | TopUp | Pause | Resume | Quit | UpdateVersion | Sweep | BringHome
)


def words(action: FleetAction) -> str:
    """An action in a line for a person."""
    match action:
        case Assign(index, _, gpu_class):
            return f"account {index} is for {gpu_class.name}"
        case Fund(address, amount):
            return f"fund {address} with {amount} wei for its stake"
        case TopUp(address, amount):
            return f"send {address} {amount} wei for gas"
        case Sweep(address, recipient, amount):
            return f"sweep {amount} wei of {address} to {recipient}"
        case BringHome(address, amount):
            return f"send {amount} wei of {address} back to the treasury"
        case Join(address, gpu_class):
            return f"join {address} for {gpu_class.name}"
        case UpdateVersion(address):
            return f"say the new version of {address}"
        case _:
            return f"{type(action).__name__.lower()} {action.address}"
