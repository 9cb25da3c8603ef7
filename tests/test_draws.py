import itertools

import numpy as np
import pytest

from siss_diffusers import draws
from siss_diffusers.draws import keyed_generator, mixture_components, shuffled_index, torch_seed


@pytest.mark.parametrize(("num_pairs", "lam", "share"), [(64, 0.5, 32), (10, 0.3, 3), (8, 0.0, 0), (8, 1.0, 8)])
def test_a_whole_share_of_the_window_is_exact(num_pairs, lam, share):
    assert all(mixture_components(0, window, num_pairs, lam).sum() == share for window in range(50))


@pytest.mark.parametrize(("num_pairs", "lam"), [(1, 0.5), (3, 0.5), (7, 0.15), (4, 0.9)])
def test_a_broken_share_is_rounded_without_bias(num_pairs, lam):
    windows = np.array([mixture_components(0, window, num_pairs, lam) for window in range(4000)])
    assert set(windows.sum(1)) <= {int(lam * num_pairs), int(lam * num_pairs) + 1}
    # Every pair, and so the count too, is of the forget component with probability lam, within 4.5 standard errors.
    assert np.abs(windows.mean(0) - lam).max() < 4.5 * (lam * (1 - lam) / len(windows)) ** 0.5


def test_a_window_of_two_pairs_has_both_sides_at_half():
    assert all(mixture_components(seed, 0, 2, 0.5).sum() == 1 for seed in range(50))


def test_every_element_once_in_each_pass_in_an_order_of_its_own():
    size = 11
    keep, forget = ([shuffled_index(3, which, i, size) for i in range(3 * size)] for which in (0, 1))
    passes = [sequence[start : start + size] for sequence in (keep, forget) for start in range(0, 3 * size, size)]
    assert all(sorted(one_pass) == list(range(size)) for one_pass in passes)
    assert len({tuple(one_pass) for one_pass in passes}) == 6
    assert keep != [shuffled_index(4, 0, i, size) for i in range(3 * size)]


def test_positions_may_be_asked_for_in_any_order():
    """A resumed run starts in the middle; ranks and workers ask for scattered positions."""
    forward = [shuffled_index(0, 1, i, 5) for i in range(40)]
    draws.epoch_order.cache_clear()
    assert [shuffled_index(0, 1, i, 5) for i in reversed(range(40))] == forward[::-1]


def test_draws_of_different_purposes_and_keys_do_not_collide():
    purposes = (draws.PAIR, draws.COMPONENT, draws.ORDER, draws.CALIBRATION, draws.MODEL, draws.ADAPTER)
    assert len(set(purposes)) == 6
    # Keys of the lengths that are used: numpy pads short ones with zeros, so lengths must not be mixed in one purpose.
    lengths = dict(zip(purposes, (2, 1, 2, 1, 2, 0), strict=True))
    first = [
        keyed_generator(seed, purpose, *key).integers(2**63)
        for seed in (0, 1, 2**31)
        for purpose in purposes
        for key in itertools.product(range(4), repeat=lengths[purpose])
    ]
    assert len(set(first)) == len(first)


def test_the_same_key_draws_the_same():
    assert (
        keyed_generator(5, draws.PAIR, 2, 3).random(4).tolist()
        == keyed_generator(5, draws.PAIR, 2, 3).random(4).tolist()
    )
    assert torch_seed(5, draws.MODEL, 2, 0) == torch_seed(5, draws.MODEL, 2, 0) != torch_seed(5, draws.MODEL, 2, 1)
    assert 0 <= torch_seed(5, draws.MODEL, 2, 0) < 2**63
