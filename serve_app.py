"""The operator's HTTP face: health, readiness, metrics and status, as a Ray Serve application.

    GET /healthz     this process is alive, whatever else is gone
    GET /readyz      200 when tasks can be taken; 503 with what is missing, in words
    GET /metrics     Prometheus text; 503 while the coordinator is away
    GET /v1/status   everything at one moment
    GET /openapi.json, /docs

The coordinator is asked for each answer, and given a short time: this process keeps nothing.
`create_api` knows nothing of Ray; the deployment at the file's end gives it a source that does.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Mapping
from typing import Any, Protocol, TypeVar

import ray
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, ConfigDict, ValidationError
from ray import serve
from ray.actor import ActorHandle
from ray.exceptions import RayError

import cluster
from actors.environment import without_password
from cluster.metrics import CONTENT_TYPE
from cluster.status import Status, readiness

COORDINATOR = "coordinator"
TIMEOUT_SECONDS = 3.0

Answer = TypeVar("Answer")

log = logging.getLogger(__name__)


class SourceAway(Exception):
    """The coordinator can't be asked now; the message says why, in one line."""


class StatusSource(Protocol):
    """Where the answers come from. Raises `SourceAway`."""

    async def status(self) -> Mapping[str, Any]:
        """`Status`, as `model_dump(mode="json")` gives it."""
        ...

    async def metrics_text(self) -> bytes: ...


class Health(BaseModel):
    alive: bool = True
    version: str = cluster.__version__


class Readiness(BaseModel):
    model_config = ConfigDict(frozen=True)

    ready: bool
    missing: tuple[str, ...] = ()


class Away(BaseModel):
    detail: str


_HINT = """crynux-cluster {version}

/healthz     this process is alive
/readyz      can tasks be taken, and if not, why
/metrics     Prometheus metrics
/v1/status   identity, accounts, GPUs, tasks (JSON)
/docs        the API
"""
_AWAY: dict[int | str, dict[str, Any]] = {
    503: {"model": Away, "description": "The coordinator can't be asked now."}
}


def create_api(source: StatusSource, timeout: float = TIMEOUT_SECONDS) -> FastAPI:
    """The API over `source`, which gets `timeout` seconds for each answer."""
    api = FastAPI(
        title="crynux-cluster",
        version=cluster.__version__,
        summary="A GPU cluster that serves the Crynux network.",
    )

    async def look() -> Status:
        try:
            return Status.model_validate(await _in_time(source.status(), timeout))
        except ValidationError as error:
            # An older coordinator, while a new version rolls out.
            detail = f"its status is not of this version ({error.error_count()} fields differ)"
            raise SourceAway(detail) from None

    @api.exception_handler(SourceAway)
    async def away(_request: Request, error: SourceAway) -> JSONResponse:  # noqa: RUF029
        return JSONResponse(Away(detail=_away(error)).model_dump(), 503)

    @api.get("/", response_class=PlainTextResponse, include_in_schema=False)
    async def hint() -> str:  # noqa: RUF029
        return _HINT.format(version=cluster.__version__)

    @api.get("/healthz", summary="This process is alive")
    async def healthz() -> Health:  # noqa: RUF029
        return Health()

    @api.get(
        "/readyz",
        summary="Whether tasks can be taken, and what is missing",
        responses={503: {"model": Readiness, "description": "Tasks can't be taken now."}},
    )
    async def readyz(response: Response) -> Readiness:
        try:
            ready, missing = readiness(await look())
        except SourceAway as error:
            ready, missing = False, (_away(error),)
        response.status_code = 200 if ready else 503
        return Readiness(ready=ready, missing=missing)

    @api.get(
        "/metrics",
        summary="Prometheus metrics",
        response_class=PlainTextResponse,
        responses=_AWAY,
    )
    async def metrics() -> Response:
        text = await _in_time(source.metrics_text(), timeout)
        return Response(text, headers={"content-type": CONTENT_TYPE})

    @api.get("/v1/status", summary="Everything at one moment", responses=_AWAY)
    async def status() -> Status:
        return await look()

    return api


def _away(error: SourceAway) -> str:
    return f"the coordinator is away: {error}"


async def _in_time(answer: Coroutine[Any, Any, Answer], timeout: float) -> Answer:  # noqa: ASYNC109
    try:
        return await asyncio.wait_for(answer, timeout)
    except TimeoutError:
        raise SourceAway(f"no answer within {timeout:g} s") from None


# --- Ray ----------------------------------------------------------------------------------------


class CoordinatorSource:
    """Asks the named coordinator actor; finds it again when it was replaced."""

    def __init__(self, namespace: str, name: str = COORDINATOR) -> None:
        self._namespace = namespace
        self._name = name
        self._handle: ActorHandle[Any] | None = None

    async def status(self) -> Mapping[str, Any]:
        answer: Mapping[str, Any] = await self._ask("status")
        return answer

    async def metrics_text(self) -> bytes:
        answer: bytes = await self._ask("metrics_text")
        return answer

    async def _ask(self, method: str) -> Any:
        try:
            if self._handle is None:
                # It blocks on the cluster's store, so not in this loop.
                self._handle = await asyncio.to_thread(
                    ray.get_actor, self._name, namespace=self._namespace
                )
            return await getattr(self._handle, method).remote()
        except RayError as error:  # before ValueError: what the actor raised can be both
            self._handle = None
            log.warning("the coordinator did not answer: %s", error)
            raise SourceAway(f"{type(error).__name__} when it was asked") from None
        except ValueError:
            raise SourceAway("it has not been started, or it is being replaced") from None


class Edge:
    """The deployment's class, without its decorators."""

    def __init__(self, namespace: str) -> None:
        self._source = CoordinatorSource(namespace)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_api(self._source)


def build(namespace: str) -> serve.Application:
    """The Serve application that asks the coordinator in `namespace`."""
    deployment: serve.Deployment = serve.deployment(
        name="edge",
        num_replicas=1,
        max_ongoing_requests=64,
        ray_actor_options={"num_cpus": 0, **without_password()},
        health_check_timeout_s=10,
        logging_config={"enable_access_log": False},
    )(serve.ingress()(Edge))
    return deployment.bind(namespace)
