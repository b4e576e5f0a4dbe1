"""Writes configs/grafana/dashboards/*.json: `python configs/grafana/generate.py [--check]`.

With `--check` nothing is written, and the exit code is 1 when a file isn't what the code says.
"""

from __future__ import annotations

import sys
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from pages import chain, fleet, gpu, money
from panels import Page, make

FOLDER = Path(__file__).with_name("dashboards")
PAGES: dict[str, Page] = {
    "fleet": fleet.PAGE,
    "gpu": gpu.PAGE,
    "chain": chain.PAGE,
    "money": money.PAGE,
}


def main(argv: list[str]) -> int:
    stale = []
    for name, page in PAGES.items():
        file = FOLDER / f"{name}.json"
        text = JSONEncoder(indent=2, sort_keys=True).encode(make(page)) + "\n"
        if "--check" not in argv:
            file.write_text(text, encoding="utf-8")
        elif not file.exists() or file.read_text(encoding="utf-8") != text:
            stale.append(file.name)
    stale += [file.name for file in FOLDER.glob("*.json") if file.stem not in PAGES]
    if stale:
        print(f"not what configs/grafana/generate.py makes: {', '.join(sorted(stale))}")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
