"""Unbiasedness, by Monte Carlo on Gaussian images of two pixels and a fixed perceptron."""

import pytest
import torch
from diffusers import DDPMScheduler

from siss_diffusers import METHODS, GaussianPath, Query
from siss_diffusers.draws import mixture_components
from siss_diffusers.methods import SISS


LOW = GaussianPath.from_scheduler(DDPMScheduler(num_train_timesteps=20, beta_start=0.02, beta_end=0.4))
NUM_KEEP, NUM_FORGET, DRAWS = 7, 3, 40_000


def low_dimensional_images():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(NUM_KEEP + NUM_FORGET, 1, 1, 2, generator=generator)


def row_gradients(rows):
    """Per-row gradients `(R, P)` of the keep and of the forget side for `W2 tanh(W1 [m, t])`, by hand."""
    generator = torch.Generator().manual_seed(2)
    first, second = torch.randn(4, 3, generator=generator), torch.randn(2, 4, generator=generator)
    inputs = torch.cat([rows.noisy.flatten(1), rows.timesteps[:, None] / 20], 1)
    hidden = torch.tanh(inputs @ first.T)
    for target, weight in ((rows.keep_target, rows.keep_weight), (rows.forget_target, rows.forget_weight)):
        residual = 2 * weight[:, None] * (hidden @ second.T - (0 if target is None else target.flatten(1)))
        back = (residual @ second) * (1 - hidden**2)
        outer = [residual[:, :, None] * hidden[:, None, :], back[:, :, None] * inputs[:, None, :]]
        yield torch.cat([matrix.flatten(1) for matrix in outer], 1).double()


def monte_carlo(method, seed, keep_from, forget_from, lam=0.5):
    """`DRAWS` independent draws of the gradients, the images drawn uniformly from the index ranges."""
    generator, images = torch.Generator().manual_seed(seed), low_dimensional_images()
    choose = [torch.randint(*bounds, (DRAWS,), generator=generator) for bounds in (keep_from, forget_from)]
    query = Query(
        keep=images[choose[0]],
        forget=images[choose[1]],
        noise=torch.randn(DRAWS, 1, 1, 2, generator=generator),
        timesteps=torch.randint(20, (DRAWS,), generator=generator),
        from_forget=torch.from_numpy(mixture_components(seed, 0, DRAWS, lam).copy()),
        path=LOW,
    )
    return list(row_gradients(method.rows(query)))


def assert_same_mean(first, second):
    """Two-sided test of each of the 20 components at z = 4.5: with equal means, 1 chance in 7,000 of failing."""
    standard_error = (first.var(0) / len(first) + second.var(0) / len(second)).sqrt()
    z = (first.mean(0) - second.mean(0)).abs() / standard_error
    assert z.max() < 4.5
    # The bound says something: the estimate is precise compared with the gradient itself.
    assert standard_error.norm() < 0.05 * second.mean(0).norm()


KEEP, FORGET, EVERYTHING = (0, NUM_KEEP), (NUM_KEEP, NUM_KEEP + NUM_FORGET), (0, NUM_KEEP + NUM_FORGET)


@pytest.mark.parametrize("lam", [0.1, 0.5, 0.9])
def test_importance_sampling_is_unbiased(lam):
    mixture = monte_carlo(SISS(lam), 10, KEEP, FORGET, lam)
    no_is = METHODS["siss_no_is"]()
    keep, forget = monte_carlo(no_is, 11, KEEP, FORGET)
    # The first half of the rows without importance sampling is made from keep images, the second from forget images.
    assert_same_mean(mixture[0], keep[:DRAWS])
    assert_same_mean(mixture[1], forget[DRAWS:])


@pytest.mark.parametrize("lam", [0.1, 0.5, 0.9])
def test_with_all_of_x_it_is_naive_deletion(lam):
    """Section 2: `n/(n-k) L_x - k/(n-k) L_a`, x from all of X and s = 0, is the objective on X without A."""
    keep, forget = monte_carlo(SISS(lam), 12, EVERYTHING, FORGET, lam)
    n, k = NUM_KEEP + NUM_FORGET, NUM_FORGET
    naive, _ = monte_carlo(METHODS["naive_deletion"](), 13, KEEP, FORGET)
    assert_same_mean(n / (n - k) * keep - k / (n - k) * forget, naive)
