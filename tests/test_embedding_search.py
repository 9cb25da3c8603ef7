"""The search for a condition: its gradient, its draws, and that searches in one batch are alone."""

import pytest
import torch
from torch import nn

from siss_diffusers.embedding_search import (
    ROWS_PER_SEARCH,
    gaussian_like,
    search_draws,
    search_embeddings,
    search_gradient,
)
from siss_diffusers.noising import GaussianPath
from tests.helpers.tiny_sd import build_pipeline


PATH = GaussianPath(torch.linspace(0.99, 0.1, 10), torch.linspace(0.1, 0.99, 10), torch.arange(10), "epsilon")
IMAGES = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
START = {
    "encoder_hidden_states": torch.randn(3, 24, 16, generator=torch.Generator().manual_seed(1)),
    "attention_mask": torch.ones(3, 24, dtype=torch.long),
}


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    return build_pipeline().unet.eval()


def predict_with(unet: nn.Module):
    return lambda noisy, timesteps, tensors: unet(noisy, timesteps, tensors["encoder_hidden_states"]).sample


def test_the_gradient_is_that_of_finite_differences(unet):
    """In float64, along random directions, of a real network with cross-attention."""
    unet = build_pipeline().unet.eval().double()
    path = GaussianPath(PATH.alphas.double(), PATH.sigmas.double(), PATH.model_timesteps, "v_prediction")
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(3, 2, 4, 8, 8, generator=generator, dtype=torch.float64)
    timesteps = torch.randint(10, (3, 2), generator=generator)
    images = IMAGES.double()

    def losses(states: torch.Tensor) -> torch.Tensor:
        return search_gradient(predict_with(unet), path, images, noise, timesteps, START | {name: states})[0]

    name = "encoder_hidden_states"
    states = START[name].double()
    _, gradients = search_gradient(predict_with(unet), path, images, noise, timesteps, START | {name: states})
    assert set(gradients) == {name}  # the mask is no floating tensor
    for _ in range(3):
        direction = torch.randn(states.shape, generator=generator, dtype=torch.float64)
        change = (losses(states + 1e-5 * direction) - losses(states - 1e-5 * direction)) / 2e-5
        slope = (gradients[name] * direction).flatten(1).sum(1)
        assert slope.abs().max() > 1e-6
        torch.testing.assert_close(change, slope, rtol=1e-5, atol=1e-9)


def run(unet, rows=(0, 1, 2), marks=(3, 6), seed=0):
    keys = [(0, row) for row in rows]
    start = {name: tensor[list(rows)] for name, tensor in START.items()}
    return search_embeddings(
        predict_with(unet), PATH, IMAGES[list(rows)], start, keys, marks=marks, seed=seed, learning_rate=0.1
    )


def test_two_searches_are_equal_bit_for_bit_and_another_seed_is_another(unet):
    first, second, other = run(unet), run(unet), run(unet, seed=1)
    for one, again, another in zip(first, second, other):
        assert torch.equal(one["encoder_hidden_states"], again["encoder_hidden_states"])
        assert not torch.equal(one["encoder_hidden_states"], another["encoder_hidden_states"])


def test_a_mark_on_the_way_changes_nothing_and_a_mask_stays(unet):
    (early, late), (alone,) = run(unet), run(unet, marks=(6,))
    assert torch.equal(late["encoder_hidden_states"], alone["encoder_hidden_states"])
    assert (early["encoder_hidden_states"] - START["encoder_hidden_states"]).abs().max() <= 3 * 0.1 + 1e-3
    assert torch.equal(late["attention_mask"], START["attention_mask"])


def test_searches_in_one_batch_do_not_touch_each_other(unet):
    together, alone = run(unet)[-1], run(unet, rows=(1,))[-1]
    difference = together["encoder_hidden_states"][1] - alone["encoder_hidden_states"][0]
    # Adam turns the rounding of a gradient near zero into a whole step, of few numbers.
    assert (difference.abs() > 1e-3).float().mean() < 0.02


def test_the_loss_falls_and_the_weights_get_no_gradient(unet):
    found = run(unet, marks=(40,))[0]
    draws = [search_draws((9, row), 0, IMAGES.shape[1:], len(PATH), seed=5) for row in range(3)]
    noise, timesteps = (torch.stack(parts) for parts in zip(*draws))
    before, after = (
        search_gradient(predict_with(unet), PATH, IMAGES, noise, timesteps, tensors)[0] for tensors in (START, found)
    )
    assert (after < before).all()
    assert all(parameter.grad is None for parameter in unet.parameters())


def test_every_row_has_noise_and_a_timestep_of_its_own():
    noise, timesteps = search_draws((1, 2), 3, (4, 8, 8), 1000, seed=0)
    assert noise.shape == (ROWS_PER_SEARCH, 4, 8, 8) and len(set(timesteps.tolist())) > 5
    for other in (search_draws((1, 2), 4, (4, 8, 8), 1000, 0), search_draws((1, 3), 3, (4, 8, 8), 1000, 0)):
        assert not torch.equal(noise, other[0])


def test_gaussian_starts_are_as_large_as_a_prompt():
    tensors = {"states": 5 * torch.randn(1, 77, 64), "mask": torch.ones(1, 77, dtype=torch.long)}
    drawn = gaussian_like(tensors, 0, 9, 1)
    assert drawn["states"].std().item() == pytest.approx(tensors["states"].std().item(), rel=0.05)
    assert torch.equal(drawn["mask"], tensors["mask"])
    assert torch.equal(drawn["states"], gaussian_like(tensors, 0, 9, 1)["states"])
