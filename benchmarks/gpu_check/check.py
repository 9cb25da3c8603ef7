"""What a card has to say of this package, in eight minutes: `python3 benchmarks/gpu_check/check.py`.

Five parts, the most telling first, each in a process of its own with a time limit of its own: the scripts (a), the tests whose
answer depends on the card (b), the cost of a step at full size (c), a whole run by the clock (d), runs of a study (e). Results
are written as they come to `gpu_check.json`. A part that fails says so with the end of its error, and the next one runs.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from bars import read_bars
from common import ROOT, read_lines

from siss_diffusers.storage.files import write_json


HERE = Path(__file__).resolve().parent
CARRIED = HERE / "carried"
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "datasets", "bitsandbytes", "numpy")
LEAST = 10.0  # seconds that a part is worth starting with
END = 2_000  # characters of the output of a part that are kept where it fails


@dataclass(frozen=True)
class Part:
    """A program with the flags of `common.make_parser`.

    Args:
        seconds: its time limit; less where less is left.
        tiny_seconds: the same when the check is shrunk.
    """

    name: str
    program: Path
    seconds: float
    tiny_seconds: float


PARTS = (
    Part("a scripts", HERE / "scripts.py", 150, 60),
    Part("b unit tests", HERE / "unit_tests.py", 80, 60),
    Part("c steps", HERE / "steps.py", 140, 60),
    Part("d whole run", HERE / "whole_run.py", 90, 60),
    Part("e many runs", HERE / "many_runs.py", 600, 12),
)


class Stopped(Exception):
    """The check was asked to stop."""


class Report:
    """The results, written whole after every change: a reader finds complete JSON at any time."""

    def __init__(self, file: Path, content: dict) -> None:
        self.file, self.content = file, content
        self.write()

    def write(self) -> None:
        """Write the file."""
        if not self.content["tiny"]:  # whose figures mean nothing
            self.content["bars"] = read_bars(self.content["parts"])
        write_json(self.file, self.content)

    def update(self, part: str, **entries: object) -> None:
        """Change entries of a part, and write the file where they are new."""
        before = self.content["parts"].setdefault(part, {})
        if before | entries != before:
            before |= entries
            self.write()


def run_part(part: Part, seconds: float, folder: Path, report: Report, tiny: bool) -> None:
    """Run a part until it ends or its time is over; then it is killed with all that it started."""
    work, lines = folder / part.name.replace(" ", "_"), folder / f"{part.program.stem}.jsonl"
    lines.unlink(missing_ok=True)
    command = [sys.executable, str(part.program), "--results", str(lines), "--folder", str(work)]
    command += ["--seconds", str(seconds), *(["--tiny"] if tiny else [])]
    started = time.perf_counter()
    report.update(part.name, status="running", limit=round(seconds, 1))
    status = "stopped"
    with open(folder / f"{part.program.stem}.log", "w+", encoding="utf-8", errors="replace") as log:
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while time.perf_counter() - started < seconds:
                code = child.poll()
                report.update(part.name, results=read_lines(lines))
                if code is not None:
                    status = "ok" if code == 0 else "failed"
                    break
                time.sleep(0.2)
        finally:
            end_group(child)
            log.seek(0)
            error = {} if status == "ok" else {"error": log.read()[-END:]}
            took = round(time.perf_counter() - started, 1)
            report.update(part.name, status=status, seconds=took, results=read_lines(lines), **error)


def end_group(child: subprocess.Popen) -> None:
    """Kill a process and all that it started, also what it left behind."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    child.wait()


def run_parts(parts: list[Part], ends: float, folder: Path, report: Report, tiny: bool) -> None:
    """Run the parts in their order, as far as the time reaches."""
    for part in parts:
        seconds = min(part.tiny_seconds if tiny else part.seconds, ends - time.perf_counter())
        if seconds < LEAST:
            report.update(part.name, status="not reached")
            continue
        print(f"{part.name}: at most {seconds:.0f} s", flush=True)
        run_part(part, seconds, folder, report, tiny)
        done = report.content["parts"][part.name]
        print(f"{part.name}: {done['status']}, {done['seconds']} s, {len(done['results'])} results", flush=True)


def install_carried(folder: Path) -> None:
    """Install the wheels that `prepare.sh` collected, where a package is missing, for this check alone."""
    wheels = sorted(CARRIED.glob("wheels/*.whl"))
    if all(find_spec(name) for name in ("diffusers", "datasets", "peft")) or not wheels:
        return
    site = folder / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    subprocess.run([*command, "--upgrade", "--target", str(site), *map(str, wheels)])  # what is missing, the parts say
    sys.path.insert(0, str(site))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])


def describe() -> dict:
    """Return commit, card, driver and versions."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    card, driver, memory = None, None, None
    if shutil.which("nvidia-smi"):
        said = subprocess.run(query, capture_output=True, text=True)
        if said.returncode == 0 and said.stdout.count(",") >= 2:
            card, driver, memory = said.stdout.splitlines()[0].split(", ")
    versions: dict[str, str | None] = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {"commit": find_commit(), "card": card, "driver": driver, "memory": memory, "versions": versions}


def find_commit() -> str | None:
    """Return the commit of the checkout; of a copy without its history, that of the checkout that `prepare.sh` ran in."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        said = subprocess.run(
            ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True
        )
        if said.returncode == 0:
            return said.stdout.strip()
    carried = CARRIED / "commit"
    return " ".join(carried.read_text().split()) if carried.exists() else None


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    letters = [part.name[0] for part in PARTS]
    parser.add_argument("--parts", nargs="+", choices=letters, default=letters, help="Default: all.")
    parser.add_argument("--minutes", type=float, default=8.0, help="For everything. Default: 8.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/gpu_check"), help="Default: %(default)s.")
    parser.add_argument("--tiny", action="store_true", help="On the CPU, shrunk: to see that it runs, not to quote.")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None, parts: tuple[Part, ...] = PARTS) -> int:
    """Run the check; return 0 where every part was done and nothing in it failed."""
    ends = time.perf_counter()
    args = parse_args(argv)
    ends += 60 * args.minutes
    folder = args.output_dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)

    def stop(*_: object) -> None:
        raise Stopped

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    if args.tiny:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    install_carried(folder)
    chosen = [part for part in parts if part.name[0] in args.parts]
    started = datetime.now(UTC).isoformat(timespec="seconds")
    content = {"started": started, "tiny": args.tiny, "minutes": args.minutes} | describe()
    report = Report(
        folder / "gpu_check.json", content | {"parts": {part.name: {"status": "not run"} for part in chosen}}
    )
    try:
        run_parts(chosen, ends, folder, report, args.tiny)
    except Stopped:
        print("stopped", flush=True)
    print(f"results: {report.file}")
    return 0 if all(part["status"] == "ok" for part in report.content["parts"].values()) else 1


def has_gpu() -> bool:
    """Tell whether torch finds a GPU."""
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    if not parse_args().tiny and not has_gpu():
        sys.exit("check.py: error: no GPU was found; --tiny runs every part shrunk on the CPU, to see that it runs")
    sys.exit(main())
