"""Prompts as numbered conditions."""

import logging
from collections.abc import Iterable, Sequence

from accelerate import PartialState

from siss_diffusers.families.base import Conditions, Family


logger = logging.getLogger(__name__)

PROMPTS_AT_ONCE = 8


class Prompts:
    """Numbers prompts by their token ids, so that two spellings of the same tokens are the same condition.

    Args:
        family, pipeline: what tokenizes and embeds them.

    Attributes:
        truncated: how many of the prompts that were numbered are longer than what the text encoders see.
    """

    def __init__(self, family: Family, pipeline) -> None:
        self.family = family
        self.pipeline = pipeline
        self.numbers: dict[tuple, int] = {}
        self.texts: list[str] = []  # by number
        self.truncated = 0

    def number(self, prompts: Sequence[str]) -> list[int]:
        """Return the number of each prompt; new ones get the next."""
        distinct = list(dict.fromkeys(prompts))
        if not distinct:
            return []
        by_prompt, too_long = {}, set()
        for prompt, ids, is_long in zip(distinct, *self.family.token_ids(self.pipeline, distinct)):
            by_prompt[prompt] = self.numbers.setdefault(ids, len(self.numbers))
            if by_prompt[prompt] == len(self.texts):
                self.texts.append(prompt)
            if is_long:
                too_long.add(prompt)
        self.truncated += sum(prompt in too_long for prompt in prompts)
        return [by_prompt[prompt] for prompt in prompts]

    def warn_of_truncated(self) -> None:
        """Warn of prompts that are cut off. They are counted and not shown: a prompt may be what has to be forgotten."""
        if self.truncated and PartialState().is_main_process:
            prompts = "1 prompt is" if self.truncated == 1 else f"{self.truncated} prompts are"
            limit = self.family.max_prompt_tokens(self.pipeline)
            logger.warning(f"{prompts} longer than the {limit} tokens that the model reads; the rest is ignored")

    def embed(self, numbers: Iterable[int]) -> tuple[Conditions, dict[int, int]]:
        """Return the table of the conditions of these numbers, on the host, and the row of each number in it."""
        used = sorted(set(numbers))
        parts = []
        for start in range(0, len(used), PROMPTS_AT_ONCE):
            texts = [self.texts[number] for number in used[start : start + PROMPTS_AT_ONCE]]
            # Always so many, or the last bits of a prompt could depend on which others are used.
            filled = texts + texts[-1:] * (PROMPTS_AT_ONCE - len(texts))
            parts.append(self.family.embed(self.pipeline, filled).to("cpu")[: len(texts)])
        return Conditions.cat(parts), {number: row for row, number in enumerate(used)}


def warn_of_long_prompts(family: Family, pipeline, prompts: Sequence[str]) -> None:
    """Warn of prompts that are cut off."""
    numbered = Prompts(family, pipeline)
    numbered.number(prompts)
    numbered.warn_of_truncated()
