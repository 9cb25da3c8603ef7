"""What cannot be measured is never a good result."""

import math
from types import SimpleNamespace

import pytest
import torch

from siss_diffusers.auditing import measure_prompt
from siss_diffusers.commands.audit_table import compare_with_ordinary
from siss_diffusers.evaluation.data import EvaluationData
from siss_diffusers.evaluation.detectors import Detectors
from siss_diffusers.evaluation.evaluator import measure, only_finite
from siss_diffusers.evaluation.model import MeasuredModel
from siss_diffusers.evaluation.networks import Networks
from siss_diffusers.evaluation.settings import EvaluationSettings
from siss_diffusers.families import Sampling, Unconditional
from siss_diffusers.hub.card import relearning_result
from siss_diffusers.metrics import METRICS, PROBES
from siss_diffusers.metrics.broken import broken, finite
from siss_diffusers.metrics.copies import CopyDetectors, copy_statistics, wilson_interval
from siss_diffusers.metrics.drift import drift
from siss_diffusers.metrics.pictures import frame_copies
from siss_diffusers.noising import GaussianPath


GENERATOR = torch.Generator().manual_seed(0)
PICTURES = torch.rand(12, 1, 8, 8, generator=GENERATOR)
FORGET, KEEP, OTHERS = PICTURES[:1], PICTURES[1:8], PICTURES[8:]


def damaged() -> dict[str, torch.Tensor]:
    """One sample of each kind that is no picture."""
    one_pixel = OTHERS[:1].clone()
    one_pixel[0, 0, 0, 0] = math.nan
    infinite = OTHERS[:1].clone()
    infinite[0, 0, 3, 3] = math.inf
    return {
        "not a number": torch.full((1, 1, 8, 8), math.nan),
        "one pixel": one_pixel,
        "infinite": infinite,
        "grey": torch.full((1, 1, 8, 8), 0.5),
        "black": torch.rand(1, 1, 8, 8, generator=GENERATOR) * 6 / 255,
        "white": torch.ones(1, 1, 8, 8),
    }


@pytest.mark.parametrize("kind", damaged())
def test_each_kind_is_seen(kind):
    assert broken(damaged()[kind]).item()
    assert finite(damaged()[kind]).item() == (kind in ("grey", "black", "white"))


def test_pictures_are_not_broken_though_dark_or_of_one_channel():
    assert not broken(PICTURES).any()
    assert not broken(PICTURES * 0.1).any()
    red = torch.zeros(1, 3, 8, 8)
    red[:, 0] = PICTURES[:1, 0]
    assert not broken(red).any()
    coloured = torch.tensor([0.9, 0.1, 0.4]).reshape(1, 3, 1, 1).expand(1, 3, 8, 8)
    assert broken(coloured).all()


@pytest.mark.parametrize("kind", damaged())
def test_they_are_counted_by_themselves(kind):
    samples = torch.cat([FORGET, OTHERS[:3], damaged()[kind]])
    statistics = copy_statistics(CopyDetectors.calibrated(FORGET, KEEP).flags(samples), broken(samples))
    assert statistics["samples"] == 5 and statistics["broken_share"] == pytest.approx(1 / 5)
    assert statistics["copy_share"] == 1 / 4
    assert (statistics["copy_share_low"], statistics["copy_share_high"]) == wilson_interval(1, 4)
    assert statistics["copy_share_by_detector"]["pixel_l2"] == pytest.approx(1 / 4)


def test_without_a_picture_there_is_no_share():
    samples = torch.full((4, 1, 8, 8), math.nan)
    statistics = copy_statistics(CopyDetectors.calibrated(FORGET, KEEP).flags(samples), broken(samples))
    assert statistics["copy_share"] is None and statistics["broken_share"] == 1
    assert (statistics["copy_share_low"], statistics["copy_share_high"]) == (0, 1)
    assert copy_statistics({"any": torch.zeros(0, dtype=torch.bool)})["copy_share"] is None


