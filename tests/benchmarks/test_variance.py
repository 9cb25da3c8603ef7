"""The estimators of `benchmarks/variance.py` on cases of known answer, and that it runs."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from siss_diffusers import METHODS
from tests.helpers.paths import ROOT
from tests.helpers.scripts import imported_script
from tests.helpers.tiny_problem import TinyNet, draw_query, flatten, trainable


SCRIPT = ROOT / "benchmarks" / "variance.py"


@pytest.fixture(scope="module")
def variance():
    with imported_script(SCRIPT) as module:
        yield module


def moments_of(variance, keep, forget):
    moments = variance.Moments(keep.shape[1], len(keep))
    for window, vectors in enumerate(zip(keep, forget)):
        moments.add(window, *vectors)
    return moments.close()


def gaussian_vectors(num_windows=4000):
    """Means (3, 0, ...) and (0, 2, 0, ...), covariances I and 4 I, and I between the two; 8 dimensions."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, num_windows, 8, generator=generator)
    keep, forget = noise[0], noise[0] + 3**0.5 * noise[1]
    keep[:, 0] += 3
    forget[:, 1] += 2
    return keep, forget


@pytest.mark.parametrize(
    "direction, trace, squared_mean",
    [((1, 0, 0), 8, 9), ((0, 1, 0), 32, 4), ((1, -0.5, 0), 8 - 8 + 8, 9 + 1)],
)
def test_gaussian_vectors_of_known_covariance(variance, direction, trace, squared_mean):
    vectors = moments_of(variance, *gaussian_vectors()).along(direction)
    for statistic, expected in ((vectors.trace_covariance, trace), (vectors.squared_mean, squared_mean)):
        found = variance.estimate_interval(statistic)
        assert found["low"] < expected < found["high"]
        assert found["value"] == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("direction", [(1, 0, 0), (0, 1, 0), (1, -2, 0), (1, 0, -0.5)])
def test_inner_products_are_enough(variance, direction):
    """Against the vectors themselves, of which one is zero: a one-sided window."""
    keep, forget = gaussian_vectors(40)
    forget[7] = 0
    found = moments_of(variance, keep, forget).along(direction)
    ratio = torch.where(forget.norm(dim=1) > 0, keep.norm(dim=1) / forget.norm(dim=1), 0)[:, None]
    vectors = (direction[0] * keep + (direction[1] + direction[2] * ratio) * forget).double().numpy()
    for groups in (np.arange(10), np.arange(1, 10)):
        chosen = vectors.reshape(10, 4, 8)[groups].reshape(-1, 8)
        assert found.trace_covariance(groups) == pytest.approx(np.trace(np.cov(chosen.T)), rel=1e-5)
        means = chosen.reshape(-1, 4, 8).mean(1)
        pairs = [a @ b for i, a in enumerate(means) for j, b in enumerate(means) if i != j]
        assert found.squared_mean(groups) == pytest.approx(np.mean(pairs), rel=1e-5)


def test_the_squared_mean_of_zero_is_zero_in_expectation(variance):
    means = np.random.default_rng(0).standard_normal((4000, 10, 5))
    found = [variance.squared_mean(vectors @ vectors.T, np.arange(10)) for vectors in means]
    assert abs(np.mean(found)) < 4 * np.std(found) / len(found) ** 0.5 < 0.05  # the naive estimate: 5 / 10


def test_the_jackknife_of_a_mean_is_its_standard_error(variance):
    values = np.random.default_rng(0).standard_normal(10)
    value, error = variance.jackknife(lambda groups: values[groups].mean())
    assert value == pytest.approx(values.mean()) and error == pytest.approx(values.std(ddof=1) / 10**0.5)


def test_the_engine_gives_both_gradients_of_summed_losses_averaged_over_pairs(variance):
    net = TinyNet()
    engine = variance.Engine(lambda noisy, timesteps: SimpleNamespace(sample=net(noisy, timesteps)), trainable(net))
    rows = METHODS["siss"]().rows(draw_query())
    output = net(rows.noisy, rows.timesteps)
    sides = ((rows.keep_target, rows.keep_weight), (rows.forget_target, rows.forget_weight))
    for (target, weight), found in zip(sides, engine(rows)):
        loss = (weight * (output - target).square().flatten(1).sum(1)).sum() / rows.num_pairs
        expected = flatten(torch.autograd.grad(loss, trainable(net), retain_graph=True))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.norm().item())


def test_components(variance):
    uniform = np.random.default_rng(0).random((500, 8))
    for stratified in (True, False):
        variant = variance.Variant("siss", 0.25, stratified)
        counts = [int(variant.components(0, window, draws).sum()) for window, draws in enumerate(uniform)]
        assert np.mean(counts) == pytest.approx(2, abs=0.2)
        assert (np.std(counts) == 0) == stratified
    assert not variance.Variant("siss_no_is").components(0, 0, uniform[0]).any()


def test_work_is_counted_as_the_engine_runs_it(variance):
    query = draw_query(from_forget=torch.arange(12) < 6)
    work = {name: variance.count_work(METHODS[name]().rows(query)) for name in ("siss_no_is", "subscore_bernoulli")}
    assert work["siss_no_is"] == (24, 24, 24, False, 0) and work["subscore_bernoulli"] == (12, 12, 12, False, 0)
    forward, backward, joint, one_sided, both = variance.count_work(METHODS["siss"]().rows(query))
    assert joint == 12 and 0 < both < 1 and backward == pytest.approx(12 * (1 + both)) and not one_sided
    one_sided_query = replace(query, from_forget=torch.ones(12, dtype=torch.bool))
    assert variance.count_work(METHODS["subscore_bernoulli"]().rows(one_sided_query))[3]


@pytest.mark.slow
def test_quick(variance, tmp_path, capsys):
    files = tmp_path / "variance.json", tmp_path / "variance.png"
    variance.main(["--quick", "--models", "digits", "latents", "--json", str(files[0]), "--plot", str(files[1])])
    report = json.loads(files[0].read_text())
    assert list(report["models"]) == ["digits", "latents"] and files[1].stat().st_size > 0
    for model in report["models"].values():
        rows = {row["variant"]: row for row in model["results"]}
        assert list(rows) == [variant.name for variant in variance.VARIANTS]
        assert rows["siss_no_is"]["compute"] == 2 and rows["subscore_bernoulli 0.5 stratified"]["compute"] == 1
        assert 1 <= rows["siss 0.5 stratified"]["compute"] < 2
        assert set(rows["siss 0.5 stratified"]["variance_x_compute"]["keep"].values()) == {1.0}
        for side in ("keep", "forget"):
            assert sum(bin_[side]["value"] for bin_ in model["timestep_bins"]) == pytest.approx(1)
    shares = report["models"]["digits"]["one_sided"]
    assert {row["one_sided_share"] for row in shares if row["variant"].endswith("stratified")} == {0.0}
    assert "| siss 0.5 stratified" in capsys.readouterr().out


@pytest.mark.parametrize("flags", ["--windows 15", "--windows 0", "--pairs 1", "--models sd"])
def test_bad_usage(variance, flags, capsys):
    with pytest.raises(SystemExit) as exit_info:
        variance.main(flags.split())
    assert exit_info.value.code == 2 and "error:" in capsys.readouterr().err
