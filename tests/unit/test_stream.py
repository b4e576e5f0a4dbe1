"""What the stream of events sends: everything once, then what has changed, packed."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping
from typing import Any

import pytest

from cluster.api.contents import LEAST_BYTES, Packer, Seen, joined
from cluster.api.source import SourceAway
from cluster.api.stream import LONG, LONG_SECONDS, Changes
from cluster.status import GpuStatus, Status
from tests.unit.metric_fakes import large
from tests.unit.test_serve_app import KNOWN, Source, client, sound

SMALL = {"now": "1", "gpus": "[]"}


def test_a_status_by_its_fields_is_the_same_status() -> None:
    status = large(3)
    seen = Seen(status)
    assert Status.model_validate_json(seen.content.plain) == status
    assert json.loads(joined(seen.fields)) == status.model_dump(mode="json")


def test_only_what_has_changed_is_sent_again() -> None:
    changes = Changes()
    assert changes.since(SMALL, 0.0) == SMALL
    assert changes.since(SMALL, 2.0) == {}
    assert changes.since({**SMALL, "now": "2"}, 4.0) == {"now": "2"}
    assert changes.since({**SMALL, "now": "2"}, 6.0) == {}


def test_what_is_long_is_sent_again_only_after_a_while() -> None:
    changes = Changes()
    long = [json.dumps(str(n) * LONG) for n in range(3)]
    changes.since({"gpus": long[0], "now": "0"}, 0.0)
    assert changes.since({"gpus": long[1], "now": "2"}, 2.0).keys() == {"now"}
    # Nothing of it is lost: what is sent then is what is so then.
    later = changes.since({"gpus": long[2], "now": "3"}, LONG_SECONDS)
    assert later == {"gpus": long[2], "now": "3"}


class Growing(Source):
    """Each look finds another time, and a card more; once it is away."""

    async def status(self) -> Mapping[str, Any]:
        self.looks = getattr(self, "looks", 0) + 1
        if self.looks == 2:
            raise SourceAway("it is being replaced")
        card = sound().gpus[0]
        cards: tuple[GpuStatus, ...] = (card,) * (1 if self.looks < 4 else 2)
        return sound(now=float(self.looks), gpus=cards).model_dump(mode="json")


def test_a_viewer_puts_the_events_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.api.stream.EVENT_SECONDS", 0.0)
    ticking = iter(range(0, 1_000_000, 60))
    api = client(Growing(), clock=lambda: float(next(ticking)))
    text = api.get("/v1/events", params={"count": 4}).text
    events = [each.split("\n") for each in text.strip().split("\n\n")]
    kinds = [kind.removeprefix("event: ") for kind, _ in events]
    assert kinds == ["status", "away", "changed", "changed"]
    first, _, third, fourth = (json.loads(data.removeprefix("data: ")) for _, data in events)
    assert third.keys() == {"now"}
    assert fourth.keys() == {"now", "gpus"}
    found = Status.model_validate(first | third | fourth)
    assert (found.now, len(found.gpus)) == (4.0, 2)


def test_long_answers_are_packed_for_whoever_takes_them_so() -> None:
    api = client(Source(large(8)))
    for path in ("/v1/status", "/metrics", "/page/views.js", "/"):
        plain = api.get(path, headers={"accept-encoding": "identity"})
        packed = api.get(path, headers={"accept-encoding": "br, gzip;q=0.5"})
        assert "content-encoding" not in plain.headers
        assert packed.headers["content-encoding"] == "gzip"
        assert packed.headers["vary"] == plain.headers["vary"] == "accept-encoding"
        assert packed.text == plain.text
        assert int(packed.headers["content-length"]) < int(plain.headers["content-length"]) / 2
        refused = api.get(path, headers={"accept-encoding": "gzip;q=0, br"})
        assert "content-encoding" not in refused.headers
    short = api.get(f"/v1/tasks/{KNOWN}")
    assert len(short.content) < LEAST_BYTES
    assert "content-encoding" not in short.headers


def test_a_packed_stream_is_read_as_it_comes() -> None:
    api = client(Source(large(8)))
    for said, encoding in (("gzip", "gzip"), ("identity", None)):
        answer = api.get("/v1/events", params={"count": 1}, headers={"accept-encoding": said})
        assert answer.headers.get("content-encoding") == encoding
        assert answer.text.startswith("event: status\n")
    packer, reading = Packer(), zlib.decompressobj(31)
    packets = [packer.add(b"one"), packer.add(b"two")]
    assert [reading.decompress(each) for each in packets] == [b"one", b"two"]
    assert gzip.decompress(b"".join([*packets, packer.end()])) == b"onetwo"


def test_a_large_cluster_costs_a_viewer_little() -> None:
    """A minute in which every card and every account is another one at each look."""
    packer, changes, sent = Packer(), Changes(), 0
    status = large(256)
    for second in range(0, 60, 2):
        gpus = [each.model_copy(update={"step": second}) for each in status.gpus]
        accounts = [each.model_copy(update={"qos": second}) for each in status.accounts]
        now = {"now": float(second), "gpus": tuple(gpus), "accounts": tuple(accounts)}
        fields = changes.since(Seen(status.model_copy(update=now)).fields, float(second))
        sent += len(packer.add(joined(fields).encode()))
    assert sent < 200_000
