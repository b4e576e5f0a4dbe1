"""Ten readers of one machine who want one model, by our store and each for himself.

A local hub serves the model. First ten processes ask one store for it, then ten processes download
it with huggingface_hub, each into a cache of its own, as nodes do that share nothing. Both in the
same run, in turns; bytes are what the hub sent of the weights.

    python -m benchmarks.model_fetch --json
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.report import arguments, progress, publish
from cluster.models.guarded_http import guarded_client
from cluster.models.hub import Hub as HubSource
from cluster.models.keeper import Keeper, Wanted
from cluster.models.refs import ref
from cluster.models.settings import Limits
from cluster.models.store import ModelStore
from cluster.models.urls import UrlRules
from devnet.hub import Hub

REPO, FILE = "acme/style", "pytorch_lora_weights.safetensors"


def weights(megabytes: int) -> bytes:
    size = megabytes * 10**6
    header = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(range(250)) * (size // 250)


def ours(folder: str, url: str) -> None:
    """One reader of the store."""
    port = urlsplit(url).port
    rules = UrlRules(allow_hosts=frozenset({f"127.0.0.1:{port}", f"localhost:{port}"}))
    source = HubSource(lambda: guarded_client(rules), url)
    keeper = Keeper(ModelStore(Path(folder)), [source], Limits(spare=0))
    keeper.room.tidy()
    keeper.ensure(ref("lora", REPO), Wanted())
    print(keeper.store.lora_file(REPO).stat().st_size)


def theirs(folder: str, url: str) -> None:
    """One reader for himself."""
    from huggingface_hub import hf_hub_download

    cache = tempfile.mkdtemp(dir=folder)
    file = hf_hub_download(REPO, FILE, endpoint=url, cache_dir=cache, token=False)
    print(Path(file).stat().st_size)


def timed(
    reader: Callable[[str, str], None], readers: int, hub: Hub, size: int
) -> tuple[float, int]:
    """Seconds until all readers have the model, and bytes that the hub sent for it."""
    program = f"import sys; from {__spec__.name} import {reader.__name__} as read; "
    before, began = hub.sent("cdn/"), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            subprocess.Popen(
                [
                    sys.executable,
                    "-W",
                    "ignore",
                    "-c",
                    f"{program}read(*sys.argv[1:])",
                    folder,
                    hub.url,
                ],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            for _ in range(readers)
        ]
        said = [process.communicate()[0].strip() for process in processes]
        seconds = time.perf_counter() - began
    if said != [str(size)] * readers:
        sys.exit(f"error: a reader of {reader.__name__} has no model: {said}")
    return seconds, hub.sent("cdn/") - before


def medians(runs: Sequence[tuple[float, int]]) -> tuple[float, float]:
    seconds, sizes = zip(*runs, strict=True)
    return statistics.median(seconds), statistics.median(sizes)


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--readers", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    content = weights(asked.megabytes)
    runs: dict[str, list[tuple[float, int]]] = {"ours": [], "theirs": []}
    with Hub() as hub:
        hub.add(REPO, {FILE: content})
        for number in range(asked.rounds):
            for reader in (ours, theirs):
                runs[reader.__name__].append(timed(reader, asked.readers, hub, len(content)))
            progress(f"round {number + 1} of {asked.rounds}")
    (seconds, size), (seconds_each, size_each) = medians(runs["ours"]), medians(runs["theirs"])
    publish(
        "model_fetch",
        {
            "ratio_bytes": round(size / size_each, 4),
            "ratio_seconds": round(seconds / seconds_each, 4),
            "bytes": int(size),
            "bytes_each_for_himself": int(size_each),
            "seconds": round(seconds, 3),
            "seconds_each_for_himself": round(seconds_each, 3),
            "readers": asked.readers,
            "megabytes": asked.megabytes,
            "rounds": asked.rounds,
        },
        "cpu",
        asked.json,
    )


if __name__ == "__main__":
    main()
