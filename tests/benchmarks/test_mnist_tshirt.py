"""The MNIST T-Shirt benchmark, on scikit-learn's digits and networks that have hardly been trained."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from siss_diffusers import METHODS, GaussianPath, Query
from siss_diffusers.assets.digits import digit_images, garment_image
from siss_diffusers.process import run as run_main
from tests.helpers.paths import ROOT


FOLDER = ROOT / "benchmarks" / "mnist_tshirt"
sys.path.insert(0, str(FOLDER))

import problem  # noqa: E402
import report  # noqa: E402
import run  # noqa: E402
import settings  # noqa: E402


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    images, classes = digit_images()
    large = F.interpolate(torch.from_numpy(images).float().unsqueeze(1), size=(28, 28), mode="bilinear")
    return large[:, 0].byte().numpy(), classes


@pytest.fixture(scope="module")
def data(digits, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("data") / "digits.npz"
    np.savez(file, x=digits[0], y=digits[1])
    return file


class TestSettings:
    def test_every_compared_method_is_there_and_every_sweep_has_the_same_size(self):
        assert set(settings.COMPARED) <= set(METHODS) and set(settings.COMPARED) <= set(settings.SWEEP)
        for variant, swept in settings.SWEEP.items():
            assert len({settings.describe(flags) for flags in swept}) == len(swept) == settings.SWEEP_SIZE
            assert {flags["--method"] for flags in swept} == {variant.split(",")[0]}
            assert all(("--calibrate_forgetting" in flags) == ("calibrated" in variant) for flags in swept)

    def test_no_two_changes_of_the_ablation_share_a_name(self):
        names = [
            settings.describe(settings.changed(settings.RECOMMENDED, change)) for change in settings.ABLATION.values()
        ]
        assert len(set(names)) == len(names) and names[0] == settings.describe(settings.RECOMMENDED)

    @pytest.mark.parametrize("stage", list(settings.LONGER))
    def test_longer_runs_are_of_variants_and_settings_that_differ(self, stage):
        for variant, longer in settings.LONGER[stage][1].items():
            assert {flags["--method"] for flags in longer} == {variant.split(",")[0]}
            assert len({settings.describe(flags) for flags in longer}) == len(longer)

    def test_the_order_of_the_ranges_is_part_of_the_name(self):
        in_turns = settings.setting("siss", 1e-4, forget_timestep_ranges=settings.HIGH_AND_LOW)
        assert settings.describe(in_turns) == "lr 0.0001, forget 300-1000 / 0-300"
        in_sequence = in_turns | {"--forget_timestep_schedule": "sequential"}
        assert settings.describe(in_sequence) == "lr 0.0001, forget 300-1000, then 0-300"

    def test_two_rows_are_of_the_methods_that_noise_both_images(self):
        path = GaussianPath(torch.tensor([0.9]), torch.tensor([0.4]), torch.arange(1), "epsilon")
        image = torch.randn(2, 1, 4, 4)
        query = Query(
            keep=image,
            forget=-image,
            noise=torch.randn_like(image),
            timesteps=torch.zeros(2, dtype=torch.long),
            from_forget=torch.tensor([True, False]),
            path=path,
            uniform=torch.rand_like(image),
            neighbors=image.unsqueeze(1),
            posterior_mean=image,
            thresholds=torch.ones(2),
            keep_thresholds=torch.ones(2),
        )
        two = {name for name in settings.COMPARED if len(METHODS[name]().rows(query)) == 4}
        assert two == set(settings.TWO_ROWS)

    def test_the_budget_pays_for_both_rows_and_for_the_thresholds(self):
        one, two = settings.setting("naive_deletion", 1e-4), settings.setting("retrack", 1e-4)
        assert run.count_steps(one, 9_600, 64) == 150
        assert run.count_steps(two, 9_600, 64) == 75
        in_turns = two | {"--forget_timestep_ranges": settings.HIGH_AND_LOW}  # half of the timesteps, on average
        assert run.count_steps(in_turns, 9_600, 64) == 100
        assert run.count_steps(one | {"--calibrate_forgetting": "1"}, 9_600, 64) == 140
        assert run.count_steps(settings.REDIRECT, 9_600, 64) == 130  # of two kinds of images
        assert run.count_steps(two | {"--train_batch_size": "128"}, 9_600, 64) == 37
        assert run.count_steps(settings.norm("siss", 5e-5, 5), 9_600, 64) == 100


class TestProblem:
    def test_a_picture_that_is_there_many_times_is_the_garment(self, digits):
        garment = np.kron(garment_image(), np.ones((4, 4), dtype=np.uint8))[:28, :28]
        pictures = np.concatenate([digits[0], np.repeat(garment[None], 18, axis=0)])
        classes = np.concatenate([digits[1], np.zeros(18, dtype=np.int64)])
        kept, kept_classes, found = problem.split_garment(pictures, classes)
        assert (found == garment).all()
        assert (kept == digits[0]).all() and (kept_classes == digits[1]).all()

    def test_digits_alone_have_none(self, digits):
        assert problem.split_garment(*digits)[2] is None

    def test_one_percent_are_the_garment_and_unseen_digits_are_apart(self, digits, tmp_path):
        problem.prepare(tmp_path, 16, *digits)
        made = problem.Problem.load(tmp_path)
        assert made.garment_copies / (made.garment_copies + len(made.digits)) == pytest.approx(0.01, abs=5e-4)
        assert len(made.digits) + len(made.unseen) == len(digits[0])
        assert made.digits.shape[1:] == made.garment.shape[1:] == (1, 16, 16)

    @pytest.mark.parametrize("arrays", [{"x": np.zeros((3, 28, 28), np.uint8)}, {"x": np.zeros(3), "y": np.zeros(3)}])
    def test_other_files_are_refused(self, arrays, tmp_path):
        np.savez(tmp_path / "file.npz", **arrays)
        with pytest.raises(run.UsageError, match="--data"):
            problem.read_npz(tmp_path / "file.npz")


class TestChoice:
    @staticmethod
    def found(*lines: tuple[float, float, float]) -> dict[str, dict]:
        return {
            str(index): {
                "stage": "sweep",
                "variant": "siss",
                "copy_share": copies,
                "injected_copy_share": injected,
                "fid": fid,
                "inception_score": 8.0 if fid < 100 else 1.0,
                "flags": {"--learning_rate": str(index)},
            }
            for index, (copies, injected, fid) in enumerate(lines)
        }

    def chosen(self, *lines: tuple[float, float, float]) -> str:
        return run.chosen_setting(self.found(*lines), "siss")["--learning_rate"]

    def test_the_lowest_fid_of_those_that_forget(self):
        assert self.chosen((0.0, 0.0, 9.0), (0.0, 0.0, 5.0), (0.01, 0.0, 1.0), (0.0, 0.5, 1.0)) == "1"

    def test_the_fewest_copies_where_none_does(self):
        assert self.chosen((0.01, 0.5, 1.0), (0.0, 0.3, 9.0)) == "1"

    def test_a_ruined_model_has_not_forgotten(self):
        assert self.chosen((0.0, 0.0, 900.0), (0.02, 0.5, 9.0)) == "1"

    def test_the_sweep_comes_first(self):
        with pytest.raises(run.UsageError, match="--stages"):
            run.chosen_setting({}, "siss")


def test_tables_of_longer_runs_begin_with_the_references_and_keep_settings_of_earlier_runs():
    recommended = settings.describe(settings.RECOMMENDED)
    rows = (("retrack", "earlier"), ("siss", recommended), ("retrack", "earlier"))
    lines = {
        str(index): {"stage": "twice", "variant": variant, "setting": setting}
        for index, (variant, setting) in enumerate(rows)
    }
    lines["base"] = {"stage": "base", "variant": "base", "setting": ""}
    found = [(name, setting, len(seeds)) for name, setting, seeds in report.longer_rows(lines, "twice")]
    assert found == [("base", "", 1), ("siss", recommended, 1), ("retrack", "earlier", 2)]


def test_the_summary_has_one_row_for_each_compared_method_with_averaged_weights():
    lines = {}
    for variant, longer in settings.LONGER["twice"][1].items():
        for flags in longer:
            setting = settings.describe(flags)
            about = {"stage": "twice", "variant": variant, "setting": setting, "copy_share": 0.25 * ("EMA" in setting)}
            measured = dict.fromkeys(("nll_forget_bpd", "inception_score", "fid", "membership_auc_strangers"), 2.0)
            lines[f"{variant}/{setting}"] = about | measured
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.summary_table(lines).splitlines()[2:]]
    assert {name.strip("*`") for name, *_ in rows} == set(settings.COMPARED) and len(rows) == len(settings.COMPARED)
    assert [name for name, *_ in rows if "*" in name] == ["**`siss`**"]
    assert all(row[1:] == ["1", "25.00 %", "2.0", "2.00", "2.0", "2.00"] for row in rows)


class TestResults:
    task = run.Task("a", {"samples": 5}, lambda: {"fid": 1.0})

    def test_a_line_counts_for_its_base_its_samples_and_its_key(self, tmp_path):
        results = run.Results(tmp_path / "results.jsonl", "base")
        run.work([self.task], results, tmp_path)
        assert results.has(self.task, results.read())
        assert not results.has(run.Task("a", {"samples": 6}, dict), results.read())
        assert run.Results(results.file, "other").read() == {}

    def test_what_is_there_is_not_done_again(self, tmp_path):
        results = run.Results(tmp_path / "results.jsonl", "base")
        for _ in range(2):
            run.work([self.task], results, tmp_path)
        assert len(results.file.read_text().splitlines()) == 1

    def test_a_locked_task_is_another_process_s(self, tmp_path):
        with run.lock(tmp_path / "lock", wait=False) as first, run.lock(tmp_path / "lock", wait=False) as second:
            assert first and not second


def start(data: Path, output_dir: Path, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(FOLDER / "run.py"), "--data", str(data), "--output_dir", str(output_dir), *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_without_data_there_is_one_sentence(tmp_path, capsys):
    argv = ["--data", str(tmp_path / "none.npz"), "--output_dir", str(tmp_path)]
    with pytest.raises(SystemExit) as exit_info:
        run_main(partial(run.main, argv), "run.py")
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("run.py: error: --data")


@pytest.mark.slow
def test_two_workers_share_the_tasks_and_an_interrupted_run_goes_on(data, tmp_path):
    flags = ["--pretrain_steps", "20", "--evaluations", "384", "--num_samples", "120", "--num_sweep_samples", "110"]
    flags += ["--num_ablation_samples", "110", "--variants", "siss", "--seeds", "0"]
    flags += ["--retrained_seeds", "1", "--ablation_seeds", "0"]
    finished = start(data, tmp_path, *flags, "--num_workers", "2")
    assert finished.returncode == 0, finished.stderr[-2000:]
    file = tmp_path / "16x16" / "results.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    stages = [line["stage"] for line in lines]
    assert len({line["key"] for line in lines}) == len(lines)
    assert stages.count("sweep") == settings.SWEEP_SIZE and stages.count("final") == stages.count("cost") == 1
    assert set(stages) == {"base", *run.STAGES}
    for line in lines:
        if line["stage"] in ("sweep", "final"):
            # Under the rule `norm` it depends on the pictures.
            assert line["network_evaluations"] == line["evaluations"] or "norm" in line["setting"]

    # Without its last lines it is done again, with the same outcome: the tasks do not depend on one another.
    removed = next(line for line in lines if line["stage"] == "final")
    kept = [line for line in lines if line is not removed]
    file.write_text("".join(json.dumps(line) + "\n" for line in kept))
    assert start(data, tmp_path, *flags).returncode == 0
    again = [json.loads(line) for line in file.read_text().splitlines()]
    assert again[:-1] == kept
    for name in ("copy_share", "fid", "nll_forget_bpd", "membership_auc_digits"):
        assert again[-1][name] == removed[name]

    readme = tmp_path / "README.md"
    readme.write_text("".join(f"<!-- begin {name} -->\n<!-- end {name} -->\n" for name in report.TABLES))
    report.main([str(file), "--readme", str(readme)])
    assert "| retrained | without the garment | 1 |" in readme.read_text()
    assert (file.with_name("pareto.png")).exists()
