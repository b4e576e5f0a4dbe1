"""The API, over a source that may be away, slow or of another version.

    GET  /                    the live page
    GET  /healthz             this process is alive, whatever else is gone
    GET  /readyz              200 when tasks can be taken; 503 with what is missing, in words
    GET  /metrics             Prometheus text; 503 while the coordinator is away
    GET  /v1/status           everything at one moment
    GET  /v1/events           the same as server-sent events, then what has changed of it
    GET  /v1/tasks/{name}     a task's whole story; /bundle: what is kept of its failed attempts;
                              /files/{file}: a file of its result, while it is kept
    GET  /v1/earnings         what came in, by the hour or day
    GET  /v1/audit            what operators had done
    POST /v1/actions          have something done (`cluster.steering`)

Nothing is kept here but the last answer, for a moment, so that many who look cost no more than one.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Coroutine, Mapping
from importlib import resources
from typing import Annotated, Any, Literal, TypeVar

from fastapi import Body, Depends, FastAPI, Path, Query, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ConfigDict, Field, ValidationError

import cluster
from cluster.api.contents import Content, Seen, takes_gzip
from cluster.api.guard import Access, Guard, address_of
from cluster.api.shared import Shared
from cluster.api.source import NotKnown, Source, SourceAway
from cluster.api.stream import EVENT_SECONDS, events, packed
from cluster.api.traffic import LONGEST_STREAM_SECONDS, Door, Stream, Traffic
from cluster.earnings import Earnings
from cluster.metrics import CONTENT_TYPE
from cluster.status import Status, View
from cluster.steering import ORDERS, ActionView, Done, Order
from cluster.story import TaskStory

TIMEOUT_SECONDS = 3.0
KEPT_SECONDS = 1.0
SCRAPED_SECONDS = 5.0
"""Prometheus asks every 15 s, unless it is told to ask more often."""
_UNSURE = "; whether it was done is not known: the audit log has what was"
MOST_DAYS = 400.0
MOST_BODY = 65_536
"""Bytes of a request. A body is read before it is known who sends it."""

Answer = TypeVar("Answer")
PagePart = Literal["app.js", "dom.js", "plot.js", "story.js", "views.js", "style.css"]


class Health(BaseModel):
    alive: bool = True
    version: str = cluster.__version__


class Readiness(BaseModel):
    model_config = ConfigDict(frozen=True)

    ready: bool
    missing: tuple[str, ...] = ()


class Problem(BaseModel):
    detail: str


class Bundle(View):
    """`parameters` is the task's own text, a prompt among it."""

    story: TaskStory
    parameters: str | None
    attempts: tuple[dict[str, Any], ...] = Field(default=())


def _says(code: int, what: str, model: type[BaseModel] = Problem) -> dict[int | str, Any]:
    return {code: {"model": model, "description": what}}


_CLOSED = _says(401, "A token is needed.") | _says(403, "Not from there.")
_CLOSED |= _says(429, "Too often; `Retry-After` says when again.")
_AWAY = _says(503, "The coordinator can't be asked now.")
_UNKNOWN = _says(404, "No such task is known.")
_READ = _CLOSED | _AWAY
_TOO_LONG = _says(413, f"It has more than {MOST_BODY} bytes.")
_TOO_LONG[413]["content"] = {"text/plain": {"schema": {"type": "string"}}}

_PNG = b"\x89PNG\r\n\x1a\n"
_AS_A_FILE = {
    "x-content-type-options": "nosniff",
    "content-disposition": "attachment",
    "cache-control": "no-store",
}
_FILE_TYPES: Mapping[str, Any] = {"image/png": {}, "application/octet-stream": {}}

