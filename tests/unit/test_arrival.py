"""How a download gets on, as it is told."""

from __future__ import annotations

from pathlib import Path

from structlog.testing import capture_logs

from cluster.models.arrival import LOG_SECONDS, Teller
from cluster.models.disk import Disk
from cluster.models.refs import ref
from cluster.models.sources import Listing, RemoteFile
from cluster.models.waiting import Wanted, Watch
from tests.unit.model_fakes import LORA, Time


def teller(root: Path, time: Time, size: int | None) -> Teller:
    disk = Disk(root)
    disk.prepare()
    watch = Watch(disk, LORA, Wanted(), time.clock, time.sleep)
    return Teller(watch, Listing("mirror", "1", (RemoteFile("x", size),)))


def lines(told: Teller, time: Time, seconds: float, rate: int) -> list[dict[str, object]]:
    """What is logged while so many bytes a second come."""
    with capture_logs() as entries:
        for _ in range(int(seconds)):
            time.now += 1
            told.arrived(rate)
            told.gain(rate)
    return [{**entry} for entry in entries]


def test_the_log_says_how_far_how_fast_and_how_long_yet(tmp_path: Path) -> None:
    time = Time()
    told = teller(tmp_path, time, 1_000_000)
    assert lines(told, time, LOG_SECONDS - 1, rate=10_000) == []
    (line,) = lines(told, time, 1, rate=10_000)
    assert line == {
        "event": "model_arriving",
        "log_level": "info",
        "model": str(LORA),
        "source": "mirror",
        "done_bytes": 150_000,
        "total_bytes": 1_000_000,
        "bytes_per_second": 10_000,
        "seconds_left": 85,
    }
    assert len(lines(told, time, 4 * LOG_SECONDS, rate=10_000)) == 4


def test_of_what_has_no_known_size_the_log_says_no_time(tmp_path: Path) -> None:
    time = Time()
    (line,) = lines(teller(tmp_path, time, None), time, LOG_SECONDS, rate=10_000)
    assert (line["total_bytes"], line["seconds_left"]) == (0, None)


def test_the_log_says_nothing_of_a_links_query(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    disk.prepare()
    time = Time()
    link = ref("lora", "https://host.example/x?token=SECRET")
    watch = Watch(disk, link, Wanted(), time.clock, time.sleep)
    told = Teller(watch, Listing("web", "1", (RemoteFile("x", 9),)))
    (line,) = lines(told, time, LOG_SECONDS, rate=10_000)
    assert "SECRET" not in str(line)
