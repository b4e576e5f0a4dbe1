"""The chart's values.schema.json and README.md, written by code: `python -m helm.schema.generate`.

What stands under `config` is the operator's own configuration, so its types and bounds come from
`cluster.config` and its words from the project's README. A test fails when the files are not up to
date; `make docs` writes them.
"""
