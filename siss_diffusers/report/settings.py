"""The settings of an evaluation: numbers, counts and versions. Anything else may be a prompt or a path."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from siss_diffusers.metrics import METRICS
from siss_diffusers.metrics.formats import short_number
from siss_diffusers.report.sentences import TESTS
from siss_diffusers.report.tables import undescribed_figures
from siss_diffusers.report.values import Entries, as_number, is_identifier, unique


SETTINGS = {
    "forget_images": "Images to forget",
    "prompts": "Prompts",
    "num_inference_steps": "Sampling steps",
    "guidance_scale": "Guidance scale",
    "seed": "Seed",
    "embedding_attack": "Embedding attack",
    "relearning_rate": "Learning rate of relearning",
    "data": "Data",
    "seconds": "Time taken",
    "versions": "Versions",
}
SETTINGS_SHOWN_ELSEWHERE = ("skipped", "detectors", "damage_table", "keep_flagged")
PROMPT_KINDS = ("memorized", "ordinary", "paraphrases", "forget", "keep")


def settings_rows(settings: Entries) -> list[tuple[str, str]]:
    """Return the settings that may be shown, with their labels."""
    rows = [(label, setting_text(key, settings.get(key))) for key, label in SETTINGS.items()]
    return [(label, text) for label, text in rows if text is not None]


def hidden_entries(models: Mapping[str, Entries], settings: Entries) -> list[str]:
    """Name what is recorded and not shown. Count the entries whose names could be prompts or paths themselves."""
    hidden = [
        key
        for key, value in settings.items()
        if key not in SETTINGS_SHOWN_ELSEWHERE
        and (key not in SETTINGS or (value is not None and setting_text(key, value) is None))
    ]
    parts = ["copy_share_by_detector", *TESTS, *undescribed_figures(models)]
    for key, metric in METRICS.items():
        parts += [key, f"{key}_low", f"{key}_high", *([metric.spread] if metric.spread else [])]
    hidden = unique([*hidden, *(key for figures in models.values() for key in figures if key not in parts)])
    named = [key for key in hidden if is_identifier(key)]
    return named + ([f"{len(hidden) - len(named)} more"] if len(named) < len(hidden) else [])


def setting_text(key: str, value: Any) -> str | None:
    """Write a setting, or return None if it is missing or may not be shown."""
    if key == "prompts":
        if isinstance(value, Mapping) and set(value) <= set(PROMPT_KINDS):
            counts = [f"{kind} {short_number(n)}" for kind, n in value.items() if as_number(n) is not None]
            return ", ".join(counts) or None
        if isinstance(value, Sequence | Mapping) and not isinstance(value, str):
            return str(len(value))
    if isinstance(value, Mapping):
        known = [(name, entry) for name, entry in value.items() if is_identifier(name)]
        if key == "versions":
            # A version, not the folder from which a package was installed.
            shown = [
                f"{name} {entry}"
                for name, entry in known
                if isinstance(entry, str) and re.fullmatch(r"[\w.+!-]{1,40}", entry)
            ]
        else:
            shown = [f"{name} {short_number(entry)}" for name, entry in known if as_number(entry) is not None]
        return ", ".join(shown) or None
    if as_number(value) is None:
        return None
    if key == "seconds":
        minutes, seconds = divmod(round(value), 60)
        return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
    # A seed is an identifier, not an amount: it has no thousands separators.
    return str(value) if key == "seed" else short_number(value)
