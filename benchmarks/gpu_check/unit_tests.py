"""Part b: the tests whose answer depends on the card: gradients in every precision against float64, resuming to the bit."""

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common import ROOT, Results, make_parser, run_part


PRECISION = "tests/gradients/test_precision.py"
# They run on the GPU where there is one, with --deterministic.
RESUMING = ("tests/scripts/test_unconditional_resuming.py", "tests/scripts/test_train_siss_sd.py")
END = 1_000  # characters of the message of a failure that are kept


class Reporter:
    """A plugin of pytest: a result for each test, as soon as it is known."""

    def __init__(self, results: Results) -> None:
        self.results = results

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Add the result of a test: of its call, or of what kept it from being called."""
        if report.when != "call" and not (report.skipped or report.failed):
            return
        figures = {"seconds": report.duration}
        if report.skipped:
            figures["skipped"] = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        if report.failed:
            figures["error"] = report.longreprtext[-END:]
        self.results.add(report.nodeid.removeprefix("tests/"), not report.failed, **figures)

    def pytest_collectreport(self, report: Any) -> None:
        """Add a file that cannot be read as a failure."""
        if report.failed:
            self.results.add(report.nodeid, False, error=report.longreprtext[-END:])


def run_tests(args: argparse.Namespace, results: Results) -> None:
    """Run the tests of gradients, and those of resuming."""
    options = ["-q", "-p", "no:cacheprovider", f"--basetemp={args.folder / 'pytest'}", f"--rootdir={ROOT}"]
    runs = [[str(ROOT / PRECISION)]]
    if not args.tiny:
        runs.append([*(str(ROOT / file) for file in RESUMING), "-k", "resum and not slow"])
    for chosen in runs:
        pytest.main([*options, *chosen], plugins=[Reporter(results)])


if __name__ == "__main__":
    run_part(run_tests, make_parser(__doc__).parse_args())
