"""Reports of runs: what a trainer or a folder knows, for `report.json` and the card."""
