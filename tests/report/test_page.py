"""The page: every figure that exists with its explanation, one paragraph of what does not, settings without secrets."""

import html
import json
import re
from io import BytesIO

import pytest
from PIL import Image

from siss_diffusers.metrics import METRICS
from siss_diffusers.report.curves import share_svg
from siss_diffusers.report.sentences import NO_ENTRY, NO_REASON, NONE_LEFT, NOT_FINITE


HOSTILE = """<script src="https://evil.example/x.js">alert('x')</script> " onload='y' & ]]>"""


@pytest.fixture(scope="module")
def png() -> bytes:
    file = BytesIO()
    Image.new("RGB", (320, 160), (255, 0, 255)).save(file, "PNG")
    return file.getvalue()


def test_the_order_of_the_page(report, evaluation, png):
    page = report(evaluation, {"base, memorized prompt": png})
    assert [text for level, text in page.headings if level == "h2"] == [
        "Before and after",
        "Verdict",
        "Figures",
        "Copies by detector",
        "Does it stay forgotten?",
        "How far the detectors can be trusted",
        "Settings",
        "Not measured",
        "What this cannot show",
    ]
    assert page.text.index("should not be published as it is") < page.text.index("Before and after")


def test_pictures_of_the_same_kind_stand_one_under_the_other(report, evaluation, png):
    models, kinds = ("base", "unlearned", "retrained"), ("memorized prompt", "ordinary prompts")
    page = report(evaluation, {f"{model}, {kind}": png for model in models for kind in kinds} | {"a curve": png})
    assert [picture["alt"] for picture in page.named("img")] == [
        *(f"{model}, {kind}" for kind in kinds for model in models),
        "a curve",
    ]
    titles = [text for level, text in page.headings if level == "h3"]
    assert titles[:3] == ["Memorized prompt", "Ordinary prompts", "a curve"]
    # The browser knows the size before it has decoded the picture.
    assert {(picture["width"], picture["height"]) for picture in page.named("img")} == {("320", "160")}


def test_every_metric_has_a_row_with_its_figure_and_an_explanation(report, evaluation):
    page = report(evaluation)
    expected = {"samples": "256", "copy_share": "86.3 % [81.5, 90.0]", "others": "35", "fid": "31.25"}
    expected |= {"others_distance_to_keep": "6.810", "others_sharpness": "0.9700", "classifier_accuracy": "93.6 %"}
    expected |= {"inception_score": "3.117 ± 0.213", "kid": "0.01234", "precision": "50.0 %"}
    expected |= {"recall": "40.2 %", "coverage": "70.7 %", "density": "1.017", "nll_forget_bpd": "1.502"}
    expected |= {"nll_keep_bpd": "4.218", "sscd_forget": "0.8120", "clip_iqa": "0.6130", "clip_score": "24.30"}
    expected |= {"text_noise_norm": "7.310", "ordinary_copy_share": "0.0 %", "drift": "0.2500"}
    for key, figure in expected.items():
        metric = METRICS[key]
        assert page.row(metric.label)[0] == figure
        assert page.below(metric.label) == metric.explanation != ""


def test_rows_of_the_other_tables(report, evaluation):
    page = report(evaluation)
    assert page.row("pixel_l2") == ["85.1 %", "0.0 %"]
    assert page.below("pixel_l2").endswith("(threshold 2.113).")
    assert page.row("t = 999") == ["0.951", "0.113"]
    assert page.row("200") == ["18.8 % [11.0, 30.0]"]
    assert page.row("1") == ["25.0 %", "3.1 %"]
    assert page.row("colours turned") == ["50.0 %", "100.0 %", "–"]
    assert page.row("contrast halved") == ["missed", "caught", "–"]
    assert page.row("all") == ["0.0 %", "0.0 %", "0.0 %"]
    assert page.row("Prompts") == ["memorized 1, ordinary 10"]
    assert page.row("Seed") == ["1234"]
    assert page.row("Time taken") == ["12 min 34 s"]
    assert page.row("Versions") == ["torch 2.9.1+cpu, diffusers 0.35.1"]
    assert "Not measured for the base." in page.section("Does it stay forgotten?")


def test_chapters_hold_their_metrics_and_only_those_with_figures(report):
    page = report({"unlearned": {"samples": 8, "copy_share": 0.5, "fid": 3.5, "new_figure": 0.25}})
    heads = [cells[0] for cells in page.cells]
    expected = ["Copies", "Samples", "Copies", "What the model still does", "FID", "Other figures", "new_figure"]
    assert [head for head in heads if head in expected] == expected
    assert "Recall" not in heads and "What comes instead of copies" not in heads
    assert page.row("new_figure") == ["0.2500"]


