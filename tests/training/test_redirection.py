"""What forget images are redirected to, and how the images for it are chosen."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from siss_diffusers.data.keep_order import KeepOrder
from siss_diffusers.data.strangers import Strangers
from siss_diffusers.training.redirection import KeepPosterior
from siss_diffusers.training.samples import MAX_TURNED_IMAGES, images_to_turn
from siss_diffusers.training.training_set import rows_to_redirect_to
from tests.helpers.image_rows import index_of, make_images
from tests.helpers.tiny_problem import SHAPE, draw_query, micro_batches


class Keep:
    """Images whose number is the row."""

    def __init__(self, num_images=40):
        self.tensors = torch.randn(num_images, *SHAPE, generator=torch.Generator().manual_seed(5))

    def __len__(self):
        return len(self.tensors)

    def load(self, index, generator=None):
        assert generator is None  # posterior means, nothing random
        return self.tensors[index]


def mean_over(query, pair, images):
    """y' of a pair by its definition, in float64."""
    r = (query.path.alphas / query.path.sigmas)[query.timesteps[pair]].double()
    errors = query.noise[pair].double() + r * (query.forget[pair].double() - images.double())
    posterior = (-errors.square().flatten(1).sum(1) / 2).softmax(0)
    return (posterior[:, None, None, None] * images.double()).sum(0).float()


# Images to keep have three conditions, of which no forget image has 2; the forget condition 7 has no image to keep.
CONDITIONS = {row: row % 3 for row in range(40)}
ROWS, OTHERS = [row for row in range(30) if row % 3 < 2], [2, 5, 6, 33]


@pytest.fixture
def query():
    query = draw_query(24, from_forget=torch.arange(24) % 4 > 0)
    return replace(query, keep_condition=torch.full((24,), 2), forget_condition=torch.tensor([0, 7, 1] * 8))


def test_means_of_drawn_conditions_are_over_the_images_that_belong_to_them(query):
    """Another prompt has those of the stand-ins that have it; a searched one, 99, those of its image's prompt."""
    keep = Keep()
    posterior = KeepPosterior.of_rows(keep, ROWS, OTHERS, CONDITIONS, "cpu")
    drawn = replace(query, forget_condition=torch.tensor([2, 99, 50] * 8))
    means = posterior.means(drawn, torch.where(drawn.forget_condition == 99, 0, drawn.forget_condition))
    expected = {
        2: [row for row in OTHERS if row % 3 == 2],
        99: [row for row in ROWS if row % 3 == 0],
        50: OTHERS,  # Gaussian: of any prompt
    }
    for pair in query.from_forget.nonzero().flatten().tolist():
        rows = expected[int(drawn.forget_condition[pair])]
        torch.testing.assert_close(means[pair], mean_over(drawn, pair, keep.tensors[rows]), rtol=1e-4, atol=1e-5)


def test_means_are_over_the_images_of_the_condition_or_of_any_where_it_has_none(query):
    keep = Keep()
    means = KeepPosterior.of_rows(keep, ROWS, OTHERS, CONDITIONS, "cpu").means(query)
    expected = {
        0: [row for row in ROWS if row % 3 == 0],
        1: [row for row in ROWS if row % 3 == 1],
        7: OTHERS,
    }
    seen = set()
    for pair in query.from_forget.nonzero().flatten().tolist():
        condition = int(query.forget_condition[pair])
        wanted = mean_over(query, pair, keep.tensors[expected[condition]])
        torch.testing.assert_close(means[pair], wanted, rtol=1e-6, atol=1e-6)
        others = mean_over(query, pair, keep.tensors[expected[1 if condition == 0 else 0]])
        assert not torch.allclose(means[pair], others, atol=1e-3)
        seen.add(condition)
    assert seen == expected.keys()
    assert means[~query.from_forget].equal(query.forget[~query.from_forget])


def test_without_conditions_they_are_over_all_images(query):
    keep, query = Keep(), replace(query, keep_condition=None, forget_condition=None)
    means = KeepPosterior.of_rows(keep, [], OTHERS, None, "cpu").means(query)
    for pair in query.from_forget.nonzero().flatten().tolist():
        torch.testing.assert_close(means[pair], mean_over(query, pair, keep.tensors[OTHERS]), rtol=1e-6, atol=1e-6)


