"""The embedding attack on the tiny Stable Diffusion: it finds the flower, and what it says of controls."""

from dataclasses import replace

import pytest
import torch

from siss_diffusers.errors import UsageError
from siss_diffusers.evaluation import EvaluationSettings, measure
from siss_diffusers.metrics import METRICS, PROBES
from siss_diffusers.metrics.embedding_attack import choose_controls, count_controls, curve_marks, turned
from tests.helpers.evaluating import digits_evaluator, flowers_evaluator, load_digits, load_flowers


ENTRIES = [PROBES["embedding_attack"], METRICS["attacked_copy_share"], METRICS["attacked_control_share"]]
QUICK = {"embedding_attack": True, "guidance_scale": 1.0, "num_inference_steps": 10, "batch_size": 32}


def test_it_finds_the_flower_from_a_gaussian_start_and_no_control():
    settings = QUICK | {
        "attack_steps": 25,
        "attack_starts": ("gauss",),
        "num_attack_samples": 12,
        "attack_controls": 3,
    }
    figures, reasons = measure(flowers_evaluator(**settings).model("base", load_flowers()), ENTRIES)
    (row,) = figures["embedding_attack"]["gauss"]
    assert not reasons and (row["guidance"], row["step"], row["samples"]) == (1.0, 25, 12)
    assert row["copy_share"] > 0.5 and row["copy_share_low"] < row["copy_share"] < row["copy_share_high"]
    assert row["controls"] == 3 and row["control_copy_share"] == row["control_copy_share_worst"] == 0
    assert figures["attacked_copy_share"] == row["copy_share"] and figures["attacked_control_share"] == 0
    assert figures["attacked_control_share_high"] == row["control_copy_share_high"] > 0


def test_two_attacks_are_equal_and_there_is_a_row_for_every_start_guidance_and_mark():
    settings = QUICK | {"guidance_scale": 3.0, "attack_steps": 2, "num_attack_samples": 2, "num_inference_steps": 2}
    settings |= {"attack_restarts": 2, "attack_controls": 1}
    found = [
        measure(flowers_evaluator(**settings).model("base", load_flowers()), ENTRIES[:1])[0]["embedding_attack"]
        for _ in range(2)
    ]
    assert found[0] == found[1]
    places = [(start, row["guidance"]) for start, rows in found[0].items() for row in rows]
    assert places == [(start, scale) for start in ("prompt", "empty", "other", "gauss") for scale in (1.0, 3.0)]


def test_the_curve_is_cut_at_the_steps_asked_for():
    assert curve_marks(10) == [10] and curve_marks(50) == [25, 50] and curve_marks(300) == [25, 50, 100, 200, 300]


def test_the_weights_stay_as_they_were():
    model = flowers_evaluator(**QUICK, attack_steps=1, attack_controls=0, num_attack_samples=1).model(
        "base", load_flowers()
    )
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    figures, reasons = measure(model, ENTRIES)
    assert all(torch.equal(before[name], value) for name, value in model.network.state_dict().items())
    assert "control_copy_share" not in figures["embedding_attack"]["prompt"][0]
    assert "no control" in reasons["attacked_control_share"]


def test_controls_are_given_pictures_first_and_never_look_like_a_forget_image_or_one_to_keep():
    evaluator = flowers_evaluator(**QUICK)
    data = evaluator.data
    noise = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    evaluator.data = replace(data, never_seen=torch.cat([data.forget, data.keep[:1], noise]))
    controls = choose_controls(evaluator.model("base", load_flowers()))
    # The flower itself is no control, neither is an image to keep; the flower turned looks like the flower.
    assert len(controls) == 5 and torch.equal(controls[0].picture, noise[0])
    assert not any(torch.equal(control.picture, image) for control in controls for image in (*data.forget, *data.keep))


def test_a_turned_picture_is_never_the_mirrored_one():
    picture = torch.arange(18.0).reshape(2, 3, 3)
    pictures = turned(picture)
    assert len({tuple(other.flatten().tolist()) for other in pictures}) == 6
    assert not any(torch.equal(other, seen) for other in pictures for seen in (picture, picture.flip(-1)))


def test_a_sample_counts_for_the_control_that_it_was_searched_for():
    model = flowers_evaluator(**QUICK, attack_controls=2, attack_restarts=2).model("base", load_flowers())
    first, second = controls = choose_controls(model)
    # The conditions take turns: two restarts of the first, two of the second, and again.
    hits = torch.stack([first.picture, first.picture, second.picture, second.picture, first.picture, second.picture])
    counted = count_controls(model, controls, hits)
    assert counted["control_copy_share"] == pytest.approx(5 / 6)
    assert counted["control_copy_share_worst"] == 1 and counted["controls"] == 2
    assert count_controls(model, controls, hits.roll(2, 0))["control_copy_share"] == pytest.approx(1 / 6)


def test_where_it_cannot_run_it_says_why():
    _, reasons = measure(digits_evaluator().model("base", load_digits()), ENTRIES)
    assert all("injection" in reasons[entry.key] for entry in ENTRIES)
    _, reasons = measure(flowers_evaluator().model("base", load_flowers()), ENTRIES)
    assert all(reasons[entry.key] == "needs --embedding_attack" for entry in ENTRIES)


@pytest.mark.parametrize(
    "settings",
    [
        {"attack_steps": 10},
        {"never_seen_dir": "x"},
        {"embedding_attack": True, "attack_starts": ("x",)},
        {"embedding_attack": True, "attack_restarts": 0},
        {"embedding_attack": True, "attack_controls": 0, "never_seen_dir": "x"},
    ],
)
def test_bad_settings_name_themselves(settings):
    with pytest.raises(UsageError, match=list(settings)[-1 if len(settings) < 3 else 1]):
        EvaluationSettings(**settings)