def test_figures_that_were_not_measured_are_one_paragraph(report, evaluation):
    keys = [key for key in METRICS if key not in ("samples", "copy_share")]
    reasons = {key: f"reason of {key}" for key in [*keys, "relearning", "copies by cluster"]}
    reasons |= {"fid": "as KID", "kid": "as KID.", "clip_iqa": None}
    evaluation["settings"]["skipped"] = reasons
    for name in ("base", "unlearned"):
        evaluation[name] |= dict.fromkeys([*keys, "relearning"])
    page = report(evaluation)
    text = page.section("Not measured")
    for key in keys:
        reason = {"fid": "as KID", "kid": "as KID", "clip_iqa": NO_REASON}.get(key, reasons[key])
        assert re.search(rf"{re.escape(METRICS[key].label)}(, KID)?: {re.escape(reason)}\.( |$)", text), key
        assert METRICS[key].label not in [cells[0] for cells in page.cells]
    assert "FID, KID: as KID. " in text
    assert "Relearning: reason of relearning." in text and "copies by cluster: reason of copies by cluster." in text
    assert "–" not in page.section("Figures")
    assert len([attributes for attributes in page.named("p") if attributes.get("class") == "missing"]) == 1


def test_why_a_figure_is_missing(report):
    page = report(
        {
            "base": {"others": 0, "others_sharpness": None, "fid": float("nan"), "clip_score": "/home/x", "kid": True},
            "unlearned": {"others": 4, "others_sharpness": 1.1, "fid": None, "nll_keep_bpd": 4.2, "recall": None},
        }
    )
    text = page.section("Not measured")
    for sentence in (
        f"FID (base), KID (base), CLIP score (base): {NOT_FINITE}.",
        f"FID (unlearned), Recall (unlearned): {NO_REASON}.",
    ):
        assert sentence in text
    assert re.search(rf"Sharpness of these \(base\)[^.]*: {NONE_LEFT}\.", text)
    # The base never had the likelihood: a dash is enough.
    assert page.row(METRICS["nll_keep_bpd"].label) == ["–", "4.200"] and "Code length of images to keep" not in text
    assert re.search(rf"Precision, [^.]*Relearning, Checks of the detectors: {NO_ENTRY}\.", text)
    assert "/home/x" not in page.text


@pytest.mark.parametrize("empty", [None, {}])
def test_nothing_recorded(report, empty):
    page = report({"base": empty, "unlearned": empty, "settings": empty})
    assert f"cannot say how many samples of the unlearned model are copies: {NO_REASON}" in page.text
    headings = [text for level, text in page.headings if level == "h2"]
    assert headings == ["Verdict", "Not measured", "What this cannot show"]
    assert f"Relearning, Checks of the detectors: {NO_ENTRY}." in page.text


