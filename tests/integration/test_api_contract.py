"""What the API answers is what its OpenAPI document says, whatever it is asked (schemathesis)."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.core.failures import FailureGroup

from cluster.api.app import create_api
from cluster.api.guard import Access
from tests.integration.page_world import SaidSource

TOKEN = "0123456789abcdef"


class Clock:
    """A minute passes with each look, so that nobody is ever too fast."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 60.0
        return self.now


Case = schemathesis.Case[Any]
Context = schemathesis.AuthContext

# The stream of events never ends, unless it is told how many to send.
open_api = schemathesis.openapi.from_asgi(
    "/openapi.json", create_api(SaidSource(), access=Access(TOKEN), clock=Clock())
).exclude(path="/v1/events")
away_api = schemathesis.openapi.from_asgi(
    "/openapi.json", create_api(SaidSource(away="it is gone"), access=Access(TOKEN), clock=Clock())
).exclude(path="/v1/events")


class Bearer:
    """The check that nobody gets in without it takes it away again."""

    def get(self, case: Case, context: Context) -> str:
        return TOKEN

    def set(self, case: Case, data: str, context: Context) -> None:
        case.headers["authorization"] = f"Bearer {data}"


open_api.auth()(Bearer)
away_api.auth()(Bearer)
quick = settings(
    max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)


@open_api.parametrize()
@quick
def test_every_answer_is_as_described(case: Case) -> None:
    case.call_and_validate(base_url="http://127.0.0.1")


@away_api.parametrize()
@quick
def test_every_answer_is_as_described_while_the_coordinator_is_away(
    case: Case,
) -> None:
    # 503 is an answer here, not a crash.
    checks: list[Any] = [schemathesis.checks.not_a_server_error]
    case.call_and_validate(base_url="http://127.0.0.1", excluded_checks=checks)


def test_an_answer_of_another_shape_is_noticed() -> None:
    api = create_api(SaidSource(), clock=Clock())

    @api.get("/v1/odd", responses={200: {"model": int}})
    def odd() -> None:
        return None

    schema = schemathesis.openapi.from_asgi("/openapi.json", api)
    case = schema["/v1/odd"]["GET"].Case()
    with pytest.raises(FailureGroup, match="violates schema"):
        case.call_and_validate(base_url="http://127.0.0.1")
