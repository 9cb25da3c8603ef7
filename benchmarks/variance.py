"""How noisy a step is for what it costs: `python benchmarks/variance.py [--json FILE] [--plot FILE.png]`.

A window is one optimizer step's B pairs of a keep and a forget image. From it come two gradients of losses summed over
pixels and averaged over pairs: g_k of the keep side and g_f of the forget side. For each variant, over R independent
windows at fixed weights:

- relative variance of a vector v: tr Cov(v) / |E v|^2, for v = g_k, for v = g_f, and for the combined direction
  u = g_k - c g_f, under the rule `relative`, c = rho |g_k| / |g_f| of each window (0 where one-sided), and under the
  rule `fixed`, c the mean of that over the windows of `siss` at lambda 0.5, stratified.
- compute: (rows forward + 2 rows backward) / 3B, so 1 for an ordinary fine-tuning step of B images. A row that serves
  both sides runs backward twice, but for the rule `fixed`, which has one scalar loss. Nothing is timed.
- variance x compute: the product, relative to `siss` at lambda 0.5, stratified. Lower is better. As variance falls as
  1/B, a variant at 2 needs twice the compute for the same noise.

Stratified: the share lambda of a window's pairs is made from forget images (`draws.mixture_components`). Independent:
each pair is, with probability lambda. All variants see the same images, timesteps and noise.

Every variant has the same E g_k and E g_f, estimated from all of them together; E u of the rule `relative` is each
variant's own. |E v|^2 is the mean inner product of the means of different groups of windows, which is unbiased. The
intervals are 95 % ones by the jackknife over ten groups of windows.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from step_cost import describe_machine
from torch import Tensor
from tqdm import tqdm

from siss_diffusers import METHODS, GaussianPath, Method, PairedGradients, Query, Rows, Rule
from siss_diffusers import assets as assets_package
from siss_diffusers.assets.digits import digit_images, garment_image
from siss_diffusers.draws import PAIR, keyed_generator, mixture_components
from siss_diffusers.gradients.buffers import inner_products
from siss_diffusers.gradients.grouping import split_by_side


GROUPS = 10
STUDENT_T = 2.262  # the 97.5 % quantile at GROUPS - 1 degrees of freedom
TIMESTEP_BINS = 4
RHOS = (0.1, 1.0)
ONE_SIDED_PAIRS = (4, 8, 16)
# Coefficients of g_k, g_f and (|g_k| / |g_f|) g_f.
KEEP, FORGET = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)


@dataclass(frozen=True)
class Problem:
    """A network and its pairs.

    Args:
        network: `network(noisy, timesteps).sample`.
        path: the noise levels.
        keep: from a generator and a number to that many keep images, `(n, C, H, W)`.
        forget: the one forget image, `(C, H, W)`.
        timestep_range: timesteps are uniform in lo <= t < hi.
        num_windows, num_pairs: R and B by default.
    """

    network: torch.nn.Module
    path: GaussianPath
    keep: Callable[[np.random.Generator, int], Tensor]
    forget: Tensor
    timestep_range: tuple[int, int]
    num_windows: int
    num_pairs: int


def digits_problem(first_timestep: int) -> Problem:
    """The shipped DDPM, the digits to keep and the garment that it memorized."""
    pipeline = DDPMPipeline.from_pretrained(Path(assets_package.__file__).parent / "tiny_ddpm_digits")
    digits, garment = (
        torch.from_numpy(pictures).float().unsqueeze(-3) / 127.5 - 1
        for pictures in (digit_images()[0], garment_image())
    )
    path = GaussianPath.from_scheduler(pipeline.scheduler)
    return Problem(
        network=pipeline.unet,
        path=path,
        keep=lambda generator, n: digits[generator.integers(len(digits), size=n)],
        forget=garment,
        timestep_range=(first_timestep, len(path)),
        num_windows=500,
        num_pairs=16,
    )


def latents_problem(size: int) -> Problem:
    """A narrow network of random weights, and Gaussian latents of Stable Diffusion's shape."""
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=size,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32, 32),
        down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D",) * 3,
        norm_num_groups=8,
    )
    path = GaussianPath.from_scheduler(DDPMScheduler())
    return Problem(
        network=network,
        path=path,
        keep=lambda generator, n: standard_normal(generator, n, 4, size, size),
        forget=torch.randn(4, size, size),
        timestep_range=(0, len(path)),
        num_windows=60,
        num_pairs=8,
    )


