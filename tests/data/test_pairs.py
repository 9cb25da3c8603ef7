import numpy as np
import pytest
import torch

from siss_diffusers.data.keep_order import KeepOrder
from siss_diffusers.data.pairs import PairDataset, WindowSampler, window_loader
from siss_diffusers.methods import SISS, EraseDiff, ReTrack
from tests.helpers.image_rows import index_of


class TestPairs:
    def pairs(self, numbered, method=None, num_pairs=4, timestep_range=(0, 1000), seed=0, **kwargs) -> PairDataset:
        keep, forget = numbered.select(range(15)), numbered.select(range(15, 20))
        order = KeepOrder(keep, np.arange(15), set(), seed)
        return PairDataset(keep, forget, order, method or SISS(), num_pairs, timestep_range, seed, **kwargs)

    def test_keep_and_forget_are_disjoint_and_every_image_is_used(self, numbered):
        pairs = self.pairs(numbered)
        items = [pairs[position] for position in range(15)]
        assert {index_of(item["keep"]) for item in items} == set(range(15))
        assert {index_of(item["forget"]) for item in items} == set(range(15, 20))

    def test_timesteps_span_the_requested_range(self, numbered):
        timesteps = [int(self.pairs(numbered)[position]["timesteps"]) for position in range(400)]
        assert min(timesteps) < 20 and max(timesteps) > 980 and len(set(timesteps)) > 250
        narrow = self.pairs(numbered, timestep_range=(3, 6))
        assert {int(narrow[position]["timesteps"]) for position in range(60)} == {3, 4, 5}

    def test_timesteps_are_drawn_as_often_as_a_density_says(self, numbered):
        density = np.array([0.5, 0.0, 0.1, 0.3, 0.1])
        for low, high in ((0, 5), (1, 4)):
            pairs = self.pairs(numbered, timestep_range=(low, high), timestep_density=density)
            drawn = np.bincount([int(pairs[position]["timesteps"]) for position in range(600)], minlength=5) / 600
            expected = np.where((np.arange(5) >= low) & (np.arange(5) < high), density, 0)
            np.testing.assert_allclose(drawn, expected / expected.sum(), atol=0.06)

    def test_a_share_lambda_of_every_window_is_made_from_forget_images(self, numbered):
        pairs = self.pairs(numbered, SISS(lam=0.25), num_pairs=8)
        for window in range(5):
            assert sum(bool(pairs[8 * window + pair]["from_forget"]) for pair in range(8)) == 2

    def test_draws_are_keyed_by_seed_window_and_pair(self, numbered):
        pairs, same, other = (self.pairs(numbered, seed=seed) for seed in (0, 0, 1))
        assert torch.equal(pairs[5]["noise"], same[5]["noise"])
        assert not torch.equal(pairs[5]["noise"], other[5]["noise"])
        noises = torch.stack([pairs[position]["noise"] for position in range(50)])
        assert torch.unique(noises, dim=0).shape[0] == 50
        assert abs(noises.mean()) < 0.1 and abs(noises.std() - 1) < 0.05

    @pytest.mark.parametrize("workers", [0, 2])
    def test_ranks_and_micro_batches_cover_each_window_once(self, numbered, workers):
        """Two processes of two micro-batches draw what one process of one micro-batch draws, each pair once."""
        pairs = self.pairs(numbered, num_pairs=8)
        whole = next(iter(window_loader(pairs, WindowSampler(8, 1, 0, 1, first_window=3), workers)))
        parts = {}
        for rank in range(2):
            batches = iter(window_loader(pairs, WindowSampler(2, 2, rank, 2, first_window=3), workers))
            for micro_step in range(2):
                parts[2 * micro_step + rank] = next(batches)
        for key, expected in whole.items():
            assert torch.equal(torch.cat([parts[index][key] for index in range(4)]), expected), key

    def test_methods_get_what_they_need(self, numbered):
        item = self.pairs(numbered, EraseDiff())[0]
        assert 0 <= item["uniform"].min() and item["uniform"].max() < 1
        item = self.pairs(numbered, ReTrack(num_neighbors=2), neighbors=[[1, 2]] * 5)[0]
        assert [index_of(neighbor) for neighbor in item["neighbors"]] == [1, 2]
        assert "uniform" not in item and "neighbors" not in self.pairs(numbered)[0]
