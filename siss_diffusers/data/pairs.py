"""Pairs of a keep and a forget image with everything that is drawn for them, window after window."""

import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from siss_diffusers.data.forget_conditions import ForgetConditions
from siss_diffusers.data.keep_order import KeepOrder
from siss_diffusers.data.latents import LoadsImages
from siss_diffusers.draws import PAIR, draw_timestep, keyed_generator, mixture_components, shuffled_index
from siss_diffusers.methods import Method


class PairDataset(Dataset):
    """Item `p` is pair `p % num_pairs` of window `p // num_pairs`: one keep and one forget image, and all draws.

    Args:
        keep, forget: what to keep and what to forget.
        keep_order: which of `keep` is at each position.
        method: decides what else a query needs.
        num_pairs: pairs in the window of one optimizer step, over all processes and micro-batches.
        timestep_range: `(lo, hi)`; timesteps are drawn in lo <= t < hi.
        seed: of every draw.
        neighbors: from `nearest_neighbors`, for a method that needs them.
        keep_conditions, forget_conditions: the condition of each image that is drawn, where there are conditions.
        timestep_density: `(T,)`, how often each timestep is drawn; None for uniform draws.
        told: draws other conditions of forget images; None: always their own.
    """

    def __init__(
        self,
        keep: LoadsImages,
        forget: LoadsImages,
        keep_order: KeepOrder,
        method: Method,
        num_pairs: int,
        timestep_range: tuple[int, int],
        seed: int,
        neighbors: list[list[int]] | None = None,
        keep_conditions: Mapping[int, int] | None = None,
        forget_conditions: Sequence[int] | None = None,
        timestep_density: np.ndarray | None = None,
        told: ForgetConditions | None = None,
    ) -> None:
        self.keep = keep
        self.forget = forget
        self.keep_order = keep_order
        self.method = method
        self.num_pairs = num_pairs
        self.timestep_range = timestep_range
        self.seed = seed
        self.neighbors = neighbors
        self.keep_conditions = keep_conditions
        self.forget_conditions = forget_conditions
        self.timestep_density = timestep_density
        self.told = told

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        window, pair = divmod(position, self.num_pairs)
        generator = keyed_generator(self.seed, PAIR, window, pair)
        keep_index = self.keep_order[position]
        forget_index = shuffled_index(self.seed, 1, position, len(self.forget))
        components = mixture_components(self.seed, window, self.num_pairs, self.method.mixture)

        timestep = draw_timestep(generator, self.timestep_range, self.timestep_density)
        keep = self.keep.load(keep_index, generator)
        forget = self.forget.load(forget_index, generator)
        item = {
            "keep": keep,
            "forget": forget,
            "noise": torch.from_numpy(generator.standard_normal(keep.shape, dtype=np.float32)),
            "timesteps": torch.tensor(timestep),
            "from_forget": torch.tensor(bool(components[pair])),
        }
        if "uniform" in self.method.needs:
            item["uniform"] = torch.from_numpy(generator.random(keep.shape, dtype=np.float32))
        if "neighbors" in self.method.needs:
            item["neighbors"] = torch.stack([self.keep.load(index) for index in self.neighbors[forget_index]])
        if self.keep_conditions is not None:
            conditions = self.keep_conditions[keep_index], self.forget_conditions[forget_index]
            if self.told is not None:
                drawn_for = self.seed, position, self.num_pairs, self.method.mixture
                conditions = self.told.draw(*drawn_for, forget_index, *conditions)
            item["keep_condition"], item["forget_condition"] = map(torch.tensor, conditions)
        return item


@dataclass(frozen=True)
class WindowSampler:
    """This process's micro-batches, window after window without end, as positions into a `PairDataset`.

    Micro-batch m of process r holds pairs `(m num_processes + r) batch_size ...` of the window, so that the union over
    processes and micro-batches does not depend on how it is split.
    """

    batch_size: int
    accumulation_steps: int
    process_index: int
    num_processes: int
    first_window: int

    @property
    def num_pairs(self) -> int:
        return self.batch_size * self.accumulation_steps * self.num_processes

    def __iter__(self) -> Iterator[list[int]]:
        for window in count(self.first_window):
            for micro_step in range(self.accumulation_steps):
                start = window * self.num_pairs
                start += (micro_step * self.num_processes + self.process_index) * self.batch_size
                yield list(range(start, start + self.batch_size))


def first_positions(sampler: WindowSampler, num_windows: int) -> list[int]:
    """Return what this process draws in the first `num_windows` windows."""
    batches = islice(replace(sampler, first_window=0), num_windows * sampler.accumulation_steps)
    return [position for batch in batches for position in batch]


def window_loader(pairs: PairDataset, sampler: WindowSampler, num_workers: int = 0) -> DataLoader:
    """Batches of `pairs` in the order of `sampler`, as dictionaries of the tensors of a `Query`."""
    return DataLoader(
        pairs, batch_sampler=sampler, num_workers=num_workers, worker_init_fn=ignore_signals if num_workers else None
    )


def ignore_signals(_: int) -> None:
    """Ignore what a terminal or a scheduler sends to every process: the main process stops its workers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
