"""That the benchmark of throughput runs, in small; it says nothing about speed."""

import json
import subprocess
import sys


def test_all_three_sides_answer_and_the_last_line_is_json() -> None:
    small = ["--rounds", "2", "--warmup", "0", "--concurrency", "2", "--tokens", "4"]
    command = [sys.executable, "-m", "benchmarks.mixed_levels", *small]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["tokens_per_second"].keys() == {"off", "mixed", "no hooks"}
    assert report["ratios"].keys() == {"mixed_vs_off", "off_vs_no_hooks", "mixed_vs_no_hooks"}
    assert all(speed > 0 for speed in report["tokens_per_second"].values())
