"""Calibrated redirection against its equations, written out in float64 for every parametrisation."""

from dataclasses import replace

import pytest
import torch

from siss_diffusers import make_method
from siss_diffusers.methods import NaiveDeletion, Redirect, ReTrack
from siss_diffusers.methods.posterior import posterior_mean
from siss_diffusers.noising import mean_squared_error
from tests.helpers.equations import (
    Terms,
    assert_a_range_of_forgetting_leaves_ordinary_fine_tuning_elsewhere,
    assert_gradient_is_that_of_the_equations,
    keep_alone,
)
from tests.helpers.tiny_problem import PATHS, SHAPE, draw_query


NONE = torch.full((12,), torch.inf)


def redirected(terms):
    """The target of a_t, and its beta: the clean image and the noise are moved together, then made a target."""
    query = terms.query
    y = query.posterior_mean.double()
    noise = (terms.a_t - terms.alpha * y) / terms.sigma
    whole = (terms.target(y, noise) - terms.target(terms.a, terms.eps)).square().mean((1, 2, 3)).sqrt()
    beta = (query.thresholds.double().sqrt() / whole).clamp(max=1)[:, None, None, None]
    return terms.target(terms.a + beta * (y - terms.a), terms.eps + beta * (noise - terms.eps)), beta.flatten()


def losses(terms):
    query = terms.query
    is_forget = query.from_forget[:, None, None, None]
    target = torch.where(is_forget, redirected(terms)[0], terms.target(terms.x, terms.eps))
    weight = torch.where(query.from_forget, (query.keep_thresholds / query.thresholds).clamp(max=1), 1)
    return terms.loss(weight, terms.m, target), terms.nothing


@pytest.mark.parametrize("prediction_type", PATHS)
def test_gradient_is_that_of_the_equations(prediction_type):
    assert_gradient_is_that_of_the_equations(Redirect(), losses, keep_alone, prediction_type)


def test_a_range_of_forgetting_leaves_ordinary_fine_tuning_elsewhere():
    assert_a_range_of_forgetting_leaves_ordinary_fine_tuning_elsewhere(Redirect(), losses, keep_alone)


def test_the_problem_has_rows_of_every_kind():
    """Otherwise the two tests above would not reach every branch."""
    query = draw_query()
    beta = redirected(Terms(None, query))[1][query.from_forget]
    strange = (query.thresholds > query.keep_thresholds)[query.from_forget]
    assert (beta == 1).any() and (beta < 0.5).any() and strange.any() and not strange.all()
    assert 3 <= query.from_forget.sum() <= 9