def test_a_condition_that_no_image_has_after_all_gets_the_images_of_the_others(query):
    """Captions that are alike but for case may be two conditions to a tokenizer that tells cases apart."""
    keep = Keep()
    means = KeepPosterior.of_rows(keep, ROWS, [], CONDITIONS, "cpu").means(query)
    (pair, *_) = (query.from_forget & (query.forget_condition == 7)).nonzero().flatten().tolist()
    torch.testing.assert_close(means[pair], mean_over(query, pair, keep.tensors[ROWS]), rtol=1e-6, atol=1e-6)


def test_means_do_not_depend_on_the_split_into_batches(query):
    posterior = KeepPosterior.of_rows(Keep(), ROWS, OTHERS, CONDITIONS, "cpu")
    parts = [posterior.means(part) for part in micro_batches(query, 1, 5, 16, 2)]
    torch.testing.assert_close(torch.cat(parts), posterior.means(query), rtol=2e-7, atol=2e-7)


@pytest.fixture
def numbered(tmp_path):
    """Twenty pictures, each another."""
    return make_images([np.full((8, 8), index, np.uint8) for index in range(20)], tmp_path / "numbered")


class TestChoice:
    CAPTIONS = pa.chunked_array([["a flower", "A  Flower ", "a temple", "a digit"] * 5])

    def order(self, numbered, seed=0, limit=None):
        return KeepOrder(numbered, np.arange(20), set(), seed, limit)

    def test_of_each_prompt_the_first_of_the_order(self, numbered):
        rows, others = rows_to_redirect_to(self.order(numbered), self.CAPTIONS, ["a flower", "a digit"] * 2, 4)
        flowers, digits = [row for row in rows if row % 4 < 2], [row for row in rows if row % 4 == 3]
        assert len(flowers) == len(digits) == 4 and len(rows) == 8 and others == []
        first = self.order(numbered).first_pass.tolist()
        assert set(flowers) == set([row for row in first if row % 4 < 2][:4])

    def test_nothing_but_data_and_seed_decides(self, numbered):
        walked = self.order(numbered)
        walked.walk(13)
        chosen = [
            rows_to_redirect_to(order, self.CAPTIONS, ["a flower"], 4) for order in (self.order(numbered), walked)
        ]
        assert chosen[0] == chosen[1]
        other = self.order(numbered, seed=1)
        assert rows_to_redirect_to(other, self.CAPTIONS, ["a flower"], 4) != chosen[0]

    def test_images_of_any_prompt_only_where_a_prompt_has_none(self, numbered):
        rows, others = rows_to_redirect_to(self.order(numbered), self.CAPTIONS, ["a temple", "a boat"], 3)
        assert len(rows) == 3 and all(row % 4 == 2 for row in rows)
        assert others == sorted(self.order(numbered).first_pass[:3].tolist())
        assert rows_to_redirect_to(self.order(numbered), None, None, 3) == ([], others)

    def test_a_limited_keep_set_gives_no_more(self, numbered):
        _, others = rows_to_redirect_to(self.order(numbered, limit=5), None, None, 100)
        assert len(others) == 5


def test_each_picture_is_turned_once_however_many_copies_there_are():
    digests = [bytes([number % 3]) for number in range(9)]
    chosen = images_to_turn(0, digests)
    assert sorted(index % 3 for index in chosen) == [0, 1, 2]
    assert chosen == images_to_turn(0, digests) and any(
        chosen != images_to_turn(seed, digests) for seed in range(1, 4)
    )
    assert len(images_to_turn(0, [bytes([one, two]) for one in range(20) for two in range(20)])) == MAX_TURNED_IMAGES


def test_strangers_are_the_pictures_turned_three_times(tmp_path):
    pictures = [np.full((8, 8), 10 * number, np.uint8) for number in (1, 2)]
    for picture in pictures:
        picture[0, 0] = 255  # top left
    strangers = Strangers(make_images(pictures, tmp_path), [1, 0])
    assert len(strangers) == 6 and [strangers.source_of(index) for index in range(6)] == [1, 1, 1, 0, 0, 0]
    corners = [(7, 0), (7, 7), (0, 7)]
    for index in range(6):
        picture = strangers.load(index)[0]
        assert picture[corners[index % 3]] == 1 and (picture == 1).sum() == 1
        assert index_of(picture[3:5, 3:5]) == (20 if index < 3 else 10)
