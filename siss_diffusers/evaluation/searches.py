"""Searches of the text conditioning of a measured model, many at a time."""

from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from siss_diffusers.distributed import on_all_processes
from siss_diffusers.draws import SEARCH_START
from siss_diffusers.embedding_search import ROWS_PER_SEARCH, gaussian_like, search_embeddings
from siss_diffusers.families import Conditions
from siss_diffusers.metrics.embedding_attack import Target, curve_marks


if TYPE_CHECKING:
    from siss_diffusers.evaluation.model import MeasuredModel


def starting_condition(model: "MeasuredModel", start: str, target: Target, restart: int) -> Conditions:
    """Return the condition, one row, that a search begins with."""
    data = model.data
    if start == "empty":
        return model.embed([""])
    if start == "other":
        return model.embed([data.ordinary_prompts[restart % len(data.ordinary_prompts)]])
    condition = model.embed([data.prompts[target.prompt]])
    if start == "prompt":
        return condition
    drawn = gaussian_like(condition.tensors, model.settings.seed, SEARCH_START, *target.key, restart)
    return Conditions(drawn, 1)


def search_conditions(
    model: "MeasuredModel", targets: Sequence[Target], starts: Sequence[str], label: str
) -> list[dict]:
    """Search conditions for every target, from every start, `attack_restarts` times, shared out over all processes.

    Returns:
        For each start, in their order, the conditions by mark: those of all targets and restarts below each other.
    """
    settings, marks = model.settings, curve_marks(model.settings.attack_steps)
    jobs = list(product(range(len(starts)), targets, range(settings.attack_restarts)))
    size = max(1, settings.batch_size // ROWS_PER_SEARCH)
    path = model.path.to(model.device)

    def predict(noisy: Tensor, timesteps: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        return model.predict(noisy, timesteps, Conditions(tensors, len(noisy)))

    def run(batch: list[tuple[int, Target, int]]) -> list[Conditions]:
        begin = Conditions.cat([starting_condition(model, starts[which], target, n) for which, target, n in batch])
        found = search_embeddings(
            predict,
            path,
            model.encode(torch.stack([target.picture for _, target, _ in batch])),
            begin.to(model.device).tensors,
            [(*target.key, which, restart) for which, target, restart in batch],
            marks=marks,
            seed=settings.seed,
        )
        return [Conditions(tensors, len(batch)).to("cpu") for tensors in found]

    batches = [jobs[first : first + size] for first in range(0, len(jobs), size)]
    results = on_all_processes(run, batches, f"Embedding attack on {label}, {model.name}")
    by_mark = [Conditions.cat(parts) for parts in zip(*results)]
    per_start = len(targets) * settings.attack_restarts
    return [
        {mark: table[slice(which * per_start, (which + 1) * per_start)] for mark, table in zip(marks, by_mark)}
        for which in range(len(starts))
    ]
