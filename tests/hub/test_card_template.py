"""The text of the model card. That it loads the model and what it says about real runs is tested in test_card.py."""

import json
import re
from pathlib import Path

import pytest
import yaml

from siss_diffusers.hub.card import render_card
from siss_diffusers.methods import METHODS
from siss_diffusers.metrics import METRICS, Metric
from siss_diffusers.metrics.formats import percent
from siss_diffusers.storage.files import LORA_FILE


REPORT = {
    "base_model": "base/tiny",
    "method": "siss",
    "method_args": {"lam": 0.5},
    "forget_scaling": "relative",
    "forget_scale": 0.1,
    "data": {"forget": 3, "keep": 20},
    "settings": {"learning_rate": 0.01, "lr_scheduler": "constant", "seed": 7},
    "lora": {"rank": 4, "alpha": 8.0},
    "global_step": 60,
    "pairs_per_step": 16,
    "skipped_steps": 1,
    "timestep_range": [0, 1000],
    "versions": {"torch": "2.9"},
}
COPIES = {"copy_share": 0.863, "copy_share_low": 0.81649, "copy_share_high": 0.90001}
HEAD = "| | base model | this model | better |"


@pytest.fixture
def adapter(tmp_path) -> Path:
    (tmp_path / LORA_FILE).write_bytes(b"")
    return tmp_path


