"""The check of a card: what becomes of parts that fail, hang or are killed; and all of it, shrunk, on the CPU."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from siss_diffusers.flags import parse_settings
from siss_diffusers.settings import TextToImageSettings, UnconditionalSettings, resolve
from tests.helpers.paths import ROOT
from tests.helpers.scripts import imported_script


FOLDER = ROOT / "benchmarks" / "gpu_check"
CHECK = FOLDER / "check.py"
HEAD = f"""
import sys, time, subprocess
sys.path.insert(0, {str(FOLDER)!r})
from common import make_parser, run_part

def do(args, results):
"""
TAIL = "\nrun_part(do, make_parser(None).parse_args())\n"
# What a part does, and what becomes of it.
GOOD = 'results.add("one", figure=1)'
FAILING = 'results.add("one"); raise RuntimeError("the reason")'
NOT_AS_IT_SHOULD_BE = 'results.add("one", ok=False); results.add("two")'
HANGING = """
    child = subprocess.Popen(["sleep", "120"])
    results.add("one", pid=child.pid)
    time.sleep(120)
"""


@pytest.fixture
def start(tmp_path):
    """Starts the check with parts of one's own, 3 seconds each where nothing else is said."""

    def start(*bodies: str, minutes: float = 1.0, seconds: float = 3.0) -> subprocess.Popen:
        parts = []
        for letter, body in zip("abcde", bodies):
            program = tmp_path / f"part_{letter}.py"
            program.write_text(HEAD + "    " + body.strip("\n").removeprefix("    ") + TAIL)
            parts.append(f"Part({letter!r}, Path({str(program)!r}), {seconds}, {seconds})")
        driver = tmp_path / "driver.py"
        driver.write_text(
            f"import sys\nfrom pathlib import Path\nsys.path.insert(0, {str(FOLDER)!r})\nimport check\n"
            f"from check import Part\ncheck.LEAST = 0.1\nsys.exit(check.main(sys.argv[1:], ({', '.join(parts)},)))\n"
        )
        command = [sys.executable, str(driver), "--minutes", str(minutes), "--output_dir", str(tmp_path / "out")]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return start


@pytest.fixture
def report(tmp_path):
    """Reads the results, which are complete JSON at any time."""
    return lambda: json.loads((tmp_path / "out" / "gpu_check.json").read_text())


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_for(condition, seconds: float = 30.0) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.05)


def test_a_part_that_fails_says_why_and_the_next_one_runs(start, report):
    done = start(FAILING, NOT_AS_IT_SHOULD_BE, GOOD, seconds=20)
    assert done.wait(60) == 1
    first, second, third = report()["parts"].values()
    assert first["status"] == "failed" and first["error"].rstrip().endswith("RuntimeError: the reason")
    assert [result["name"] for result in first["results"]] == ["one"]
    assert second["status"] == "failed" and second["error"].rstrip().endswith("not as it should be: one")
    assert [result["ok"] for result in second["results"]] == [False, True]
    assert third["status"] == "ok" and third["results"] == [{"name": "one", "ok": True, "figure": 1}]
    assert "error" not in third


def test_a_part_that_hangs_is_killed_with_its_children_and_the_next_one_runs(start, report):
    done = start(HANGING, GOOD)
    assert done.wait(60) == 1
    hanging, good = report()["parts"].values()
    assert hanging["status"] == "stopped" and 3 <= hanging["seconds"] < 10
    assert not is_alive(hanging["results"][0]["pid"])
    assert good["status"] == "ok"


def test_what_a_part_leaves_running_is_ended(start, report):
    body = 'results.add("one", pid=subprocess.Popen(["sleep", "120"]).pid)'
    assert start(body, seconds=20).wait(60) == 0
    (part,) = report()["parts"].values()
    assert part["status"] == "ok" and not is_alive(part["results"][0]["pid"])


