import datasets
import numpy as np
import pytest

from siss_diffusers import draws
from siss_diffusers.data.images import Images, ImageTransform
from siss_diffusers.data.keep_order import KeepOrder
from siss_diffusers.data.pairs import PairDataset
from siss_diffusers.errors import UsageError
from siss_diffusers.methods import SISS
from tests.helpers.image_rows import embedded, flat


class CountingImages(Images):
    """Remembers what was decoded to be compared."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.decoded: list[int] = []

    def digest(self, index: int) -> bytes:
        self.decoded.append(index)
        return super().digest(index)


def counting(pictures: list[np.ndarray]) -> CountingImages:
    return CountingImages(embedded(pictures), "image", ImageTransform(channels=1, resolution=8), "--dataset_name")


class TestKeepOrder:
    SIZE = 60
    COPIES = (3, 17, 18, 41)

    def images(self) -> CountingImages:
        """Rows 3, 17, 18 and 41 are copies of the forget image, row 50."""
        return counting([flat(50 if row in self.COPIES else row) for row in range(self.SIZE)])

    def order(self, images=None, seed=0, limit=None) -> KeepOrder:
        images = images or self.images()
        return KeepOrder(images, np.delete(np.arange(self.SIZE), 50), {Images.digest(images, 50)}, seed, limit)

    def test_a_pass_holds_what_is_to_keep_once_and_copies_never(self):
        order = self.order()
        kept = sorted(set(range(self.SIZE)) - {*self.COPIES, 50})
        drawn = [order[position] for position in range(3 * len(kept))]
        passes = [drawn[start : start + len(kept)] for start in range(0, len(drawn), len(kept))]
        assert [sorted(one_pass) for one_pass in passes] == [kept] * 3
        assert len({tuple(one_pass) for one_pass in passes}) == 3

    def test_positions_do_not_depend_on_what_was_asked_before(self):
        """Ranks, workers and resumed runs start anywhere, and longer runs plan more."""
        one_by_one, scattered, planned = self.order(), self.order(), self.order()
        forward = [one_by_one[position] for position in range(130)]
        planned.walk(20)
        assert {position: scattered[position] for position in range(129, -1, -7)} == dict(
            list(enumerate(forward))[129::-7]
        )
        assert [planned[position] for position in range(130)] == forward

    def test_only_what_is_drawn_is_decoded_and_that_once(self):
        images = self.images()
        order = self.order(images)
        order.walk(12)
        assert 12 <= len(images.decoded) <= 12 + len(self.COPIES)
        drawn = [order[position] for position in range(12)]
        assert set(drawn) <= set(images.decoded) and len(images.decoded) == len(set(images.decoded))
        order.walk(1_000)
        assert sorted(images.decoded) == sorted(set(range(self.SIZE)) - {50})
        removed = len(self.COPIES)
        assert order.counts() == {
            "keep": self.SIZE - 1 - removed,
            "duplicates_removed": removed,
            "near_duplicates_removed": 0,
            "checked": self.SIZE - 1,
        }

    def test_every_image_is_equally_likely_at_every_position(self):
        """Over seeds, at the first positions: where copies were skipped nothing takes their share."""
        images, seeds = self.images(), 2_000
        digests = [Images.digest(images, row) for row in range(self.SIZE)]
        images.digest = lambda row: digests[row]
        counts = np.zeros((3, self.SIZE))
        for seed in range(seeds):
            order = KeepOrder(images, np.delete(np.arange(self.SIZE), 50), {digests[50]}, seed)
            for position in range(3):
                counts[position, order[position]] += 1
        kept = sorted(set(range(self.SIZE)) - {*self.COPIES, 50})
        expected = seeds / len(kept)
        assert counts[:, [*self.COPIES, 50]].sum() == 0
        assert np.abs(counts[:, kept] - expected).max() < 5 * expected**0.5

    def test_a_limit_takes_so_many_images_that_are_no_copies(self):
        orders = [self.order(seed=seed, limit=9) for seed in range(12)]
        for order in orders:
            drawn = [order[position] for position in range(27)]
            subset = set(drawn)
            assert len(subset) == 9 and not subset & {*self.COPIES, 50}
            assert all(set(drawn[start : start + 9]) == subset for start in (0, 9, 18))
            assert set(order.first(1_000)) <= subset and order.counts()["keep"] == 9

    def test_a_sample_to_compare_with_holds_no_copies_either(self):
        images = self.images()
        order, among = self.order(images), np.arange(self.SIZE) < 20
        assert order.first(5) == sorted(order[position] for position in range(5))
        assert order.first(1_000, among) == [row for row in range(20) if row not in self.COPIES]
        assert order.first(3, among) == sorted(order.first(3, among)) and len(order.first(3, among)) == 3
        only_copies = np.isin(np.arange(self.SIZE), self.COPIES)
        assert order.first(5, only_copies) == []

    def test_what_cannot_be_read_matters_only_where_it_is_drawn(self):
        order = self.order()
        last = order[54]  # of the first pass
        cells = self.images().rows.to_list()
        cells[last]["image"]["bytes"] = b"not a picture"
        spoilt = datasets.Dataset.from_list(cells, datasets.Features(image=datasets.Image(decode=False)))
        images = Images(spoilt, "image", ImageTransform(channels=1, resolution=8), "--dataset_name")
        order = self.order(images)
        order.walk(50)
        with pytest.raises(UsageError, match=f"--dataset_name: cannot read image {last} "):
            order.walk(55)


def test_long_passes_are_permuted_once(monkeypatch):
    """A permutation of a million for every item would take as long as the step."""
    images = counting([flat(row) for row in range(30)])
    order = KeepOrder(images, np.arange(30), set(), seed=0)
    order.walk(30)
    pairs = PairDataset(images, images.select([0]), order, SISS(), 4, (0, 1000), 0)
    draws.epoch_order.cache_clear()
    made, default_rng = [], np.random.default_rng

    def counted(key):
        made.append(tuple(key)) if key[1] == draws.ORDER else None
        return default_rng(key)

    monkeypatch.setattr(np.random, "default_rng", counted)
    for position in range(30, 90):  # with one forget image, every position is a pass of its own there
        pairs[position]
    assert [key for key in made if key[2] == 0] == [(0, draws.ORDER, 0, 1), (0, draws.ORDER, 0, 2)]
