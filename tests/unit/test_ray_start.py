"""Another try where Ray didn't come up in time, and none where it never will."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import psutil
import pytest

from cluster import ray_start

SLEEP = ["sleep", "600"]


class Ray:
    """Starts what it leaves behind, as Ray does, and fails so often, by that."""

    def __init__(self, failures: int, error: Exception) -> None:
        self.left: list[subprocess.Popen[bytes]] = []
        self.shutdowns = 0
        self.given: list[dict[str, object]] = []
        self._failures = failures
        self._error = error

    def init(self, **options: object) -> None:
        self.given.append(options)
        self.left.append(subprocess.Popen(SLEEP))
        if len(self.given) <= self._failures:
            raise self._error

    def shutdown(self) -> None:
        self.shutdowns += 1

    def alive(self) -> list[bool]:
        return [psutil.pid_exists(each.pid) and each.poll() is None for each in self.left]


@pytest.fixture
def rays() -> Iterator[list[Ray]]:
    made: list[Ray] = []
    yield made
    for each in (process for ray in made for process in ray.left):
        each.kill()
        each.wait()


LATE = Exception("The current node timed out during startup.")


def test_what_a_failed_try_left_is_ended_before_the_next(rays: list[Ray]) -> None:
    ray = Ray(2, LATE)
    rays.append(ray)
    bystander = subprocess.Popen(SLEEP)
    try:
        ray_start.start(ray.init, ray.shutdown, {"address": "local"})
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()
    assert ray.given == [{"address": "local"}] * 3
    assert ray.alive() == [False, False, True]
    assert ray.shutdowns == 2


def test_the_last_failure_is_raised_and_nothing_stays(rays: list[Ray]) -> None:
    ray = Ray(9, LATE)
    rays.append(ray)
    with pytest.raises(Exception, match="timed out during startup") as caught:
        ray_start.start(ray.init, ray.shutdown, {})
    assert caught.value is LATE
    assert ray.alive() == [False] * ray_start.TRIES


@pytest.mark.parametrize("kind", [ConnectionError, ValueError, RuntimeError])
def test_what_a_second_try_would_not_mend_is_raised_at_once(
    rays: list[Ray], kind: type[Exception]
) -> None:
    ray = Ray(9, kind("another version"))
    rays.append(ray)
    with pytest.raises(kind, match="another version"):
        ray_start.start(ray.init, ray.shutdown, {})
    assert len(ray.given) == 1
