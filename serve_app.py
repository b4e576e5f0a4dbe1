"""The operator's HTTP face as a Ray Serve application: `cluster.api` over the coordinator's actor.

The coordinator is asked for each answer, and given a short time: this process keeps nothing but the
last one, for a moment. It runs on the head, where the token is; the token is never an argument.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import ray
from fastapi import FastAPI
from ray import serve
from ray.actor import ActorHandle
from ray.exceptions import RayError

from actors.environment import without_password
from actors.precedence import ONLOOKERS, give_way, serve_gives_way
from cluster import logs
from cluster.api.app import create_api
from cluster.api.guard import Access
from cluster.api.source import NotKnown, SourceAway, SourceBusy
from cluster.api.tokens import is_loopback, read_token
from cluster.api.traffic import MOST_ONGOING
from cluster.config import Config
from cluster.core.errors import ClusterError, ConfigError
from cluster.core.wording import named
from cluster.lookups import TooBusy
from cluster.story import UnknownTask

COORDINATOR = "coordinator"

log = logs.get(__name__)


class CoordinatorSource:
    """Asks the named coordinator actor; finds it again when it was replaced."""

    def __init__(self, namespace: str, name: str = COORDINATOR) -> None:
        self._namespace = namespace
        self._name = name
        self._handle: ActorHandle[Any] | None = None

    async def status(self) -> Mapping[str, Any]:
        return cast(Mapping[str, Any], await self._ask("status"))

    async def metrics_text(self) -> bytes:
        return cast(bytes, await self._ask("metrics_text"))

    async def story(self, name: str) -> Mapping[str, Any]:
        return cast(Mapping[str, Any], await self._ask("story", name))

    async def bundle(self, name: str) -> Mapping[str, Any]:
        return cast(Mapping[str, Any], await self._ask("bundle", name))

    async def file(self, name: str, file: str) -> bytes:
        return cast(bytes, await self._ask("file", name, file))

    async def shown(self, who: str, what: str, task: str) -> None:
        await self._ask("shown", who, what, task)

    async def earnings(self, since: float, step: str) -> Mapping[str, Any]:
        return cast(Mapping[str, Any], await self._ask("earnings", since, step))

    async def audit(self, limit: int) -> list[Mapping[str, Any]]:
        return cast(list[Mapping[str, Any]], await self._ask("audit", limit))

    async def perform(self, order: Mapping[str, Any], who: str) -> Mapping[str, Any]:
        return cast(Mapping[str, Any], await self._ask("perform", order, who))

    async def _ask(self, method: str, *arguments: object) -> Any:  # noqa: ANN401 - as it says
        try:
            if self._handle is None:
                # It blocks on the cluster's store, so not in this loop.
                self._handle = await asyncio.to_thread(
                    ray.get_actor, self._name, namespace=self._namespace
                )
            return await getattr(self._handle, method).remote(*arguments)
        except RayError as error:  # before ValueError: what the actor raised can be both
            # Not every kind of it has a cause.
            cause = getattr(error, "cause", None)
            if isinstance(cause, UnknownTask):
                raise NotKnown(str(cause)) from None
            if isinstance(cause, TooBusy):
                raise SourceBusy(str(cause)) from None
            if isinstance(cause, ClusterError):
                raise SourceAway(_said(cause)) from None
            self._handle = None
            # Of what was raised there, the text is its whole traceback.
            log.warning("coordinator_away", asked=method, error=named(error), cause=_cause(cause))
            raise SourceAway(f"{type(error).__name__} when it was asked") from None
        except ValueError:
            raise SourceAway("it has not been started, or it is being replaced") from None


def _cause(error: object) -> str:
    """Its kind only: what a bug says may hold anything."""
    return type(error).__name__ if isinstance(error, BaseException) else ""


def _said(error: ClusterError) -> str:
    """By the coordinator itself, which is there."""
    refuses = "it refuses its configuration: " if isinstance(error, ConfigError) else ""
    return f"{refuses}{error}"


@dataclass(frozen=True, slots=True)
class EdgeSettings:
    """What the deployment is told: where the token is, never what it is."""

    namespace: str
    token_file: Path | None = None
    open_reads: bool = False
    local: bool = True
    said: logs.Settings = logs.Settings()

    @classmethod
    def of(cls, config: Config) -> EdgeSettings:
        where = config.serve
        return cls(
            config.ray.namespace,
            where.token_file,
            where.open_reads,
            is_loopback(where.host),
            logs.Settings(config.logs.level, config.logs.format),
        )

    def access(self) -> Access:
        """Raises `ConfigError`."""
        return Access(read_token(self.token_file), self.open_reads, self.local)


class Edge:
    """The deployment's class, without its decorators."""

    def __init__(self, settings: EdgeSettings) -> None:
        settings.said.setup()
        give_way(ONLOOKERS)
        self._source = CoordinatorSource(settings.namespace)
        self._access = settings.access()

    async def check_health(self) -> None:
        """Serve calls it every ten seconds."""
        await asyncio.to_thread(serve_gives_way)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_api(self._source, access=self._access)


def build(config: Config) -> serve.Application:
    """The Serve application that asks this configuration's coordinator."""
    deployment: serve.Deployment = serve.deployment(
        name="edge",
        num_replicas=1,
        max_ongoing_requests=MOST_ONGOING,
        ray_actor_options={
            "num_cpus": 0,
            # The token's file is on the head.
            "resources": {"node:__internal_head__": 0.001},
            **without_password(always=config.ray.address is not None),
        },
        health_check_timeout_s=10,
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    )(serve.ingress()(Edge))
    return deployment.bind(EdgeSettings.of(config))
