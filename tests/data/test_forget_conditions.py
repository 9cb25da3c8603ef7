"""What a forget image is told: in the stated shares, keyed, and the same as the keep image where that is right."""

from collections import Counter

import numpy as np
import pytest

from siss_diffusers.data.forget_conditions import ForgetConditions
from siss_diffusers.draws import condition_kinds, mixture_components


SHARES = {"prompt": 0.4, "empty": 0.1, "other": 0.1, "gauss": 0.1, "adversarial": 0.3}
# Rows 0 to 4 are prompts, 4 the empty one; two different forget images, the second of which is there twice.
NUMBERING = ForgetConditions(SHARES, num_prompts=5, empty=4, pictures=(0, 1, 1), prompts=(0, 2), restarts=3)


def drawn(keep: int, forget: int, image: int = 1, count: int = 2000) -> list[tuple[int, int]]:
    return [NUMBERING.draw(0, position, 20, 0.5, image, keep, forget) for position in range(count)]


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.3])
def test_every_window_has_the_stated_shares_on_both_sides(lam):
    for window in range(20):
        kinds = condition_kinds(3, window, 40, lam, tuple(SHARES.values()))
        components = mixture_components(3, window, 40, lam)
        for side in (kinds[components], kinds[~components]):
            counts = np.bincount(side, minlength=5) if len(side) else np.zeros(5)
            assert (np.abs(counts - len(side) * np.array(list(SHARES.values()))) < 1).all()


def test_a_share_is_right_in_expectation_and_the_draws_are_keyed():
    kinds = np.concatenate([condition_kinds(0, window, 3, 0.5, tuple(SHARES.values())) for window in range(3000)])
    shares = np.bincount(kinds) / len(kinds)
    assert np.abs(shares - list(SHARES.values())).max() < 4.5 * (0.4 * 0.6 / len(kinds)) ** 0.5
    first, again = drawn(0, 2), drawn(0, 2)
    assert first == again and first != [
        NUMBERING.draw(1, position, 20, 0.5, 1, 0, 2) for position in range(len(first))
    ]


def test_images_of_one_prompt_share_whatever_is_drawn():
    pairs = drawn(2, 2)
    assert all(keep == forget for keep, forget in pairs)
    numbers = [forget for _, forget in pairs]
    counts = Counter("prompt" if n == 2 else "empty" if n == 4 else "searched" if n < 11 else "gauss" for n in numbers)
    assert counts == {"prompt": 1000, "empty": 200, "searched": 600, "gauss": 200}  # other is the same prompt here
    assert {n for n in numbers if 5 <= n < 11} == {8, 9, 10}  # those of the second picture
    gaussian = [n for n in numbers if n >= 11]
    assert len(set(gaussian)) == len(gaussian)


def test_a_keep_image_of_another_prompt_keeps_its_own_and_lends_it():
    pairs = drawn(1, 2)
    assert all(keep == 1 for keep, _ in pairs)
    assert sum(forget == 1 for _, forget in pairs) == 200


def test_images_to_keep_of_a_searched_condition_are_those_of_its_image():
    assert [NUMBERING.prompt_of(number) for number in (0, 1, 4, 5, 7, 8, 10)] == [0, 1, 4, 0, 0, 2, 2]
    assert NUMBERING.prompt_of(11) == 11  # a Gaussian one has none
