"""The devnet's relay: the calls of protocol.md section 3 over HTTP, and a server for them.

What it keeps and reports on chain is in `devnet.relay_store`.
"""

from __future__ import annotations

import contextlib
import logging
import re
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, JSONResponse
from starlette.datastructures import FormData, UploadFile
from web3.exceptions import Web3Exception

from cluster.core.types import TaskStatus, TaskType
from cluster.inference.scoring import score_images, score_llm
from cluster.relay.signing import InvalidSignature, recover
from devnet.relay_store import VALIDATED, Chain, Reporter, Row, Store

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 32 * 1024 * 1024
MAX_SKEW_SECONDS = 60
_TASK = "task_id_commitment"


class Refused(Exception):
    """A call that the relay refuses, and the field and words it does so with."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field
        self.message = message


def _refuse_if(condition: bool, field: str, message: str) -> None:
    if condition:
        raise Refused(field, message)


class Relay:
    """The calls of section 3, past HTTP. Each raises `Refused`."""

    def __init__(
        self, store: Store, chain: Chain, reporter: Reporter, clock: Callable[[], float]
    ) -> None:
        self.store = store
        self._chain = chain
        self._reporter = reporter
        self.clock = clock

    def signer(self, fields: Mapping[str, str], given: Mapping[str, Any]) -> str:
        """Who signed the call."""
        timestamp, signature = given.get("timestamp"), given.get("signature")
        if not isinstance(timestamp, str) or not re.fullmatch(r"[0-9]{1,15}", timestamp):
            raise Refused("timestamp", "required")
        if not isinstance(signature, str):
            raise Refused("signature", "required")
        if abs(self.clock() - int(timestamp)) > MAX_SKEW_SECONDS:
            raise Refused("signature", "Invalid signature")
        try:
            return recover(fields, int(timestamp), signature)
        except InvalidSignature:
            raise Refused("signature", "Invalid signature") from None

    def known(self, commitment: str) -> Row:
        row = self.store.task(commitment)
        if row is None:
            raise Refused("task_id", "Task not found")
        return row

    def create(self, commitment: str, signer: str, args: str, checkpoint: bytes | None) -> None:
        task = self._chain.task(commitment)
        if task is None:
            raise Refused(_TASK, "Task not found on the Blockchain")
        _refuse_if(task.status is not TaskStatus.STARTED, _TASK, "Task not started")
        _refuse_if(task.creator != signer, "signature", "Signer not allowed")
        if task.task_type is TaskType.SD_FT:
            if checkpoint is None:
                raise Refused("checkpoint", "Checkpoint not uploaded")
            self.store.write(commitment, "input.zip", checkpoint)
        added = self.store.add_task(commitment, args, task.creator, task.selected_node)
        _refuse_if(not added, _TASK, "Task already uploaded")
        self._reporter.wake()

    def read(self, commitment: str, signer: str) -> dict[str, Any]:
        row = self.known(commitment)
        # The public relay gives a task out until its results are in.
        _refuse_if(row.results > 0, "task_id", "Task not ready")
        _refuse_if(signer not in {row.selected_node, row.creator}, "signature", _NOT_ALLOWED)
        task = self._chain.task(commitment)
        if task is None:
            raise Refused("task_id", "Task not found")
        return {
            _TASK: commitment,
            "task_args": row.task_args,
            "task_type": int(task.task_type),
            "model_ids": list(task.model_ids),
            "min_vram": task.min_vram,
            "required_gpu": task.required_gpu,
            "required_gpu_vram": task.required_gpu_vram,
            "selected_node": row.selected_node,
            "creator": row.creator,
            "status": int(task.status),
        }

    def checkpoint(self, commitment: str, signer: str) -> Path:
        row = self.known(commitment)
        _refuse_if(signer not in {row.selected_node, row.creator}, "signature", _NOT_ALLOWED)
        return self._file(commitment, "input.zip", "task_id", "Checkpoint file not found")

    def put_results(
        self, commitment: str, signer: str, files: Sequence[bytes], checkpoint: bytes | None
    ) -> None:
        row = self.known(commitment)
        _refuse_if(signer != row.selected_node, "Signature", _NOT_ALLOWED)
        task = self._chain.task(commitment)
        if task is None or row.results > 0 or task.status not in VALIDATED:
            raise Refused(_TASK, "Task not validated")
        _refuse_if(not files, "files", "Files is empty")
        _refuse_if(_score(task.task_type, files) != task.score, "files", _WRONG_FILES)
        if task.task_type is TaskType.SD_FT:
            if checkpoint is None:
                raise Refused("checkpoint", "Checkpoint not uploaded")
            self.store.write(commitment, "checkpoint.zip", checkpoint)
        for index, data in enumerate(files):
            self.store.write(commitment, str(index), data)
        self.store.add_results(commitment, len(files))
        self._reporter.wake()

    def result(self, commitment: str, index: str, signer: str) -> Path:
        row = self.known(commitment)
        _refuse_if(signer != row.creator, "signature", _NOT_ALLOWED)
        _refuse_if(row.results == 0, "task_id", "Task results not uploaded")
        if index == "checkpoint":
            return self._file(commitment, "checkpoint.zip", "task_id", "Checkpoint file not found")
        _refuse_if(
            not re.fullmatch(r"0|[1-9][0-9]{0,3}", index),
            "index",
            "File not found",
        )
        return self._file(commitment, index, "index", "File not found")

    def _file(self, commitment: str, name: str, field: str, message: str) -> Path:
        path = self.store.path(commitment, name)
        _refuse_if(not path.is_file(), field, message)
        return path


_NOT_ALLOWED = "Signer not allowed"
_WRONG_FILES = "Wrong result files uploaded"


def _score(task_type: TaskType, files: Sequence[bytes]) -> bytes:
    if task_type is TaskType.LLM:
        return b"".join(score_llm(data) for data in files)
    try:
        return score_images(files)
    except ValueError:
        raise Refused("files", _WRONG_FILES) from None


async def _bytes_of(form: FormData, name: str) -> list[bytes]:
    return [await part.read() for part in form.getlist(name) if isinstance(part, UploadFile)]


async def _one(form: FormData, name: str) -> bytes | None:
    parts = await _bytes_of(form, name)
    _refuse_if(len(parts) > 1, name, f"More than one {name} file")
    return parts[0] if parts else None


def _commitment(given: str) -> str:
    if not re.fullmatch(r"0x[0-9a-f]{64}", given):
        raise Refused(_TASK, "Invalid task id commitment")
    return given


def _success(data: object = None) -> JSONResponse:
    return JSONResponse({"message": "success"} | ({} if data is None else {"data": data}))


async def _form(request: Request) -> FormData:
    length = request.headers.get("content-length", "")
    _refuse_if(not length.isdigit() or int(length) > MAX_BODY_BYTES, "files", "Body too large")
    return await request.form(max_part_size=MAX_BODY_BYTES)


def _add_calls(app: FastAPI, relay: Relay) -> None:
    root = "/v1/inference_tasks/{c}"

    @app.get("/v1/now")
    def now() -> Response:
        return _success({"now": int(relay.clock())})

    @app.post(root)
    async def create(c: str, request: Request) -> Response:
        form = await _form(request)
        args = form.get("task_args")
        if not isinstance(args, str) or not args:
            raise Refused("task_args", "required")
        signer = relay.signer({_TASK: c, "task_args": args}, form)
        checkpoint = await _one(form, "checkpoint")
        await run_in_threadpool(relay.create, _commitment(c), signer, args, checkpoint)
        return _success()

    @app.get(root)
    def read(c: str, request: Request) -> Response:
        signer = relay.signer({_TASK: c}, request.query_params)
        return _success(relay.read(_commitment(c), signer))

    @app.get(root + "/checkpoint")
    def checkpoint(c: str, request: Request) -> Response:
        signer = relay.signer({_TASK: c}, request.query_params)
        return FileResponse(relay.checkpoint(_commitment(c), signer))

    @app.post(root + "/results")
    async def put_results(c: str, request: Request) -> Response:
        form = await _form(request)
        signer = relay.signer({_TASK: c}, form)
        files = await _bytes_of(form, "files")
        checkpoint = await _one(form, "checkpoint")
        await run_in_threadpool(relay.put_results, _commitment(c), signer, files, checkpoint)
        return _success()

    @app.get(root + "/results/checkpoint")
    def result_checkpoint(c: str, request: Request) -> Response:
        signer = relay.signer({_TASK: c}, request.query_params)
        return FileResponse(relay.result(_commitment(c), "checkpoint", signer))

    @app.get(root + "/results/{index}")
    def result(c: str, index: str, request: Request) -> Response:
        signer = relay.signer({_TASK: c, "index": index}, request.query_params)
        return FileResponse(
            relay.result(_commitment(c), index, signer), media_type="application/octet-stream"
        )


def create_app(
    rpc_url: str,
    task_contract: str,
    data_dir: Path,
    relay_key: str,
    *,
    clock: Callable[[], float] = time.time,
    report: bool = True,
) -> FastAPI:
    """The relay as an application; `report=False` stores what it owes the chain and keeps it."""
    store = Store(data_dir)
    chain = Chain(rpc_url, task_contract, relay_key)
    reporter = Reporter(store, chain)

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        if report:
            reporter.start()
        yield
        if report:
            await run_in_threadpool(reporter.stop)
        store.close()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(Refused)
    async def refused(_request: Request, error: Refused) -> Response:  # noqa: RUF029
        data = {"field_name": error.field, "message": error.message}
        return JSONResponse({"message": "validation_error", "data": data}, status_code=400)

    @app.exception_handler(Web3Exception)
    @app.exception_handler(OSError)
    async def failed(_request: Request, error: Exception) -> Response:  # noqa: RUF029
        log.error("relay: %s", error)
        return JSONResponse({"message": type(error).__name__}, status_code=500)

    _add_calls(app, Relay(store, chain, reporter, clock))
    return app


class RelayServer:
    """The relay on 127.0.0.1, served from a thread; `port` 0 takes a free one."""

    def __init__(
        self,
        rpc_url: str,
        task_contract: str,
        data_dir: Path,
        relay_key: str,
        *,
        port: int = 0,
        clock: Callable[[], float] = time.time,
        report: bool = True,
    ) -> None:
        app = create_app(rpc_url, task_contract, data_dir, relay_key, clock=clock, report=report)
        self._socket = socket.create_server(("127.0.0.1", port))
        self.port: int = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._server = uvicorn.Server(
            uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=5)
        )
        self._thread = threading.Thread(
            target=self._server.run,
            kwargs={"sockets": [self._socket]},
            name="devnet-relay",
            daemon=True,
        )

    def __enter__(self) -> RelayServer:
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise RuntimeError("the relay did not start")
            time.sleep(0.02)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()