def all_missing(content):
    """Every variant of a nested structure with one entry taken out or null."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield content | {key: None}
            yield {name: entry for name, entry in content.items() if name != key}
            for variant in all_missing(value):
                yield content | {key: variant}
    elif isinstance(content, list):
        for index, value in enumerate(content):
            for variant in [None, *all_missing(value)]:
                yield [*content[:index], variant, *content[index + 1 :]]


def test_any_entry_may_be_missing_or_null(report, evaluation, monkeypatch):
    # Most variants have the same curve, and drawing it is slow.
    drawings = {}

    def draw_once(curves: dict, steps: str) -> str:
        if (key := repr(curves)) not in drawings:
            drawings[key] = share_svg(curves, steps)
        return drawings[key]

    monkeypatch.setattr("siss_diffusers.report.page.share_svg", draw_once)
    variants = list(all_missing(evaluation))
    assert len(variants) > 200
    for variant in variants:
        report(variant)
    assert 10 < len(drawings) < 50


def test_an_evaluation_without_a_model_is_an_error(report):
    with pytest.raises(ValueError, match="without a model"):
        report({"settings": {"seed": 0}})


def test_several_models_are_columns_in_the_given_order(report, evaluation):
    for name, share in (("retrained", 0.004), ("a <b>long</b> name", 0.9)):
        evaluation[name] = evaluation["unlearned"] | {"copy_share": share}
    page = report(evaluation)
    assert ["Metric", *(name for name in evaluation if name != "settings")] in page.cells
    assert [cell.partition(" %")[0] for cell in page.row("Copies")] == ["86.3", "0.0", "0.4", "90.0"]


def test_it_is_self_contained(report, evaluation, png, tmp_path):
    (tmp_path / "secret_name.png").write_bytes(png)
    page = report(evaluation, {"base, samples": tmp_path / "secret_name.png", "unlearned, samples": png})
    for name, attributes in page.elements:
        assert name not in ("script", "link", "iframe", "object", "embed", "base", "foreignobject")
        for key, value in attributes.items():
            assert not key.startswith("on")
            if key in ("src", "href", "srcset", "xlink:href", "action", "data"):
                # Within a curve the points of a line refer to the shape of a point.
                assert value.startswith(("data:image/png;base64,", "#"))
    content = (tmp_path / "report.html").read_text()
    assert "url(" not in content and "@import" not in content and "http" not in content.replace("http-equiv", "")
    assert content.count("<style") == 1
    assert "secret_name" not in content
    assert len(page.named("img")) == 2
    assert [path.name for path in tmp_path.glob("report*")] == ["report.html"]
    # Beside the pictures the page is small.
    assert len(report(evaluation).text) < 20_000 and (tmp_path / "report.html").stat().st_size < 60_000
    (policy,) = (meta["content"] for meta in page.named("meta") if "http-equiv" in meta)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_pictures_come_with_a_warning(report, evaluation, png):
    warning = "should not be published as it is"
    assert warning in report(evaluation, {"samples": png}).text.partition("samples of the unlearned")[0]
    assert warning not in report(evaluation).text
    assert warning not in report(evaluation, {}).text


@pytest.mark.parametrize("content", [b"<svg onload='x'/>", b"GIF89a", b"\x89PNG\r\n\x1a\n<script>"])
def test_pictures_of_other_formats_are_refused(report, evaluation, content):
    with pytest.raises(ValueError, match="PNG, JPEG or WebP"):
        report(evaluation, {"drawing": content})


def test_a_page_can_be_used_without_eyes_and_mouse(report, evaluation, png):
    """Headings without gaps, heads of rows and columns, names of regions and drawings, boxes that keys can scroll."""
    page = report(evaluation, {"base, samples": png})
    levels = [int(level[1]) for level, _ in page.headings]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:]))
    assert all(head["scope"] in ("row", "col", "rowgroup") for head in page.named("th"))
    assert page.named("html")[0]["lang"] == "en" and len(page.named("main")) == 1
    regions = [box for box in page.named("div") if "box" in box.get("class", "").split()]
    assert regions and all(box["role"] == "region" and box["aria-label"] and box["tabindex"] == "0" for box in regions)
    (drawing,) = (box for box in page.named("div") if box.get("role") == "img")
    assert drawing["aria-label"] == "Share of copies by steps of relearning: unlearned"
    assert all(picture["alt"] for picture in page.named("img"))


def test_text_is_escaped(report, evaluation, png, tmp_path):
    """Wherever a text can come from."""
    evaluation[HOSTILE] = evaluation["unlearned"]
    for name in ("copy_share_by_detector", "injection"):
        evaluation["base"][name][HOSTILE] = 0.5
    evaluation["settings"]["skipped"] |= {"fid": HOSTILE, HOSTILE: HOSTILE}
    evaluation["base"]["fid"] = None
    evaluation["settings"]["detectors"][HOSTILE] = {"threshold": 1}
    evaluation["settings"]["damage_table"] |= {HOSTILE: {HOSTILE: True}}
    page = report(evaluation, {HOSTILE: png, f"base, {HOSTILE}": png}, title=HOSTILE)
    assert not page.named("script")
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)
    written = (tmp_path / "report.html").read_text()
    assert "<script" not in written and html.escape("<script src=") in written
    assert page.text.count(re.sub(r"\s+", " ", HOSTILE)) > 15


def test_settings_show_neither_prompts_nor_paths(report, evaluation):
    evaluation["settings"] |= {
        "prompts": ["a secret flower", "another flower"],
        "training": {"--train_data_dir": "/home/secret"},
        "model": "/home/secret",
        "seed": "a secret flower",
        "data": {"rows": 7, "a secret flower": 3, "folder": "/home/secret"},
        "versions": {"torch": "2.9.1", "siss_diffusers": "@ file:///home/secret"},
        "a secret flower": 3,
    }
    evaluation["base"] |= {"a secret flower": 3, "prompt": "a secret flower", "new_figure": 0.25}
    page = report(evaluation)
    assert "secret" not in page.text
    assert page.row("Prompts") == ["2"]
    assert page.row("Data") == ["rows 7"]
    assert page.row("new_figure")[0] == "0.2500"
    assert "Recorded, but not shown in this report: seed, training, model, prompt, 1 more." in page.text
    evaluation["settings"]["prompts"] = {"a secret flower": 3}
    assert report(evaluation).row("Prompts") == ["1"]


def test_an_evaluation_from_json(report, evaluation):
    """As `evaluation.json` comes back from the disk."""
    assert report(json.loads(json.dumps(evaluation))).text == report(evaluation).text
