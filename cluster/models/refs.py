"""What a task asks for by name: a model of some kind, from the hub or by URL.

Names come from tasks and from the chain, and are hostile until they are a `ModelRef`.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Final

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from cluster.core.errors import TaskInvalid
from cluster.models.refusals import Refused, Rule

KINDS: Final = ("base", "lora", "controlnet", "unet", "vae", "textual_inversion")
"""A base model is a diffusers pipeline or a language model, whichever its files make of it."""

_ID: Final = re.compile(r"(?!\.)[\w.-]{1,96}(/(?!\.)[\w.-]{1,96})?", re.ASCII)
_NEVER_AN_ID: Final = re.compile(r"[^\w./-]|/.*/|--|\.\.", re.DOTALL)
"""In every version of the library's rule; on the rest its versions differ, or might."""
MOST_SHOWN: Final = 200
_WORD: Final = re.compile(r"(?!\.)[\w.-]{1,100}", re.ASCII)
_URL: Final = re.compile(r"[!-~]{1,2048}", re.ASCII)
"""Nothing that could break a line, or that no file's name could be made of."""
_MODEL_ID: Final = re.compile(r"(base|lora|controlnet):(.+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ModelRef:
    """`variant` and `file` are empty where the task names none; `file` is a LoRA's."""

    kind: str
    name: str
    variant: str = ""
    file: str = ""

    @property
    def is_url(self) -> bool:
        return "://" in self.name

    @property
    def key(self) -> str:
        """A folder's name: short, without anything of the ref that could be a path."""
        text = "\n".join((self.kind, self.name, self.variant, self.file))
        shown = re.sub(r"[^A-Za-z0-9.]+", "-", self.shown.rpartition("/")[2])[:40].strip("-.")
        return f"{self.kind}-{shown}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    @property
    def shown(self) -> str:
        """For people: a URL without user, query and fragment, which may hold a secret."""
        if not self.is_url:
            return self.name
        scheme, _, rest = self.name.partition("://")
        authority, slash, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
        return f"{scheme}://{authority.rpartition('@')[2]}{slash}{path}"

    @property
    def base_key(self) -> str:
        """As in a model id, without the kind: `name[+variant]`."""
        return f"{self.name}+{self.variant}" if self.variant else self.name

    def __str__(self) -> str:
        name = self.shown if len(self.shown) <= MOST_SHOWN else f"{self.shown[:MOST_SHOWN]}..."
        return "+".join(filter(None, (f"{self.kind}:{name}", self.variant, self.file)))


def plain(text: str) -> str:
    """What a stranger wrote, on one line, and not a long one."""
    short = text[:MOST_SHOWN]
    return short if short.isascii() and short.isprintable() else ascii(short)[:MOST_SHOWN]


def ref(kind: str, name: str, variant: str | None = None, file: str = "") -> ModelRef:
    """Raises `TaskInvalid` for a name that no hub could have, and `Refused` for what is read here
    with more care than elsewhere: another node may take it."""
    if kind not in KINDS:
        raise Refused(Rule.NAME, f"{kind!r} is not a kind of model")
    if "://" not in name:
        _check_id(kind, name)
    elif not _URL.fullmatch(name):
        raise Refused(Rule.URL, f"{kind}: {ascii(name[:100])} is not a plain URL")
    for what, word in (("variant", variant), ("file", file)):
        if word and not _WORD.fullmatch(word):
            raise Refused(Rule.NAME, f"{word[:100]!r} is not a {what}'s name")
    return ModelRef(kind, name, variant or "", file)


def of_model_id(model_id: str) -> ModelRef:
    """`<kind>:<name>[+<variant>]`, as the chain writes it. Raises `Refused` for anything else.

    Whoever creates a task may write anything there, so nothing is concluded from it.
    """
    match = _MODEL_ID.fullmatch(model_id)
    if match is None:
        raise Refused(Rule.NAME, f"{model_id[:200]!r} is not a model's id")
    name, variant = match[2], ""
    if "://" not in name:
        name, _, variant = name.partition("+")
    try:
        return ref(match[1], name, variant)
    except TaskInvalid as error:
        raise Refused(Rule.NAME, str(error)) from None


def _check_id(kind: str, name: str) -> None:
    shown = ascii(name[:200])
    try:
        validate_repo_id(name)
    except HFValidationError:
        if _NEVER_AN_ID.search(name):
            # The library that every node fetches with refuses it before it asks anyone.
            raise TaskInvalid(f"{kind}: {shown} is neither a hub's id nor a URL") from None
        raise Refused(Rule.NAME, f"{shown} is not a hub's id") from None
    if not _ID.fullmatch(name):
        raise Refused(Rule.NAME, f"{shown} is not a plain id")
