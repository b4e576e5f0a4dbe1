"""Certificates that an operator believes beside the usual ones: of a proxy that looks into TLS, of
a mirror or a hub of his own."""

from __future__ import annotations

import ssl
from pathlib import Path

import httpx2

from cluster.core.errors import ConfigError


def trusting(file: Path) -> ssl.SSLContext:
    """What is believed anyhow, and those in the file. Raises `ConfigError`."""
    context = httpx2.create_ssl_context(trust_env=False)
    try:
        context.load_verify_locations(cafile=str(file))
    except ssl.SSLError:
        raise ConfigError(f"models.ca_file: no certificates in {file}") from None
    except OSError as error:
        raise ConfigError(f"models.ca_file: can't read {file}: {error.strerror}") from None
    return context
