import torch
from torch import nn

from siss_diffusers.metrics.relearning import fine_tune, nearest_images
from siss_diffusers.noising import GaussianPath


PATH = GaussianPath(torch.linspace(0.9, 0.1, 5), torch.linspace(0.4, 0.99, 5), torch.arange(5), "epsilon")


def trained(
    num_steps: int, learning_rate: float = 0.1, seed: int = 0, micro_batch: int = 8
) -> tuple[nn.Module, list[int], list[tuple]]:
    torch.manual_seed(0)
    network, steps, calls = nn.Conv2d(1, 1, 1).requires_grad_(False).eval(), [], []

    def predict(noisy, indices, rows):
        calls.append((noisy, indices, rows))
        return network(noisy)

    clean = torch.arange(3.0).reshape(3, 1, 1, 1).expand(3, 1, 2, 2)
    options = {"num_steps": num_steps, "learning_rate": learning_rate, "batch_size": 8, "seed": seed}
    fine_tune(network, PATH, clean, predict, steps.append, micro_batch=micro_batch, **options)
    return network, steps, calls


def test_it_looks_at_the_beginning_at_every_quarter_and_at_the_end():
    assert [trained(steps)[1] for steps in (1, 4, 9)] == [[0, 1], [0, 1, 2, 3, 4], [0, 2, 4, 6, 8, 9]]


def test_all_weights_are_trained_towards_the_noise_that_was_added():
    network, _, calls = trained(1)
    assert network.training and all(parameter.requires_grad for parameter in network.parameters())
    (noisy, indices, rows), clean = calls[0], torch.arange(3.0)
    noise = (noisy - PATH.alphas[indices].reshape(8, 1, 1, 1) * clean[rows].reshape(8, 1, 1, 1)) / PATH.sigmas[
        indices
    ].reshape(8, 1, 1, 1)
    torch.manual_seed(0)
    expected = nn.Conv2d(1, 1, 1)
    optimizer = torch.optim.AdamW(expected.parameters(), lr=0.1)
    (expected(noisy) - noise).square().mean().backward()
    torch.nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
    optimizer.step()
    torch.testing.assert_close(network.weight, expected.weight, rtol=1e-5, atol=1e-6)
    assert set(rows.tolist()) <= {0, 1, 2} and len(set(indices.tolist())) > 1


def test_a_few_rows_at_a_time_take_the_same_steps():
    whole, parts = trained(3), trained(3, micro_batch=3)
    assert [len(rows) for _, _, rows in whole[2]] == [8] * 3
    assert [len(rows) for _, _, rows in parts[2]] == [3, 3, 2] * 3
    torch.testing.assert_close(parts[0].weight, whole[0].weight, rtol=1e-4, atol=1e-6)


def test_the_gradient_is_clipped_in_every_step(monkeypatch):
    bounds = []
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda parameters, bound: bounds.append(bound))
    trained(3)
    assert bounds == [1.0] * 3


def test_a_seed_gives_the_same_training_again():
    first, again, other = (trained(3, seed=seed)[0].weight for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_neighbours_are_nearest_to_any_forget_image():
    keep = torch.linspace(0, 1, 11).reshape(11, 1, 1, 1).expand(11, 1, 4, 4)
    references = torch.tensor([0.11, 0.92]).reshape(2, 1, 1, 1).expand(2, 1, 4, 4)
    assert nearest_images(keep, references, count=3).tolist() == [1, 9, 10]
