"""A curve of shares: an SVG within the page that shows its points, and nothing of the caller's text."""

import re
from html.parser import HTMLParser

import pytest

from siss_diffusers.report.curves import COLORS, HEIGHT, WIDTH, share_svg


class Drawing(HTMLParser):
    """Collects the paths and points of each named group, and all text."""

    def __init__(self, svg: str) -> None:
        super().__init__()
        self.groups: list[str] = []
        self.paths: dict[str, list[dict]] = {}
        self.points: dict[str, list[tuple[float, float]]] = {}
        self.text: list[str] = []
        self.feed(svg)
        assert not self.groups

    def handle_starttag(self, name, attributes):
        attributes = dict(attributes)
        if name == "g":
            self.groups.append(attributes.get("id", ""))
        here = next((group for group in reversed(self.groups) if group), "")
        if name == "path":
            self.paths.setdefault(here, []).append(attributes)
        elif name == "use":
            self.points.setdefault(here, []).append((float(attributes["x"]), float(attributes["y"])))

    def handle_endtag(self, name):
        if name == "g":
            self.groups.pop()

    def handle_data(self, data):
        if data.strip():
            self.text.append(data.strip())


def curve(*points: tuple) -> dict:
    keys = ("copy_share", "copy_share_low", "copy_share_high")
    return {step: dict(zip(keys, shares)) for step, *shares in points}


RISING = curve((0, 0.0, 0.0, 0.057), (50, 0.0, 0.0, 0.057), (100, 0.016, 0.0027, 0.084), (200, 0.188, 0.11, 0.3))


def test_points_lie_where_the_shares_are():
    drawing = Drawing(share_svg({"unlearned": RISING}, "relearning"))
    points = drawing.points["points-0"]
    (first, _), *_ = points
    assert [(x - first) / (points[-1][0] - first) for x, _ in points] == pytest.approx([0, 0.25, 0.5, 1], abs=1e-3)
    heights = [points[0][1] - y for _, y in points]
    assert [height / heights[-1] for height in heights] == pytest.approx([0, 0, 0.016 / 0.188, 1], abs=1e-3)
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in points)
    assert len(drawing.paths["band-0"]) == len(drawing.paths["curve-0"]) == 1
    # The axis ends at the first round share above every interval.
    assert {"steps of relearning", "copies among the samples", "0 %", "50 %", "200"} <= set(drawing.text)
    assert "100 %" not in drawing.text


@pytest.mark.parametrize("steps", [[0], [0, 1], [0, 3], [0, 2500, 5000]])
def test_curves_of_any_length(steps):
    drawing = Drawing(share_svg({"unlearned": curve(*((step, 1.0) for step in steps))}, "relearning"))
    assert len(drawing.points["points-0"]) == len(steps)
    assert "band-0" not in drawing.paths
    # Steps are whole, so that a run of three has no tick at 0.5.
    ticks = [text for text in drawing.text if "%" not in text]
    assert not any("." in tick for tick in ticks)


def test_a_band_needs_every_interval():
    points = RISING | curve((300, 0.2))
    assert "band-0" not in Drawing(share_svg({"unlearned": points}, "relearning")).paths


def test_models_differ_in_colour_or_dashes_and_no_name_is_in_the_drawing():
    names = [f"$secret_{index}$ <b>" for index in range(len(COLORS) + 1)]
    svg = share_svg(dict.fromkeys(names, RISING), "relearning")
    drawing = Drawing(svg)
    styles = [drawing.paths[f"curve-{index}"][0]["style"] for index in range(len(names))]
    assert len(set(styles)) == len(names)
    assert len({re.search(r"var\(--c\d\)", style)[0] for style in styles}) == len(COLORS)
    assert "secret" not in svg


def test_the_drawing_has_only_the_page_s_colours_and_nothing_global():
    svg = share_svg({"unlearned": RISING}, "relearning")
    assert svg.startswith("<svg ") and svg.endswith("</svg>")
    assert not re.search(r"#[0-9a-fA-F]{6}\b", svg)
    for forbidden in ("<style", "<script", "<metadata", "http", "url(", "font:", "<!DOCTYPE"):
        assert forbidden not in svg
    assert f'viewBox="0 0 {WIDTH} {HEIGHT}"' in svg
    assert svg == share_svg({"unlearned": RISING}, "relearning")


def test_the_legend_names_every_curve_with_its_style(report, evaluation):
    evaluation["retrained"] = evaluation["unlearned"]
    page = report(evaluation)
    keys = [path["style"] for path in page.named("path") if "stroke-dasharray: " in path.get("style", "")]
    assert [key for key in keys if key.startswith("stroke: var(--c0)")] and "var(--c1)" in " ".join(keys)
    assert "unlearned retrained" in page.section("Does it stay forgotten?")
