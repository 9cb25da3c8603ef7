"""One self-contained HTML page from the content of an `evaluation.json`: no network, no script, pictures inline.

Of the settings only numbers, counts and versions are shown; the rest, which may be prompts and paths, is named.
Captions and names of models are the caller's. All text is escaped.
"""

import base64
import html
import math
import os
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class Markup(str):
    """Text that is HTML already; `tag` escapes every other."""


def tag(name: str, /, *children: str, **attributes: str | float | None) -> Markup:
    """An element. `class_` means `class`, other underscores are hyphens; an attribute of None is left out."""
    opening = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in ("meta", "img", "br"):
        return Markup(f"<{name}{opening}>")
    return Markup(f"<{name}{opening}>{joined(*children)}</{name}>")


def joined(*children: str) -> Markup:
    return Markup("".join(child if isinstance(child, Markup) else html.escape(child) for child in children))


@dataclass(frozen=True)
class Metric:
    """A row of the table of figures.

    Args:
        show: the value as text.
        spread: key of the standard deviation, if there may be one.
        of_others: taken over the samples that are no copies, of which there may be none.
        of_the_rest: says whether the model still does what it should.
    """

    label: str
    explanation: str
    show: Callable[[float], str]
    spread: str | None = None
    of_others: bool = False
    of_the_rest: bool = False


def percent(share: float) -> str:
    """In %, never rounded to 0 or 100 where it is neither."""
    value = 100 * share
    if 0 < value < 0.01:
        return "<0.01 %"
    if 99.99 < value < 100:
        return ">99.99 %"
    digits = 2 if 0 < value < 0.1 or 99.9 < value < 100 else 1
    return f"{value:.{digits}f} %"


def limits(low: float, high: float) -> tuple[str, str]:
    """Of an interval, in %, rounded outwards: never narrower than it is."""
    # First to six digits, for 100 * 0.07 is a little more than 7.
    return (
        f"{math.floor(round(1000 * low, 6)) / 10:.1f}",
        f"{math.ceil(round(1000 * high, 6)) / 10:.1f}",
    )


def percent_up(share: float) -> str:
    return f"{limits(0, share)[1]} %"


def number(value: float) -> str:
    """As short as it is to four digits."""
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def figure_text(value: float) -> str:
    """Four digits, zeros at the end too, so that the figures of a row can be compared."""
    return number(value) if isinstance(value, int) or abs(value) >= 1000 else f"{value:#.4g}"


METRICS = {
    "samples": Metric(
        "Samples", "Pictures drawn from each model to count copies in. The more, the narrower the interval.", number
    ),
    "copy_share": Metric(
        "Copies",
        "Share of the samples that any detector flags as a copy of a forgotten image, with its 95 % interval. Lower is"
        " better.",
        percent,
    ),
    "others": Metric("Samples that are no copies", "What the next figures are taken from.", number),
    "others_distance_to_keep": Metric(
        "Distance of these to images to keep",
        "Median pixel distance of a sample that is no copy to the nearest image to keep. Lower is better: something"
        " like the data comes instead; far above the base points to noise or broken pictures.",
        figure_text,
        of_others=True,
    ),
    "others_sharpness": Metric(
        "Sharpness of these",
        "Fine detail relative to the images to keep. Near 1 is best: blur and flat pictures have less, noise more.",
        figure_text,
        of_others=True,
    ),
    "drift": Metric(
        "Drift of ordinary samples",
        "Median distance of a sample from the base's of the same seed, relative to its contrast; of those that were no"
        " copies. Lower is better: 0 is the same picture, about 1.4 an unrelated one.",
        figure_text,
        of_the_rest=True,
    ),
    "ordinary_copy_share": Metric(
        "Copies under ordinary prompts",
        "Share of the samples of other prompts that a detector flags. Lower is better.",
        percent,
    ),
    "classifier_accuracy": Metric(
        "Classifier accuracy",
        "Share of the samples in which a classifier sees what the prompt asks for. Higher is better.",
        percent,
        of_the_rest=True,
    ),
    "inception_score": Metric(
        "Inception score",
        "How distinct and how varied a classifier finds the samples, copies removed. Higher is better; compare with"
        " the base only.",
        figure_text,
        spread="inception_score_std",
        of_the_rest=True,
    ),
    "fid": Metric(
        "FID",
        "Distance between the samples and the data in a network's features; depends on the number of samples. Lower is"
        " better.",
        figure_text,
        of_the_rest=True,
    ),
    "kid": Metric(
        "KID",
        "Such a distance that does not depend on the number of samples; may fall a little below 0. Lower is better.",
        figure_text,
        of_the_rest=True,
    ),
    "precision": Metric(
        "Precision", "Share of the samples that look like the data. Higher is better.", percent, of_the_rest=True
    ),
    "recall": Metric(
        "Recall", "Share of the data that the samples reach. Higher is better.", percent, of_the_rest=True
    ),
    "density": Metric(
        "Density",
        "How close the samples lie to the data; may exceed 1. Higher is better.",
        figure_text,
        of_the_rest=True,
    ),
    "coverage": Metric(
        "Coverage",
        "Share of the data that has a sample close to it. Higher is better.",
        percent,
        of_the_rest=True,
    ),
    "nll_forget_bpd": Metric(
        "Code length of forgotten images",
        "Bits per dimension (negative log-likelihood). Higher is better, up to what unseen images take, about the next"
        " row; far more than that would itself give the images away.",
        figure_text,
    ),
    "nll_keep_bpd": Metric(
        "Code length of images to keep",
        "Bits per dimension (negative log-likelihood). Lower is better; it should stay where the base has it.",
        figure_text,
        of_the_rest=True,
    ),
    "sscd_forget": Metric(
        "Similarity to forgotten images",
        "Mean over the samples of the highest cosine with a forgotten image, in the features of a copy detector. Lower"
        " is better.",
        figure_text,
    ),
    "clip_iqa": Metric(
        "CLIP-IQA", "Quality of the pictures as CLIP rates it. Higher is better.", figure_text, of_the_rest=True
    ),
    "clip_score": Metric(
        "CLIP score", "How well the pictures fit their prompts. Higher is better.", figure_text, of_the_rest=True
    ),
    "text_noise_norm": Metric(
        "Text-conditional noise norm",
        "How hard the memorized prompt pulls; large where a model recalls an image. Lower is better.",
        figure_text,
    ),
}
# Shown in sections of their own.
OTHER_PARTS = {
    "copy_share_by_detector": "Copies by detector",
    "injection": "Half-noised images",
    "paraphrases": "Other wordings",
    "prompt_noise": "Noise on the prompt",
    "relearning": "Relearning",
}
PARTS_OF_ROWS = ("copy_share_low", "copy_share_high", "inception_score_std")

