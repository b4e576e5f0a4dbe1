"""The operator's configuration: read once, checked once, then passed in as a frozen value.

Whatever is wrong with a file becomes one line that names the file, the key, what is wrong and how
to mend it (`ConfigError`). Relative paths are relative to the configuration file. What can hold a
credential (a database URL, an endpoint with a key in it) is left out of `repr`.
"""

from cluster.config.reading import load
from cluster.config.schema import Config, changes, digest
from cluster.config.values import WEI_PER_CNX

__all__ = ["WEI_PER_CNX", "Config", "changes", "digest", "load"]
