from __future__ import annotations

import pytest

from actors.relay_sight import AWAY_SECONDS, FORGET_SECONDS, QUIET_SECONDS, RelaySight
from cluster.core.errors import (
    ClusterError,
    ParametersNotReady,
    ParametersUnreadable,
    RelayBroken,
    RelayError,
    RelayRefused,
    ResultRefused,
)
from tests.unit.actor_fakes import OTHER, TASK

AWAY = RelayError("relay: ConnectError")
BROKEN = RelayBroken("relay: HTTP 500")


def test_one_that_does_not_answer_is_away_until_it_does() -> None:
    sight = RelaySight()
    assert sight.error(0.0) is None
    sight.heard(TASK, AWAY, 1.0)
    assert sight.error(2.0) == "relay: ConnectError"
    sight.heard(OTHER, None, 3.0)
    assert sight.error(3.0) is None


@pytest.mark.parametrize(
    "answer",
    [
        RelayRefused("relay: task refused: Signer not allowed"),
        ParametersNotReady("not yet"),
        ParametersUnreadable("not ours"),
        ResultRefused("no"),
    ],
)
def test_whatever_it_says_it_is_there(answer: ClusterError) -> None:
    sight = RelaySight()
    sight.heard(TASK, answer, 0.0)
    assert sight.error(0.0) is None
    sight.heard(TASK, AWAY, 0.0)
    sight.heard(TASK, answer, 1.0)
    assert sight.error(1.0) is None


def test_a_task_that_breaks_it_again_and_again_is_no_outage_but_several_are() -> None:
    sight = RelaySight()
    for second in range(100):
        sight.heard(TASK, BROKEN, float(second))
        assert sight.error(float(second)) is None
    sight.heard(OTHER, BROKEN, 100.0)
    assert sight.error(100.0) == "relay: HTTP 500"
    sight.heard(OTHER, None, 101.0)
    assert sight.error(101.0) is None


def test_what_nobody_has_asked_for_a_while_is_forgotten() -> None:
    sight = RelaySight()
    sight.heard(TASK, AWAY, 0.0)
    assert sight.error(FORGET_SECONDS - 1) is not None
    assert sight.error(FORGET_SECONDS) is None
    sight.heard(OTHER, BROKEN, FORGET_SECONDS + 1)
    assert sight.error(FORGET_SECONDS + 1) is None


def test_it_is_asked_when_no_task_has_called_for_a_while() -> None:
    sight = RelaySight()
    assert sight.is_quiet(0.0), "nobody has ever called"
    sight.heard(TASK, None, 0.0)
    assert not sight.is_quiet(QUIET_SECONDS - 1)
    assert sight.is_quiet(QUIET_SECONDS)
    assert sight.is_quiet(-1.0), "the clock was set back"
    sight.asked("relay: ConnectError", QUIET_SECONDS)
    assert sight.error(QUIET_SECONDS + 1) == "relay: ConnectError"
    assert not sight.is_quiet(QUIET_SECONDS + AWAY_SECONDS - 1)
    assert sight.is_quiet(QUIET_SECONDS + AWAY_SECONDS), "one that is away is asked more often"
    sight.asked("", 2 * QUIET_SECONDS)
    assert sight.error(2 * QUIET_SECONDS) is None


def test_that_it_is_there_says_nothing_of_what_it_makes_of_tasks() -> None:
    sight = RelaySight()
    sight.heard(TASK, BROKEN, 0.0)
    sight.heard(OTHER, BROKEN, 1.0)
    sight.asked("", 2.0)
    assert sight.error(2.0) == "relay: HTTP 500"


def test_a_task_it_serves_shows_that_it_is_there() -> None:
    sight = RelaySight()
    sight.asked("relay: HTTP 500", 0.0)
    assert sight.error(0.0) == "relay: HTTP 500", "what asks nothing of it is no task's fault"
    sight.heard(TASK, None, 1.0)
    assert sight.error(1.0) is None
