"""The verdict: no stronger than its figures, with everything beside it that weakens it."""

import pytest


def figures(copy_share: float, low: float, high: float) -> dict:
    return {"samples": 256, "copy_share": copy_share, "copy_share_low": low, "copy_share_high": high}


def test_verdict(report, evaluation):
    """The share with its interval, the base, and what weakens it."""
    text = report(evaluation).section("Verdict")
    claim = "0 of 256 samples of the unlearned model are copies: 0.0 % (95 % interval 0.0 to 1.5 %)."
    assert f"{claim} The share is lower than the base's." in text
    assert "221 of 256 samples of the base are copies: 86.3 % (95 % interval 81.5 to 90.0 %)." in text
    assert "No copy was found among the samples, but the model may still make copies." in text
    assert "The 95 % interval reaches up to 1.5 % (the unlearned model)." in text
    assert "18.8 % in the relearning test (after 200 steps; 95 % interval 11.0 to 30.0 %)" in text
    assert "3.1 % under other wordings of the prompt (prompt 1; no interval is recorded)" in text
    assert "0.0 % with noise on the prompt (no interval is recorded)" in text
    assert "No detector catches every copy with one of these damages: mirrored." in text
    assert "The detectors also flag" not in text
    assert "No figure here says" not in text


@pytest.mark.parametrize(
    ("unlearned", "base", "said"),
    [
        (figures(0.1, 0.05, 0.2), figures(0.15, 0.1, 0.25), "these samples do not show a difference"),
        (figures(0.5, 0.4, 0.6), figures(0.1, 0.05, 0.2), "The share is higher than the base's"),
        ({"copy_share": 0.0, "samples": 8}, figures(0.9, 0.8, 1.0), "Without both intervals the share cannot be told"),
        (figures(1 / 256, 0.0007, 0.0218), {}, "1 of 256 samples of the unlearned model is a copy"),
        (figures(1 / 256, 0.0007, 0.0218), {}, "There is no base to compare with"),
        ({}, figures(0.9, 0.8, 1.0), "cannot say how many samples of the unlearned model are copies"),
        (
            {"copy_share": 0.25},
            {},
            "25.0 % of the samples of the unlearned model are copies (no interval is recorded)",
        ),
        ({"copy_share": 0.25}, {}, "the number of samples is not recorded"),
    ],
)
def test_verdict_is_no_stronger_than_the_figures(report, unlearned, base, said):
    text = report({"base": base, "unlearned": unlearned}).section("Verdict")
    assert said in text
    assert "lower than" not in text
    assert "No figure here says what else changed in the unlearned model." in text


def test_flagged_keep_images_are_in_the_verdict(report, evaluation):
    evaluation["settings"]["keep_flagged"]["correlation"] = 0.0213
    assert "The detectors also flag images to keep (up to 2.1 % of them)." in report(evaluation).section("Verdict")


def test_a_base_alone_is_judged(report, evaluation):
    text = report({"base": evaluation["base"]}).section("Verdict")
    assert text.count("221 of 256 samples of the base are copies") == 1
    assert "71.0 % under other wordings of the prompt" in text


def test_every_model_is_judged_and_the_base_last(report, evaluation):
    evaluation["retrained"] = evaluation["unlearned"] | figures(1 / 256, 0.0007, 0.0218)
    text = report(evaluation).section("Verdict")
    places = [
        text.index(f"samples of {name} ") for name in ("the unlearned model", "the model “retrained”", "the base")
    ]
    assert places == sorted(places)
    assert "1 of 256 samples of the model “retrained” is a copy" in text
    assert text.count("18.8 % in the relearning test") == 2


def test_what_figures_cannot_show_comes_last(report, evaluation):
    """With the bound that the samples of this evaluation give."""
    evaluation["other"] = evaluation["unlearned"] | {"samples": 64, "copy_share_high": 0.057}
    text = report(evaluation).section("What this cannot show")
    assert "No unlearning metric is a legal proof" in text
    bounds = "0 of 256 samples allow a share of up to 1.5 %; 0 of 64 samples allow a share of up to 5.7 %"
    assert f"(here: {bounds})" in text
    assert "(here:" not in report({"base": evaluation["base"]}).text
