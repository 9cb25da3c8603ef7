"""What a method is: for a batch of pairs, rows of a weighted regression, and a rule that combines two gradients."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch
from torch import Tensor

from siss_diffusers.combine import Rule
from siss_diffusers.noising import GaussianPath
from siss_diffusers.weights import NEGLIGIBLE_WEIGHT


@dataclass
class Query:
    """B pairs of a keep and a forget image, with everything that was drawn for them.

    Args:
        keep, forget, noise: x, a and eps, `(B, C, H, W)`, any floating dtype; held in float32.
        timesteps: `(B,)` int64, indices into `path`; x and a share timestep and noise.
        from_forget: `(B,)` bool, the component of the mixture: whether m is made from a.
        path: the noise levels.
        keep_condition, forget_condition: `(B,)` int64, what the network is told of x and of a beside the timestep, as
            indices into a table of the caller's (prompts, say); equal where x and a share it. None for neither.
        uniform: `(B, C, H, W)`, U[0, 1) noise; only for a method that needs it.
        neighbors: `(B, K, C, H, W)`, the keep images nearest to a; only for a method that needs them.
        posterior_mean: `(B, C, H, W)`, the mean y' of keep images given a_t, as of `posterior_mean`; read of pairs with
            `from_forget` alone, and only by a method that needs it.
        thresholds: `(B,)`, tau_t, the loss per pixel that an unseen image would have; infinite where there is none. Only
            for a method that needs it, with `keep_thresholds`, that of images to keep alone.
    """

    keep: Tensor
    forget: Tensor
    noise: Tensor
    timesteps: Tensor
    from_forget: Tensor
    path: GaussianPath
    keep_condition: Tensor | None = None
    forget_condition: Tensor | None = None
    uniform: Tensor | None = None
    neighbors: Tensor | None = None
    posterior_mean: Tensor | None = None
    thresholds: Tensor | None = None
    keep_thresholds: Tensor | None = None

    def __post_init__(self) -> None:
        # Half precision would round x - a before it is multiplied by r = alpha / sigma, which reaches 100.
        self.keep, self.forget, self.noise = self.keep.float(), self.forget.float(), self.noise.float()
        if self.neighbors is not None:
            self.neighbors = self.neighbors.float()
        if self.posterior_mean is not None:
            self.posterior_mean = self.posterior_mean.float()

    def __getitem__(self, index: Tensor) -> "Query":
        """Select pairs by `index`, `(B,)` bool or numbers."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: value[index] for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **tensors)

    def noisy(self, sample: Tensor) -> Tensor:
        return self.path.add_noise(sample, self.noise, self.timesteps)

    def target(self, sample: Tensor, noise: Tensor) -> Tensor:
        return self.path.target(sample, noise, self.timesteps)


@dataclass
class Rows:
    """R rows of the regression: the loss is `sum_r w_r |network(m_r) - y_r|^2` on each side, averaged over pairs.

    Args:
        noisy: m, `(R, C, H, W)`.
        timesteps: `(R,)` int64, indices into the path.
        pair: `(R,)` int64, the pair of the query that a row belongs to.
        from_forget: `(R,)` bool, whether m was made from the forget image.
        condition: `(R,)` int64, that of the image which m was made from; None where there is none.
        keep_target, forget_target: `(R, C, H, W)`, in the model's own parametrisation; None where the side is unused.
        keep_weight, forget_weight: `(R,)` float32; zero where the row does not serve that side.
        num_pairs: B of the query, what losses are averaged over; kept when rows are selected.
    """

    noisy: Tensor
    timesteps: Tensor
    pair: Tensor
    from_forget: Tensor
    condition: Tensor | None
    keep_target: Tensor | None
    keep_weight: Tensor
    forget_target: Tensor | None
    forget_weight: Tensor
    num_pairs: int

    def __post_init__(self) -> None:
        self.keep_weight = drop_negligible(self.keep_weight)
        self.forget_weight = drop_negligible(self.forget_weight)

    def __len__(self) -> int:
        return len(self.noisy)

    def __getitem__(self, index: Tensor) -> "Rows":
        return self._map(lambda value: value[index])

    def to(self, device: torch.device | str) -> "Rows":
        """Move the rows to a device; the numbers of their conditions stay where the table of conditions may be."""
        return replace(self._map(lambda value: value.to(device, non_blocking=True)), condition=self.condition)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Rows":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: function(value) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **tensors)

    def reweighted(self, weight: Tensor) -> "Rows":
        """Multiply both sides by a weight per row `(R,)`, such as the signal-to-noise ratio at its timestep."""
        return replace(self, keep_weight=self.keep_weight * weight, forget_weight=self.forget_weight * weight)


def drop_negligible(weight: Tensor) -> Tensor:
    return torch.where(weight < NEGLIGIBLE_WEIGHT, 0.0, weight.float())


def stack_rows(keep: Rows, forget: Rows) -> Rows:
    """Stack the rows of a method that noises both images: first those made from x, then those made from a."""
    return _concatenate(keep, forget, keep.num_pairs)


