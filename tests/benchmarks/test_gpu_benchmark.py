"""The GPU benchmark runs and says what it promises; nothing here depends on how fast the machine is."""

import json
import math
import subprocess
import sys

import pytest
import torch

from tests.helpers.paths import ROOT


SCRIPT = ROOT / "benchmarks" / "gpu.py"
VARIANTS = ["plain", "siss", "siss_lagged", "plain_lora", "siss_lora"]


def run_script(*flags: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *flags], capture_output=True, text=True)


def check_row(row: dict) -> None:
    low, high = row["seconds_quartiles"]
    assert 0 < low <= row["seconds_median"] <= high < math.inf
    assert row["images_per_second"] == pytest.approx(row["batch"] / row["seconds_median"])
    assert 0 < row["ratio_to_plain"] < math.inf and 0 < row["operations"] < math.inf
    assert (row["ratio_to_plain_lora"] is None) != row["variant"].endswith("_lora")
    assert row["reason"] is None


@pytest.mark.slow
def test_tiny(tmp_path):
    done = run_script("--tiny", "--repeats", "2", "--json", str(tmp_path / "report.json"))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["machine"]["device"] == "cpu" and report["machine"]["dtype"] == "float32"
    rows = {(row["model"], row["variant"]): row for row in report["results"]}
    assert list(rows) == [(model, variant) for model in ("sd15", "sdxl") for variant in VARIANTS]
    for (_, variant), row in rows.items():
        check_row(row)
        assert row["peak_bytes"] is None and row["share_of_matrix_rate"] is None
        assert row["turns_with"] == [other for other in VARIANTS if other != variant]
    for model in ("sd15", "sdxl"):
        assert rows[model, "plain"]["ratio_to_plain"] == rows[model, "plain_lora"]["ratio_to_plain_lora"] == 1
        # Frozen weights need no gradient, and one scalar loss is one forward and one backward of the batch.
        operations = {variant: rows[model, variant]["operations"] for variant in VARIANTS}
        assert operations["plain_lora"] < operations["plain"] == operations["siss_lagged"] <= operations["siss"]
    assert [run["micro_batch"] for run in report["run_seconds"]] == [4, 1]
    assert all(0 < run["seconds"] < math.inf and run["reason"] is None for run in report["run_seconds"])
    assert "images/s" in done.stdout and "SD-1.5-size LoRA run" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu():
    done = run_script()
    assert done.returncode == 2 and done.stdout == ""
    (sentence,) = [line for line in done.stderr.splitlines() if "error: " in line]
    assert sentence.startswith("gpu.py: error: no GPU") and "Traceback" not in done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(tmp_path):
    done = run_script("--models", "sd15", "--repeats", "3", "--json", str(tmp_path / "report.json"))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["machine"]["matrix_flops_per_second"] > 0
    assert [row["variant"] for row in report["results"]] == VARIANTS
    plain_fits = report["results"][0]["reason"] is None
    for row in report["results"]:
        if row["reason"] is not None:
            assert "out of memory" in row["reason"] and row["seconds_median"] is None
            continue
        assert row["peak_bytes"] > 1.7e9  # the weights in bfloat16
        assert 0 < row["share_of_matrix_rate"] < 1
        if plain_fits:
            check_row(row)
    assert [(run["steps"], run["images"], run["micro_batch"]) for run in report["run_seconds"]] == [
        (35, 16, 16),
        (35, 16, 1),
    ]