def test_the_time_is_that_of_all_parts_together(start, report):
    done = start(HANGING, GOOD, minutes=2 / 60, seconds=60)
    assert done.wait(60) == 1
    first, second = report()["parts"].values()
    assert first["status"] == "stopped" and first["limit"] <= 2
    assert second == {"status": "not reached"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_results_are_whole_when_the_check_is_killed(start, report, tmp_path, number):
    done = start(GOOD, HANGING, GOOD, seconds=60)
    wait_for((tmp_path / "out" / "gpu_check.json").exists)
    wait_for(lambda: report()["parts"]["b"].get("results"))
    done.send_signal(number)
    done.wait(30)
    first, second, third = report()["parts"].values()
    pid = second["results"][0]["pid"]
    assert first["status"] == "ok" and third == {"status": "not run"}
    if number == signal.SIGTERM:
        assert second["status"] == "stopped" and not is_alive(pid)
    else:  # nobody was there to write more; the part is ours to end
        assert second["status"] == "running"
        os.killpg(os.getpgid(pid), signal.SIGKILL)


def test_results_say_where_they_come_from(start, report):
    assert start(GOOD, seconds=20).wait(60) == 0
    content = report()
    assert (
        content["commit"] and not content["tiny"] and content["versions"]["torch"] and content["versions"]["diffusers"]
    )
    assert {"card", "driver", "memory", "started"} <= content.keys()
    assert all(bar["figure"] is None and bar["met"] is None for bar in content["bars"])


def test_bars_are_read_from_the_results():
    with imported_script(FOLDER / "bars.py") as bars:
        steps = [
            {"name": "sd15, redirect", "ratio_to_plain": 1.01},
            {"name": "sd15, siss", "ratio_to_plain": 1.2},
            {"name": "sd15, redirect_lora", "share_of_matrix_rate": 0.45},
        ]
        entries = bars.read_bars({"c steps": {"results": steps}})
    assert [entry["met"] for entry in entries] == [True, False, True, None]


@pytest.mark.parametrize("flags, says", [(("--batches", "3"), "must be even"), (("--repeats", "0"), "at least 1")])
def test_what_no_step_can_be_is_refused(flags, says, capsys):
    with imported_script(FOLDER / "steps.py") as steps, pytest.raises(SystemExit):
        steps.parse_args(["--results", "r", "--folder", "f", *flags])
    assert says in capsys.readouterr().err


def test_every_run_of_a_script_has_flags_that_it_takes(tmp_path):
    """Also those that only a GPU can run: the time of a card is not for typing errors."""
    kinds = {"train_siss_sd.py": TextToImageSettings, "train_siss_unconditional.py": UnconditionalSettings}
    with imported_script(FOLDER / "scripts.py") as scripts:
        for case in scripts.CASES:
            # fp16 is refused without a GPU, and says nothing about the other flags.
            flags = scripts.base_flags(case.script, tmp_path) | case.flags | {"--mixed_precision": "bf16"}
            settings, _, _ = resolve(parse_settings(kinds[case.script], "", scripts.as_flags(flags)))
            assert settings.max_train_steps == 4 and settings.use_8bit_adam == (case.needs is not None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_nothing_is_begun(tmp_path):
    command = [sys.executable, str(CHECK), "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("check.py: error: no GPU was found")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_all_of_it_shrunk_on_the_cpu(tmp_path):
    done = subprocess.run(
        [sys.executable, str(CHECK), "--tiny", "--output_dir", str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert report["tiny"] and "bars" not in report  # its figures mean nothing
    assert done.returncode == 0, json.dumps(report, indent=1)
    parts = report["parts"]
    assert [part["status"] for part in parts.values()] == ["ok"] * 5
    names = {name: [result["name"] for result in part["results"]] for name, part in parts.items()}
    assert names["a scripts"] == ["LoRA, bf16, siss, validation", "adapter at scale 0"]
    assert len(names["b unit tests"]) == 14 and all("test_precision" in name for name in names["b unit tests"])
    variants = ["plain_lora", "siss_lora", "redirect_lora", "plain", "siss", "siss_lagged", "redirect"]
    steps = {result["name"]: result for result in parts["c steps"]["results"]}
    for model, known in {"sd15": variants, "sdxl": variants, "flux": variants[:3]}.items():
        rows = [row for name, row in steps.items() if name.startswith(f"{model}, ")]
        assert [row["variant"] for row in rows] == known
        operations = {row["variant"]: row["operations"] for row in rows}
        # Frozen weights need no gradient, and one scalar loss is one forward and one backward of the batch.
        assert operations.get("plain", float("inf")) > operations["plain_lora"] > 0
        assert operations.get("siss_lagged") == operations.get("plain")
        assert all(row["seconds_median"] > 0 and row["reason"] is None for row in rows)
    assert names["d whole run"] == ["cached"] and parts["d whole run"]["results"][0]["steps"] == 2
