"""What an operator may have done, by the API and the command line alike: names, arguments, answers.

Each order is a frozen value with its checks; what it does, and that it is written down, is
`actors.steering`'s.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, TypeAdapter, model_validator

from cluster.logs import Level
from cluster.status import View

Name = Annotated[str, Field(min_length=1, max_length=200)]
ModelName = Annotated[str, Field(min_length=1, max_length=600)]
AccountName = Annotated[str, Field(pattern=r"^0x[0-9a-fA-F]{40}$")]


def _tagged(schema: dict[str, Any]) -> None:
    """What tells the orders apart is never left out, though in Python it needn't be said."""
    schema["required"] = ["action", *schema.get("required", ())]


class Said(View):
    model_config = ConfigDict(json_schema_extra=_tagged, strict=True)


def _aimed(schema: dict[str, Any]) -> None:
    """What `_Aimed` asks for, in the schema's words."""
    _tagged(schema)
    everything = {"what": {"const": "everything"}, "name": {"const": ""}, "now": {"const": False}}
    part = {"what": {"enum": ["card", "node"]}, "name": {"minLength": 1}}
    asked = {each: everything[each] for each in everything if each in schema["properties"]}
    schema["anyOf"] = [{"properties": asked}, {"properties": part, "required": ["what", "name"]}]


class _Aimed(Said):
    """An order for everything, or for a part that is named: one whose aim is half said must not
    fall on everything."""

    model_config = ConfigDict(json_schema_extra=_aimed)

    what: Literal["everything", "card", "node"] = "everything"
    name: Annotated[str, Field(max_length=200)] = ""

    @model_validator(mode="after")
    def _aim(self) -> Self:
        if self.what == "everything" and self.name:
            raise ValueError("a name needs what: card or node")
        if self.what != "everything" and not self.name:
            raise ValueError(f"which {self.what}? it needs a name")
        return self


class Drain(_Aimed):
    """Finish what runs and take nothing new. `name`: a card's id or UUID, or a Ray node's id;
    `now`, of a card or node: what is computed there is begun again elsewhere."""

    action: Literal["drain"] = "drain"
    now: bool = False

    @model_validator(mode="after")
    def _aim_now(self) -> Self:
        if self.now and self.what == "everything":
            raise ValueError("now is for a card or node")
        return self


class EndDrain(_Aimed):
    """End every drain, or that of one card or node, which take tasks again while the others don't.
    `name`: as for `drain`."""

    action: Literal["resume"] = "resume"


class ClearQuarantine(Said):
    """Let a card, by id or UUID, out of quarantine; it answers the canary before it gets a task."""

    action: Literal["clear_quarantine"] = "clear_quarantine"
    card: Name


class ForgetCanary(Said):
    """Forget what cards of a class are expected to answer to the canary, or those of every class,
    and what they answered: they are asked before they get a task, and it is recorded anew."""

    action: Literal["forget_canary"] = "forget_canary"
    gpu_class: Name | None = None


class ApplyFleet(Said):
    """Act on the fleet's plan until nothing is left of it."""

    action: Literal["apply_fleet"] = "apply_fleet"


class RetireAccount(Said):
    """Have an account finish what it has, quit, and send what it owns back to the treasury; it
    isn't joined again until it is cleared."""

    action: Literal["retire_account"] = "retire_account"
    account: AccountName


class ClearAccount(Said):
    """Let an account be used again that was slashed, kicked out, held or retired."""

    action: Literal["clear_account"] = "clear_account"
    account: AccountName


class PreloadModel(Said):
    """Have every machine with cards fetch a model (`kind:name[+variant]`), behind what tasks
    need."""

    action: Literal["preload_model"] = "preload_model"
    model: ModelName


class DropModel(Said):
    """Remove a model from every machine's disk; where a task uses it, it stays."""

    action: Literal["drop_model"] = "drop_model"
    model: ModelName


class SetLogLevel(Said):
    """Of the coordinator, until it begins anew."""

    action: Literal["set_log_level"] = "set_log_level"
    level: Level


class ReloadConfig(Said):
    """Read the configuration's file again, and take over what can change while it runs."""

    action: Literal["reload_config"] = "reload_config"


Order = Annotated[
    Drain
    | EndDrain
    | ClearQuarantine
    | ForgetCanary
    | ApplyFleet
    | RetireAccount
    | ClearAccount
    | PreloadModel
    | DropModel
    | SetLogLevel
    | ReloadConfig,
    Field(discriminator="action"),
]
ORDERS: TypeAdapter[Order] = TypeAdapter(Order)


class Done(View):
    """What came of an order. `nothing`: there was nothing to do; `unknown`: what it names isn't
    known here; `refused`: it can't be done now, and nothing was, or not all: the text says."""

    kind: Literal["done", "nothing", "unknown", "refused"] = "done"
    text: str
    """In one line, for a person."""

    @property
    def well(self) -> bool:
        return self.kind in {"done", "nothing"}


class ActionView(View):
    """One line of the audit log."""

    at: float
    who: str
    action: str
    arguments: dict[str, object]
    outcome: str