DETECTORS = {
    "pixel_l2": "The pixels are nearer to a forgotten image than a threshold",
    "correlation": "The picture correlates with a forgotten image, whatever its brightness and contrast",
    "network": "A copy-detection network finds the picture similar to a forgotten image",
    "sscd": "The copy-detection network SSCD finds the picture similar to a forgotten image",
    "cluster": "The picture falls into the base's cluster of copies",
    "any": "Any of them: this is what the report calls a copy.",
}
DAMAGES = {
    "none": "no damage",
    "noise": "noise added",
    "blur": "blurred",
    "contrast": "contrast halved",
    "hue": "colours turned",
    "crop": "cropped and enlarged",
    "flip": "mirrored",
    "shift": "shifted",
}
SETTINGS = {
    "forget_images": "Images to forget",
    "prompts": "Prompts",
    "num_inference_steps": "Sampling steps",
    "guidance_scale": "Guidance scale",
    "seed": "Seed",
    "relearning_rate": "Learning rate of relearning",
    "data": "Data",
    "seconds": "Time taken",
    "versions": "Versions",
}
SETTINGS_SHOWN_ELSEWHERE = ("skipped", "detectors", "damage_table", "keep_flagged")
PROMPT_KINDS = ("memorized", "ordinary", "paraphrases", "forget", "keep")

NO_REASON = "no reason is recorded"
NOT_FINITE = "the recorded value is not a finite number"
NOT_MEASURED = "not measured for this model"
NONE_LEFT = "every sample is a copy, so that no other is left to measure"
NO_ENTRY = "not part of this evaluation"


def as_mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def as_rows(value: Any) -> list[Mapping[str, Any]]:
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, Sequence) else []


def as_number(value: Any) -> float | None:
    """None for all that is not a finite number; True is none either."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def is_identifier(name: str) -> bool:
    """Whether a key can be shown: a program's word, not a prompt or a path."""
    return re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,39}", name) is not None


def model_phrase(name: str) -> str:
    return {"base": "the base", "unlearned": "the unlearned model"}.get(name, f"the model “{name}”")


def unique(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(names))