@pytest.fixture
def pipeline(tmp_path) -> Path:
    index = {"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "SD3Transformer2DModel"]}
    index |= {"text_encoder": ["transformers", "CLIPTextModelWithProjection"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    return tmp_path


def render(run: Path, base: dict | None = None, unlearned: dict | None = None, **report: object) -> str:
    """Without `base`: the card of a run that was not evaluated."""
    evaluation = None if base is None else {"base": base, "unlearned": base if unlearned is None else unlearned}
    return render_card(run, "founder/forgetful", REPORT | report, evaluation, {"license": "mit"})


def table(card: str, head: str) -> list[list[str]]:
    """The cells of the table under this head, up to the first line that is no row."""
    lines = card.split(f"\n{head}\n")[1].splitlines()[1:]
    rows = lines[: next(index for index, line in enumerate(lines) if not line.startswith("|"))]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def code(card: str) -> str:
    (block,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    compile(block, "card", "exec")
    return block


class TestKinds:
    def test_adapter(self, adapter):
        card = render(adapter)
        assert "This is a LoRA adapter for [base/tiny](https://huggingface.co/base/tiny).\n" in card
        assert 'from_pretrained("base/tiny")\npipeline.load_lora_weights("founder/forgetful")\n' in code(card)
        assert "**The adapter can be removed.**" in card and "author did not publish" not in card

    def test_pipeline_of_another_family(self, pipeline):
        card = render(pipeline, lora=None)
        assert yaml.safe_load(card.split("---")[1]) == {
            "base_model": "base/tiny",
            "base_model_relation": "finetune",
            "library_name": "diffusers",
            "license": "mit",
            "pipeline_tag": "text-to-image",
            "tags": ["data-unlearning", "siss", "diffusers-training"],
        }
        assert 'from_pretrained("founder/forgetful")\nimage = pipeline("a photograph of the sea")' in code(card)
        assert "fine-tuned copy of" in card and "can be removed" not in card and "LoRA" not in card

    def test_unconditional(self, tmp_path):
        (tmp_path / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "UNet2DModel"]}))
        card = render(tmp_path)
        assert "image = pipeline().images[0]\n" in code(card)
        assert yaml.safe_load(card.split("---")[1])["pipeline_tag"] == "unconditional-image-generation"

    def test_base_that_is_not_named(self, adapter):
        card = render(adapter, base_model=None)
        assert "base_model" not in card and "huggingface.co" not in card
        assert 'from_pretrained("THE BASE MODEL")' in code(card) and "The author did not publish that name." in card

    def test_one_image(self, adapter):
        card = render(adapter, data={"forget": 1, "keep": 20})
        assert card.count("forget 1 image of the training set") == 2 and "1 images" not in card

    @pytest.mark.parametrize("evaluated", [False, True])
    @pytest.mark.parametrize("kind", ["adapter", "pipeline"])
    def test_layout(self, kind, evaluated, request):
        """Nothing of the template is left over, and every heading, table and block stands on its own."""
        card = render(request.getfixturevalue(kind), base=COPIES if evaluated else None)
        assert not re.search(r"\{\{|\{%|%\}|\n\n\n|None|Undefined| \n", card)
        text = re.sub(r"```.*?```", "", card.split("---\n", 2)[2], flags=re.DOTALL)
        for heading in re.finditer(r"\n#+ .*\n", text):
            assert text[heading.start() - 1] == "\n" and text[heading.end()] == "\n", heading[0]
        headings = ["How to use", "What was forgotten", "Training", "Evaluation", "Limitations", "Citation"]
        assert re.findall(r"\n## (.*)\n", text) == headings
        assert not re.search(r"[^|\n]\n\|", text) and not re.search(r"\|\n[^|\n]", text)


class TestMethods:
    @pytest.mark.parametrize("name", METHODS)
    def test_every_method_has_its_paper(self, name, adapter):
        title, address = METHODS[name].paper
        card = render(adapter, method=name)
        assert f"The method is `{name}` from the paper [{title}]({address})." in card
        assert re.fullmatch(r"https://arxiv.org/abs/\d{4}\.\d{5}", address)
        assert (f"The method `{name}` comes from" in card) == ("2503.01034" not in address)
        assert "url       = {https://arxiv.org/abs/2503.01034}" in card

    def test_a_method_of_a_later_version(self, adapter):
        card = render(adapter, method="later")
        assert "The method is `later`.\n" in card and "comes from" not in card

    def test_settings(self, adapter):
        rows = table(render(adapter), "| setting | value |")
        assert ["`lam` of the method", "0.5"] in rows and ["LoRA", "rank 4, alpha 8"] in rows
        assert ["scaling of the forget gradient", "`relative`, factor 0.1"] in rows
        assert ["skipped steps (the gradient was not finite)", "1"] in rows and ["random seed", "7"] in rows
        assert ["timesteps of forgetting", "0 to 1000"] in rows and ["mixed precision", "no"] in rows
        assert ["quantile of calibrated forgetting", "0.5"] not in rows
        settings = {"calibrate_forgetting": 0.5, "forget_timestep_schedule": "sequential", "mixed_precision": "bf16"}
        ranges = [[500, 1000], [0, 500]]
        rows = table(render(adapter, settings=settings, forget_timestep_ranges=ranges), "| setting | value |")
        assert ["timesteps of forgetting", "500 to 1000, then 0 to 500"] in rows
        assert ["quantile of calibrated forgetting", "0.5"] in rows and ["mixed precision", "bf16"] in rows
        assert "random seed" not in [name for name, _ in rows]


class TestFigures:
    def test_every_metric_has_its_row_and_its_explanation(self, adapter):
        card = render(adapter, base=dict.fromkeys(METRICS, 0.25), unlearned=dict.fromkeys(METRICS, 0.5))
        rows = table(card, HEAD)
        expected = [
            [metric.label, metric.format(0.25), metric.format(0.5), metric.better or ""] for metric in METRICS.values()
        ]
        assert rows == expected
        for metric in METRICS.values():
            assert f"\n- **{metric.label}**: {metric.explanation}\n" in card

    def test_a_new_metric_needs_no_change_here(self, adapter, monkeypatch):
        entry = Metric(
            key="new",
            label="A new one",
            explanation="It says a lot.",
            measure=dict,
            format=lambda value: f"{value:.1f} s",
            better="lower",
            spread="new_std",
        )
        monkeypatch.setitem(METRICS, "new", entry)
        card = render(adapter, base={"new": 1.26, "new_std": 0.5}, unlearned={"new": 2, "new_low": 1, "new_high": 3})
        assert table(card, HEAD) == [["A new one", "1.3 s ± 0.5 s", "2.0 s [1.0 s, 3.0 s]", "lower"]]
        assert "- **A new one**: It says a lot.\n" in card

    def test_an_interval_of_shares_is_rounded_outwards(self, adapter):
        assert METRICS["copy_share"].format is percent
        assert table(render(adapter, base=COPIES), HEAD)[0][1] == "86.3 % [81.6, 90.1]"

    @pytest.mark.parametrize("interval", [{"copy_share_low": "jane", "copy_share_high": 0.5}, {"copy_share_low": 0.1}])
    def test_only_figures(self, interval, adapter):
        base = {
            "fid": "jane",
            "kid": True,
            "recall": None,
            "precision": float("nan"),
            "jane": 1.0,
            "samples": ["jane"],
        }
        card = render(adapter, base=base, unlearned={"fid": 12.5, "copy_share": 0.1} | interval)
        assert [row[:3] for row in table(card, HEAD)] == [["Copies", "-", "10.0 %"], ["FID", "-", "12.50"]]
        assert "jane" not in card

    def test_brackets_and_spreads_are_explained_where_there_are_any(self, adapter):
        spread = {"inception_score": 5.0, "inception_score_std": 0.1}
        for base, brackets, spreads in (({"fid": 1.0}, 0, 0), (COPIES, 1, 0), (spread, 0, 1), (COPIES | spread, 1, 1)):
            card = render(adapter, base=base)
            counts = card.count("ends of a confidence interval"), card.count("after ± is a standard deviation")
            assert counts == (brackets, spreads)

    def test_relearning(self, adapter):
        points = [{"step": 0, "copy_share": 0.0}, {"step": 10, "copy_share": 0.125}, {"step": 20, "copy_share": 0.1}]
        card = render(adapter, base=COPIES, unlearned=COPIES | {"relearning": points})
        assert "fine-tuned for 20 steps" in card and "At most 12.5 % of its samples" in card
        assert "fine-tuned for" not in render(adapter, base=COPIES, unlearned=COPIES | {"relearning": None})

    @pytest.mark.parametrize("base", [None, {}, {"fid": None}])
    def test_nothing_measured(self, base, adapter):
        card = render(adapter, base=base)
        assert "**Nothing was measured.**" in card and "evaluation.json" not in card and HEAD not in card


def test_the_adapter_is_loaded_into_the_files_that_it_was_trained_on(adapter):
    card = render(adapter, base_revision="v1", base_variant="fp16")
    assert 'DiffusionPipeline.from_pretrained("base/tiny", revision="v1", variant="fp16")' in card
    assert 'DiffusionPipeline.from_pretrained("base/tiny")' in render(adapter)
