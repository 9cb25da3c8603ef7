"""What a metric is: how it is measured, what it is called, and how it reads."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from siss_diffusers.metrics.formats import four_digits


class Skip(Exception):
    """Raised by a metric that cannot be measured here; the message is the reason, for people."""


@dataclass(frozen=True)
class Metric:
    """One figure of `evaluation.json`. Report, model card, terminal summary and docs read this entry.

    Args:
        key: its key in `evaluation.json`; part of the interface.
        label: its name in tables.
        explanation: what it says and how to read it, in two or three sentences.
        measure: from the measured model (see `siss_diffusers.evaluation`) to the entries of `evaluation.json`, with
            `key` among them. Raises `Skip` with the reason where it cannot be measured.
        format: the figure as text.
        better: which way is better; None where neither is.
        chapter: where the report shows it: `copies`; `instead`, what comes in place of copies; `rest`, what the model
            still does as it should; `memory`, what it still knows of the images.
        spread: key of its standard deviation, where there is one.
    """

    key: str
    label: str
    explanation: str
    measure: Callable[[Any], dict[str, Any]]
    format: Callable[[float], str] = four_digits
    better: Literal["lower", "higher", "near 1"] | None = None
    chapter: Literal["copies", "instead", "rest", "memory"] = "rest"
    spread: str | None = None
