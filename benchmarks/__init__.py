"""Each prints one JSON object with `--json`; `report.py` has what they share."""