FileName = Annotated[str, Path(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
Name = Annotated[str, Path(min_length=1, max_length=80, description="A task's or attempt's id.")]


def create_api(
    source: Source,
    timeout: float = TIMEOUT_SECONDS,
    access: Access = Access(),  # noqa: B008 - frozen
    clock: Callable[[], float] = time.monotonic,
    wall: Callable[[], float] = time.time,
) -> FastAPI:
    """The API over `source`, which gets `timeout` seconds for each answer."""
    api = FastAPI(
        title="crynux-cluster",
        version=cluster.__version__,
        summary="A GPU cluster that serves the Crynux network.",
        docs_url=None,  # they would load scripts from elsewhere
        redoc_url=None,
        max_body_size=MOST_BODY,
    )
    guard, traffic = Guard(access, clock), Traffic()
    api.add_middleware(Door, traffic=traffic)
    status_now = Shared(lambda: _look(source, timeout), KEPT_SECONDS, clock)
    events_now = Shared(status_now.get, EVENT_SECONDS, clock)
    metrics_now = Shared(lambda: _scrape(source, timeout, traffic), SCRAPED_SECONDS, clock)
    bearer = HTTPBearer(auto_error=False, description="The token of serve.token_file.")
    reading = [Depends(guard.read), Depends(bearer)]
    acting = [Depends(bearer)]
    _answer_errors(api)
    _add_page(api)
    _add_health(api, status_now)
    _add_tasks(api, source, timeout, guard, reading, acting)

    @api.get(
        "/metrics",
        summary="Prometheus metrics",
        response_class=Response,  # of no content type: the refusals are JSON
        responses=_READ | {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
        dependencies=reading,
    )
    async def metrics(request: Request) -> Response:
        return (await metrics_now.get()).answer(request, {"content-type": CONTENT_TYPE})

    @api.get(
        "/v1/status",
        summary="Everything at one moment",
        response_model=Status,
        responses=_READ,
        dependencies=reading,
    )
    async def status(request: Request) -> Response:
        seen = await status_now.get()
        return seen.content.answer(request, {"content-type": "application/json"})

    @api.get(
        "/v1/events",
        summary="The status as server-sent events: whole, then what has changed of it",
        response_class=StreamingResponse,
        responses=_CLOSED
        | _says(503, "Too many follow already.")
        | {200: {"content": {"text/event-stream": {}}}},
        dependencies=reading,
    )
    async def follow(
        request: Request,
        count: Annotated[int | None, Query(ge=1, le=1_000_000, description="End after.")] = None,
    ) -> Stream:
        address = address_of(request)
        traffic.enter(address)
        stream = events(events_now, clock, count, LONGEST_STREAM_SECONDS)
        headers = {"cache-control": "no-store"}
        if takes_gzip(request):
            stream, headers = packed(stream), headers | {"content-encoding": "gzip"}
        return Stream(stream, lambda: traffic.leave(address), headers)

    @api.get(
        "/v1/earnings",
        summary="What came in and what gas went out, by the hour or day",
        responses=_READ,
        dependencies=reading,
    )
    async def earnings(
        days: Annotated[float, Query(gt=0, le=MOST_DAYS, description="How far back.")] = 1.0,
        step: Literal["hour", "day"] = "hour",
    ) -> Earnings:
        since = wall() - days * 86_400
        found = await _in_time(source.earnings(since, step), timeout)
        return _valid(Earnings, found)

    traffic.expect(api.routes)
    return api


def _add_tasks(
    api: FastAPI, source: Source, timeout: float, guard: Guard, reading: Any, acting: Any
) -> None:
    @api.get(
        "/v1/tasks/{name}",
        summary="A task's whole story, by any of its ids",
        responses=_READ | _UNKNOWN,
        dependencies=reading,
    )
    async def story(name: Name) -> TaskStory:
        return _valid(TaskStory, await _in_time(source.story(name), timeout))

    @api.get(
        "/v1/tasks/{name}/bundle",
        summary="What is kept of its failed attempts, its parameters among it",
        responses=_READ | _UNKNOWN,
        dependencies=acting,
    )
    async def bundle(
        name: Name,
        who: str = Depends(guard.look),  # noqa: FAST002 - it can't be found by its name
    ) -> Bundle:
        found = _valid(Bundle, await _in_time(source.bundle(name), timeout))
        await _in_time(source.shown(who, "bundle", name), timeout)
        return found

    @api.get(
        "/v1/tasks/{name}/files/{file}",
        summary="A file of its result, while it is kept",
        response_class=Response,
        responses=_READ | _UNKNOWN | {200: {"content": _FILE_TYPES}},
        dependencies=acting,
    )
    async def result_file(
        name: Name,
        file: FileName,
        who: str = Depends(guard.look),  # noqa: FAST002 - it can't be found by its name
    ) -> Response:
        data = await _in_time(source.file(name, file), timeout)
        await _in_time(source.shown(who, "result", name), timeout)
        kind = "image/png" if data.startswith(_PNG) else "application/octet-stream"
        return Response(data, media_type=kind, headers=_AS_A_FILE)

    @api.get(
        "/v1/audit",
        summary="What operators had done, the newest first",
        responses=_READ,
        dependencies=[*acting, Depends(guard.look)],
    )
    async def audit(
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    ) -> tuple[ActionView, ...]:
        found = await _in_time(source.audit(limit), timeout)
        return tuple(_valid(ActionView, each) for each in found)

    @api.post(
        "/v1/actions",
        summary="Have something done",
        responses=_READ
        | _says(400, "It isn't JSON.")
        | _says(404, "What it names isn't known.", Done)
        | _says(409, "It can't be done now.", Done)
        | _TOO_LONG,
        dependencies=acting,
    )
    async def act(
        order: Annotated[Order, Body()],
        response: Response,
        who: str = Depends(guard.act),  # noqa: FAST002 - it can't be found by its name
    ) -> Done:
        plain = ORDERS.dump_python(order, mode="json")
        found = await _in_time(source.perform(plain, who), 10 * timeout, _UNSURE)
        done = _valid(Done, found)
        response.status_code = {"unknown": 404, "refused": 409}.get(done.kind, 200)
        return done


def _add_health(api: FastAPI, status_now: Shared[Seen]) -> None:
    @api.get("/healthz", summary="This process is alive")
    async def healthz() -> Health:  # noqa: RUF029
        return Health()

    @api.get(
        "/readyz",
        summary="Whether tasks can be taken, and what is missing",
        responses=_says(503, "Tasks can't be taken now.", Readiness),
    )
    async def readyz(response: Response) -> Readiness:
        try:
            status = (await status_now.get()).status
            ready, missing = status.ready, status.missing
        except SourceAway as error:
            ready, missing = False, (error.words,)
        response.status_code = 200 if ready else 503
        return Readiness(ready=ready, missing=missing)


def _add_page(api: FastAPI) -> None:
    """The page holds no data of its own, so anyone may have it."""
    folder = resources.files("cluster.api") / "page"
    headers = {
        "cache-control": "no-cache",
        "content-security-policy": "default-src 'self'; img-src 'self' blob: data:; "
        "style-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
    }

    @functools.cache
    def part_of(name: str) -> Content:
        return Content((folder / name).read_bytes())

    @api.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page(request: Request) -> Response:  # noqa: RUF029
        kind = {"content-type": "text/html; charset=utf-8"}
        return part_of("index.html").answer(request, headers | kind)

    @api.get("/page/{name}", include_in_schema=False)
    async def part(name: PagePart, request: Request) -> Response:  # noqa: RUF029
        kind = "text/css" if name.endswith(".css") else "text/javascript"
        told = headers | {"content-type": f"{kind}; charset=utf-8"}
        return part_of(name).answer(request, told)


def _answer_errors(api: FastAPI) -> None:
    @api.exception_handler(SourceAway)
    async def away(_request: Request, error: SourceAway) -> JSONResponse:  # noqa: RUF029
        return JSONResponse(Problem(detail=error.words).model_dump(), 503)

    @api.exception_handler(NotKnown)
    async def not_known(_request: Request, error: NotKnown) -> JSONResponse:  # noqa: RUF029
        return JSONResponse(Problem(detail=str(error)).model_dump(), 404)


async def _look(source: Source, timeout: float) -> Seen:  # noqa: ASYNC109
    return Seen(_valid(Status, await _in_time(source.status(), timeout)))


async def _scrape(source: Source, timeout: float, traffic: Traffic) -> Content:  # noqa: ASYNC109
    """One text for everything: the coordinator's, and of what only this process knows."""
    return Content(await _in_time(source.metrics_text(), timeout) + traffic.render())


Model = TypeVar("Model", bound=BaseModel)


def _valid(model: type[Model], found: Mapping[str, Any]) -> Model:
    try:
        return model.model_validate(found)
    except ValidationError as error:
        # An older coordinator, while a new version rolls out.
        fields = error.error_count()
        detail = f"its {model.__name__} is not of this version ({fields} fields differ)"
        raise SourceAway(detail) from None


async def _in_time(
    answer: Coroutine[Any, Any, Answer],
    timeout: float,  # noqa: ASYNC109
    more: str = "",
) -> Answer:
    try:
        return await asyncio.wait_for(answer, timeout)
    except TimeoutError:
        raise SourceAway(f"no answer within {timeout:g} s{more}") from None
