"""Conditions by number: those of prompts, those that were searched, and Gaussian ones."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from siss_diffusers.data.forget_conditions import ForgetConditions
from siss_diffusers.draws import GAUSSIAN_CONDITION
from siss_diffusers.embedding_search import gaussian_like
from siss_diffusers.families import Conditions
from siss_diffusers.settings import Settings
from siss_diffusers.training.training_set import TrainingSet


if TYPE_CHECKING:
    from siss_diffusers.training.samples import Samples

NUM_OTHER_PROMPTS = 8  # that searches of adversarial conditions begin with


class ToldConditions:
    """Looks up conditions by the numbers of `ForgetConditions`: prompts, searched and Gaussian ones.

    Args:
        prompts: the table of prompts.
        numbering: what a number means.
        seed: of the Gaussian ones.

    Attributes:
        searched: the searched conditions, a row for each.
    """

    def __init__(self, prompts: Conditions, numbering: ForgetConditions, seed: int) -> None:
        self.prompts, self.numbering, self.seed = prompts, numbering, seed
        self.searched = prompts[torch.zeros(numbering.num_searched, dtype=torch.long)]  # a copy, to be written to

    def gaussian(self, purpose: int, *key: int) -> dict[str, Tensor]:
        """Return a Gaussian condition, as large as the prompt of the first forget image: tensors of one row."""
        row = self.numbering.prompts[0]
        return gaussian_like(self.prompts[[row]].tensors, self.seed, purpose, *key)

    def __getitem__(self, numbers: Tensor | list[int]) -> Conditions:
        """Select conditions by their numbers."""
        numbers, numbering = torch.as_tensor(numbers).cpu(), self.numbering
        is_prompt = numbers < numbering.num_prompts
        table = self.prompts[torch.where(is_prompt, numbers, 0)]
        for place in (~is_prompt).nonzero().flatten().tolist():
            number = int(numbers[place]) - numbering.num_prompts
            if number < numbering.num_searched:
                tensors = self.searched[[number]].tensors
            else:
                tensors = self.gaussian(GAUSSIAN_CONDITION, number - numbering.num_searched)
            for name, tensor in table.tensors.items():
                tensor[place] = tensors[name][0]
        return table


def other_prompts(training_set: TrainingSet) -> list[str]:
    """Return the first different prompts of images to keep, in the order in which these are drawn: the same on every
    process."""
    rows = training_set.split.order.first(NUM_OTHER_PROMPTS * 8)
    return list(dict.fromkeys(training_set.captions_of(rows)))[:NUM_OTHER_PROMPTS]


def tell_conditions(settings: Settings, training_set: TrainingSet, samples: "Samples") -> ToldConditions:
    """Number the conditions that forget images are told, beside those of the prompts that `samples` has."""
    digests = training_set.split.forget_digests
    places = {digest: place for place, digest in enumerate(dict.fromkeys(digests))}
    pictures = [places[digest] for digest in digests]
    numbering = ForgetConditions(
        shares=settings.forget_conditions,
        num_prompts=len(samples.conditions),
        empty=samples.empty_row,
        pictures=pictures,
        prompts=[samples.forget_conditions[pictures.index(place)] for place in range(len(places))],
        restarts=settings.adversarial_restarts if settings.searches_conditions else 0,
    )
    return ToldConditions(samples.conditions, numbering, settings.seed)