def test_a_flat_forget_image_that_comes_back_is_a_copy():
    flat = torch.full((1, 1, 8, 8), 0.5)
    statistics = copy_statistics(CopyDetectors.calibrated(flat, KEEP).flags(flat), broken(flat))
    assert statistics["copy_share"] == 1 and statistics["broken_share"] == 0


def test_detectors_that_miss_the_image_itself_are_blind():
    assert not CopyDetectors.calibrated(FORGET, KEEP).are_blind
    assert CopyDetectors.calibrated(FORGET, torch.cat([KEEP, FORGET])).are_blind
    assert Detectors(FORGET, torch.cat([KEEP, FORGET])).are_blind
    for sets in ((FORGET[:0], KEEP), (FORGET, KEEP[:0])):
        with pytest.raises(ValueError, match="both sets need an image"):
            CopyDetectors.calibrated(*sets)


def test_drift_to_what_is_not_finite_is_not_small():
    after = OTHERS.clone()
    after[0] = math.nan
    assert drift(OTHERS, after) == 0  # the median of four is of a picture
    after[:3] = math.nan
    assert drift(OTHERS, after) == math.inf


def fake_model(samples: torch.Tensor, keep: torch.Tensor = KEEP):
    """A model without a network whose samples are given."""

    def features(images: torch.Tensor) -> torch.Tensor:
        assert images.isfinite().all()
        return images.flatten(1)[:, :8]

    model = MeasuredModel(
        name="unlearned",
        pipeline=SimpleNamespace(unet=torch.nn.Linear(1, 1)),
        family=Unconditional(1, 8),
        data=EvaluationData.without_prompts(FORGET, keep),
        settings=EvaluationSettings(),
        detectors=Detectors(FORGET, keep, features),
        networks=Networks(features, features, lambda images: features(images).softmax(1)),
    )
    model.__dict__["_memorized"] = samples, None
    return model


WITHOUT_NETWORK = [metric for key, metric in METRICS.items() if not key.startswith(("nll", "memorized_bits"))]


@pytest.mark.parametrize("kind", damaged())
def test_no_figure_of_a_ruined_model_is_good(kind):
    figures, reasons = measure(fake_model(damaged()[kind].repeat(8, 1, 1, 1)), WITHOUT_NETWORK)
    assert figures["broken_share"] == 1 and "copy_share" not in figures and "broken" in reasons["copy_share"]
    if kind in ("not a number", "one pixel", "infinite"):
        assert figures["others"] == 0
        measured = {key for key, value in figures.items() if value is not None}
        assert measured == {"samples", "broken_share", "others"}


def test_figures_are_those_of_the_pictures_and_all_are_finite():
    samples = torch.cat([OTHERS, PICTURES[1:8], damaged()["not a number"]])
    figures, _ = measure(fake_model(samples), WITHOUT_NETWORK)
    clean, _ = measure(fake_model(samples[:-1]), WITHOUT_NETWORK)
    assert figures["broken_share"] == pytest.approx(1 / 12) and clean["broken_share"] == 0
    assert figures["samples"] == clean["samples"] + 1 and figures["fid"] is not None
    assert {**figures, "samples": 0, "broken_share": 0} == {**clean, "samples": 0, "broken_share": 0}


def test_blind_detectors_give_no_share():
    figures, reasons = measure(fake_model(OTHERS, torch.cat([KEEP, FORGET])), WITHOUT_NETWORK)
    assert "copy_share" not in figures and "remove it" in reasons["copy_share"]


def test_a_metric_that_fails_costs_itself_only():
    model = fake_model(OTHERS)

    def fail(model):
        raise RuntimeError("out of memory")

    entry = SimpleNamespace(key="x", label="X", changes_model=False, measure=fail)
    figures, reasons = measure(model, [entry, METRICS["samples"]])
    assert figures == {"samples": 4} and reasons == {"x": "it failed (RuntimeError)"}


def test_nothing_that_is_not_finite_is_written():
    assert only_finite({"a": [math.nan, 1], "b": {"c": -math.inf}}) == {"a": [None, 1], "b": {"c": None}}


