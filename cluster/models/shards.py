"""The tables of sharded weights: `<weights>.index.json` says which file has which tensor.

The libraries open what such a table names, wherever it leads, and what doesn't end in
`.safetensors` as a pickle. So a table names safetensors files beside itself, or the model isn't
taken.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Final

from cluster.models import strict_json
from cluster.models.refusals import Refused, Rule

MOST: Final = 64 * 2**20
"""Bytes: the largest published models have tables of some ten million."""
_INDEX: Final = re.compile(r".*\.index\b.*\.json", re.DOTALL)
_OF_PICKLES: Final = re.compile(r"[\w-]+\.bin\.index(\.\w+)?\.json", re.ASCII)
"""Repositories that were cloned whole have it; nothing that loads safetensors only looks at it."""
_SHARD: Final = re.compile(r"(?!\.)[\w.-]{1,150}\.safetensors", re.ASCII)


def is_index(name: str) -> bool:
    """Whether a library might take the file for such a table."""
    return bool(_INDEX.fullmatch(name)) and not _OF_PICKLES.fullmatch(name)


def missing_shards(file: Path) -> tuple[str, ...]:
    """What the table names and isn't there. Raises `Refused` for a table that leads elsewhere or is
    none, and `OSError` where it can't be read."""
    stat = file.stat()
    names = _named(file, stat.st_size, stat.st_mtime_ns, stat.st_ino)
    return tuple(name for name in names if not (file.parent / name).is_file())


@lru_cache(maxsize=64)
def _named(file: Path, size: int, _mtime_ns: int, _inode: int) -> tuple[str, ...]:
    """Each shard once; read anew when the file was changed."""
    if size > MOST:
        raise _refused(file, f"it has more than {MOST} bytes")
    try:
        data = strict_json.loads(file.read_bytes())
    except ValueError:
        raise _refused(file, "it is not JSON") from None
    shards = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(shards, dict) or not shards:
        raise _refused(file, "it doesn't say which file has which tensor")
    for name in shards.values():
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise _refused(file, f"it names {ascii(name)[:100]}, no safetensors file beside it")
    return tuple(sorted(set(shards.values())))


def _refused(file: Path, what: str) -> Refused:
    return Refused(Rule.FILE_KIND, f"{file.name[:100]}: {what}")
