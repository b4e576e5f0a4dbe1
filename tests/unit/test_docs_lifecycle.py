"""docs/lifecycle.md is what the code says, and the check would notice if it weren't."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

from cluster.core.lifecycle import TABLE
from cluster.core.record import Progress
from cluster.core.types import Stage

ROOT = Path(__file__).parents[2]
GENERATOR = ROOT / "docs" / "generate.py"


def check(generator: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(generator), "--check"],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_page_is_up_to_date() -> None:
    done = check(GENERATOR)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_stale_page_is_noticed(tmp_path: Path) -> None:
    generator = tmp_path / "generate.py"
    generator.write_text(GENERATOR.read_text(encoding="utf-8"), encoding="utf-8")
    page = (ROOT / "docs" / "lifecycle.md").read_text(encoding="utf-8")
    (tmp_path / "lifecycle.md").write_text(page.replace("Abort", "Pray", 1), encoding="utf-8")
    done = check(generator)
    assert (done.returncode, "lifecycle.md" in done.stdout) == (1, True)


def test_the_page_has_every_cell_and_the_diagram_every_progress() -> None:
    module = runpy.run_path(str(GENERATOR))
    page: str = module["render"]()
    rows = [line for line in page.splitlines() if line.startswith("| ") and "progress" not in line]
    assert len(rows) == sum(map(len, TABLE.values()))
    assert all(f"### {stage.name}\n" in page for stage in Stage)
    moves = list(module["progress_moves"]())
    assert {after for _, after, _ in moves} == set(Progress) - {Progress.NEW}
    assert (Progress.RUNNING, Progress.READY, "AttemptFailed") in moves
    assert (Progress.COMPUTED, Progress.DELIVERED, "ResultUploaded") in moves