@pytest.mark.parametrize("value", [0.5, math.nan])
def test_an_injection_that_is_no_picture_resembles_nothing(monkeypatch, value):
    """A correlation of 0 would be the best result there is."""
    levels = torch.linspace(0.1, 0.99, 10)
    replaced = {
        "encode": lambda model, images: images,
        "embed": lambda model, prompts: torch.zeros(len(prompts), 1),
        "predict": lambda model, noisy, *_: torch.zeros_like(noisy),
        "decode": lambda model, draw: torch.full_like(draw, value),
        "path": GaussianPath(levels.flip(0), levels, torch.arange(10), "epsilon"),
    }
    for name, replacement in replaced.items():
        monkeypatch.setattr(MeasuredModel, name, replacement)
    figures, _ = measure(fake_model(OTHERS), [PROBES["injection"]])
    assert len(figures["injection"]) == 4 and set(figures["injection"].values()) == {None}


def test_the_grid_shows_them_black():
    grid = frame_copies(torch.full((1, 1, 2, 2), math.nan), [False], columns=1, scale=1)
    assert (grid[:, 2:-2, 2:-2] == 0).all()


def test_a_card_without_a_measured_point():
    points = [{"step": 0, "copy_share": 0.5}, {"step": 10, "copy_share": None}]
    assert relearning_result({"relearning": points}) == {"steps": 0, "copies": "50.0 %"}
    assert relearning_result({"relearning": points[1:]}) is None


class Audited:
    """A family whose samples are given."""

    def __init__(self, samples: torch.Tensor) -> None:
        self.samples = samples

    def network(self, pipeline):
        return torch.nn.Identity()

    def path(self, pipeline):
        return None

    def embed(self, pipeline, prompts):
        return torch.zeros(1)

    def sample(self, *_):
        return self.samples


def test_the_audit_leaves_broken_samples_out(monkeypatch):
    norms = torch.arange(12.0).reshape(2, 6)

    def saw_a_pass(self):
        self.passes.append([norms[0]])
        return self

    monkeypatch.setattr("siss_diffusers.metrics.noise_norm.TextNoiseNorms.__enter__", saw_a_pass)
    monkeypatch.setattr("siss_diffusers.metrics.noise_norm.TextNoiseNorms.__exit__", lambda *_: None)
    monkeypatch.setattr("siss_diffusers.metrics.noise_norm.TextNoiseNorms.per_step", lambda self: norms)
    samples = torch.cat([OTHERS, damaged()["grey"], damaged()["not a number"]])
    figures, _ = measure_prompt(Audited(samples), None, "a", 6, Sampling())
    monkeypatch.setattr("siss_diffusers.metrics.noise_norm.TextNoiseNorms.per_step", lambda self: norms[:, :4])
    clean, _ = measure_prompt(Audited(OTHERS), None, "a", 4, Sampling())
    assert figures == clean | {"broken": 2} and clean["broken"] == 0

    monkeypatch.setattr("siss_diffusers.metrics.noise_norm.TextNoiseNorms.per_step", lambda self: norms)
    black, _ = measure_prompt(Audited(torch.zeros(6, 1, 8, 8)), None, "a", 6, Sampling())
    assert black == {"broken": 6, "self_similarity": None, "noise_norm": None, "noise_norm_first": None}


def test_what_was_not_measured_neither_flags_nor_clears():
    def row(value):
        return {"self_similarity": value, "noise_norm": None, "noise_norm_first": None, "best_match": None}

    rows, ordinary = [row(None), row(0.5), row(0.9)], [row(0.7), row(None), row(None)]
    compare_with_ordinary(rows, ordinary)
    assert [row["flagged"] for row in rows] == [None, False, True]
    assert rows[2]["p_values"] == {"self_similarity": 1 / 2}  # of one ordinary prompt that was measured, not of three
    compare_with_ordinary(rows, [row(None)])
    assert [row["flagged"] for row in rows] == [None, None, None]
