"""The benchmark runs and says what it promises; nothing here depends on how fast the machine is."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from siss_diffusers import PairedGradients, scaling_rule
from tests.helpers.paths import ROOT
from tests.helpers.scripts import imported_script


SCRIPT = ROOT / "benchmarks" / "step_cost.py"


@pytest.fixture(scope="module")
def step_cost():
    with imported_script(SCRIPT) as module:
        yield module


def tiny_model(step_cost):
    """Pairs near enough that rows of all three kinds occur."""

    def images(batch, generator):
        keep = torch.randn(batch, 1, 8, 8, generator=generator)
        return keep, keep + 0.2 * torch.randn(keep.shape, generator=generator)

    return step_cost.Model(lambda: step_cost.make_unet(1, 8, (32, 32)), images, (8,))


def gradient(step) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in step.network.parameters()])


def test_two_backward_computes_the_gradient_of_the_engine(step_cost):
    model, device = tiny_model(step_cost), torch.device("cpu")
    for query in step_cost.draw_queries(model, 8, 3):
        published, ours = (step_cost.Step(variant, model, device) for variant in ("two_backward", "siss"))
        ours.gradients = PairedGradients(ours.network.parameters(), scaling_rule("norm", step_cost.SCALING_NORM))
        for step in (published, ours):
            step.compute_gradients(query)
        error = (gradient(published) - gradient(ours)).norm() / gradient(published).norm()
        assert error < 1e-4


def test_half_of_the_pairs_take_the_forget_component(step_cost):
    queries = step_cost.draw_queries(tiny_model(step_cost), 6, 4)
    assert [int(query.from_forget.sum()) for query in queries] == [3, 3, 3, 3]
    assert len({tuple(query.from_forget.tolist()) for query in queries}) > 1


def test_rows_are_counted(step_cost):
    model = tiny_model(step_cost)
    queries = step_cost.draw_queries(model, 8, 4)
    counts = {variant: step_cost.count_rows(variant, queries) for variant in step_cost.VARIANTS}
    assert counts["plain"] == (8, 8) and counts["siss_no_is"] == (16, 16) and counts["two_backward"] == (8, 16)
    forward, backward = counts["siss"]
    assert forward == 8 and 8 < backward < 16
    assert counts["siss_lagged"] == (8, 8)


def test_digits_from_a_file(step_cost, tmp_path):
    digits = np.random.default_rng(0).integers(0, 256, (5, 28, 28)).astype(np.uint8)
    np.savez(tmp_path / "digits.npz", x=digits)
    keep, forget = step_cost.digit_pairs(str(tmp_path / "digits.npz"))(3, torch.Generator())
    assert keep.shape == forget.shape == (3, 1, 28, 28)
    known = torch.from_numpy(digits).float() / 127.5 - 1
    assert all((picture == known).flatten(1).all(1).any() for picture in keep)


@pytest.mark.slow
def test_json(step_cost, capsys):
    step_cost.main("--models unet2d_sd_latents --batches 2 --quick --json".split())
    report = json.loads(capsys.readouterr().out)  # exactly one object, so all else went to stderr
    assert {"device", "processor", "cores", "threads", "torch", "dtype"} <= report["machine"].keys()
    assert [row["variant"] for row in report["results"]] == list(step_cost.VARIANTS)
    for row in report["results"]:
        assert row["model"] == "unet2d_sd_latents" and row["batch"] == 2
        assert row["seconds_median"] > 0 and row["ratio_to_plain"] > 0
        if sys.platform == "linux" or torch.cuda.is_available():
            assert row["peak_bytes"] > 3 * row["gradient_bytes"]  # the weights and the optimizer's two copies
            assert row["peak_ratio_to_plain"] > 0
    assert report["results"][0]["ratio_to_plain"] == report["results"][0]["peak_ratio_to_plain"] == 1


@pytest.mark.parametrize("flags", ["--models unet3d", "--repeats 0", "--batches 1"])
def test_bad_usage(step_cost, flags, capsys):
    with pytest.raises(SystemExit) as exit_info:
        step_cost.main(flags.split())
    assert exit_info.value.code == 2 and "error:" in capsys.readouterr().err


@pytest.mark.slow
def test_the_table_of_options(step_cost, tmp_path):
    command = [sys.executable, str(SCRIPT.with_name("options.py")), "--models", "unet2d_28x28", "--batch", "2"]
    subprocess.run([*command, "--repeats", "1", "--json", str(tmp_path / "options.json")], check=True)
    report = json.loads((tmp_path / "options.json").read_text())
    ratios = {row["variant"]: row["ratio_to_as_is"] for row in report["results"]}
    assert len(ratios) == 6 and ratios["as is"] == 1 and all(ratio > 0 for ratio in ratios.values())


@pytest.mark.slow
def test_the_table_of_stable_diffusion(step_cost, capsys):
    step_cost.main("--sd --batches 2 --quick --json".split())
    results = json.loads(capsys.readouterr().out)["results"]
    assert [row["variant"] for row in results] == list(step_cost.step_cost_sd.VARIANTS)
    assert all(row["seconds_median"] > 0 for row in results)
    assert results[0]["ratio_to_plain_cached"] == 1
