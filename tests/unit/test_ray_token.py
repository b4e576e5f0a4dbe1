from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import cast

import pytest

from cluster import ray_token


@pytest.fixture(autouse=True)
def before_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ray", raising=False)


def shown(home: Path, **environment: str) -> str | None:
    ray_token.show(environment, home)
    return environment.get(ray_token.MODE)


def test_a_token_that_is_there_is_shown_and_no_other_word_overruled(tmp_path: Path) -> None:
    assert shown(tmp_path) is None
    assert shown(tmp_path, RAY_AUTH_TOKEN="x") == "token"
    assert shown(tmp_path, RAY_AUTH_TOKEN_PATH="/x") == "token"
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("x")
    assert shown(tmp_path) == "token"
    assert shown(tmp_path, RAY_AUTH_MODE="disabled") == "disabled"


def test_once_ray_has_read_it_nothing_is_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = SimpleNamespace(is_initialized=lambda: False)
    monkeypatch.setitem(sys.modules, "ray", cast(ModuleType, ray))
    assert shown(tmp_path, RAY_AUTH_TOKEN="x") is None
