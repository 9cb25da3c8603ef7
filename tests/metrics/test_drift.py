import pytest
import torch

from siss_diffusers.metrics import METRICS, Skip
from siss_diffusers.metrics.drift import drift
from tests.helpers.evaluating import digits_evaluator, load_digits


def test_it_is_relative_to_the_contrast_of_each_picture():
    before = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = []
    for picture in before:
        contrast = sum((channel - channel.mean()).square().sum() for channel in picture).sqrt()
        expected.append((torch.full_like(picture, 0.1).norm() / contrast).item())
    assert drift(before, before) == 0
    assert drift(before, before + 0.1) == pytest.approx(sorted(expected)[2], rel=1e-4)


def test_unrelated_pictures_are_a_root_of_two_apart():
    generator = torch.Generator().manual_seed(0)
    before, after = (torch.randn(20, 1, 32, 32, generator=generator) for _ in range(2))
    assert drift(before, after) == pytest.approx(2**0.5, rel=0.02)


def test_copies_of_the_base_do_not_count():
    evaluator = digits_evaluator()
    base = evaluator.model("base", load_digits())
    garment = evaluator.data.forget
    base.samples = torch.cat([evaluator.data.keep[:3], garment])
    model = evaluator.model("unlearned", load_digits(), base)
    model.samples = torch.cat([evaluator.data.keep[:3], 1 - garment])
    assert METRICS["drift"].measure(model) == {"drift": 0.0} and METRICS["drift"].measure(base) == {}
    only_copies, unlearned = (evaluator.model(name, load_digits()) for name in ("base", "unlearned"))
    only_copies.samples = unlearned.samples = garment
    unlearned.base = only_copies
    with pytest.raises(Skip, match="every ordinary sample of the base"):
        METRICS["drift"].measure(unlearned)
