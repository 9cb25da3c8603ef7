"""An evaluation as `siss evaluate` writes it, and a report that is written and parsed."""

import re
from html.parser import HTMLParser

import pytest

from siss_diffusers.report import write_report


VOID = ("meta", "img", "br")


class Page(HTMLParser):
    """Checks that every element is closed in its turn, and collects elements, sections and text."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.cells: list[list[str]] = []
        self.headings: list[tuple[str, str]] = []
        self.starts: dict[str, int] = {}
        self.feed(content)
        self.close()
        assert not self.open

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        if name not in VOID:
            self.open.append(name)
        if name == "tr":
            self.cells.append([])
        elif name in ("td", "th"):
            self.cells[-1].append("")
        elif name in ("h1", "h2", "h3"):
            self.headings.append((name, ""))

    def handle_endtag(self, name):
        assert self.open.pop() == name
        if name == "h2":
            self.starts[self.headings[-1][1]] = len(self.texts)
        if name in ("li", "p", "td", "th", "h1", "h2", "h3", "title", "figcaption", "text"):
            self.texts.append(" ")

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.texts.append(data)
        if self.open[-1:] and self.open[-1] in ("h1", "h2", "h3"):
            self.headings[-1] = (self.open[-1], self.headings[-1][1] + data)
        if "table" in self.open and ("td" in self.open or "th" in self.open):
            self.cells[-1][-1] += data.replace("\N{NO-BREAK SPACE}", " ")

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.texts))

    def row(self, head: str) -> list[str]:
        """The cells beside a head of a row; the heading of a chapter has none."""
        return next(cells[1:] for cells in self.cells if cells[0] == head and len(cells) > 1)

    def below(self, head: str) -> str:
        """The explanation below a head."""
        return next(after[0] for cells, after in zip(self.cells, self.cells[1:]) if cells[0] == head and cells[1:])

    def section(self, heading: str) -> str:
        """The text below a heading of the second level."""
        start = self.starts[heading]
        end = min((other for other in self.starts.values() if other > start), default=None)
        return re.sub(r"\s+", " ", "".join(self.texts[start:end]))

    def named(self, name: str) -> list[dict]:
        """The attributes of all elements of a name."""
        return [attributes for element, attributes in self.elements if element == name]


@pytest.fixture
def report(tmp_path):
    """Write a report and return it parsed."""

    def write(content: dict, pictures: dict | None = None, **more) -> Page:
        write_report(tmp_path / "report.html", content, pictures, **more)
        return Page((tmp_path / "report.html").read_text(encoding="utf-8"))

    return write


@pytest.fixture
def evaluation() -> dict:
    """Of a Stable Diffusion model."""
    shared = {"inception_score": 3.117, "inception_score_std": 0.213, "fid": 31.25, "kid": 0.01234}
    shared |= {"precision": 0.5, "recall": 0.402, "coverage": 0.707, "density": 1.017, "clip_iqa": 0.613}
    shared |= {"clip_score": 24.3, "nll_keep_bpd": 4.218, "ordinary_copy_share": 0.0, "drift": 0.25}
    shared |= {"classifier_accuracy": 0.936, "samples": 256}
    base = shared | {"copy_share": 221 / 256, "copy_share_low": 0.8159, "copy_share_high": 0.9}
    base |= {"copy_share_by_detector": {"pixel_l2": 0.851, "correlation": 0.863}, "others": 35, "sscd_forget": 0.812}
    base |= {"others_distance_to_keep": 6.81, "others_sharpness": 0.97, "nll_forget_bpd": 1.502}
    base |= {"text_noise_norm": 7.31, "injection": {"199": 0.998, "399": 0.991, "999": 0.951}}
    base |= {"paraphrases": [{"prompt_number": 0, "copy_share": 0.71}, {"prompt_number": 1, "copy_share": 0.25}]}
    unlearned = shared | {"copy_share": 0.0, "copy_share_low": 0.0, "copy_share_high": 0.01478, "others": 256}
    unlearned |= {"copy_share_by_detector": {"pixel_l2": 0.0, "correlation": 0.0}, "sscd_forget": 0.241}
    unlearned |= {"others_distance_to_keep": 6.92, "others_sharpness": 1.08, "text_noise_norm": 3.07}
    unlearned |= {"injection": {"199": 0.961, "399": 0.72, "999": 0.113}, "nll_forget_bpd": 4.155}
    unlearned |= {"paraphrases": [{"prompt_number": 0, "copy_share": 0.0}, {"prompt_number": 1, "copy_share": 0.031}]}
    unlearned |= {"prompt_noise": [{"noise": 0.5, "copy_share": 0.0}]}
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
