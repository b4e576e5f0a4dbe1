"""How long one scrape of 256 cards and 512 accounts takes to make, and how much it is.

What /metrics costs the coordinator: gauges set from a status, and the text. Counting the outbox and
making the status aren't in it.

    python -m benchmarks.metrics_render --json
"""

from __future__ import annotations

import statistics
import time

from benchmarks.report import arguments, publish
from cluster.metrics import Metrics
from tests.unit.metric_fakes import large

CARDS = 256
LOOKS = 50


def main() -> None:
    options = arguments(__doc__.splitlines()[0]).parse_args()
    metrics, status = Metrics("1", "d"), large(CARDS)
    metrics.observe(status)
    seconds: list[float] = []
    text, spent = b"", time.process_time()
    for _ in range(LOOKS):
        began = time.perf_counter()
        metrics.observe(status)
        text = metrics.render()
        seconds.append(time.perf_counter() - began)
    figures = {
        "cards": CARDS,
        "accounts": len(status.accounts),
        "series": sum(not line.startswith(b"#") for line in text.splitlines()),
        "bytes": len(text),
        "scrape_cpu_ms": round(1000 * (time.process_time() - spent) / LOOKS, 1),
        "scrape_p50_ms": round(1000 * statistics.median(seconds), 1),
        "scrape_max_ms": round(1000 * max(seconds), 1),
    }
    publish("metrics_render", figures, "cpu", options.json)


if __name__ == "__main__":
    main()
