"""Time and memory of conversion and quality report for 100,000 rows in the format of HH-RLHF.

`make bench` runs it. It measures a first call and a second one, which reads the cache.
"""

import json
import random
import subprocess
import sys
from pathlib import Path

ROWS = 100_000

ONE_CALL = """
import json, resource, sys, time
from hf_rlhf_ext import load_comparisons, quality_report
start = time.perf_counter()
data, loaded = load_comparisons(sys.argv[1])
middle = time.perf_counter()
report = quality_report(data, source=loaded.source)
end = time.perf_counter()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps({"rows": loaded.kept, "convert_s": middle - start, "report_s": end - middle, "peak_gb": peak}))
"""


def transcripts(path: Path) -> None:
    """Writes random words in the format of HH-RLHF: prompts of 20 words, replies of 20 to 80 words."""
    rng = random.Random(0)
    vocabulary = [f"{word}{k}" for k in range(40) for word in ("tree", "river", "stone", "cloud", "lamp")]
    with path.open("w") as file:
        for _ in range(ROWS):
            head = f"\n\nHuman: {' '.join(rng.choices(vocabulary, k=20))}\n\nAssistant: "
            sides = [head + " ".join(rng.choices(vocabulary, k=rng.randint(20, 80))) for _ in range(2)]
            file.write(json.dumps({"chosen": sides[0], "rejected": sides[1]}) + "\n")


def test_conversion_and_report_of_many_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "pairs.jsonl"
    transcripts(path)
    results = {}
    for name in ("first call", "second call"):
        done = subprocess.run([sys.executable, "-c", ONE_CALL, str(path)], capture_output=True, text=True, check=True)
        results[name] = json.loads(done.stdout.splitlines()[-1])
    with capsys.disabled():
        print(f"\n{'':12} rows     convert   report    peak memory")
        for name, found in results.items():
            seconds = f"{found['convert_s']:6.1f} s  {found['report_s']:6.1f} s"
            print(f"{name:12} {found['rows']:,}  {seconds}  {found['peak_gb']:.2f} GB")
        print(json.dumps(results))