def _concatenate(one: Rows, other: Rows, num_pairs: int) -> Rows:
    values = {"num_pairs": num_pairs}
    for field in fields(Rows):
        first, second = getattr(one, field.name), getattr(other, field.name)
        if field.name.endswith("_target") and (first is None) != (second is None):
            # The missing half has weight zero; only its shape matters.
            first, second = [
                torch.zeros_like(rows.noisy) if half is None else half
                for rows, half in ((one, first), (other, second))
            ]
        if isinstance(first, Tensor):
            values[field.name] = torch.cat([first, second])
        elif first is None:
            values[field.name] = None
    return Rows(**values)


class Method(ABC):
    """A method of data unlearning. Its hyperparameters are the fields of the dataclass that subclasses it.

    Class attributes:
        name: as in `--method`.
        summary: one line for `--help`.
        paper: title and address of the paper that the method comes from; the model card cites it.
        takes_scaling: whether the forget gradient is subtracted by a scaling rule of the user's choice.
        subtracts_forget: whether the forget loss is ascended, and so can be calibrated.
        needs: what a query must hold beside the pair: any of `uniform`, `posterior_mean`, `thresholds`, and
            `neighbors` (then the method has a hyperparameter `num_neighbors`).
        threshold_source: whose losses set the thresholds by default: `keep`, `strangers`, or `both`, the higher.
        learns_keep: whether it learns from keep images.
        has_both_sides: whether it learns from keep images and from forget images.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[tuple[str, str]]
    takes_scaling: ClassVar[bool] = False
    subtracts_forget: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset()
    threshold_source: ClassVar[str] = "keep"
    learns_keep: ClassVar[bool] = True
    has_both_sides: ClassVar[bool] = True

    @property
    def mixture(self) -> float:
        """Return the share of pairs whose `from_forget` is drawn to be True; 0 where a method does not read it."""
        return 0.0

    @abstractmethod
    def rows(self, query: Query) -> Rows:
        """Return the rows of the regression for a batch of pairs; nothing here depends on the network."""

    def rows_within(self, query: Query, forget_timestep_range: tuple[int, int]) -> Rows:
        """Return `rows` of the pairs whose timestep lies in the range, LO <= t < HI; the other pairs are those of
        ordinary fine-tuning, one row each, made from the keep image with weight 1. So keep is learned at every timestep
        of the query, and forget where its range says; nothing is drawn from a mixture that has one component.

        Both losses stay averages over all pairs of the query.
        """
        low, high = forget_timestep_range
        within = (query.timesteps >= low) & (query.timesteps < high)
        if within.all():
            return self.rows(query)
        parts = []
        for mask, make_rows in ((within, self.rows), (~within, self._keep_rows)):
            rows = make_rows(query[mask])
            parts.append(replace(rows, pair=mask.nonzero().flatten()[rows.pair]))
        return _concatenate(*parts, num_pairs=len(query.keep))

    @abstractmethod
    def rule(self, scaling: Rule) -> Rule:
        """Return how the two gradients are combined: `scaling`, the user's choice, or a rule of the method's own."""

    @classmethod
    def hyperparameters(cls) -> dict[str, object]:
        """Return the names of the `--method_args`, with their defaults."""
        return {field.name: field.default for field in fields(cls)}

    @staticmethod
    def _rows(
        query: Query,
        sample: Tensor,
        from_forget: Tensor,
        keep: tuple[Tensor, Tensor] | None = None,
        forget: tuple[Tensor, Tensor] | None = None,
    ) -> Rows:
        """Return rows of noised `sample` `(B, C, H, W)`; `keep` and `forget` are (target, weight) of a side."""
        unused = (None, torch.zeros(len(sample)))
        keep_target, keep_weight = keep or unused
        forget_target, forget_weight = forget or unused
        condition = None
        if query.keep_condition is not None:
            condition = torch.where(from_forget, query.forget_condition, query.keep_condition)
        return Rows(
            noisy=query.noisy(sample),
            timesteps=query.timesteps,
            pair=torch.arange(len(sample)),
            from_forget=from_forget,
            condition=condition,
            keep_target=keep_target,
            keep_weight=keep_weight,
            forget_target=forget_target,
            forget_weight=forget_weight,
            num_pairs=len(sample),
        )

    @classmethod
    def _keep_rows(cls, query: Query) -> Rows:
        """Return rows of x_t against its own noise, weight 1: the loss of naive deletion."""
        target = query.target(query.keep, query.noise)
        return cls._rows(
            query, query.keep, torch.zeros(len(target), dtype=torch.bool), keep=(target, torch.ones(len(target)))
        )

    @classmethod
    def _forget_rows(cls, query: Query) -> Rows:
        """Return rows of a_t against its own noise, weight 1: the loss that NegGrad ascends."""
        target = query.target(query.forget, query.noise)
        return cls._rows(
            query, query.forget, torch.ones(len(target), dtype=torch.bool), forget=(target, torch.ones(len(target)))
        )


def check_unit_interval(name: str, value: float, open_interval: bool = False) -> None:
    """Raise ValueError unless `value` lies in [0, 1], or in (0, 1) where the interval is open."""
    if not (0 < value < 1 if open_interval else 0 <= value <= 1):
        interval = "strictly between 0 and 1" if open_interval else "in [0, 1]"
        raise ValueError(f"{name} must lie {interval}, not {value}")
