"""The report: well-formed, self-contained, complete, no stronger than its figures, and readable in a browser."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from siss_diffusers.report import (
    METRICS,
    NO_REASON,
    NONE_LEFT,
    NOT_FINITE,
    NOT_MEASURED,
    limits,
    percent,
    write_report,
)


HOSTILE = """<script src="https://evil.example/x.js">alert('x')</script> " onload='y' & ]]>"""
MAGENTA = (255, 0, 255)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    """Checks that every element is closed in its turn, and collects elements and text."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.cells: list[list[str]] = []
        self.feed(content)
        self.close()
        assert not self.open

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        if name not in ("meta", "img", "br"):
            self.open.append(name)
        if name == "tr":
            self.cells.append([])
        elif name in ("td", "th"):
            self.cells[-1].append("")

    def handle_endtag(self, name):
        assert self.open.pop() == name
        if name in ("li", "p", "td", "th", "h1", "h2", "h3", "title"):
            self.texts.append(" ")

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.texts.append(data)
        if "table" in self.open and ("td" in self.open or "th" in self.open):
            self.cells[-1][-1] += data

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.texts))

    def row(self, head: str) -> list[str]:
        """The cells beside a head."""
        return next(cells[1:] for cells in self.cells if cells[0] == head)

    def below(self, head: str) -> str:
        """The explanation below a head."""
        return next(after[0] for cells, after in zip(self.cells, self.cells[1:]) if cells[0] == head)


def png(color: tuple[int, int, int] = MAGENTA, size: tuple[int, int] = (320, 160)) -> bytes:
    file = BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


def model(copy_share: float, low: float, high: float, **more) -> dict:
    return {"samples": 256, "copy_share": copy_share, "copy_share_low": low, "copy_share_high": high} | more


def evaluation() -> dict:
    """Of a Stable Diffusion model, as `siss evaluate` writes it."""
    shared = {"inception_score": 3.117, "inception_score_std": 0.213, "fid": 31.25, "kid": 0.01234}
    shared |= {"precision": 0.5, "recall": 0.402, "coverage": 0.707, "density": 1.017, "clip_iqa": 0.613}
    shared |= {
        "clip_score": 24.3,
        "nll_keep_bpd": 4.218,
        "ordinary_copy_share": 0.0,
        "drift": 0.25,
        "classifier_accuracy": 0.936,
    }
    base = shared | model(221 / 256, 0.8159, 0.9000)
    base |= {"copy_share_by_detector": {"pixel_l2": 0.851, "correlation": 0.863}, "others": 35, "sscd_forget": 0.812}
    base |= {"others_distance_to_keep": 6.81, "others_sharpness": 0.97, "nll_forget_bpd": 1.502}
    base |= {"text_noise_norm": 7.31, "injection": {"199": 0.998, "399": 0.991, "999": 0.951}}
    base |= {"paraphrases": [{"prompt_number": 0, "copy_share": 0.71}, {"prompt_number": 1, "copy_share": 0.25}]}
    unlearned = shared | model(0.0, 0.0, 0.01478, others=256, sscd_forget=0.241, nll_forget_bpd=4.155)
    unlearned |= {"copy_share_by_detector": {"pixel_l2": 0.0, "correlation": 0.0}}
    unlearned |= {"others_distance_to_keep": 6.92, "others_sharpness": 1.08, "text_noise_norm": 3.07}
    unlearned |= {"injection": {"199": 0.961, "399": 0.72, "999": 0.113}}
    unlearned |= {"paraphrases": [{"prompt_number": 0, "copy_share": 0.0}, {"prompt_number": 1, "copy_share": 0.031}]}
    curve = [(0, 0.0, 0.0, 0.057), (50, 0.0, 0.0, 0.057), (100, 0.016, 0.0027, 0.084), (200, 0.188, 0.11, 0.3)]
    unlearned["relearning"] = [
        {"step": step, "copy_share": share, "copy_share_low": low, "copy_share_high": high}
        for step, share, low, high in curve
    ]
    damages = {"none": 1.0, "noise": 1.0, "blur": 1.0, "contrast": False, "hue": 0.5, "flip": False, "shift": True}
    settings = {
        "skipped": {"copies by cluster": "the samples do not fall into two clusters"},
        "detectors": {"pixel_l2": {"threshold": 2.113}, "correlation": {"threshold": 0.874}},
        "damage_table": {"pixel_l2": damages, "correlation": damages | {"contrast": True, "hue": 1.0}},
        "keep_flagged": {"pixel_l2": 0.0, "correlation": 0.0, "any": 0.0},
        "forget_images": 1,
        "prompts": {"memorized": 1, "ordinary": 10},
        "data": {"rows": 2311, "forget_rows": 24},
        "num_inference_steps": 50,
        "guidance_scale": 7.5,
        "seed": 1234,
        "seconds": 754.2,
        "versions": {"torch": "2.9.1+cpu", "diffusers": "0.35.1"},
    }
    return {"base": base, "unlearned": unlearned, "settings": settings}


@pytest.fixture
def report(tmp_path):
    """Writes a report and returns it parsed."""

    def write(content: dict, pictures: dict | None = None, **more) -> Page:
        write_report(tmp_path / "report.html", content, pictures, **more)
        return Page((tmp_path / "report.html").read_text(encoding="utf-8"))

    return write


def test_verdict(report):
    """The share with its interval, the base, and what takes from it."""
    text = report(evaluation()).text
    start = "0 of 256 samples of the unlearned model are copies (95 % interval 0.0 to 1.5 %); the base: 86.3 %."
    assert start in text
    assert "Fewer than the base, whose interval is 81.5 to 90.0 %." in text
    assert (
        "No copy among samples does not mean that a model makes none: the 95 % interval reaches up to 1.5 % (the"
        in text
    )
    assert "relearning test: the unlearned model 18.8 % (after 200 steps; 95 % interval 11.0 to 30.0 %)." in text
    assert "other wordings of the prompt: the unlearned model 3.1 % (prompt 1; no interval is recorded)." in text
    assert "such copies may be among the samples uncounted: mirrored." in text
    assert "The detectors also flag" not in text
    assert "No figure here says" not in text


@pytest.mark.parametrize(
    ("unlearned", "base", "said"),
    [
        (model(0.1, 0.05, 0.2), model(0.15, 0.1, 0.25), "these samples do not show a difference"),
        (model(0.5, 0.4, 0.6), model(0.1, 0.05, 0.2), "More than the base"),
        ({"copy_share": 0.0, "samples": 8}, model(0.9, 0.8, 1.0), "Without both intervals the two cannot be told"),
        (model(1 / 256, 0.0007, 0.0218), {}, "1 of 256 samples of the unlearned model is a copy"),
        (model(1 / 256, 0.0007, 0.0218), {}, "There is no base to compare with"),
        ({}, model(0.9, 0.8, 1.0), "Nothing is known of copies among the samples of the unlearned model"),
        ({"copy_share": 0.25}, {}, "25.0 % of the samples of the unlearned model are copies; how many samples is not"),
    ],
)
def test_verdict_is_no_stronger_than_the_figures(report, unlearned, base, said):
    page = report({"base": base, "unlearned": unlearned})
    assert said in page.text
    assert "Fewer than" not in page.text
    assert "No figure here says what else changed in the unlearned model." in page.text


def test_flagged_keep_images_are_in_the_verdict(report):
    content = evaluation()
    content["settings"]["keep_flagged"]["correlation"] = 0.0213
    assert "The detectors also flag images to keep (up to 2.1 % of them)" in report(content).text


def test_a_base_alone_is_reported(report):
    assert "221 of 256 samples of the base are copies (95 % interval" in report({"base": evaluation()["base"]}).text


def test_every_metric_has_a_row_with_its_figure_and_an_explanation(report):
    page = report(evaluation())
    expected = {"samples": "256", "copy_share": "86.3 % [81.5, 90.0]", "others": "35", "fid": "31.25"}
    expected |= {"others_distance_to_keep": "6.810", "others_sharpness": "0.9700", "classifier_accuracy": "93.6 %"}
    expected |= {"inception_score": "3.117 ± 0.213", "kid": "0.01234", "precision": "50.0 %"}
    expected |= {"recall": "40.2 %", "coverage": "70.7 %", "density": "1.017", "nll_forget_bpd": "1.502"}
    expected |= {"nll_keep_bpd": "4.218", "sscd_forget": "0.8120", "clip_iqa": "0.6130", "clip_score": "24.30"}
    expected |= {"text_noise_norm": "7.310", "ordinary_copy_share": "0.0 %", "drift": "0.2500"}
    assert expected.keys() == METRICS.keys()
    for key, figure in expected.items():
        metric = METRICS[key]
        assert page.row(metric.label)[0] == figure
        assert page.below(metric.label) == metric.explanation != ""
    assert page.row("pixel_l2") == ["85.1 %", "0.0 %"]
    assert page.below("pixel_l2").endswith("(threshold 2.113).")
    assert page.row("t = 999") == ["0.951", "0.113"]
    assert page.row("prompt 1") == ["25.0 %", "3.1 %"]
    assert page.row("step 200") == ["-", "18.8 % [11.0, 30.0]"]
    assert page.row("colours turned") == ["50.0 %", "100.0 %", "-"]
    assert page.row("contrast halved") == ["missed", "caught", "-"]
    assert page.row("images to keep that are flagged") == ["0.0 %", "0.0 %", "0.0 %"]
    assert page.row("Prompts") == ["memorized 1, ordinary 10"]
    assert page.row("Seed") == ["1234"]
    assert page.row("Time taken") == ["12 min 34 s"]
    assert page.row("Versions") == ["torch 2.9.1+cpu, diffusers 0.35.1"]


def test_every_skipped_metric_is_listed_with_its_reason(report):
    content = evaluation()
    names = [name for name in METRICS if name not in ("samples", "copy_share")] + ["relearning", "copies by cluster"]
    content["settings"]["skipped"] = {name: f"reason of {name}" for name in names} | {"fid": "as KID", "kid": "as KID"}
    content["settings"]["skipped"]["clip_iqa"] = None
    for metrics in (content["base"], content["unlearned"]):
        metrics |= dict.fromkeys(names)
    page = report(content)
    for name in names:
        label = METRICS[name].label if name in METRICS else {"relearning": "Relearning"}.get(name, name)
        reason = {"fid": "as KID", "kid": "as KID", "clip_iqa": NO_REASON}.get(name, f"reason of {name}")
        assert re.search(rf"{re.escape(label)}(, KID)?: {re.escape(reason)}", page.text) or name == "kid", name
        if name in METRICS:
            assert [cell[0] for cell in page.row(METRICS[name].label)] == ["-", "-"]
    assert "FID, KID: as KID" in page.text


def test_why_a_figure_is_missing(report):
    content = {
        "base": model(
            1.0, 0.985, 1.0, others=0, others_sharpness=None, fid=float("nan"), clip_score="/home/x", kid=True
        ),
        "unlearned": model(0.5, 0.4, 0.6, fid=None, nll_keep_bpd=4.2),
    }
    page = report(content)
    for label, reason in (
        ("Sharpness of these", NONE_LEFT),
        ("Code length of images to keep", NOT_MEASURED),
        ("FID, KID, CLIP score", NOT_FINITE),
        ("FID", NO_REASON),
    ):
        assert re.search(rf"\b[a-z]\s+[^.:]*{label}[^.:]*: {reason}", page.text), label
    # What a letter refers to is there.
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    targets = {attributes["href"] for name, attributes in page.elements if name == "a"}
    assert targets == {f"#{name}" for name in ids}
    assert "No entry in this evaluation:" in page.text
    assert "/home/x" not in page.text


@pytest.mark.parametrize("empty", [None, {}])
def test_nothing_recorded(report, empty):
    page = report({"base": empty, "unlearned": empty, "settings": empty})
    assert f"among the samples of the unlearned model: {NO_REASON}" in page.text
    assert page.text.count("Not measured: not part of this evaluation.") == 4
    assert "No unlearning metric is a legal proof" in page.text


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


def test_any_entry_may_be_missing_or_null(report):
    variants = list(all_missing(evaluation()))
    assert len(variants) > 200
    for variant in variants:
        report(variant)


def test_an_evaluation_without_a_model_is_an_error(report):
    with pytest.raises(ValueError, match="without a model"):
        report({"settings": {"seed": 0}})


def test_several_models_are_columns_in_the_given_order(report):
    content = evaluation()
    for name, share in (("retrained", 0.004), ("a <b>long</b> name", 0.9)):
        content[name] = content["unlearned"] | model(share, share / 2, min(2 * share, 1))
    page = report(content)
    names = [name for name in content if name != "settings"]
    assert ["", *names] in page.cells
    assert [cell.partition(" %")[0] for cell in page.row("Copies")] == ["86.3", "0.0", "0.4", "90.0"]
    assert "1 of 256 samples of the model “retrained” is a copy" in page.text
    assert "overlaps with this one" in page.text
    curves = [attributes for name, attributes in page.elements if name == "polyline"]
    assert len(curves) == 3  # the base is not relearned
    assert len({curve["class"] for curve in curves}) == len({curve.get("stroke-dasharray") for curve in curves}) == 3


def test_curve(report):
    """Its highest point lies above its first, within the drawing, and the axes are named."""
    page = report(evaluation())
    (curve,) = (attributes for name, attributes in page.elements if name == "polyline")
    points = [tuple(map(float, point.split(","))) for point in curve["points"].split()]
    assert len(points) == 4
    assert points[0][1] == points[1][1] > points[2][1] > points[3][1]
    assert [x - points[0][0] for x, _ in points] == pytest.approx([0, 101, 202, 404], abs=1)
    for _, attributes in page.elements:
        for place in attributes.get("points", "").split():
            x, y = map(float, place.split(","))
            assert 0 <= x <= 480 and 0 <= y <= 290
    assert "steps of relearning" in page.text and "copies, % of samples" in page.text


@pytest.mark.parametrize("steps", [[0], [0, 1], [0, 3], [0, 2500, 5000]])
def test_curves_of_any_length(report, steps):
    points = [{"step": step, "copy_share": 1.0} for step in steps]
    page = report({"unlearned": {"relearning": points}})
    assert sum(name == "circle" for name, _ in page.elements) == len(steps)
    assert "band" not in {attributes.get("class", "").partition(" ")[0] for _, attributes in page.elements}


def test_it_is_self_contained(report, tmp_path):
    (tmp_path / "secret_name.png").write_bytes(png())
    page = report(evaluation(), {"base": tmp_path / "secret_name.png", "unlearned": png()})
    for name, attributes in page.elements:
        assert name not in ("script", "link", "iframe", "object", "embed", "base")
        for key, value in attributes.items():
            assert not key.startswith("on")
            if key in ("src", "href", "srcset", "xlink:href", "action", "data"):
                assert value.startswith(("data:image/png;base64,", "#note-"))
    content = (tmp_path / "report.html").read_text()
    assert "url(" not in content and "@import" not in content and "http" not in content.replace("http-equiv", "")
    assert "secret_name" not in content
    assert sum(name == "img" for name, _ in page.elements) == 2
    assert [path.name for path in tmp_path.glob("report*")] == ["report.html"]


def test_pictures_come_with_a_warning(report):
    warning = "should not be published as it is"
    assert warning in report(evaluation(), {"samples": png()}).text.partition("samples of the unlearned")[0]
    assert warning not in report(evaluation()).text
    assert warning not in report(evaluation(), {}).text


def test_pictures_of_unknown_formats_are_refused(report):
    with pytest.raises(ValueError, match="PNG, JPEG or WebP"):
        report(evaluation(), {"drawing": b"<svg onload='x'/>"})


def test_text_is_escaped(report, tmp_path):
    """Wherever a text can come from."""
    content = evaluation()
    content[HOSTILE] = content["unlearned"]
    for name in ("copy_share_by_detector", "injection"):
        content["base"][name][HOSTILE] = 0.5
    content["settings"]["skipped"] |= {"fid": HOSTILE, HOSTILE: HOSTILE}
    content["base"]["fid"] = None
    content["settings"]["detectors"][HOSTILE] = {"threshold": 1}
    content["settings"]["damage_table"] |= {HOSTILE: {HOSTILE: True}}
    page = report(content, {HOSTILE: png()}, title=HOSTILE)
    assert {name for name, _ in page.elements}.isdisjoint({"script"})
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)
    written = (tmp_path / "report.html").read_text()
    assert "<script" not in written and html.escape(HOSTILE) in written
    assert page.text.count(re.sub(r"\s+", " ", HOSTILE)) > 10


def test_settings_show_neither_prompts_nor_paths(report):
    content = evaluation()
    content["settings"] |= {
        "prompts": ["a secret flower", "another flower"],
        "training": {"--train_data_dir": "/home/secret"},
        "model": "/home/secret",
        "seed": "a secret flower",
        "data": {"rows": 7, "a secret flower": 3, "folder": "/home/secret"},
        "versions": {"torch": "2.9.1", "siss_diffusers": "@ file:///home/secret"},
        "a secret flower": 3,
    }
    content["base"] |= {"a secret flower": 3, "prompt": "a secret flower", "new_figure": 0.25}
    page = report(content)
    assert "secret" not in page.text
    assert page.row("Prompts") == ["2"]
    assert page.row("Data") == ["rows 7"]
    assert page.row("new_figure")[0] == "0.2500"
    assert "Recorded, but not shown in this report: seed, training, model, prompt, 1 more." in page.text
    content["settings"]["prompts"] = {"a secret flower": 3}
    assert report(content).row("Prompts") == ["1"]


def test_an_evaluation_from_json(report):
    """As `evaluation.json` comes back from the disk."""
    assert report(json.loads(json.dumps(evaluation()))).text == report(evaluation()).text


@pytest.mark.parametrize(
    ("share", "text"),
    [(0, "0.0 %"), (1, "100.0 %"), (0.8633, "86.3 %"), (0.0004, "0.04 %"), (1e-6, "<0.01 %"), (0.99999, ">99.99 %")],
)
def test_percent(share, text):
    assert percent(share) == text


def test_limits_are_rounded_outwards():
    assert limits(0.81594, 0.01441) == ("81.5", "1.5")
    assert limits(0.07, 0.07) == ("7.0", "7.0")
    assert limits(0.0, 1.0) == ("0.0", "100.0")


def browse(tmp_path: Path, page: Path, *flags: str) -> str:
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", *flags, page.as_uri()]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH")
@pytest.mark.parametrize("width", [1100, 390])
def test_in_a_browser(tmp_path, width):
    """Pictures are shown, and nothing but the tables' own boxes scrolls sideways."""
    content = evaluation()
    content |= {f"method {index}": content["unlearned"] for index in range(4)}
    content["settings"]["skipped"]["kid"] = "a_very_long_word" * 20
    report = tmp_path / "report.html"
    write_report(report, content, {"samples": png(), "wide": png((0, 128, 0), (1500, 60))})
    # A window may not be as narrow as a phone; a frame may.
    frame = tmp_path / "frame.html"
    frame.write_text(
        '<body style="margin: 0"><iframe style="border: 0"'
        f' width="{width}" height="9000" srcdoc="{html.escape(report.read_text())}" onload="'
        "const page = this.contentDocument, root = page.documentElement;"
        "document.title = [root.scrollWidth, root.clientWidth,"
        " ...Array.from(page.images, image => image.naturalWidth)].join(' ')"
        '"></iframe>'
    )
    title = re.search(r"<title>(.*?)</title>", browse(tmp_path, frame, "--dump-dom"))[1]
    assert title == f"{width} {width} 320 1500"

    browse(tmp_path, frame, f"--screenshot={tmp_path / 'report.png'}", f"--window-size={max(width, 600)},9000")
    with Image.open(tmp_path / "report.png") as image:
        colors = {color[:3]: count for count, color in image.crop((0, 0, width, 9000)).getcolors(10**6)}
    assert colors[MAGENTA] > 0.9 * 320 * 160
    assert len(colors) > 50
