"""The sentences of the report: the verdict, what weakens it, what was not measured, and what figures cannot show."""

from collections.abc import Mapping
from typing import NamedTuple

from siss_diffusers.metrics import METRICS
from siss_diffusers.metrics.base import NO_PICTURE
from siss_diffusers.metrics.damage import DAMAGES
from siss_diffusers.metrics.formats import percent, short_number
from siss_diffusers.report.attack import forgotten_sentence
from siss_diffusers.report.tables import measured_points
from siss_diffusers.report.values import (
    Entries,
    as_mapping,
    as_number,
    as_rows,
    interval_of,
    interval_phrase,
    model_phrase,
    unique,
    upper_percent,
)


# Tests with a section of their own.
TESTS = {
    "injection": "Injection",
    "paraphrases": "Other wordings of the prompt",
    "prompt_noise": "Noise on the prompt",
    "embedding_attack": "Embedding attack",
    "memorized_bits_by_condition": "Bits by condition",
    "relearning": "Relearning",
}
# How a sentence names such a test, how it names a point of the test, and the key of the point's number.
ATTACKS = {
    "relearning": ("in the relearning test", "after {} steps", "step"),
    "paraphrases": ("under other wordings of the prompt", "prompt {}", "prompt_number"),
    "prompt_noise": ("with noise on the prompt", "noise {}", "noise"),
}

NO_REASON = "no reason is recorded"
NOT_FINITE = "the recorded value is not a finite number"
NONE_LEFT = "every sample is a copy or not finite, so no other sample is left to measure"
NO_ENTRY = "not part of this evaluation"


class Claim(NamedTuple):
    """The verdict on one model: its copies, a comparison with the base, the attempts to bring images back, and whether
    what is forgotten stays so under a search.

    All but the first may be empty.
    """

    sentence: str
    comparison: str = ""
    attempts: str = ""
    forgotten: str = ""


class Missing(NamedTuple):
    """Figures that were not measured, for one reason."""

    labels: str
    reason: str


def judged_models(models: Mapping[str, Entries]) -> dict[str, Entries]:
    """Return the models that the verdict is about: all but the base, or the base if it is alone."""
    return {name: figures for name, figures in models.items() if name != "base"} or dict(models)


def list_claims(models: Mapping[str, Entries], skipped: Entries) -> list[Claim]:
    """Return the verdict on each model, the base last."""
    claims = []
    base = models.get("base", {})
    for name, figures in judged_models(models).items():
        comparison = compare_with_base(figures, base) if name != "base" else ""
        attempts, forgotten = attempts_sentence(figures), forgotten_sentence(figures)
        claims.append(Claim(copies_sentence(name, figures, skipped), comparison, attempts, forgotten))
    if "base" in models and len(models) > 1:
        claims.append(Claim(copies_sentence("base", base, skipped)))
    return claims


def copies_sentence(name: str, figures: Entries, skipped: Entries) -> str:
    """Say how many samples of a model are copies."""
    phrase, broken = model_phrase(name), broken_sentence(name, figures)
    share, samples = as_number(figures.get("copy_share")), as_number(figures.get("samples"))
    if share is None:
        reason = recorded_reason("copy_share", skipped) or NO_REASON
        return f"{broken}The report cannot say how many samples of {phrase} are copies: {reason}."
    interval = interval_phrase(figures)
    if not samples:
        count = f"{percent(share)} of the samples of {phrase} are copies"
        return f"{broken}{count} ({interval}); the number of samples is not recorded."
    judged = round(samples * (1 - (as_number(figures.get("broken_share")) or 0)))
    copies = round(share * judged)
    verb = "is a copy" if copies == 1 else "are copies"
    which = "other samples" if broken else "samples"
    return f"{broken}{copies} of {judged} {which} of {phrase} {verb}: {percent(share)} ({interval})."


