"""Starting a Ray here, in more than one try where the machine is busy.

Ray gives its own processes half a minute to come up, which can't be set, and leaves them behind
when they don't. So what a failed try has left is ended before the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import psutil
import structlog

TRIES: Final = 3
END_SECONDS: Final = 10.0


def start(
    init: Callable[..., object], shutdown: Callable[[], object], options: Mapping[str, Any]
) -> None:
    """`ray.init(**options)`. `ConnectionError`, `ValueError` and `RuntimeError` are raised at once;
    for what else Ray raises, which is nothing narrower than `Exception`, there is another try."""
    for left in reversed(range(TRIES)):
        ours = _children()
        try:
            init(**options)
        except (ConnectionError, ValueError, RuntimeError):
            raise
        except Exception as error:
            shutdown()
            _end([each for each in _children() if each not in ours])
            if not left:
                raise
            structlog.get_logger("supervisor").warning(
                "ray_start_failed", error=str(error), tries_left=left
            )
        else:
            return


def _children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def _end(processes: list[psutil.Process]) -> None:
    for each in processes:
        try:
            each.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=END_SECONDS)
