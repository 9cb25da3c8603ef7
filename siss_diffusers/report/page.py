"""Build the page from the content of an `evaluation.json` and write it.

The page needs no network and no script; pictures are inline. Of the settings it shows only numbers, counts and
versions. Other settings may be prompts or paths: the page names them without their values. The caller chooses the
captions and the names of models. jinja2 escapes all text.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from siss_diffusers.report.attack import attack_curves, attack_table
from siss_diffusers.report.curves import line_color, line_dashes, share_svg
from siss_diffusers.report.sentences import (
    judged_models,
    label_of,
    list_caveats,
    list_claims,
    list_missing,
    zero_examples,
)
from siss_diffusers.report.settings import hidden_entries, settings_rows
from siss_diffusers.report.tables import (
    Table,
    bits_table,
    damage_table,
    detectors_table,
    figures_table,
    injection_table,
    measured_points,
    variations_table,
)
from siss_diffusers.report.values import Entries, as_mapping, model_phrase
from siss_diffusers.storage.files import write_text


FOLDER = Path(__file__).parent
# The page asks for nothing from anywhere, and the browser makes sure of it.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
FORMATS = {"PNG": "png", "JPEG": "jpeg", "WEBP": "webp"}


class Picture(NamedTuple):
    """A picture as a data URI, with its size in pixels and its place in a group."""

    name: str
    caption: str
    source: str
    width: int
    height: int


@dataclass(frozen=True)
class Curve:
    """A drawing, with what a screen reader says of it and the legend: name, colour and dashes of each line."""

    svg: str
    description: str
    legend: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Attempt:
    """A test that tries to bring the images back."""

    title: str
    explanation: str
    table: Table
    curve: Curve | None = None
    remark: str = ""


def write_report(
    path: Path,
    evaluation: Mapping[str, Any],
    pictures: Mapping[str, Path | bytes] | None = None,
    *,
    title: str = "Evaluation of unlearning",
) -> None:
    """Write the report.

    Args:
        path: of the HTML file. Its folder exists.
        evaluation: as in `evaluation.json`: `settings`, and models under any other key. One of them may be `base`.
        pictures: PNG, JPEG or WebP by caption, as files or as their bytes. A caption is "model, kind". Pictures of the
            same kind stand one under the other, so that the same seeds can be compared.
        title: of the page.

    Raises:
        ValueError: without a model, or for a picture of another format.
    """
    models = {name: as_mapping(figures) for name, figures in evaluation.items() if name != "settings"}
    if not models:
        raise ValueError("an evaluation without a model has nothing to report")
    style = (FOLDER / "page.css").read_text(encoding="utf-8")
    view = build_view(models, as_mapping(evaluation.get("settings")), pictures or {})
    page = load_template().render(title=title, policy=POLICY, style=style, **view)
    # A line must not end between a number and its percent sign.
    write_text(path, page.replace(" %", "\N{NO-BREAK SPACE}%"))


@cache
def load_template() -> Any:
    """Load the template. It escapes all text but the stylesheet and the curves, which are our own."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["own"] = Markup
    return environment.get_template("page.html.jinja")


def build_view(
    models: Mapping[str, Entries], settings: Entries, pictures: Mapping[str, Path | bytes]
) -> dict[str, Any]:
    """Return what the template shows, as plain data, in the order of the page."""
    return {
        "pictures": group_pictures(pictures),
        "claims": list_claims(models, as_mapping(settings.get("skipped"))),
        "caveats": list_caveats(judged_models(models), settings),
        "figures": figures_table(models),
        "detectors": detectors_table(models, settings),
        "attempts": list_attempts(models),
        "damages": damage_table(settings),
        "settings": settings_rows(settings),
        "hidden": hidden_entries(models, settings),
        "missing": list_missing(models, settings),
        "zero_examples": zero_examples(models),
    }