def broken_sentence(name: str, figures: Entries) -> str:
    """Say first how many samples of a model are no pictures, with a space behind; empty where there are none."""
    shares = {
        "samples": as_number(figures.get("broken_share")),
        "samples of ordinary prompts": as_number(figures.get("ordinary_broken_share")),
    }
    parts = [f"{percent(share)} of the {what}" for what, share in shares.items() if share]
    if not parts:
        return ""
    return (
        f"{' and '.join(parts)} of {model_phrase(name)} are broken: {NO_PICTURE}. They do not show that"
        " anything is forgotten. "
    )


def compare_with_base(figures: Entries, base: Entries) -> str:
    """Compare the share of copies with the base's by the intervals only, which is cautious."""
    if as_number(figures.get("copy_share")) is None:
        return ""
    if as_number(base.get("copy_share")) is None:
        return "There is no base to compare with."
    interval, base_interval = interval_of(figures), interval_of(base)
    if interval is None or base_interval is None:
        return "Without both intervals the share cannot be told apart from the base's."
    if interval[1] < base_interval[0]:
        return "The share is lower than the base's."
    if interval[0] > base_interval[1]:
        return "The share is higher than the base's."
    return "The interval overlaps with the base's: these samples do not show a difference."


def attempts_sentence(figures: Entries) -> str:
    """Name the highest share of copies in each test that tries to bring the images back."""
    parts = []
    for test, (attack, unit, label) in ATTACKS.items():
        points = measured_points(figures, test, label)
        if points:
            place, worst = max(points.items(), key=lambda point: point[1]["copy_share"])
            where = f"{unit.format(short_number(place))}; " if worst["copy_share"] > 0 else ""
            parts.append(f"{percent(worst['copy_share'])} {attack} ({where}{interval_phrase(worst)})")
    return f"Highest share of copies in attempts to bring the images back: {'; '.join(parts)}." if parts else ""


def list_caveats(models: Mapping[str, Entries], settings: Entries) -> list[str]:
    """Return what weakens the verdict on the given models, a sentence or two each."""
    caveats = [
        broken_attempts(models),
        zero_copies(models),
        unknown_rest(models),
        missed_copies(settings),
        flagged_keep(settings),
    ]
    return [caveat for caveat in caveats if caveat]


def broken_attempts(models: Mapping[str, Entries]) -> str:
    """Name the attempts to bring the images back in which samples were no pictures."""
    parts = []
    for name, figures in models.items():
        for test, (attack, _, _) in ATTACKS.items():
            shares = [as_number(row.get("broken_share")) or 0 for row in as_rows(figures.get(test))]
            if max(shares, default=0) > 0:
                parts.append(f"{attack}, {model_phrase(name)}: up to {percent(max(shares))}")
    if not parts:
        return ""
    return f"Samples were broken and say nothing of copies ({'; '.join(parts)} of the samples)."


def zero_copies(models: Mapping[str, Entries]) -> str:
    """Say how high the true share may be where no copy was found."""
    bounds = [
        f"{upper_percent(interval[1])} ({model_phrase(name)})"
        for name, figures in models.items()
        if as_number(figures.get("copy_share")) == 0 and (interval := interval_of(figures)) is not None
    ]
    if not bounds:
        return ""
    return (
        "No copy was found among the samples, but the model may still make copies. The 95 % interval reaches up to"
        f" {', '.join(bounds)}."
    )


def unknown_rest(models: Mapping[str, Entries]) -> str:
    """Name the models of which no figure says whether they still do what they should."""
    keys = [key for key, metric in METRICS.items() if metric.chapter == "rest"]
    unknown = [
        model_phrase(name)
        for name, figures in models.items()
        if name != "base" and all(as_number(figures.get(key)) is None for key in keys)
    ]
    return f"No figure here says what else changed in {', '.join(unknown)}." if unknown else ""


