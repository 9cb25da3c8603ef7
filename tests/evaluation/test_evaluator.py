"""The evaluator: what it asks of every model, in which order, and what it says where it cannot measure."""

import gc
import weakref
from contextlib import ExitStack

import pytest
import torch

from siss_diffusers.errors import UsageError
from siss_diffusers.evaluation import Networks, measure
from siss_diffusers.metrics import METRICS, PROBES, Metric, Probe, Skip
from tests.helpers.evaluating import digits_evaluator, flowers_evaluator, load_digits, load_flowers, only_entries


def entry(key: str, measure, kind=Metric, **options) -> Metric:
    return kind(key=key, label=f"Label of {key}", explanation="What it says.", measure=measure, **options)


@pytest.fixture
def only():
    """Replaces all metrics and probes by those that it is called with."""
    with ExitStack() as stack:
        yield lambda *entries: stack.enter_context(only_entries(*entries))


def test_a_metric_that_changes_the_model_comes_last(only):
    order = []
    keys = {"first": False, "breaks": True, "second": False, "probe": False}
    entries = [
        entry(
            key,
            lambda model, key=key: order.append(key) or {key: 1},
            kind=Probe if key == "probe" else Metric,
            changes_model=changes,
        )
        for key, changes in keys.items()
    ]
    only(*entries)
    digits_evaluator().evaluate({"base": load_digits})
    assert order == ["first", "second", "probe", "breaks"]
    order.clear()
    measure(digits_evaluator().model("one", load_digits()), entries)
    assert order == ["first", "second", "probe", "breaks"]


def test_relearning_changes_the_model_and_nothing_that_was_measured(only):
    assert [key for key, probe in PROBES.items() if probe.changes_model] == ["relearning"]
    only(PROBES["relearning"], METRICS["copy_share"], METRICS["drift"], PROBES["injection"])
    figures = {}
    for steps in (0, 2):
        evaluator = digits_evaluator(relearning_steps=steps, relearning_rate=0.1, num_relearning_samples=4)
        loaded = []
        models = {"base": load_digits, "other": lambda loaded=loaded: loaded.append(load_digits()) or loaded[0]}
        figures[steps] = evaluator.evaluate(models)
        before = dict(load_digits().unet.named_parameters())
        same = all(torch.equal(before[name], value) for name, value in loaded[0].unet.named_parameters())
        assert same == (steps == 0)
    other = figures[2].results["other"]
    assert [point["step"] for point in other.pop("relearning")] == [0, 1, 2]
    expected = figures[0].results["other"]
    assert expected.pop("relearning") is None and other == expected
    assert torch.equal(figures[0].samples["other"]["samples"], figures[2].samples["other"]["samples"])


def test_one_pipeline_at_a_time_and_the_base_first(only):
    bases, pipelines = {}, []

    def look(model) -> dict:
        bases[model.name] = model.base and model.base.name
        pipelines.append(model.base and model.base.pipeline)
        return {"looked": 1}

    only(entry("looked", look))
    digits_evaluator().evaluate({"base": load_digits, "unlearned": load_digits, "third": load_digits})
    assert bases == {"base": None, "unlearned": "base", "third": "base"} and pipelines == [None] * 3


def test_a_pipeline_is_freed_before_the_next_is_loaded(only):
    """Networks hold cycles, which wait for the collector, and the next network needs their memory."""
    only()
    alive = []

    def load():
        assert all(pipeline() is None for pipeline in alive)
        pipeline = load_digits()
        pipeline.unet.itself = [pipeline]  # a cycle
        alive.append(weakref.ref(pipeline))
        return pipeline

    gc.disable()
    try:
        digits_evaluator(use_clusters=False).evaluate({"base": load, "other": load})
    finally:
        gc.enable()
    assert len(alive) == 2


