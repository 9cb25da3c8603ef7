"""The embedding attack in the report: its table, its curve, and a verdict that a floor of controls holds down."""

import pytest

from siss_diffusers.report.attack import attack_curves, attack_table, forgotten_sentence
from tests.report.test_page import all_missing


def row(step: int, share: float, control: float | None = None, guidance: float = 1.0) -> dict:
    found = {"guidance": guidance, "step": step, "copy_share": share}
    found |= {"copy_share_low": max(share - 0.1, 0.0), "copy_share_high": min(share + 0.1, 1.0)}
    if control is not None:
        found |= {"control_copy_share": control, "control_copy_share_low": max(control - 0.1, 0.0)}
        found |= {"control_copy_share_high": min(control + 0.1, 1.0)}
    return found


ATTACK = {
    "prompt": [row(25, 0.0, 0.0), row(50, 0.25, 0.0), row(50, 0.5, 0.02, guidance=3.0)],
    "gauss": [row(25, 0.125, 0.0), row(50, 0.75, 0.03)],
}


def test_the_table_has_a_row_for_each_place_and_a_column_for_the_floor(report, evaluation):
    evaluation["unlearned"]["embedding_attack"] = ATTACK
    page = report(evaluation)
    assert page.row("Gaussian noise, guidance 1, 50 steps") == ["75.0 % [65.0, 85.0]", "3.0 % [0.0, 13.0]"]
    assert page.row("the prompt, guidance 3, 50 steps")[0] == "50.0 % [40.0, 60.0]"
    assert "Embedding attack" in page.section("Does it stay forgotten?")
    legends = [box["aria-label"] for box in page.named("div") if box.get("role") == "img"]
    assert "Share of copies by steps of search: unlearned, unlearned, never seen" in legends


def test_the_curve_is_the_worst_of_all_starts():
    curves = attack_curves({"unlearned": {"embedding_attack": ATTACK}})
    assert {step: point["copy_share"] for step, point in curves["unlearned"].items()} == {25: 0.125, 50: 0.75}
    assert curves["unlearned, never seen"][50]["copy_share"] == 0.03
    assert attack_curves({"unlearned": {"embedding_attack": {"gauss": [row(50, 1.0)]}}}) == {}


@pytest.mark.parametrize(
    ("attack", "said"),
    [
        (
            ATTACK,
            "up to 75.0 % of the samples are copies (from Gaussian noise, guidance 1; 95 % interval 65.0 to 85.0 %)",
        ),
        (ATTACK, "The image can still be found."),
        ({"empty": [row(50, 0.1, 0.05)]}, "no more than a picture that was never trained on"),
        ({"empty": [row(50, 0.1)]}, "so the figure has no floor"),
        ({"a secret flower": [row(50, 0.1)]}, ""),
        ({}, ""),
        (None, ""),
    ],
)
def test_the_verdict_says_whether_it_stays_forgotten(attack, said, report, evaluation):
    sentence = forgotten_sentence({"embedding_attack": attack})
    assert said in sentence and bool(said) == bool(sentence)
    evaluation["unlearned"]["embedding_attack"] = attack
    page = report(evaluation)
    assert said in page.section("Verdict") and "secret" not in page.text


def test_any_part_of_it_may_be_missing():
    for variant in all_missing({"unlearned": {"embedding_attack": ATTACK}}):
        models = {name: figures or {} for name, figures in variant.items()}
        attack_table(models)
        attack_curves(models)
        for figures in models.values():
            forgotten_sentence(figures)


def test_bits_have_a_row_for_each_condition_and_kind(report, evaluation):
    evaluation["unlearned"]["memorized_bits_by_condition"] = {
        "prompt": {"forget": 812.4, "forget_se": 3.1, "strangers": 0.5, "keep": None},
        "empty": {"forget": 2.0},
        "a secret flower": {"forget": 1.0},
    }
    page = report(evaluation)
    assert page.row("forgotten images, with the prompt") == ["812.4 ± 3.1"]
    assert page.row("pictures never seen, with the prompt") == ["0.5000"]
    assert page.row("forgotten images, with the empty prompt") == ["2.000"]
    assert "secret" not in page.text and not any(cells[0].startswith("images to keep, with") for cells in page.cells)
    for variant in all_missing(evaluation["unlearned"]["memorized_bits_by_condition"]):
        report({"unlearned": {"copy_share": 0.0, "memorized_bits_by_condition": variant}})
