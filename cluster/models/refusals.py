"""What the store will not have, by the rule that it breaks. A refusal is never the task's fault.

`Rule`'s values are the labels of the metric that counts refusals.
"""

from __future__ import annotations

import enum

from cluster.core.errors import ModelUnavailable, ModelUnavailableKind


class Rule(enum.Enum):
    URL = "url"
    """Not a URL, or one that readers differ on."""
    SCHEME = "scheme"
    CREDENTIALS = "credentials"
    PORT = "port"
    HOST = "host"
    """On the operator's list of hosts never to be asked."""
    ADDRESS = "address"
    """The name leads to an address that isn't a public one."""
    REDIRECTS = "redirects"
    NAME = "name"
    """A model's, a variant's or a file's name that could be a path."""
    FILE_KIND = "file_kind"
    """Neither safetensors weights nor a configuration or tokenizer in JSON or text."""
    FILE_SIZE = "file_size"
    QUOTA = "quota"
    HEADER = "header"
    """Not a safetensors file, or one that says of itself what can't be."""
    ARCHIVE = "archive"
    CODE = "code"
    LINK = "link"


class Refused(ModelUnavailable):
    """One line that names what was refused and why; `rule` is which."""

    def __init__(self, rule: Rule, message: str) -> None:
        super().__init__(ModelUnavailableKind.REFUSED, message)
        self.rule = rule

    def __reduce__(self) -> tuple[type[Refused], tuple[Rule, str]]:  # type: ignore[override]
        return type(self), (self.rule, str(self))
