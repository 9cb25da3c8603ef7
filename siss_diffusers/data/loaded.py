"""What was loaded of a data set, and what else there is in it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import datasets


@dataclass(frozen=True)
class OtherSplit:
    """A split of which nothing is used. It is read only where something in it may say what to forget.

    Args:
        load: reads it.
        inside: what it holds, as a text.
    """

    load: Callable[[], datasets.Dataset]
    inside: str


@dataclass(frozen=True)
class LoadedRows:
    """The rows of a data set that are used, and what else there is.

    Args:
        rows: the split `train`, or all of a folder.
        unread: how much of what kind was given and is in no split, as a text; empty for nothing.
        other_splits: of a data set that has several.
    """

    rows: datasets.Dataset
    unread: str = ""
    other_splits: Mapping[str, OtherSplit] = field(default_factory=dict)

    @property
    def passed_over(self) -> str:
        """Return all that is not used, as a text; empty for nothing."""
        splits = [f"the split {name} ({split.inside})" for name, split in self.other_splits.items()]
        return ", ".join([*splits, *([self.unread] if self.unread else [])])