def missed_copies(settings: Entries) -> str:
    """Name the damages of which no detector, nor all of them together, catches every copy."""
    tables = [as_mapping(row) for row in as_mapping(settings.get("damage_table")).values()]
    missed = [
        DAMAGES.get(damage, damage)
        for damage in unique(damage for row in tables for damage in row)
        if any(row.get(damage) is not None for row in tables)
        and not any(row.get(damage) in (True, 1) for row in tables)
    ]
    if not missed:
        return ""
    return (
        f"No detector catches every copy with one of these damages: {', '.join(missed)}. The samples may contain such"
        " copies that were not counted."
    )


def flagged_keep(settings: Entries) -> str:
    """Say that detectors flag images that are no copies, where they do."""
    shares = [as_number(share) or 0 for share in as_mapping(settings.get("keep_flagged")).values()]
    highest = max(shares, default=0)
    if highest <= 0:
        return ""
    return (
        f"The detectors also flag images to keep (up to {percent(highest)} of them). Some samples that are counted as"
        " copies may be none."
    )


def label_of(key: str) -> str:
    """Return the name of a figure, a test, or anything else that has a reason in `skipped`."""
    return METRICS[key].label if key in METRICS else TESTS.get(key, key)


def recorded_reason(key: str, skipped: Entries) -> str | None:
    """Return the recorded reason why a figure is missing; None where none is recorded at all."""
    return str(skipped[key] or NO_REASON).rstrip(".") if key in skipped else None


def list_missing(models: Mapping[str, Entries], settings: Entries) -> list[Missing]:
    """Return every figure that was not measured, with its reason. Figures with the same reason are joined."""
    skipped = as_mapping(settings.get("skipped"))
    groups: dict[str, list[str]] = {}
    for key in unique([*METRICS, *TESTS]):
        reasons = {name: missing_reason(key, name, models, skipped) for name in models}
        for reason in unique(reason for reason in reasons.values() if reason is not None):
            names = [name for name in models if reasons[name] == reason]
            of_models = "" if len(names) == len(models) else f" ({', '.join(names)})"
            groups.setdefault(reason, []).append(label_of(key) + of_models)
    for key in skipped:
        reason = recorded_reason(key, skipped)
        labels = groups.setdefault(reason, [])
        if not any(label == label_of(key) or label.startswith(f"{label_of(key)} (") for label in labels):
            labels.append(label_of(key))
    if not as_mapping(settings.get("damage_table")) and not as_mapping(settings.get("keep_flagged")):
        groups.setdefault(NO_ENTRY, []).append("Checks of the detectors")
    # What has no entry at all comes last.
    if NO_ENTRY in groups:
        groups[NO_ENTRY] = groups.pop(NO_ENTRY)
    return [Missing(", ".join(labels), reason) for reason, labels in groups.items()]


def missing_reason(key: str, name: str, models: Mapping[str, Entries], skipped: Entries) -> str | None:
    """Return why a model has no figure under `key`; None if it has one, or if only other models can have one."""
    figures = models[name]
    value = figures.get(key)
    if as_number(value) is not None or (isinstance(value, Mapping | list) and value):
        return None
    if value is not None and not isinstance(value, Mapping | list):
        return NOT_FINITE
    if key in METRICS and METRICS[key].chapter == "instead" and figures.get("others") == 0:
        return NONE_LEFT
    if key in skipped:
        return recorded_reason(key, skipped)
    if key in figures:
        return NO_REASON
    # Some figures cannot exist for the base, such as the drift from itself. A dash in the table is enough there.
    return NO_ENTRY if not any(key in other for other in models.values()) else None


def zero_examples(models: Mapping[str, Entries]) -> list[str]:
    """Say what share of copies a model may have of which no sample is a copy."""
    examples = []
    for figures in models.values():
        samples, interval = as_number(figures.get("samples")), interval_of(figures)
        if as_number(figures.get("copy_share")) == 0 and samples is not None and interval is not None:
            examples.append(f"0 of {samples:.0f} samples allow a share of up to {upper_percent(interval[1])}")
    return unique(examples)
