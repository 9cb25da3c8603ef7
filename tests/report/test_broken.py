"""Samples that are no pictures come first in the verdict."""

from siss_diffusers.report.sentences import copies_sentence


def test_they_stand_before_the_copies(report, evaluation):
    evaluation["unlearned"] |= {"broken_share": 0.25, "copy_share": 0.0, "ordinary_broken_share": 0.5}
    page = report(evaluation)
    verdict = page.section("Verdict").strip()
    assert verdict.startswith(
        "25.0 % of the samples and 50.0 % of the samples of ordinary prompts of the unlearned model are"
    )
    assert "They do not show that anything is forgotten. 0 of 192 other samples of the unlearned model are" in verdict
    assert page.row("Broken samples") == ["–", "25.0 %"]


def test_where_all_are_broken_nothing_is_said_of_copies():
    figures = {"samples": 8, "broken_share": 1.0, "copy_share": None}
    sentence = copies_sentence("unlearned", figures, {"copy_share": "every sample is broken"})
    assert sentence.startswith("100.0 % of the samples of the unlearned model are broken")
    assert sentence.endswith("cannot say how many samples of the unlearned model are copies: every sample is broken.")


def test_attempts_with_broken_samples_are_named(report, evaluation):
    evaluation["unlearned"]["relearning"][-1] |= {"broken_share": 1.0, "copy_share": None}
    assert "in the relearning test, the unlearned model: up to 100.0 % of the samples" in report(evaluation).text


def test_without_them_nothing_is_said(report, evaluation):
    evaluation["unlearned"]["broken_share"] = 0.0
    assert "broken" not in report(evaluation).section("Verdict")