def group_pictures(pictures: Mapping[str, Path | bytes]) -> dict[str, list[Picture]]:
    """Group pictures by the kind in their captions. A caption without a comma is a kind by itself."""
    groups: dict[str, list[Picture]] = {}
    for caption, picture in pictures.items():
        name, _, kind = caption.partition(", ")
        groups.setdefault(kind or name, []).append(read_picture(name if kind else "", caption, picture))
    return groups


def read_picture(name: str, caption: str, picture: Path | bytes) -> Picture:
    """Read a picture.

    Raises:
        ValueError: for a format that not every browser shows.
    """
    content = picture if isinstance(picture, bytes) else picture.read_bytes()
    try:
        with Image.open(BytesIO(content), formats=list(FORMATS)) as image:
            kind, (width, height) = FORMATS[image.format], image.size
    except OSError as error:
        raise ValueError("a picture for the report must be PNG, JPEG or WebP") from error
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return Picture(name, caption, source, width, height)


def list_attempts(models: Mapping[str, Entries]) -> list[Attempt]:
    """Return the tests that try to bring the images back and were made."""
    attempts = [
        (
            "injection",
            "A forgotten image is noised up to the time t, and the model denoises it. The figure says how similar the"
            " result is to the image; 1 means that they are the same. A model that remembers the image restores it"
            " from more noise. Little noise leaves the image visible, so every model restores it: compare with the"
            " base, or with a model that never saw the image. Lower is better where t is large.",
            injection_table(models),
        ),
        (
            "paraphrases",
            "Share of copies under other wordings of the memorized prompt. The wordings have numbers and are not"
            " shown. Lower is better.",
            variations_table(models, "paraphrases", "prompt_number", "Other wordings", "Prompt"),
        ),
        (
            "prompt_noise",
            "Share of copies with noise on the prompt's embedding, in its standard deviations. Lower is better.",
            variations_table(models, "prompt_noise", "noise", "Noise on the prompt", "Noise"),
        ),
        (
            "embedding_attack",
            "The text conditioning is searched, by Adam, for one under which the model denoises a forgotten image, from"
            " several starts. The figure is the share of copies among samples of what was found. The columns “never"
            " seen” say what the same search does with pictures that the model never saw: beyond that the search proves"
            " nothing. In the curve, each point is the highest share of all starts and guidance scales. Lower is better.",
            attack_table(models),
        ),
        (
            "memorized_bits_by_condition",
            "How many bits less than the base the model knows of an image, as a mean with its standard error: of forgotten"
            " images, of pictures that no model saw, and of images to keep. Only the first should be far from 0. If it is"
            " near 0 with the empty prompt, the image was forgotten under its prompt alone.",
            bits_table(models),
        ),
        (
            "relearning",
            "The model is trained further on images that are similar to the forgotten ones, but not on these, and the"
            " copies among its samples are counted after some steps. A band is the 95 % interval. A rising curve"
            " suggests that the image was hidden and not forgotten. Lower and flatter is better.",
            variations_table(models, "relearning", "step", "Relearning", "Step"),
        ),
    ]
    return [
        Attempt(
            label_of(key),
            explanation,
            table,
            curve_of(key, models),
            unmeasured(models, table),
        )
        for key, explanation, table in attempts
        if table is not None
    ]


def unmeasured(models: Mapping[str, Entries], table: Table) -> str:
    """Name the models that a test left out."""
    left_out = [model_phrase(name) for name in models if name not in table.head[1:]]
    return f"Not measured for {', '.join(left_out)}." if left_out else ""


def curve_of(key: str, models: Mapping[str, Entries]) -> Curve | None:
    """Draw the share of copies by the steps of an attempt; None where it has no curve."""
    if key == "relearning":
        curves, steps = {name: measured_points(figures, key, "step") for name, figures in models.items()}, "relearning"
    elif key == "embedding_attack":
        curves, steps = attack_curves(models), "search"
    else:
        return None
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return None
    legend = [(name, line_color(index), line_dashes(index)) for index, name in enumerate(curves)]
    return Curve(share_svg(curves, steps), f"Share of copies by steps of {steps}: {', '.join(curves)}", legend)
