"""Part e: runs of the study of failures (benchmarks/reliability), as many as the time allows.

Each is a line of `study.jsonl` in the folder, and is not done again: a later check with the same folder goes on.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import ROOT, Results, make_parser, read_lines, run_part


RESERVE = 3.0  # seconds to end in


def run_many(args: argparse.Namespace, results: Results) -> None:
    """Run the study until the time is over, and report each of its lines."""
    ends = time.perf_counter() + args.seconds - RESERVE
    study, reported = args.folder / "study.jsonl", 0
    command = [sys.executable, str(ROOT / "benchmarks/reliability/study.py"), "--problems", "sd"]
    command += ["--output_dir", str(args.folder / "study"), "--results", str(study)]
    if args.tiny:
        command += ["--num_samples", "4", "--seeds", "0"]
    earlier = len(read_lines(study))
    child = subprocess.Popen(command)
    try:
        while child.poll() is None and time.perf_counter() < ends:
            time.sleep(0.5)
            reported = report(read_lines(study), max(reported, earlier), results)
        is_over = child.poll() is None
    finally:
        child.kill()
        child.wait()
    report(read_lines(study), max(reported, earlier), results)
    code = 0 if is_over else child.returncode
    results.add("study", code == 0, earlier=earlier, runs=len(read_lines(study)), is_complete=not is_over)


def report(lines: list[dict], start: int, results: Results) -> int:
    """Report the lines from `start` on, and return how many there are."""
    for line in lines[start:]:
        results.add(line["key"], **{name: line[name] for name in ("steps", "train_seconds") if name in line})
    return len(lines)


if __name__ == "__main__":
    run_part(run_many, make_parser(__doc__).parse_args())