def table(head: Sequence[str], body: Sequence[Sequence[str]], explanations: Sequence[str] = ()) -> Markup:
    """In a box that scrolls sideways by itself; the first cell of a row is its head, its explanation is below it."""
    columns = joined(*(tag("th", cell, scope="col") for cell in head))
    rows = [joined(tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in body]
    if explanations:
        # In a row of its own, it has the width of a phone; in a body of its own, print does not part it from its row.
        bodies = [
            tag(
                "tbody",
                tag("tr", row, class_="above"),
                tag("tr", tag("td", tag("span", text), colspan=len(head)), class_="below"),
            )
            for row, text in zip(rows, explanations)
        ]
    else:
        bodies = [tag("tbody", *(tag("tr", row) for row in rows))]
    content = tag("table", tag("thead", tag("tr", columns)), *bodies, class_="many" if len(head) > 4 else None)
    # With tabindex the keyboard can scroll it.
    return tag("div", content, class_="box", tabindex="0")


def share_with_interval(row: Mapping[str, Any]) -> Markup | None:
    share = as_number(row.get("copy_share"))
    if share is None:
        return None
    low, high = as_number(row.get("copy_share_low")), as_number(row.get("copy_share_high"))
    if low is None or high is None:
        return joined(percent(share))
    bottom, top = limits(low, high)
    return joined(percent(share), " ", tag("span", f"[{bottom}, {top}]", class_="interval"))


@dataclass
class Notes:
    """Reasons why a figure is missing, each with a letter."""

    skipped: Mapping[str, Any]
    labels: dict[str, list[str]] = field(default_factory=dict)

    def reason(self, key: str) -> str | None:
        """The recorded one."""
        return str(self.skipped[key] or NO_REASON) if key in self.skipped else None

    def missing(self, label: str, reason: str) -> Markup:
        """A cell without a figure."""
        labels = self.labels.setdefault(reason, [])
        if label not in labels:
            labels.append(label)
        index = list(self.labels).index(reason)
        letter = string.ascii_lowercase[index % 26] * (index // 26 + 1)
        return joined("-", tag("sup", tag("a", letter, href=f"#note-{letter}")))

    def listed(self) -> Markup:
        """Every reason: those of cells, then those of whatever has no row."""
        items = []
        for index, (reason, labels) in enumerate(self.labels.items()):
            letter = string.ascii_lowercase[index % 26] * (index // 26 + 1)
            items.append(tag("li", tag("b", letter), f"  {', '.join(labels)}: {reason}", id=f"note-{letter}"))
        for key, reason in self.skipped.items():
            label = METRICS[key].label if key in METRICS else OTHER_PARTS.get(key, key)
            if str(reason or NO_REASON) not in self.labels or label not in self.labels[str(reason or NO_REASON)]:
                items.append(tag("li", f"{label}: {reason or NO_REASON}"))
        return joined(tag("h3", "Not measured"), tag("ul", *items, class_="notes")) if items else Markup()


def figures(models: Mapping[str, Mapping], notes: Notes) -> Markup:
    """A row a metric, a column a model; metrics of which nothing is recorded are named below."""
    rows, explanations, left_out = [], [], []
    for key in (*METRICS, *extras(models)):
        metric = METRICS.get(
            key, Metric(key, "Recorded by the evaluation; not described in this report.", figure_text)
        )
        if key not in notes.skipped and not any(key in metrics for metrics in models.values()):
            left_out.append(metric.label)
            continue
        cells = [figure(key, metric, metrics, notes) for metrics in models.values()]
        rows.append([metric.label, *cells])
        explanations.append(metric.explanation)
    absent = f"No entry in this evaluation: {', '.join(left_out)}." if left_out else ""
    return joined(
        table(["", *models], rows, explanations),
        notes.listed(),
        tag("p", absent, class_="small") if absent else Markup(),
    )


def extras(models: Mapping[str, Mapping]) -> list[str]:
    """Figures that this module does not know and can show all the same."""
    known = (*METRICS, *OTHER_PARTS, *PARTS_OF_ROWS)
    entries = [entry for metrics in models.values() for entry in metrics.items()]
    return unique(
        [key for key, value in entries if key not in known and is_identifier(key) and as_number(value) is not None]
    )


def figure(key: str, metric: Metric, metrics: Mapping[str, Any], notes: Notes) -> Markup:
    value = as_number(metrics.get(key))
    if value is None:
        if metrics.get(key) is not None:
            reason = NOT_FINITE
        elif metric.of_others and metrics.get("others") == 0:
            reason = NONE_LEFT
        else:
            reason = notes.reason(key) or (NO_REASON if key in metrics else NOT_MEASURED)
        return notes.missing(metric.label, reason)
    if key == "copy_share":
        return share_with_interval(metrics)
    spread = as_number(metrics.get(metric.spread)) if metric.spread else None
    return joined(
        metric.show(value), tag("span", f" ± {number(spread)}", class_="interval") if spread is not None else ""
    )


def verdict(models: Mapping[str, Mapping], settings: Mapping[str, Any], notes: Notes) -> Markup:
    """What the figures say of copies, and next to it what takes from it."""
    judged = [name for name in models if name != "base"] or list(models)
    sentences = [tag("p", *sentence_on_copies(name, models, notes), class_="verdict") for name in judged]
    caveats = caveats_of_models({name: models[name] for name in judged}) + caveats_of_detectors(settings)
    return joined(*sentences, tag("ul", *(tag("li", caveat) for caveat in caveats)) if caveats else Markup())


def sentence_on_copies(name: str, models: Mapping[str, Mapping], notes: Notes) -> list[str]:
    metrics, phrase = models[name], model_phrase(name)
    share, samples = as_number(metrics.get("copy_share")), as_number(metrics.get("samples"))
    if share is None:
        return [
            f"Nothing is known of copies among the samples of {phrase}: {notes.reason('copy_share') or NO_REASON}."
        ]
    if samples:
        copies = round(share * samples)
        count = f"{copies} of {samples:.0f} samples of {phrase} {'is a copy' if copies == 1 else 'are copies'}"
    else:
        count = f"{percent(share)} of the samples of {phrase} are copies; how many samples is not recorded"
    count += f" ({interval_phrase(metrics)})"
    base = as_mapping(models.get("base"))
    base_share = as_number(base.get("copy_share"))
    if name == "base":
        return [tag("b", f"{count}.")]
    if base_share is None:
        return [tag("b", f"{count}."), " There is no base to compare with."]
    return [tag("b", f"{count}; the base: {percent(base_share)}."), " ", comparison(metrics, base)]


def interval_phrase(row: Mapping[str, Any]) -> str:
    low, high = as_number(row.get("copy_share_low")), as_number(row.get("copy_share_high"))
    if low is None or high is None:
        return "no interval is recorded"
    return "95 % interval {} to {} %".format(*limits(low, high))


def comparison(metrics: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    """With the base, by the intervals alone: the cautious way."""
    keys = ("copy_share_low", "copy_share_high")
    (low, high), (base_low, base_high) = ([as_number(found.get(key)) for key in keys] for found in (metrics, base))
    if None in (low, high, base_low, base_high):
        return "Without both intervals the two cannot be told apart."
    bounds = "{} to {} %".format(*limits(base_low, base_high))
    if high < base_low:
        return f"Fewer than the base, whose interval is {bounds}."
    if low > base_high:
        return f"More than the base, whose interval is {bounds}."
    return f"The base's interval, {bounds}, overlaps with this one: these samples do not show a difference."


def caveats_of_models(models: Mapping[str, Mapping]) -> list[str]:
    found = []
    room = [
        f"{percent_up(high)} ({model_phrase(name)})"
        for name, metrics in models.items()
        if as_number(metrics.get("copy_share")) == 0 and (high := as_number(metrics.get("copy_share_high")))
    ]
    if room:
        found.append(
            f"No copy among samples does not mean that a model makes none: the 95 % interval reaches up to"
            f" {', '.join(room)}."
        )
    for key, attack, unit, label in (
        ("relearning", "in the relearning test", "after {} steps; ", "step"),
        ("paraphrases", "under other wordings of the prompt", "prompt {}; ", "prompt_number"),
        ("prompt_noise", "with noise on the prompt", "noise {}; ", "noise"),
    ):
        highest = []
        for name, metrics in models.items():
            points = [row for row in as_rows(metrics.get(key)) if as_number(row.get("copy_share")) is not None]
            if points:
                worst = max(points, key=lambda row: row["copy_share"])
                where = as_number(worst.get(label)) if worst["copy_share"] > 0 else None
                place = unit.format(number(where)) if where is not None else ""
                share = percent(worst["copy_share"])
                highest.append(f"{model_phrase(name)} {share} ({place}{interval_phrase(worst)})")
        start = f"Highest share of copies {attack}: "
        if len(highest) > 1:
            found.append(joined(start, tag("ul", *(tag("li", entry) for entry in highest))))
        elif highest:
            found.append(f"{start}{highest[0]}.")
    unknown = [
        model_phrase(name)
        for name, metrics in models.items()
        if name != "base"
        and all(as_number(metrics.get(key)) is None for key, metric in METRICS.items() if metric.of_the_rest)
    ]
    if unknown:
        found.append(f"No figure here says what else changed in {', '.join(unknown)}.")
    return found


def caveats_of_detectors(settings: Mapping[str, Any]) -> list[str]:
    found = []
    missed = [DAMAGES.get(name, name) for name in missed_damages(as_mapping(settings.get("damage_table")))]
    if missed:
        found.append(
            f"No detector catches every copy that was damaged in one of these ways, so that such copies may be among"
            f" the samples uncounted: {', '.join(missed)}."
        )
    flagged = [as_number(share) or 0 for share in as_mapping(settings.get("keep_flagged")).values()]
    if max(flagged, default=0) > 0:
        found.append(
            f"The detectors also flag images to keep (up to {percent(max(flagged))} of them): some of what is counted"
            " may be no copy."
        )
    return found


def missed_damages(by_detector: Mapping[str, Any]) -> list[str]:
    """Damages of which no detector, nor all of them together, catches every copy."""
    tables = [as_mapping(row) for row in by_detector.values()]
    names = unique([name for row in tables for name in row])
    return [
        name
        for name in names
        if any(row.get(name) is not None for row in tables) and not any(row.get(name) in (True, 1) for row in tables)
    ]


def by_detector(models: Mapping[str, Mapping], settings: Mapping[str, Any]) -> Markup:
    thresholds = as_mapping(settings.get("detectors"))
    shares = {name: as_mapping(metrics.get("copy_share_by_detector")) for name, metrics in models.items()}
    names = [n for n in unique([*thresholds, *(n for row in shares.values() for n in row)]) if n != "any"]
    if not names:
        return tag("p", "No detector is recorded by itself.")
    rows, explanations = [], []
    for detector in names:
        rows.append([detector, *(show_share(row.get(detector)) for row in shares.values())])
        calibration = [
            f"{key} {number(value)}"
            for key, value in as_mapping(thresholds.get(detector)).items()
            if is_identifier(key) and as_number(value) is not None
        ]
        does = DETECTORS.get(detector, "Not described in this report")
        explanations.append(f"{does} ({', '.join(calibration) or 'no threshold is recorded'}).")
    rows.append(["any", *(share_with_interval(metrics) or "-" for metrics in models.values())])
    explanations.append(DETECTORS["any"])
    return joined(
        tag(
            "p",
            "A sample counts as a copy where any detector flags it. Thresholds are calibrated on the images to keep."
            " A dash means that the detector gave no share for that model.",
        ),
        table(["Detector", *models], rows, explanations),
    )


def show_share(value: Any) -> str:
    return "-" if as_number(value) is None else percent(value)


def show_caught(value: Any) -> Markup:
    """Of a damaged copy: whether it was flagged, or the share that was."""
    if isinstance(value, bool):
        return tag("span", "caught" if value else "missed", class_="good" if value else "bad")
    if as_number(value) is None:
        return Markup("-")
    return tag("span", percent(value), class_="good" if value == 1 else "bad" if value == 0 else None)


def detector_checks(settings: Mapping[str, Any]) -> Markup:
    """Damaged copies, which should be caught, and images to keep, which should not."""
    damaged, flagged = as_mapping(settings.get("damage_table")), as_mapping(settings.get("keep_flagged"))
    names = unique([*damaged, *flagged])
    if not names:
        return tag("p", "Not measured: no check of the detectors is recorded.")
    damages = unique([damage for row in damaged.values() for damage in as_mapping(row)])
    rows = [
        [DAMAGES.get(damage, damage), *(show_caught(as_mapping(damaged.get(name)).get(damage)) for name in names)]
        for damage in damages
    ]
    rows.append(["images to keep that are flagged", *(show_share(flagged.get(name)) for name in names)])
    return joined(
        tag(
            "p",
            "Damaged copies of the forgotten images were shown to each detector: one that is caught is counted as the"
            " copy that it is, one that is missed would be overlooked among the samples too. Of the images to keep, in"
            " the last row, none should be flagged. A dash means not measured.",
        ),
        table(["Forgotten image", *names], rows),
    )


def picture_source(picture: Path | bytes) -> str:
    """A data URI.

    Raises:
        ValueError: for what no browser shows.
    """
    content = picture if isinstance(picture, bytes) else picture.read_bytes()
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        kind = "png"
    elif content.startswith(b"\xff\xd8\xff"):
        kind = "jpeg"
    elif content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        kind = "webp"
    else:
        raise ValueError("a picture for the report must be PNG, JPEG or WebP")
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def gallery(pictures: Mapping[str, Path | bytes]) -> Markup:
    return joined(
        *(
            tag("figure", tag("img", src=picture_source(picture), alt=caption), tag("figcaption", caption))
            for caption, picture in pictures.items()
        )
    )


def sorted_numerically(keys: Sequence[str]) -> list[str]:
    """Keys that are numbers in a JSON object, which knows only text."""

    def rank(key: str) -> tuple[bool, float]:
        try:
            return False, float(key)
        except ValueError:
            return True, 0.0

    return sorted(keys, key=rank)


def attacks(models: Mapping[str, Mapping], notes: Notes) -> Markup:
    """What might bring the images back, one section each."""

    def section(key: str, explanation: str, content: Markup | None) -> Markup:
        reason = notes.reason(key) or NO_ENTRY
        shown = tag("p", explanation) + content if content else tag("p", f"Not measured: {reason}.")
        return joined(tag("h3", OTHER_PARTS[key]), Markup(shown))

    return joined(
        section(
            "injection",
            "A forgotten image is noised up to the time t and denoised by the model; the figure is how like the image"
            " the result is, 1 for the same. A model that remembers restores it from more noise. Little noise leaves"
            " the image to be seen, so that every model restores it: compare with the base, or with a model that never"
            " saw the image. Lower is better where t is large.",
            injection_table(models),
        ),
        section(
            "paraphrases",
            "Share of copies under other wordings of the memorized prompt, which are numbered, not shown. Lower is"
            " better.",
            variation_table(models, "paraphrases", "prompt_number", "prompt {}"),
        ),
        section(
            "prompt_noise",
            "Share of copies with noise on the prompt's embedding, in its standard deviations. Lower is better.",
            variation_table(models, "prompt_noise", "noise", "noise {}"),
        ),
        section(
            "relearning",
            "The model is trained on, on images like the forgotten ones but without them, and the copies are counted"
            " on the way; the band is the 95 % interval. A curve that rises points to an image that was hidden rather"
            " than forgotten; lower and flatter is better.",
            relearning_section(models),
        ),
    )


def injection_table(models: Mapping[str, Mapping]) -> Markup | None:
    found = {name: as_mapping(metrics.get("injection")) for name, metrics in models.items()}
    times = sorted_numerically(unique([time for row in found.values() for time in row]))
    if not times:
        return None
    values = {time: [as_number(row.get(time)) for row in found.values()] for time in times}
    rows = [[f"t = {t}", *("-" if v is None else f"{v:.3f}" for v in row)] for t, row in values.items()]
    return table(["Noised to", *models], rows)


def variation_table(models: Mapping[str, Mapping], key: str, label: str, wording: str) -> Markup | None:
    found = {
        name: {as_number(row.get(label)): row for row in as_rows(metrics.get(key))} for name, metrics in models.items()
    }
    labels = sorted({value for rows in found.values() for value in rows if value is not None})
    if not labels:
        return None
    body = [
        [wording.format(number(value)), *(share_with_interval(rows.get(value, {})) or "-" for rows in found.values())]
        for value in labels
    ]
    return table(["", *models], body)


def relearning_section(models: Mapping[str, Mapping]) -> Markup | None:
    curves = {}
    for name, metrics in models.items():
        points = [
            row
            for row in as_rows(metrics.get("relearning"))
            if as_number(row.get("step")) is not None and as_number(row.get("copy_share")) is not None
        ]
        if points:
            curves[name] = sorted(points, key=lambda row: row["step"])
    if not curves:
        return None
    without = [name for name in models if name not in curves]
    missing = f"Not measured for {', '.join(map(model_phrase, without))}." if without else ""
    return joined(
        tag("figure", relearning_curve(curves), legend(list(curves)), class_="curve"),
        variation_table(models, "relearning", "step", "step {}") or "",
        tag("p", missing, class_="small") if missing else "",
    )


# Of the drawing, in its own units; the text is readable where a phone shrinks it to two thirds.
WIDTH, HEIGHT = 480, 290
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 12, 52
NUM_COLORS = 6
DASHES = (None, "7 4", "2 3", "9 3 2 3")


def line_style(index: int) -> dict[str, str | None]:
    """Colours and dashes both differ, for print without colours and for more models than colours."""
    return {"class_": f"color-{index % NUM_COLORS}", "stroke_dasharray": DASHES[index % len(DASHES)]}


def relearning_curve(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> Markup:
    last = max(row["step"] for points in curves.values() for row in points) or 1
    highest = max(
        max(row["copy_share"], as_number(row.get("copy_share_high")) or 0) for rows in curves.values() for row in rows
    )
    top = next((limit for limit in (0.05, 0.1, 0.2, 0.5) if highest <= limit), 1.0)

    def x(step: float) -> float:
        return round(LEFT + step / last * (WIDTH - LEFT - RIGHT), 2)

    def y(share: float) -> float:
        return round(TOP + (1 - share / top) * (HEIGHT - TOP - BOTTOM), 2)

    drawn = []
    for index in range(6):
        share = top * index / 5
        drawn.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y(share), y2=y(share), class_="grid"))
        drawn.append(tag("text", f"{100 * share:.3g}", x=LEFT - 8, y=y(share) + 4, text_anchor="end"))
    for step in axis_steps(last):
        drawn.append(tag("line", x1=x(step), x2=x(step), y1=y(0), y2=y(0) + 5, class_="axis"))
        drawn.append(tag("text", number(step), x=x(step), y=y(0) + 19, text_anchor="middle"))
    drawn.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y(0), y2=y(0), class_="axis"))
    middle, center = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    drawn.append(tag("text", "steps of relearning", x=middle, y=HEIGHT - 10, text_anchor="middle"))
    turned = f"rotate(-90 16 {center})"
    drawn.append(tag("text", "copies, % of samples", x=16, y=center, text_anchor="middle", transform=turned))

    for index, (name, points) in enumerate(curves.items()):
        style = line_style(index)
        bounds = [(as_number(row.get("copy_share_low")), as_number(row.get("copy_share_high"))) for row in points]
        if all(None not in bound for bound in bounds):
            lower = [f"{x(row['step'])},{y(low)}" for row, (low, _) in zip(points, bounds)]
            upper = [f"{x(row['step'])},{y(high)}" for row, (_, high) in zip(points, bounds)]
            drawn.append(tag("polygon", points=" ".join(upper + lower[::-1]), class_=f"band {style['class_']}"))
        places = " ".join(f"{x(row['step'])},{y(row['copy_share'])}" for row in points)
        drawn.append(tag("polyline", points=places, **style))
        for row in points:
            title = tag("title", f"{name}, step {number(row['step'])}: {percent(row['copy_share'])}")
            drawn.append(tag("circle", title, cx=x(row["step"]), cy=y(row["copy_share"]), r=3, class_=style["class_"]))
    label = f"Share of copies by steps of relearning, of {', '.join(curves)}"
    return tag("svg", *drawn, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label)


def axis_steps(last: float) -> list[float]:
    """About five round numbers from 0 to `last`."""
    magnitude = 10 ** math.floor(math.log10(last / 5))
    interval = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= last / 5)
    # Steps are whole, so that a run of three has no tick at 0.5.
    interval = max(round(interval), 1)
    return [index * interval for index in range(int(last // interval) + 1)]


def legend(names: Sequence[str]) -> Markup:
    items = []
    for index, name in enumerate(names):
        line = tag("line", x1=0, x2=30, y1=6, y2=6, **line_style(index))
        items.append(tag("span", tag("svg", line, viewBox="0 0 30 12", aria_hidden="true"), name, class_="key"))
    return tag("figcaption", *items, class_="legend")


def show_settings(models: Mapping[str, Mapping], settings: Mapping[str, Any]) -> Markup:
    """Numbers, counts and versions; the rest is named, not shown, for it may be a prompt or a path."""
    rows, hidden = [], []
    for key, label in SETTINGS.items():
        if key in settings:
            text = show_setting(key, settings[key])
            rows.append([label, "-" if text is None else text])
            if text is None and settings[key] is not None:
                hidden.append(key)
    hidden += [key for key in settings if key not in SETTINGS and key not in SETTINGS_SHOWN_ELSEWHERE]
    shown = (*METRICS, *OTHER_PARTS, *PARTS_OF_ROWS, *extras(models))
    hidden += [key for metrics in models.values() for key in metrics if key not in shown]
    named = [key for key in unique(hidden) if is_identifier(key)]
    unnamed = len(unique(hidden)) - len(named)
    named += [f"{unnamed} more"] if unnamed else []
    content = tag("p", "No settings are recorded.")
    if rows:
        lines = [tag("tr", tag("th", label, scope="row"), tag("td", text)) for label, text in rows]
        content = tag("table", tag("tbody", *lines), class_="settings")
    left_out = f"Recorded, but not shown in this report: {', '.join(named)}." if named else ""
    return joined(content, tag("p", left_out, class_="small") if left_out else "")


def show_setting(key: str, value: Any) -> str | None:
    """None where it is nothing that may be shown."""
    if key == "prompts":
        if isinstance(value, Mapping) and set(value) <= set(PROMPT_KINDS):
            return ", ".join(
                f"{kind} {number(count)}" for kind, count in value.items() if as_number(count) is not None
            )
        if isinstance(value, Sequence | Mapping) and not isinstance(value, str):
            return str(len(value))
    if isinstance(value, Mapping):
        known = [(name, entry) for name, entry in value.items() if is_identifier(name)]
        if key == "versions":
            # A version, and not a folder that a package was installed from.
            found = [f"{name} {v}" for name, v in known if isinstance(v, str) and re.fullmatch(r"[\w.+!-]{1,40}", v)]
        else:
            found = [f"{name} {number(entry)}" for name, entry in known if as_number(entry) is not None]
        return ", ".join(found) or None
    if as_number(value) is None:
        return None
    if key == "seconds":
        minutes, seconds = divmod(round(value), 60)
        return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
    # A seed is a name rather than an amount.
    return str(value) if key == "seed" else number(value)


def closing(models: Mapping[str, Mapping]) -> Markup:
    zeros = [
        f"0 of {samples:.0f} samples leave room for a share of up to {percent_up(high)}"
        for metrics in models.values()
        if as_number(metrics.get("copy_share")) == 0
        and (samples := as_number(metrics.get("samples"))) is not None
        and (high := as_number(metrics.get("copy_share_high"))) is not None
    ]
    example = f" (here: {'; '.join(unique(zeros))})" if zeros else ""
    return tag(
        "p",
        "No unlearning metric is a legal proof that an image is gone from a model. Where no copy is found, the share"
        " of copies is bounded only by the upper limit of its Wilson interval, with 95 % confidence"
        f"{example}, and only for samples drawn as these were: with the same prompts, sampler and settings. A copy"
        " detector sees only what it is made for, and a copy that is changed in another way passes it by. An image may"
        " be beyond the reach of a prompt and still be brought back by another prompt, by further training or by means"
        " that nobody has tried. An adapter can be taken off again, and the base is then as it was.",
    )


STYLE = """
:root { --paper: #fdfdfb; --ink: #1d1d1b; --soft: #5d5d58; --rule: #cfcfc8; --shade: #f3f3ee; --good: #1c6b3c;
  --bad: #a32020; --warn: #8a5a00; --c0: #1f5fa8; --c1: #b8410f; --c2: #20744a; --c3: #7a3d9c; --c4: #8a6a00;
  --c5: #b01e5e; color-scheme: light; }
@media screen and (prefers-color-scheme: dark) { :root { --paper: #161615; --ink: #e8e8e2; --soft: #a5a59d;
  --rule: #42423d; --shade: #21211f; --good: #7fcf9c; --bad: #f08a80; --warn: #e3b45a; --c0: #7db2ee; --c1: #f2915f;
  --c2: #6fcb98; --c3: #c79be6; --c4: #d8b84a; --c5: #f083b1; color-scheme: dark; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.2rem 1.2rem 4rem; max-width: 66rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 Charter, "Bitstream Charter", "Iowan Old Style", Georgia, "DejaVu Serif", serif;
  font-variant-numeric: tabular-nums lining-nums; overflow-wrap: anywhere; -webkit-text-size-adjust: 100%; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; padding-top: .7rem; border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
p, ul { margin: .5rem 0; max-width: 44rem; }
ul { padding-left: 1.2rem; }
li { margin: .25rem 0; }
.private { border-left: .25rem solid var(--warn); margin: 1rem 0 1.2rem; padding: .4rem .8rem;
  background: var(--shade); }
.verdict { font-size: 1.12rem; }
.small, .notes, .below, .interval, figcaption { font-size: .85rem; color: var(--soft); }
.notes { list-style: none; padding: 0; }
/* A shade on the right says that there is more; what scrolls hides it at the end. */
.box { overflow-x: auto; margin: .8rem 0;
  background: linear-gradient(to left, var(--paper) 40%, transparent) right / 2.5rem 100% no-repeat local,
    linear-gradient(to left, var(--rule), transparent) right / .8rem 100% no-repeat scroll; }
table { border-collapse: collapse; min-width: 100%; border-top: 2px solid var(--ink);
  border-bottom: 2px solid var(--ink); overflow-wrap: normal; }
th, td { padding: .4rem .7rem; text-align: right; vertical-align: top; border-top: 1px solid var(--rule); }
th:first-child { text-align: left; padding-left: 0; min-width: 8rem; max-width: 22rem; font-weight: normal;
  position: sticky; left: 0; background: var(--paper); }
td { white-space: nowrap; }
thead th, thead th:first-child { font-weight: bold; border: 0; border-bottom: 1px solid var(--ink);
  vertical-align: bottom; }
thead th { max-width: 11rem; overflow-wrap: break-word; }
tbody + tbody { border-top: 1px solid var(--rule); }
.above > * { padding-bottom: .1rem; }
.above > th:first-child { font-weight: bold; }
.below td { white-space: normal; text-align: left; padding: 0 0 .45rem; border: 0; }
.settings { min-width: 0; }
.settings td { white-space: normal; text-align: left; }
.below span { display: block; max-width: 48rem; line-height: 1.35; position: sticky; left: 0; }
.interval { white-space: nowrap; }
.many .interval { display: block; }
.good { color: var(--good); }
.bad { color: var(--bad); font-weight: bold; }
sup { font-size: .75rem; line-height: 0; margin-left: .1rem; }
sup a { color: var(--soft); text-decoration: none; }
figure { margin: 1.2rem 0; break-inside: avoid; }
img { display: block; max-width: 100%; height: auto; border: 1px solid var(--rule); }
figcaption { margin-top: .35rem; }
.curve { max-width: 34rem; }
.curve > svg { display: block; width: 100%; height: auto; }
svg text { font-size: 14px; fill: var(--soft); }
svg polyline, svg line { fill: none; stroke: var(--color); stroke-width: 2; }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg .axis { stroke: var(--ink); stroke-width: 1; }
svg circle { fill: var(--color); }
svg .band { fill: var(--color); opacity: .13; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; }
.key svg { width: 30px; height: 12px; margin-right: .4rem; }
@media (max-width: 36rem) { body { padding: 1.2rem .9rem 3rem; } th, td { padding: .35rem .5rem; }
  .interval { display: block; }
  .below span { max-width: calc(100vw - 3rem); } th:first-child { position: static; } }
@media print { body { max-width: none; padding: 0; font-size: 10pt; background: none; } .box { overflow: visible; }
  .box, th:first-child { background: none; } tr, tbody:has(.above) { break-inside: avoid; }
  .above, h2, h3 { break-after: avoid; } a { color: inherit; text-decoration: none; } }
""" + "".join(f".color-{index} {{ --color: var(--c{index}); }}\n" for index in range(NUM_COLORS))
# The page asks for nothing from anywhere, and the browser holds it to that.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_report(
    path: Path,
    evaluation: Mapping[str, Any],
    pictures: Mapping[str, Path | bytes] | None = None,
    *,
    title: str = "Evaluation of unlearning",
) -> None:
    """Write the report.

    Args:
        path: of the HTML file; its folder is there.
        evaluation: as in `evaluation.json`: `settings`, and models under any other key, of which one may be `base`.
        pictures: PNG, JPEG or WebP by caption, as files or as their bytes.
        title: of the page.

    Raises:
        ValueError: without a model, or for a picture of another format.
    """
    models = {name: as_mapping(metrics) for name, metrics in evaluation.items() if name != "settings"}
    if not models:
        raise ValueError("an evaluation without a model has nothing to report")
    settings, pictures = as_mapping(evaluation.get("settings")), pictures or {}
    notes = Notes(as_mapping(settings.get("skipped")))
    private = tag(
        "p",
        "This report may show samples that resemble the forgotten images. It should not be published as it is.",
        class_="private",
    )
    sections = {
        "Figures": figures(models, notes),
        "Copies by detector": by_detector(models, settings),
        "How far the detectors can be trusted": detector_checks(settings),
        "Pictures": gallery(pictures) if pictures else None,
        "Attempts to bring the images back": attacks(models, notes),
        "Settings": show_settings(models, settings),
        "What this cannot show": closing(models),
    }
    body = tag(
        "body",
        tag("h1", title),
        private if pictures else "",
        verdict(models, settings, notes),
        *(joined(tag("h2", heading), content) for heading, content in sections.items() if content is not None),
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup(STYLE)),
    )
    # As with JSON files: a reader never sees half a file.
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("<!DOCTYPE html>\n" + tag("html", head, body, lang="en") + "\n", encoding="utf-8")
    os.replace(temporary, path)
