"""What the leak scanner finds and what it wrongly finds: seeded lists, and the rows of public data sets.

    make bench-leaks                # this tree; RLHF_SHARED is the shared data folder
    make bench-leaks BASE=commit    # and, beside it, the scanner of that commit

The seeded lists are those of the tests (tests/hub/leaks.py). Of each data set, the first 2,000 rows are scanned as
`push_comparisons` scans them; each finding is listed. The last line is JSON.
"""

import argparse
import gzip
import json
import os
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from hf_rlhf_ext.hub import scan as scanner  # noqa: E402
from tests.hub import leaks  # noqa: E402

DATA = Path(os.environ.get("RLHF_SHARED", "../shared")) / "data"
ROWS = 2_000
VOCABULARY = 200_000  # entries of the vocabulary that is timed

Search = Callable[[str, str], list[Any]]
"""Findings in rows: text, name of the file."""


def scanner_of(commit: str) -> types.ModuleType:
    """The scanner of a commit in which it was one module."""
    shown = subprocess.run(
        ["git", "show", f"{commit}:hf_rlhf_ext/hub/scan.py"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    module = types.ModuleType("hf_rlhf_ext.hub.scan_before")
    module.__package__ = "hf_rlhf_ext.hub"
    sys.modules[module.__name__] = module
    exec(compile(shown.stdout, f"{commit}:scan.py", "exec"), module.__dict__)
    return module


def rows_before(module: types.ModuleType) -> Search:
    return lambda text, name: list(module.scan_text(text, name))


def rows_now(text: str, name: str) -> list[Any]:
    return list(scanner.scan_text(text, name, written_by_people=True))


def read_rows(path: Path) -> list[Any]:
    """The first rows of a JSON or JSON Lines file."""
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text(encoding="utf-8")
    try:
        rows = json.loads(text)
        rows = rows if isinstance(rows, list) else [rows]
    except ValueError:
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    return rows[:ROWS]


def data_files() -> Iterator[Path]:
    for path in sorted(DATA.rglob("*.json*")):
        if path.name != "MANIFEST.json":
            yield path


def seeded(module: types.ModuleType, rows: Search) -> dict[str, Any]:
    """How many leaks are found, and on how many harmless files the scanner alarms."""

    def found(seed: leaks.Seed) -> list[Any]:
        if seed.file == leaks.ROWS:
            return rows(seed.content.decode(), "train.jsonl")
        return module.scan({seed.file: seed.content})

    seeds, harmless = leaks.leaks(), leaks.harmless()
    missed = [f"{seed.what} in {seed.file}" for seed in seeds if not found(seed)]
    alarms = [f"{seed.what} in {seed.file}" for seed in harmless if found(seed)]
    return {"leaks": len(seeds), "missed": missed, "harmless": len(harmless), "alarms": alarms}


def timed(call: Callable[[], Any]) -> float:
    """The CPU time of a call, in seconds."""
    start = time.process_time()
    call()
    return time.process_time() - start


def measure(name: str, module: types.ModuleType, rows: Search) -> dict[str, Any]:
    """All measurements of one scanner."""
    print(f"\n{name}")
    result: dict[str, Any] = {"seeded": seeded(module, rows), "rows": {}}
    of_seeds = result["seeded"]
    print(f"  seeded leaks found: {of_seeds['leaks'] - len(of_seeds['missed'])} of {of_seeds['leaks']}")
    print(f"  alarms on harmless files: {len(of_seeds['alarms'])} of {of_seeds['harmless']}")
    for what in of_seeds["missed"]:
        print(f"    missed: {what}")
    for what in of_seeds["alarms"]:
        print(f"    alarm: {what}")
    seconds, n_bytes = 0.0, 0
    for path in data_files():
        content = read_rows(path)
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in content)
        findings: list[Any] = []
        seconds += timed(lambda text=text, findings=findings: findings.extend(rows(text, "train.jsonl")))
        n_bytes += len(text.encode())
        per_1000 = 1000 * len(findings) / len(content)
        print(f"  {path.relative_to(DATA)}: {len(content)} rows, {per_1000:.1f} findings per 1,000 rows")
        for finding in findings:
            print(f"    {finding}: {_around(text, finding)}")
        result["rows"][str(path.relative_to(DATA))] = {"rows": len(content), "findings": len(findings)}
    vocabulary = leaks.tokenizer_json(vocabulary=tuple(f"▁piece{k}" for k in range(VOCABULARY)))
    result["seconds_per_mb_of_rows"] = round(seconds / n_bytes * 1e6, 3)
    in_vocabulary = timed(lambda: module.scan({"tokenizer.json": vocabulary}))
    result["seconds_per_mb_of_vocabulary"] = round(in_vocabulary / len(vocabulary) * 1e6, 3)
    for what in ("rows", "vocabulary"):
        print(f"  {result[f'seconds_per_mb_of_{what}']} s of CPU per MB of {what}")
    return result


def _around(text: str, finding: Any) -> str:
    """The text around a finding, for a judgment on it."""
    line = text.split("\n")[finding.line - 1]
    position = max(line.find(finding.text.rstrip("…")), 0)
    return f"… {line[max(position - 40, 0) : position + 60]} …"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", help="commit of the scanner to compare with, in which it was one module")
    args = parser.parse_args()
    results = {}
    if args.base:
        module = scanner_of(args.base)
        results["before"] = measure(f"scanner of {args.base}", module, rows_before(module))
    results["now"] = measure("scanner of this tree", scanner, rows_now)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
