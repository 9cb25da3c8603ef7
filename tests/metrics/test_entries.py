"""The entries of metrics: complete, and all that a new metric needs to show up everywhere."""

import ast
from pathlib import Path

import pytest
import torch

from siss_diffusers import metrics
from siss_diffusers.evaluation import format_summary, write_evaluation
from siss_diffusers.hub.card import figure_rows
from siss_diffusers.metrics import METRICS, PROBES, Metric
from siss_diffusers.metrics.formats import percent
from tests.helpers.evaluating import digits_evaluator, load_digits, only_entries
from tests.helpers.imports import loaded_by


ENTRIES = METRICS | PROBES


@pytest.mark.parametrize("key", ENTRIES)
def test_every_entry_says_what_it_is(key):
    entry = ENTRIES[key]
    assert entry.key == key and callable(entry.measure)
    assert entry.label[0].isupper() and len(entry.label) <= 40 and not entry.label.endswith(".")
    assert entry.explanation[0].isupper() and entry.explanation.endswith(".")
    if isinstance(entry, Metric):
        assert isinstance(entry.format(0.5), str) and isinstance(entry.format(3), str)
        assert entry.chapter in ("copies", "instead", "rest", "memory")


def test_labels_are_different():
    assert len({entry.label for entry in ENTRIES.values()}) == len(METRICS) + len(PROBES)


def test_what_is_better_is_said_in_words():
    for metric in METRICS.values():
        words = {"lower": "Lower is better", "higher": "Higher is better", "near 1": "Near 1 is best"}
        if metric.better is not None:
            assert words[metric.better] in metric.explanation, metric.key


def test_every_entry_is_in_the_table():
    """An entry that is not in `METRICS` or `PROBES` is never measured."""
    entries = {
        target.id.lower()
        for file in Path(metrics.__file__).parent.glob("*.py")
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Call)
        and getattr(node.value.func, "id", None) in ("Metric", "Probe")
        for target in node.targets
    }
    assert entries == set(ENTRIES)


def test_importing_the_metrics_loads_torch_alone():
    loaded = loaded_by("import siss_diffusers.metrics, siss_diffusers.metrics.damage")
    assert loaded - {"numpy", "tqdm"} == {"torch"}
    others = "import siss_diffusers.metrics, sys; assert not {'scipy', 'sklearn', 'matplotlib'} & set(sys.modules)"
    loaded_by(others)


def test_a_metric_that_is_one_entry_shows_up_everywhere(tmp_path):
    brightness = Metric(
        key="brightness",
        label="Brightness of samples",
        explanation="Mean of all pixels. Lower is darker.",
        measure=lambda model: {"brightness": model.samples.mean().item()},
        format=percent,
        chapter="instead",
    )
    with only_entries(METRICS["samples"], METRICS["copy_share"], METRICS["others"], brightness):
        evaluation = digits_evaluator().evaluate({"base": load_digits, "unlearned": load_digits})
        summary, rows = format_summary(evaluation.content), figure_rows(evaluation.results)
        report = write_evaluation(tmp_path, evaluation).read_text().replace("\N{NO-BREAK SPACE}", " ")

    value = torch.mean(evaluation.samples["base"]["samples"]).item()
    assert evaluation.results["unlearned"]["brightness"] == pytest.approx(value)
    assert next(line for line in summary.splitlines() if brightness.label in line).count(percent(value)) == 2
    assert brightness.label in report and brightness.explanation in report and percent(value) in report
    assert {row["label"]: row["unlearned"] for row in rows}[brightness.label] == percent(value)
