"""The operator's API as the command line asks it. Each failure is one line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

import cluster
from cluster.api.tokens import read_token
from cluster.core.errors import ClusterError, ConfigError

DEFAULT_URL = "http://127.0.0.1:8000"
TIMEOUT_SECONDS = 10.0
_NO_PATH = "Not Found"
"""What FastAPI says of a path it doesn't have."""

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class ApiClient:
    """`transport` None: over the network."""

    url: str = DEFAULT_URL
    token_file: Path | None = None
    transport: httpx.BaseTransport | None = field(default=None, repr=False)

    def get(self, path: str, model: type[Model], **params: str | int | float) -> Model:
        """The answer as `model`. Raises `ConfigError`, `ClusterError` with one clear line."""
        return self._valid(self.raw(path, **params), model)

    def raw(self, path: str, **params: str | int | float) -> Any:  # noqa: ANN401 - plain JSON
        """The answer as it came; raises as `get` does."""
        url = self.url
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"--url {url}: expected a URL such as {DEFAULT_URL}")
        token = read_token(self.token_file)
        headers = {} if token is None else {"authorization": f"Bearer {token}"}
        try:
            with httpx.Client(transport=self.transport, timeout=TIMEOUT_SECONDS) as client:
                answer = client.get(f"{url.rstrip('/')}{path}", params=params, headers=headers)
            body = answer.json()
        except httpx.InvalidURL as error:
            raise ConfigError(f"--url {url}: {error}") from None
        except httpx.ConnectError:
            raise ClusterError(
                f"nothing answers at {url}; is the operator up (crynux-cluster up), "
                "and is this its address (--url)?"
            ) from None
        except httpx.HTTPError as error:
            raise ClusterError(f"{url}: {error or type(error).__name__}") from None
        except ValueError:
            raise ClusterError(
                f"{url}: this is not the operator's API (its answer isn't JSON)"
            ) from None
        if not answer.is_success:
            raise self._refusal(answer.status_code, body)
        return body

    def _refusal(self, code: int, body: object) -> ClusterError:
        said = body.get("detail") if isinstance(body, Mapping) else None
        if not isinstance(said, str) or said == _NO_PATH:
            return self._stranger(code)
        if code in {401, 403}:
            return ConfigError(f"{self.url}: {said} (--token-file)")
        return ConfigError(said) if code == 404 else ClusterError(f"{self.url}: {said}")

    def _valid(self, body: object, model: type[Model]) -> Model:
        try:
            return model.model_validate(body)
        except ValidationError:
            raise self._stranger(200) from None

    def _stranger(self, code: int) -> ClusterError:
        return ClusterError(
            f"{self.url}: HTTP {code}, and no answer of version {cluster.__version__}; "
            "is this the operator's API, and of the same version?"
        )
