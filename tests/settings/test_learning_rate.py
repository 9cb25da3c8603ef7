"""The default learning rate, which goes by the width of the network."""

import pytest

from siss_diffusers.families import NamedPipeline, StableDiffusion, Unconditional
from siss_diffusers.settings import TextToImageSettings, UnconditionalSettings
from siss_diffusers.unlearning import with_family_defaults
from tests.helpers.paths import TINY_MODEL, TINY_SD


@pytest.mark.parametrize(
    ("settings", "width", "rate"),
    [
        (UnconditionalSettings(), 512, 5e-6),
        (UnconditionalSettings(), 64, 4e-5),
        (TextToImageSettings(), 1280, 1e-5),
        (TextToImageSettings(use_lora=True), 1280, 1e-4),
        (TextToImageSettings(use_lora=True), 64, 2e-3),
    ],
)
def test_it_is_that_of_the_paper_and_falls_with_the_width(settings, width, rate):
    assert settings.default_learning_rate(width) == rate


@pytest.mark.parametrize(
    ("family", "model", "settings", "rate"),
    [
        (Unconditional, TINY_MODEL, UnconditionalSettings(), 4e-5),
        (StableDiffusion, TINY_SD, TextToImageSettings(), 2e-4),
        (StableDiffusion, TINY_SD, TextToImageSettings(learning_rate=3e-5), 3e-5),
    ],
)
def test_the_width_is_that_of_the_widest_block(family, model, settings, rate):
    source = NamedPipeline(str(model))
    resolved = with_family_defaults(settings, family.from_source(source), source)
    assert resolved.learning_rate == rate
