"""The study of failures: what a run costs, when it has failed, and one run of it."""

import json
import shutil
import sys

import pytest

from siss_diffusers.calibration import DRAWS_PER_BIN, NUM_BINS
from siss_diffusers.methods import METHODS
from siss_diffusers.settings import TextToImageSettings
from tests.helpers.paths import ROOT


sys.path.insert(0, str(ROOT / "benchmarks" / "reliability"))

import failures  # noqa: E402
import problems  # noqa: E402
import study  # noqa: E402
import variants  # noqa: E402


BASE = {"problem": "sd", "copy_share": 0.7, "others_sharpness": 1.2, "classifier_accuracy": 1.0, "broken_share": 0.0}
GOOD = BASE | {"copy_share": 0.0}


def test_every_variant_is_a_setting_that_the_api_takes():
    for variant in variants.VARIANTS.values():
        for settings in variant.phases:
            assert TextToImageSettings.from_values(settings).method in METHODS


def test_all_variants_cost_the_same():
    """A forward and a backward pass are three forward passes."""
    budget, pairs = 3_200, 16
    for variant in variants.VARIANTS.values():
        per_step = pairs * (3 * variant.rows_per_pair + variant.forward_rows_per_pair)
        cost = variant.steps(budget, pairs) * per_step + variant.thresholds * NUM_BINS * DRAWS_PER_BIN
        assert 0 <= 3 * budget / len(variant.phases) - cost < per_step


@pytest.mark.parametrize(
    "figures, expected",
    [
        ({}, []),
        ({"copy_share": 0.011}, ["copies"]),
        ({"copy_share": 0.009}, []),
        ({"copy_share": None}, ["copies"]),
        ({"broken_share": 0.1}, ["broken pictures"]),
        ({"others_sharpness": 0.9}, ["sharpness"]),
        ({"others_sharpness": None}, ["sharpness"]),
        ({"classifier_accuracy": 0.97}, ["digits"]),
        ({"copy_share": 0.5, "classifier_accuracy": None}, ["copies", "digits"]),
        ({"failed": "no step was finite"}, ["broke off"]),
    ],
)
def test_a_run_fails_by_any_of_its_figures(figures, expected):
    assert failures.faults(GOOD | figures, BASE) == expected


def test_a_run_fails_by_its_inception_score():
    base = {"copy_share": 0.03, "inception_score": 7.0}
    assert failures.faults({"copy_share": 0.0, "inception_score": 6.8}, base) == []
    assert failures.faults({"copy_share": 0.0, "inception_score": 6.78}, base) == ["inception score"]


def line(seed: int, **figures) -> dict:
    about = {"stage": "study", "problem": "sd", "variant": "redirect", "seed": seed, "rate_factor": 1}
    return {"key": f"study/sd/redirect/seed {seed}"} | GOOD | about | figures


def test_the_table_counts_runs_and_reasons():
    base = {"key": "base/sd", "stage": "base", "variant": "base"} | BASE
    found = failures.Study([base, line(0), line(1, copy_share=0.2), line(1, copy_share=0.3), line(2)])
    cell = found.failures(found.of("study", "sd", "redirect"))
    assert cell.startswith("1 of 3 [") and cell.endswith("copies 1")
    assert failures.failures_table(found).splitlines()[-1] == f"| redirect | {cell} |"


@pytest.mark.slow
def test_a_study_runs_once_and_is_not_done_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(problems.Digits, "budget", 700)
    argv = ["--problems", "digits", "--variants", "redirect", "--stages", "study", "--seeds", "0"]
    argv += ["--num_unconditional_samples", "16", "--output_dir", str(tmp_path)]
    study.main(argv)
    results = tmp_path / "results.jsonl"
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["key"] for line in lines] == ["base/digits", "study/digits/redirect/seed 0"]
    assert 0 <= lines[1]["copy_share"] <= 1 and lines[1]["steps"] == 4
    shutil.copytree(tmp_path / "pictures", tmp_path / "all")
    failures.main([str(results), "--pictures", str(tmp_path / "all")])
    assert "redirect" in capsys.readouterr().out
    assert {file.name for file in (tmp_path / "pictures").iterdir()} >= {"digits_redirect.png", "base_digits.png"}
    study.main(argv)
    assert len(results.read_text().splitlines()) == 2