def test_what_is_skipped_is_null_with_its_reason_and_what_has_no_meaning_is_absent(only):
    def no_meaning_for_the_base(model) -> dict:
        return {} if model.base is None else {"change": 2}

    def not_for_the_second(model) -> dict:
        if model.name == "second":
            raise Skip("the second has none")
        return {"first_only": 3}

    only(entry("change", no_meaning_for_the_base), entry("first_only", not_for_the_second))
    evaluation = digits_evaluator().evaluate({"base": load_digits, "second": load_digits})
    assert evaluation.results == {"base": {"first_only": 3}, "second": {"change": 2, "first_only": None}}
    skipped = evaluation.settings["skipped"]
    assert skipped["first_only"] == "the second has none" and "change" not in skipped
    assert evaluation.content == evaluation.results | {"settings": evaluation.settings}


def test_shared_work_is_done_once(only):
    calls = []

    def work(model) -> int:
        calls.append(model.name)
        return 7

    only(*(entry(key, lambda model, key=key: {key: model.once(work)}) for key in ("a", "b")))
    evaluation = digits_evaluator().evaluate({"base": load_digits, "second": load_digits})
    assert calls == ["base", "second"] and evaluation.results["second"] == {"a": 7, "b": 7}


def test_the_network_is_in_evaluation_mode_and_then_as_it_was(only):
    modes = []
    only(entry("mode", lambda model: modes.append(model.network.training) or {"mode": 0}))
    pipeline = load_digits()
    pipeline.unet.train()
    digits_evaluator().evaluate({"base": lambda: pipeline})
    assert modes == [False] and pipeline.unet.training


def test_clusters_join_the_detectors_unless_they_are_not_wanted():
    def detectors(**settings) -> dict:
        evaluator = flowers_evaluator(num_samples=24, num_inference_steps=10, batch_size=24, **settings)
        base = evaluator.model("base", load_flowers())
        evaluator.add_clusters(base)
        return evaluator.detectors.flags(base.samples)

    assert "cluster" in detectors() and "cluster" not in detectors(use_clusters=False)


def test_a_prompt_that_is_cut_off_is_counted_and_not_shown(caplog):
    secret = "flower of jane doe"
    evaluator = flowers_evaluator(paraphrases=(f"{secret} " * 30, "a flower"))
    evaluator.warn_of_long_prompts(load_flowers())
    assert "1 prompt is longer" in caplog.text and secret not in caplog.text


def test_a_network_of_the_settings_that_cannot_be_loaded_names_its_flag():
    with pytest.raises(UsageError, match="--copy_detector"):
        digits_evaluator(copy_detector="missing.pt")
    # Given networks take the place of those of the settings.
    assert digits_evaluator(Networks(), copy_detector="missing.pt").detectors.copy_features is None


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize(("name", "flag"), [("copy_features", "--copy_detector"), ("features", "--feature_extractor")])
def test_a_network_that_gives_the_same_for_all_pictures_is_refused(name, flag, value):
    def dead(images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, :64] * 0 + value

    with pytest.raises(UsageError, match=f"{flag}: the network gives the same features for 17 different pictures"):
        digits_evaluator(Networks(**{name: dead}))
    digits_evaluator(Networks(**{name: lambda images: images.flatten(1)}))


def test_a_detector_that_misses_the_forgotten_image_gives_no_figure():
    """To this network one image to keep is as the forgotten one: it would call nothing a copy."""

    middle = digits_evaluator().data.keep.mean((1, 2, 3)).median()

    def bright_or_dark(images: torch.Tensor) -> torch.Tensor:
        is_bright = images.mean((1, 2, 3)) > middle
        return torch.stack([is_bright, ~is_bright], dim=1).float()

    only_figures = [METRICS["copy_share"], METRICS["sscd_forget"]]
    with only_entries(*only_figures):
        evaluation = digits_evaluator(Networks(copy_features=bright_or_dark), use_clusters=False).evaluate(
            {"base": load_digits}
        )
    figures, skipped = evaluation.results["base"], evaluation.settings["skipped"]
    assert figures["copy_share_by_detector"]["network"] is None and figures["sscd_forget"] is None
    assert figures["copy_share"] is not None and figures["copy_share_by_detector"]["correlation"] is not None
    assert skipped["copies by network"] == skipped["sscd_forget"] and "does not flag" in skipped["sscd_forget"]
    assert evaluation.settings["damage_table"]["network"]["none"] == 0
