"""What runs is compared by: the version, and a digest of the configuration.

The coordinator is another one with every edit. A card's process isn't: it goes on over what can be
reloaded, which isn't its business, so that neither a reload nor what follows it costs its attempt.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import cluster
from cluster import config as configuration
from cluster.config import Config

LIVE = frozenset({"policy", "fleet", "canary", "verify", "logs.level"})
"""Sections and keys of the configuration that can change while it runs."""


@dataclass(frozen=True, slots=True)
class Digests:
    """Of a configuration: `whole`, and of what the `cards` and the model stores run with."""

    whole: str
    cards: str

    @classmethod
    def of(cls, config: Config) -> Digests:
        said = config.model_dump(mode="json")
        for key in LIVE:
            section, _, name = key.partition(".")
            if name:
                del said[section][name]
            else:
                del said[section]
        text = json.dumps(said, sort_keys=True)
        cards = hashlib.sha256(text.encode()).hexdigest()[:12]
        return cls(configuration.digest(config), cards)


def release(config: Config) -> str:
    """What must be equal for a running coordinator to be left alone: version, configuration."""
    return release_of(Digests.of(config).whole)


def release_of(digest: str) -> str:
    return f"{cluster.__version__}+{digest}"