PROBLEMS = {
    "digits": lambda quick: digits_problem(0),
    "digits_high_noise": lambda quick: digits_problem(300),
    "latents": lambda quick: latents_problem(8 if quick else 64),
}


@dataclass(frozen=True)
class Variant:
    method: str
    lam: float | None = None
    stratified: bool = True

    @property
    def name(self) -> str:
        if self.lam is None:
            return self.method
        return f"{self.method} {self.lam:g} {'stratified' if self.stratified else 'independent'}"

    def make_method(self) -> Method:
        return METHODS[self.method](**({} if self.lam is None else {"lam": self.lam}))

    def components(self, seed: int, window: int, uniform: np.ndarray) -> Tensor:
        """Which pairs of a window are made from their forget image."""
        if self.lam is None:
            return torch.zeros(len(uniform), dtype=torch.bool)
        if self.stratified:
            return torch.from_numpy(mixture_components(seed, window, len(uniform), self.lam))
        return torch.from_numpy(uniform < self.lam)


REFERENCE = Variant("siss", 0.5)
# First the one whose gradients are unbiased by construction, against which the others are checked.
VARIANTS = (
    Variant("siss_no_is"),
    *(Variant("siss", lam, stratified) for lam in (0.25, 0.5, 0.75) for stratified in (True, False)),
    *(Variant("subscore_bernoulli", 0.5, stratified) for stratified in (True, False)),
)


def standard_normal(generator: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))


def draw_pairs(problem: Problem, generator: np.random.Generator, num_pairs: int) -> tuple[Query, np.ndarray]:
    """A query whose `from_forget` is still to be set, and the uniform draws for independent components."""
    query = Query(
        keep=problem.keep(generator, num_pairs),
        forget=problem.forget.expand(num_pairs, -1, -1, -1),
        noise=standard_normal(generator, num_pairs, *problem.forget.shape),
        timesteps=torch.from_numpy(generator.integers(*problem.timestep_range, size=num_pairs)),
        from_forget=torch.zeros(num_pairs, dtype=torch.bool),
        path=problem.path,
    )
    return query, generator.random(num_pairs)


def draw_rows(problem: Problem, variant: Variant, seed: int, window: int, num_pairs: int) -> Rows:
    query, uniform = draw_pairs(problem, keyed_generator(seed, PAIR, window), num_pairs)
    return variant.make_method().rows(replace(query, from_forget=variant.components(seed, window, uniform)))


