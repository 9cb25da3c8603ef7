"""What a metric is: how it is measured, what it is called, and how it reads."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from siss_diffusers.metrics.formats import four_digits


if TYPE_CHECKING:
    from torch import Tensor

    from siss_diffusers.evaluation.model import MeasuredModel

NO_PROMPTS = "the model is unconditional: there is no text"
NONE_LEFT = "every sample is a copy or not finite, so no other sample is left to measure"
NO_PICTURE = "not finite, of one colour, or black"  # what `broken` finds
ALL_BROKEN = f"every sample is broken: {NO_PICTURE}"
BLIND = (
    "the detectors do not flag the forgotten images themselves, because an image to keep looks the same; remove it and"
    " evaluate again"
)


class Skip(Exception):
    """Raised by a metric that cannot be measured here; the message is the reason, for people."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A part of the figures of a model in `evaluation.json`.

    Args:
        key: its key in `evaluation.json`; part of the interface.
        label: its name in tables.
        explanation: what it says and how to read it, in two or three sentences.
        measure: from the measured model to entries of `evaluation.json`, with `key` among them. Returns an empty
            dictionary if the figure has no meaning for this model, such as the drift of the base from itself. Raises
            `Skip` with the reason if the figure cannot be measured.
        changes_model: whether `measure` leaves the model changed. Such entries are measured last.
    """

    key: str
    label: str
    explanation: str
    measure: "Callable[[MeasuredModel], dict[str, Any]]"
    changes_model: bool = False


@dataclass(frozen=True, kw_only=True)
class Metric(Entry):
    """A number. Report, model card, terminal summary and docs read this entry.

    Args:
        format: turns the number into text.
        better: which way is better; None if neither is.
        chapter: where the report shows it: `copies`; `instead`, what comes in place of copies; `rest`, what the model
            still does as it should; `memory`, what it still knows of the images.
        spread: key of its standard deviation, if there is one.
    """

    format: Callable[[float], str] = four_digits
    better: Literal["lower", "higher", "near 1"] | None = None
    chapter: Literal["copies", "instead", "rest", "memory"] = "rest"
    spread: str | None = None


@dataclass(frozen=True, kw_only=True)
class Probe(Entry):
    """An attempt to bring the images back. Its result is a table or a curve, with a section of its own in the report."""


def not_empty(samples: "Tensor") -> "Tensor":
    """Return samples that are no copies, and finite.

    Raises:
        Skip: if there are none.
    """
    if len(samples) == 0:
        raise Skip(NONE_LEFT)
    return samples
