"""The section `fleet`: how many accounts there are, and what they may cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, cast

from pydantic import BeforeValidator, Field, model_validator

from cluster.config.values import (
    Amount,
    Listed,
    OptionalAddress,
    OptionalAmount,
    Seconds,
    Section,
)
from cluster.core.capacity import MOST_SLOTS
from cluster.core.errors import ConfigError
from cluster.core.fleet import FleetPolicy
from cluster.core.types import Address, Wei


def _slots(value: object) -> int | Literal["auto"]:
    if value == "auto":
        return "auto"
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_SLOTS:
        raise ValueError(f"expected auto, or a number from 1 to {MOST_SLOTS}")
    return value


Slots = Annotated[int | Literal["auto"], BeforeValidator(_slots)]


class SlotsOf(Section):
    gpu: str = Field(min_length=1)
    """The driver's name for the card."""
    slots: Slots


class FleetConfig(Section):
    """Amounts are written in CNX. `slots_per_gpu`: node accounts for each card; `auto` takes as
    many as keep it busy, by what was measured, at most `max_slots`. `slots_by_gpu`: other slots for
    cards of a name. `stake_budget` bounds the stakes of all accounts together. `gas_reserve` is
    what an account must own beyond its stake to join; below `gas_low` the treasury tops it up to
    `gas_target`. Earnings beyond `gas_target` go to `beneficiary` once they are more than
    `sweep_above`. Accounts of cards that left are paused after `pause_after_seconds`. `auto` false:
    what spends or changes the fleet waits for `crynux-cluster fleet apply`."""

    auto: bool = True
    slots_per_gpu: Slots = 1
    slots_by_gpu: Listed[SlotsOf] = ()
    max_slots: int = Field(default=8, ge=1, le=MOST_SLOTS)
    stake_budget: OptionalAmount = None
    gas_reserve: Amount = cast(Wei, "0.01")
    gas_low: Amount = cast(Wei, "0.005")
    gas_target: Amount = cast(Wei, "0.05")
    beneficiary: OptionalAddress = None
    sweep_above: Amount = cast(Wei, "10")
    pause_after_seconds: Seconds = 120.0

    @model_validator(mode="after")
    def _in_order(self) -> FleetConfig:
        if not self.gas_low <= self.gas_reserve <= self.gas_target:
            raise ValueError("gas_low, gas_reserve and gas_target: expected in rising order")
        return self

    @model_validator(mode="after")
    def _each_gpu_once(self) -> FleetConfig:
        names = [each.gpu for each in self.slots_by_gpu]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"slots_by_gpu: {name} stands twice")
        return self

    def check_accounts(self, accounts: Mapping[int, Address]) -> None:
        """Raises `ConfigError` where earnings would go to an account that they are swept from."""
        for index, account in accounts.items():
            if account == self.beneficiary:
                raise ConfigError(
                    f"fleet.beneficiary: {account} is node account {index} itself; name an address "
                    "that isn't one, the treasury's if need be"
                )

    def policy(self, stake: Wei) -> FleetPolicy:
        beneficiary = None if self.beneficiary is None else Address(self.beneficiary)
        return FleetPolicy(
            stake,
            self.gas_reserve,
            self.gas_low,
            self.gas_target,
            self.stake_budget,
            beneficiary,
            None if beneficiary is None else self.sweep_above,
        )