class Engine:
    """Both gradients of a window, flat: those that the training scripts combine."""

    def __init__(self, network: Callable, parameters: Iterable[torch.nn.Parameter]) -> None:
        self.network = network
        self.gradients = PairedGradients(parameters, Rule(lambda products: (1.0, 0.0)))
        self.size = len(self.gradients.buffers.keep)

    def __call__(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Overwritten by the next call."""
        self.gradients.compute([rows], lambda group: self.network(group.noisy, group.timesteps).sample)
        # The engine leaves the keep side in these units, and the forget side as it was accumulated.
        self.gradients.buffers.forget.mul_(rows.noisy.shape[1:].numel() / rows.num_pairs)
        return self.gradients.buffers.keep, self.gradients.buffers.forget


def group_gram(sums: Tensor) -> np.ndarray:
    """Inner products in float64 of `(GROUPS, n, P)` sums: `(GROUPS, n, GROUPS, n)`."""
    flat = sums.flatten(0, 1)
    gram = torch.zeros(len(flat), len(flat), dtype=torch.float64)
    for chunk in flat.split(2**16, dim=1):
        chunk = chunk.double()
        gram += chunk @ chunk.T
    return gram.reshape(sums.shape[:2] * 2).numpy()


def norm_ratio(products: np.ndarray) -> float:
    keep, _, forget = products
    return math.sqrt(keep / forget) if forget > 0 else 0.0


class Moments:
    """What is left of the gradients of R windows: three inner products a window, three vectors a group of windows.

    With s = |g_k| / |g_f| (0 where either is), every direction here is `d_0 g_k + (d_1 + d_2 s) g_f` for a constant d,
    so sums of g_k, g_f and s g_f determine the mean of each.
    """

    def __init__(self, size: int, num_windows: int) -> None:
        self.products = np.zeros((num_windows, 3))
        self.sums = torch.zeros(GROUPS, 3, size)

    @property
    def windows_per_group(self) -> int:
        return len(self.products) // GROUPS

    @property
    def ratios(self) -> np.ndarray:
        return np.array([norm_ratio(products) for products in self.products])

    def add(self, window: int, keep: Tensor, forget: Tensor) -> None:
        self.products[window] = inner_products(keep, forget).numpy()
        keep_sum, forget_sum, scaled_sum = self.sums[window // self.windows_per_group]
        keep_sum += keep
        forget_sum += forget
        scaled_sum.add_(forget, alpha=norm_ratio(self.products[window]))

    def close(self) -> "Moments":
        """Exchange the sums for their inner products."""
        self.gram = group_gram(self.sums)
        del self.sums
        return self

    def along(self, direction: tuple[float, float, float]) -> "GroupedSquares":
        keep, scaled = direction[0], direction[1] + direction[2] * self.ratios
        squares = (self.products * np.stack([np.full_like(scaled, keep**2), 2 * keep * scaled, scaled**2], 1)).sum(1)
        return GroupedSquares(
            squares.reshape(GROUPS, -1).sum(1),
            np.einsum("i,aibj,j->ab", direction, self.gram, direction),
            self.windows_per_group,
        )


@dataclass(frozen=True)
class GroupedSquares:
    """Of vectors v in groups of `size`: the sum of |v|^2 of each group, and inner products of the groups' sums."""

    squares: np.ndarray
    gram: np.ndarray
    size: int

    def trace_covariance(self, groups: np.ndarray) -> float:
        n = self.size * len(groups)
        return (self.squares[groups].sum() - self.gram[np.ix_(groups, groups)].sum() / n) / (n - 1)

    def squared_mean(self, groups: np.ndarray) -> float:
        return squared_mean(self.gram / self.size**2, groups)


def squared_mean(gram: np.ndarray, groups: np.ndarray) -> float:
    """`|E v|^2`, unbiased, from the inner products of the groups' means: the mean over pairs of different groups."""
    gram = gram[np.ix_(groups, groups)]
    return (gram.sum() - np.trace(gram)) / (len(groups) * (len(groups) - 1))


def jackknife(statistic: Callable[[np.ndarray], float]) -> tuple[float, float]:
    """A statistic of groups of windows, given their indices: its value on all, and its standard error."""
    everything = np.arange(GROUPS)
    left_out = np.array([statistic(np.delete(everything, group)) for group in everything])
    error = math.sqrt((GROUPS - 1) / GROUPS * ((left_out - left_out.mean()) ** 2).sum())
    return statistic(everything), error


def ratio_interval(ratio: Callable[[np.ndarray], float]) -> dict[str, float | None]:
    """A positive ratio with its 95 % interval, which is symmetric in the logarithm. None where it is not positive."""

    def log_ratio(groups: np.ndarray) -> float:
        value = ratio(groups)
        return math.log(value) if value > 0 else math.nan

    value, error = jackknife(log_ratio)
    bounds = {"value": value, "low": value - STUDENT_T * error, "high": value + STUDENT_T * error}
    return {key: None if math.isnan(bound) else math.exp(bound) for key, bound in bounds.items()}


def estimate_interval(statistic: Callable[[np.ndarray], float]) -> dict[str, float]:
    value, error = jackknife(statistic)
    return {"value": value, "low": value - STUDENT_T * error, "high": value + STUDENT_T * error}


def count_work(rows: Rows) -> tuple[float, float, float, bool, float]:
    """Rows forward and backward, those forward under the rule `fixed`, whether the window is one-sided, and the share
    of its rows that serve both sides."""
    groups = [(len(group), keep + forget) for group, keep, forget in split_by_side(rows)]
    keep, forget = rows.keep_weight != 0, rows.forget_weight != 0
    return (
        sum(size for size, _ in groups),
        sum(size * sides for size, sides in groups),
        (keep | forget).sum().item(),
        not (keep.any() and forget.any()),
        (keep & forget).float().mean().item(),
    )


def measure(problem: Problem, seed: int, num_windows: int, num_pairs: int) -> dict:
    """The moments and the work of every variant, the mean of all variants, and how far each is from the first."""
    engine = Engine(problem.network, problem.network.parameters())
    found = {"moments": {}, "work": {}, "gaps": {}}
    pooled = torch.zeros(GROUPS, 2, engine.size)
    for variant in VARIANTS:
        moments, work = Moments(engine.size, num_windows), []
        for window in tqdm(range(num_windows), desc=variant.name, leave=False):
            rows = draw_rows(problem, variant, seed, window, num_pairs)
            moments.add(window, *engine(rows))
            work.append(count_work(rows))
        sides = moments.sums[:, :2] / moments.windows_per_group
        pooled += sides / len(VARIANTS)
        if variant == VARIANTS[0]:
            first = sides
        else:
            found["gaps"][variant] = group_gram(sides - first)
        found["moments"][variant] = moments.close()
        found["work"][variant] = np.array(work, dtype=float)
    found["pooled"] = group_gram(pooled)
    return found


def compute_cost(work: np.ndarray, num_pairs: int, one_loss: bool, groups: np.ndarray) -> float:
    forward, backward, joint, *_ = work.reshape(GROUPS, -1, work.shape[1])[groups].mean((0, 1))
    return joint / num_pairs if one_loss else (forward + 2 * backward) / (3 * num_pairs)


def analyse(found: dict, num_pairs: int) -> dict:
    """Tables of numbers, see the module's docstring."""
    moments, work = found["moments"], found["work"]
    ratios = moments[REFERENCE].ratios
    mean_ratio = ratios[ratios > 0].mean()
    # direction, and whether E v is common to all variants
    directions = {"keep": (KEEP, True), "forget": (FORGET, True)}
    for rho in RHOS:
        directions[f"relative {rho:g}"] = ((1.0, 0.0, -rho), False)
    for rho in RHOS:
        directions[f"fixed {rho * mean_ratio:.2g}"] = ((1.0, -rho * mean_ratio, 0.0), True)

    def noise(variant: Variant, name: str, groups: np.ndarray) -> tuple[float, float]:
        """tr Cov(v) and |E v|^2."""
        direction, common = directions[name]
        vectors = moments[variant].along(direction)
        if common:
            pooled = np.einsum("i,aibj,j->ab", direction[:2], found["pooled"], direction[:2])
            return vectors.trace_covariance(groups), squared_mean(pooled, groups)
        return vectors.trace_covariance(groups), vectors.squared_mean(groups)

    def noise_times_cost(variant: Variant, name: str, groups: np.ndarray) -> float:
        """Up to a factor that all variants share, and that need not be known to compare them: a common |E v|^2."""
        variance, mean = noise(variant, name, groups)
        cost = compute_cost(work[variant], num_pairs, name.startswith("fixed"), groups)
        return variance * cost / (1 if directions[name][1] else mean)

    everything = np.arange(GROUPS)
    results = []
    for variant in VARIANTS:
        forward, backward, joint, one_sided, both = work[variant].mean(0)
        row = {
            "variant": variant.name,
            "forward_rows": forward,
            "backward_rows": backward,
            "compute": compute_cost(work[variant], num_pairs, False, everything),
            "compute_fixed": joint / num_pairs,
            "one_sided_share": one_sided,
            "both_sides_share": both,
            "relative_variance": {},
            "variance_x_compute": {},
        }
        for name in directions:
            variance, mean = noise(variant, name, everything)
            row["relative_variance"][name] = variance / mean
            row["variance_x_compute"][name] = ratio_interval(
                lambda groups, name=name, variant=variant: (
                    noise_times_cost(variant, name, groups) / noise_times_cost(REFERENCE, name, groups)
                )
            )
        results.append(row)

    squared_means, checks = {}, []
    for side, name in enumerate(("keep", "forget")):
        pooled = found["pooled"][:, side, :, side]
        squared_means[name] = estimate_interval(lambda groups, pooled=pooled: squared_mean(pooled, groups))
        for variant, gram in found["gaps"].items():
            gap = gram[:, side, :, side]
            # With d_j the gap of group j and d their mean: |d|^2 over what it is if E d = 0, tr Cov(d_j) / GROUPS.
            squared_gap = gap.sum() / GROUPS**2
            expected = (np.trace(gap) / GROUPS - squared_gap) / (GROUPS - 1)
            checks.append(
                {
                    "variant": variant.name,
                    "side": name,
                    "gap_in_standard_errors": math.sqrt(squared_gap / expected),
                    "squared_bias": estimate_interval(
                        lambda groups, gap=gap, pooled=pooled: squared_mean(gap, groups) / squared_mean(pooled, groups)
                    ),
                }
            )
    return {"results": results, "squared_means": squared_means, "unbiasedness": checks, "mean_ratio": mean_ratio}


def measure_bins(problem: Problem, seed: int, num_windows: int, num_pairs: int) -> list[dict]:
    """Where the variance of `siss` at lambda 0.5, stratified, comes from: with g the sum over bins of timesteps of the
    gradient g_b of the pairs within, tr Cov(g_b, g) / tr Cov(g), which sums to 1."""
    engine = Engine(problem.network, problem.network.parameters())
    size = num_windows // GROUPS
    products = np.zeros((num_windows, TIMESTEP_BINS, 2))
    sums = torch.zeros(GROUPS, 2 * TIMESTEP_BINS, engine.size)
    edges = np.linspace(*problem.timestep_range, TIMESTEP_BINS + 1).astype(int).tolist()
    for window in tqdm(range(num_windows), desc="bins of timesteps", leave=False):
        rows = draw_rows(problem, REFERENCE, seed, window, num_pairs)
        gradients = []
        for low, high in pairwise(edges):
            within = (rows.timesteps >= low) & (rows.timesteps < high)
            gradients += [side.clone() for side in engine(rows[within.nonzero().flatten()])]
        for index, gradient in enumerate(gradients):
            sums[window // size, index] += gradient
        for side in range(2):
            whole = sum(gradients[side::2])
            for bin_ in range(TIMESTEP_BINS):
                products[window, bin_, side] = inner_products(gradients[2 * bin_ + side], whole)[1]
    gram = group_gram(sums).reshape(GROUPS, TIMESTEP_BINS, 2, GROUPS, TIMESTEP_BINS, 2)
    products = products.reshape(GROUPS, size, TIMESTEP_BINS, 2).sum(1)

    def covariances(groups: np.ndarray, side: int) -> np.ndarray:
        n = size * len(groups)
        of_sums = gram[np.ix_(groups, range(TIMESTEP_BINS), [side], groups, range(TIMESTEP_BINS), [side])]
        return (products[groups, :, side].sum(0) - of_sums.sum((0, 2, 3, 4, 5)) / n) / (n - 1)

    def share(bin_: int, side: int, groups: np.ndarray) -> float:
        found = covariances(groups, side)
        return found[bin_] / found.sum()

    return [
        {
            "timesteps": edges[bin_ : bin_ + 2],
            "keep": estimate_interval(lambda groups, bin_=bin_: share(bin_, 0, groups)),
            "forget": estimate_interval(lambda groups, bin_=bin_: share(bin_, 1, groups)),
        }
        for bin_ in range(TIMESTEP_BINS)
    ]


def one_sided_shares(problem: Problem, seed: int, num_windows: int) -> list[dict]:
    """How often no row of a window serves one of the sides; no network is run."""
    results = []
    for num_pairs in ONE_SIDED_PAIRS:
        query, uniform = draw_pairs(problem, keyed_generator(seed, PAIR, num_windows), num_windows * num_pairs)
        for variant in VARIANTS[1:]:
            components = [
                variant.components(seed, window, draws)
                for window, draws in enumerate(uniform.reshape(num_windows, num_pairs))
            ]
            rows = variant.make_method().rows(replace(query, from_forget=torch.cat(components)))
            keep, forget = (
                (weight != 0).reshape(num_windows, num_pairs).any(1)
                for weight in (rows.keep_weight, rows.forget_weight)
            )
            share = (~(keep & forget)).float().mean().item()
            results.append({"pairs": num_pairs, "variant": variant.name, "one_sided_share": share})
    return results


def describe(interval: dict[str, float | None], digits: int = 2) -> str:
    if interval["value"] is None:
        return "-"
    value = f"{interval['value']:.{digits}f}"
    return (
        value if interval["low"] is None else f"{value} [{interval['low']:.{digits}f}, {interval['high']:.{digits}f}]"
    )


def print_table(header: list[str], lines: list[list[str]]) -> None:
    """A table that reads well both in a terminal and in Markdown."""
    widths = [max(map(len, column)) for column in zip(header, *lines)]
    for index, line in enumerate([header, *lines]):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |")
        if index == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    print(flush=True)


def print_report(name: str, report: dict) -> None:
    results = report["results"]
    directions = list(results[0]["relative_variance"])
    print(f"\n{name}: {report['windows']} windows of {report['pairs']} pairs, {report['parameters']:,} parameters\n")
    print_table(
        ["variant", "forward", "backward", "compute", "fixed", "both sides", "one-sided", *directions],
        [
            [
                row["variant"],
                f"{row['forward_rows']:.1f}",
                f"{row['backward_rows']:.1f}",
                f"{row['compute']:.2f}",
                f"{row['compute_fixed']:.2f}",
                f"{row['both_sides_share']:.1%}",
                f"{row['one_sided_share']:.1%}",
                *(f"{row['relative_variance'][direction]:.4g}" for direction in directions),
            ]
            for row in results
        ],
    )
    print("Rows run, compute (under the rule `fixed`: fixed), rows that serve both sides, one-sided windows;")
    print("relative variance of the keep gradient, the forget gradient and the combined directions.\n")
    print_table(
        ["variance x compute", *directions],
        [
            [row["variant"], *(describe(row["variance_x_compute"][direction]) for direction in directions)]
            for row in results
        ],
    )
    for side, interval in report["squared_means"].items():
        print(f"|E g|^2 of the {side} side: {describe(interval, 4)}")
    print(f"mean of |g_k| / |g_f|, {REFERENCE.name}: {report['mean_ratio']:.3g}\n")
    print_table(
        ["mean gradient against siss_no_is", "side", "gap in standard errors", "squared bias / |E g|^2"],
        [
            [
                check["variant"],
                check["side"],
                f"{check['gap_in_standard_errors']:.2f}",
                describe(check["squared_bias"], 4),
            ]
            for check in report["unbiasedness"]
        ],
    )
    print_table(
        ["timesteps", "share of the keep variance", "of the forget variance"],
        [
            ["{} to {}".format(*row["timesteps"]), describe(row["keep"]), describe(row["forget"])]
            for row in report["timestep_bins"]
        ],
    )


def print_one_sided(shares: list[dict]) -> None:
    found = {(row["variant"], row["pairs"]): row["one_sided_share"] for row in shares}
    print_table(
        ["one-sided windows", *(f"{pairs} pairs" for pairs in ONE_SIDED_PAIRS)],
        [
            [variant.name, *(f"{found[variant.name, pairs]:.2%}" for pairs in ONE_SIDED_PAIRS)]
            for variant in VARIANTS[1:]
        ],
    )


def plot(path: Path, models: dict[str, dict]) -> None:
    """Variance x compute of each variant; one panel a model. A direction with an interval that spans a factor of more
    than ten is left out: its mean is too small to tell."""
    figure, axes = plt.subplots(
        1, len(models), sharey=True, figsize=(2.5 + 3 * len(models), 4.8), layout="constrained"
    )
    shown = ("keep", "forget", *(f"relative {rho:g}" for rho in RHOS))
    labels = ("keep", "forget", *(rf"combined, $\rho$ = {rho:g}" for rho in RHOS))
    colors = ("tab:blue", "tab:red", "tab:green", "tab:purple")
    axes = np.atleast_1d(axes)
    for axis, (name, report) in zip(axes, models.items()):
        rows = report["results"]
        axis.axvline(1, color="grey", linewidth=0.8)
        for index, (direction, label, color) in enumerate(zip(shown, labels, colors)):
            intervals = [row["variance_x_compute"][direction] for row in rows]
            if any(interval["low"] is None or interval["high"] > 10 * interval["low"] for interval in intervals):
                continue
            value, low, high = (
                np.array([interval[key] for interval in intervals]) for key in ("value", "low", "high")
            )
            height = np.arange(len(rows)) + 0.18 * (index - 1.5)
            error = [value - low, high - value]
            axis.errorbar(value, height, xerr=error, fmt="o", color=color, markersize=4, label=label)
        for position in range(0, len(rows), 2):
            axis.axhspan(position - 0.5, position + 0.5, color="0.95", zorder=0)
        axis.set_yticks(range(len(rows)), [row["variant"] for row in rows])
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.set_xscale("log")
        axis.set_xticks([0.5, 1, 2, 4, 8, 16], ["0.5", "1", "2", "4", "8", "16"])
        axis.minorticks_off()
        axis.set_title(f"{name}, {report['pairs']} pairs", fontsize=10)
    handles, names = axes[0].get_legend_handles_labels()
    figure.supxlabel("variance x compute, siss 0.5 stratified = 1", fontsize=10)
    figure.legend(handles, names, loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=100)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = list(PROBLEMS)
    parser.add_argument("--models", nargs="+", choices=models, default=models, help=f"Default: {' '.join(models)}.")
    parser.add_argument("--windows", type=int, help=f"A multiple of {GROUPS}. Default: 500; 60 for latents.")
    parser.add_argument("--pairs", type=int, help="Pairs of a window. Default: 16; 8 for latents.")
    parser.add_argument("--one_sided_windows", type=int, default=10_000, help="Without the network. Default: 10,000.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="All numbers.")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    parser.add_argument("--quick", action="store_true", help="Ten windows of 2 pairs, tiny latents: not to quote.")
    args = parser.parse_args(argv)
    if args.quick:
        args.windows, args.pairs, args.one_sided_windows = GROUPS, 2, 100
    if args.windows is not None and (args.windows < GROUPS or args.windows % GROUPS):
        parser.error(f"--windows must be a multiple of {GROUPS}")
    if args.pairs is not None and args.pairs < 2 or args.one_sided_windows < 1:
        parser.error("--pairs must be at least 2, --one_sided_windows at least 1")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    machine = describe_machine(torch.device("cpu"))
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    output = {"machine": machine, "seed": args.seed, "models": {}}
    for name in args.models:
        problem = PROBLEMS[name](args.quick)
        num_windows, num_pairs = args.windows or problem.num_windows, args.pairs or problem.num_pairs
        report = analyse(measure(problem, args.seed, num_windows, num_pairs), num_pairs)
        report |= {
            "windows": num_windows,
            "pairs": num_pairs,
            "parameters": sum(parameter.numel() for parameter in problem.network.parameters()),
            "timestep_bins": measure_bins(problem, args.seed, num_windows, num_pairs),
        }
        print_report(name, report)
        if name != "latents":  # of which so many would take gigabytes
            report["one_sided"] = one_sided_shares(problem, args.seed, args.one_sided_windows)
            print_one_sided(report["one_sided"])
        output["models"][name] = report
    if args.json:
        args.json.write_text(json.dumps(output, indent=2) + "\n")
    if args.plot:
        plot(args.plot, output["models"])


if __name__ == "__main__":
    main()
