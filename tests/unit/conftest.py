"""Unit tests reach nothing: no socket beyond an event loop's own pair, and no Ray.

These are hooks and not fixtures, because a fixture per function doesn't go with Hypothesis.
"""

from __future__ import annotations

import socket
import sys
from typing import NoReturn

import pytest
from pytest_socket import SocketBlockedError, disable_socket, enable_socket

_ray_init: list[object] = []


def _no_connection(*_args: object, **_kwargs: object) -> NoReturn:
    raise SocketBlockedError


def _no_ray(*_args: object, **_kwargs: object) -> NoReturn:
    raise RuntimeError("a unit test must not start Ray: test the plain class")


def pytest_runtest_setup(item: pytest.Item) -> None:
    # A Unix socket pair is what an event loop is made of; connecting or binding one is refused.
    disable_socket(allow_unix_socket=True)
    for method in ("connect", "connect_ex", "bind"):
        setattr(socket.socket, method, _no_connection)
    ray = sys.modules.get("ray")
    if ray is not None and ray.init is not _no_ray:
        _ray_init.append(ray.init)
        ray.init = _no_ray  # type: ignore[attr-defined]


def pytest_runtest_teardown(item: pytest.Item) -> None:
    enable_socket()
    ray = sys.modules.get("ray")
    if ray is None:
        return
    if _ray_init:
        ray.init = _ray_init.pop()  # type: ignore[attr-defined]
    if ray.is_initialized():
        ray.shutdown()
        pytest.fail("a unit test started Ray")