@pytest.mark.parametrize("prediction_type", PATHS)
def test_targets_are_those_of_float64(prediction_type):
    """At all noise levels, of which the lowest have r = alpha / sigma of 100 and 1,000."""
    timesteps = torch.tensor([0, 1, 3, 10, 30, 100, 300, 500, 700, 900, 980, 999])
    query = draw_query(path=PATHS[prediction_type], timesteps=timesteps, from_forget=torch.ones(12, dtype=torch.bool))
    for thresholds in (query.thresholds, 1e-4 * query.thresholds, NONE):
        query = replace(query, thresholds=thresholds)
        expected = redirected(Terms(None, query))[0].float()
        torch.testing.assert_close(Redirect().rows(query).keep_target, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("prediction_type", PATHS)
def test_the_loss_of_the_target_on_a_is_the_smaller_of_tau_and_the_whole_way(prediction_type):
    query = draw_query(path=PATHS[prediction_type], from_forget=torch.ones(12, dtype=torch.bool))
    own = query.target(query.forget, query.noise)
    whole = mean_squared_error(Redirect().rows(replace(query, thresholds=NONE)).keep_target, own)
    found = mean_squared_error(Redirect().rows(query).keep_target, own)
    torch.testing.assert_close(found, torch.minimum(query.thresholds, whole), rtol=1e-5, atol=0)
    assert (found < whole).any() and (found == whole).any()
    zero = Redirect().rows(replace(query, thresholds=torch.zeros(12))).keep_target
    torch.testing.assert_close(zero, own, rtol=0, atol=0)


@pytest.mark.parametrize("prediction_type", PATHS)
def test_without_thresholds_the_target_is_that_of_retrack_over_the_same_images(prediction_type):
    query = draw_query(path=PATHS[prediction_type], from_forget=torch.ones(12, dtype=torch.bool))
    ratio = (query.path.alphas / query.path.sigmas)[query.timesteps]
    means = [
        posterior_mean(*(tensor[pair, None] for tensor in (query.forget, query.noise, ratio)), query.neighbors[pair])
        for pair in range(12)
    ]
    query = replace(query, posterior_mean=torch.cat(means), thresholds=NONE, keep_thresholds=NONE)
    rows, of_retrack = Redirect().rows(query), ReTrack().rows(query)[torch.arange(12, 24)]
    # ReTrack takes its posterior in float32.
    torch.testing.assert_close(rows.keep_target, of_retrack.keep_target, rtol=1e-4, atol=1e-4)
    assert rows.noisy.equal(of_retrack.noisy) and (rows.keep_weight == 1).all()


def test_rows_from_x_are_those_of_naive_deletion():
    """Whatever the posterior mean of their pair holds: nobody computed it."""
    query = draw_query(from_forget=torch.zeros(12, dtype=torch.bool))
    query.posterior_mean[:] = torch.nan
    query.thresholds[:] = 0
    rows, naive = Redirect().rows(query), NaiveDeletion().rows(query)
    for name in ("noisy", "keep_target", "keep_weight", "timesteps"):
        assert getattr(rows, name).equal(getattr(naive, name)), name


def test_one_row_for_each_pair_on_the_keep_side_under_the_prompt_of_its_image():
    query = replace(draw_query(), keep_condition=torch.arange(12), forget_condition=torch.arange(12) + 100)
    rows = Redirect().rows(query)
    assert len(rows) == 12 and rows.forget_target is None and not rows.forget_weight.any()
    assert rows.condition.equal(torch.arange(12) + 100 * query.from_forget)
    assert rows.from_forget.equal(query.from_forget)


def test_a_row_from_a_weighs_less_only_where_strangers_are_harder():
    query = draw_query(from_forget=torch.arange(12) < 10)
    query = replace(query, keep_thresholds=torch.ones(12), thresholds=torch.linspace(0.5, 4.5, 9).repeat(2)[:12])
    weight = Redirect().rows(query).keep_weight
    torch.testing.assert_close(weight[:10], 1 / query.thresholds[:10].clamp(min=1))
    assert (weight[10:] == 1).all()


class TestPosterior:
    def brute_force(self, a, eps, ratio, images):
        a, eps, images = (tensor.double() for tensor in (a, eps, images))
        errors = eps[:, None] + ratio.double()[:, None, None, None, None] * (a[:, None] - images)
        posterior = (-errors.square().flatten(2).sum(2) / 2).softmax(1)
        return (posterior[..., None, None, None] * images).sum(1)

    def problem(self, num_images=300, shape=(4, 16, 16), ratio=None):
        """Images so near to each other that several share the posterior even where r is 100."""
        generator = torch.Generator().manual_seed(0)
        centre = torch.randn(shape, generator=generator)
        scale = torch.logspace(-4, 0.5, num_images)[torch.randperm(num_images, generator=generator)]
        images = centre + scale[:, None, None, None] * torch.randn(num_images, *shape, generator=generator)
        a = centre + 3e-4 * torch.randn(9, *shape, generator=generator)
        ratio = torch.logspace(-3, 3, 9) if ratio is None else torch.full((9,), ratio)
        return a, torch.randn(9, *shape, generator=generator), ratio, images

    @pytest.mark.parametrize("chunk", [2**23, 5_000])
    def test_it_is_that_of_brute_force(self, chunk, monkeypatch):
        monkeypatch.setattr("siss_diffusers.methods.posterior.CHUNK_NUMBERS", chunk)
        a, eps, ratio, images = self.problem()
        found, expected = posterior_mean(a, eps, ratio, images), self.brute_force(a, eps, ratio, images)
        # What counts is the noise that the mean stands for: r times it.
        error = ratio[:, None, None, None] * (found - expected)
        assert error.abs().max() < 3e-7 * (1 + (ratio.max() * expected.abs().max()))
        torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=1e-6)

    def test_float32_would_not_do(self):
        """A test of the test above: the problem is hard enough to tell."""
        a, eps, ratio, images = self.problem(ratio=300.0)
        direction = ratio[:, None] * (eps + ratio[:, None, None, None] * a).flatten(1)
        exponents = direction @ images.flatten(1).T - ratio[:, None] ** 2 / 2 * images.flatten(1).square().sum(1)
        single = (exponents.softmax(1) @ images.flatten(1)).view_as(a)
        assert (single - self.brute_force(a, eps, ratio, images)).abs().max() > 1e-4
        assert (posterior_mean(a, eps, ratio, images) - self.brute_force(a, eps, ratio, images)).abs().max() < 1e-6

    def test_one_image_is_the_mean(self):
        a, eps, ratio, images = self.problem()
        assert posterior_mean(a, eps, ratio, images[:1]).equal(images[:1].expand_as(a))

    def test_members_are_the_images_that_are_meant(self):
        a, eps, ratio, images = self.problem()
        chosen = torch.tensor([7, 100, 3, 299])
        expected = posterior_mean(a, eps, ratio, images[chosen])
        assert posterior_mean(a, eps, ratio, images, chosen).equal(expected)

    def test_an_image_to_keep_that_is_a_itself(self):
        """At low noise it is all of the posterior, and nothing is redirected; at high noise it is one of many."""
        generator = torch.Generator().manual_seed(0)
        images, eps = (torch.randn(count, *SHAPE, generator=generator) for count in (5, 2))
        a, timesteps = images[3].expand(2, *SHAPE), torch.tensor([0, 999])
        query = draw_query(2, from_forget=torch.ones(2, dtype=torch.bool), timesteps=timesteps)
        ratio = (query.path.alphas / query.path.sigmas)[timesteps]
        mean = posterior_mean(a, eps, ratio, images)
        assert mean[0].equal(images[3])
        torch.testing.assert_close(mean[1], images.mean(0), atol=0.05, rtol=0)
        for thresholds in (torch.zeros(2), torch.ones(2)):
            rows = Redirect().rows(replace(query, forget=a, noise=eps, posterior_mean=mean, thresholds=thresholds))
            assert rows.keep_target[0].equal(eps[0]) and rows.keep_target.isfinite().all()

    def test_no_signal_at_all_is_the_mean_of_all(self):
        a, eps, ratio, images = self.problem(ratio=0.0)
        torch.testing.assert_close(posterior_mean(a, eps, ratio, images), images.mean(0).expand_as(a))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["lam=2"], r"lam must lie in \[0, 1\]"),
        (["lam=much"], "must be of type float"),
        (["num_neighbors=3"], "no argument 'num_neighbors=3'; its arguments and defaults: lam=0.5"),
    ],
)
def test_bad_arguments_are_refused_in_a_sentence(args, message):
    with pytest.raises(ValueError, match=message):
        make_method("redirect", args)


def test_the_share_of_rows_from_forget_images():
    assert Redirect().mixture == 0.5 and make_method("redirect", ["lam=0.25"]).mixture == 0.25
