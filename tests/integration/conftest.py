"""The operator and the models that tests share, and what is shown of it when one of them fails."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest

from tests.integration.card_world import tiny_models
from tests.integration.kube_world import KubeWorld
from tests.integration.operator_start import operator_world
from tests.integration.operator_world import OperatorWorld

__all__ = ["tiny_models"]


@pytest.fixture(scope="session")
def running_operator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OperatorWorld]:
    with operator_world(tmp_path_factory.mktemp("operator")) as world:
        yield world


@pytest.fixture
def operator(running_operator: OperatorWorld) -> Iterator[OperatorWorld]:
    running_operator.begin()
    yield running_operator
    running_operator.fuse.disarm()
    assert running_operator.complaints() == []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    given = getattr(item, "funcargs", {})
    world = given.get("operator") or given.get("kube")
    if report.failed and isinstance(world, OperatorWorld | KubeWorld):
        report.sections.append(("the operator", world.explain()))
    return report
