"""The regression that a run solves: rows, predictions, thresholds and gradients."""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed
from accelerate.utils import DistributedType
from torch import Tensor

from siss_diffusers.calibration import DRAWS_PER_BIN, NUM_BINS, measure_thresholds
from siss_diffusers.combine import Rule
from siss_diffusers.draws import CALIBRATION, STRANGERS
from siss_diffusers.errors import RunError
from siss_diffusers.gradients.engine import PairedGradients
from siss_diffusers.methods import Method, Query, Rows
from siss_diffusers.noising import GaussianPath, loss_weights
from siss_diffusers.settings import Settings
from siss_diffusers.training.adversary import Adversary
from siss_diffusers.training.network import TrainedNetwork
from siss_diffusers.training.run import Run
from siss_diffusers.training.samples import Samples, threshold_source
from siss_diffusers.training.schedule import current_forget_range
from siss_diffusers.training.state import Progress
from siss_diffusers.training.training_set import TrainingSet


logger = logging.getLogger(__name__)


@dataclass
class Problem:
    """What the loop regresses on.

    Args:
        path: the noise levels, on the host.
        batches: the tensors of a `Query` for each micro-batch of this process, without end.
        timestep_range: `(lo, hi)` of training.
        forget_ranges: those of forgetting.
        planned_windows: windows whose latents are cached; None where there is no limit.
        thresholds: `(T,)`, tau_t; for a method that needs them `(2, T)`, tau_t and the threshold of images to keep alone;
            None for none.
        adversary: searches conditions for forget images; None where none are searched.
    """

    method: Method
    path: GaussianPath
    network: TrainedNetwork
    samples: Samples
    batches: Iterator[dict[str, Tensor]]
    timestep_range: tuple[int, int]
    forget_ranges: list[tuple[int, int]]
    planned_windows: int | None = None
    thresholds: Tensor | None = None
    adversary: Adversary | None = None

    def __post_init__(self) -> None:
        self.device = self.network.accelerator.device
        self.model_timesteps = self.path.model_timesteps.to(self.device)

    def next_window(self, settings: Settings, progress: Progress) -> list[Rows]:
        """Return the rows of this process for the next step, by method and path alone: what is trained has not run yet.

        Raises:
            RunError: where so many steps were skipped that no latents are left.
        """
        if progress.window == self.planned_windows:
            raise RunError(
                f"{progress.skipped_steps} steps were skipped, their gradients were not finite; lower --learning_rate or"
                " --forget_scale, use bf16 instead of fp16, or allow more by --max_skipped_steps"
            )
        if self.adversary is not None:
            self.adversary.refresh(progress.window)
        window, forget_range = [], current_forget_range(settings, self.forget_ranges, progress)
        for _ in range(settings.gradient_accumulation_steps):
            query = self._complete(Query(path=self.path, **next(self.batches)))
            rows = self.method.rows_within(query, forget_range)
            if settings.keep_target == "base":
                rows = self._with_targets_of_base(rows)
            weights = loss_weights(self.path, rows.timesteps, settings.snr_gamma, settings.weighting_scheme)
            window.append(rows if weights is None else rows.reweighted(weights))
        return window

    def _complete(self, query: Query) -> Query:
        """Return a query with what its method needs and no data loader can draw."""
        if "posterior_mean" in self.method.needs:
            means = self.samples.keep_posterior.means(query, self.samples.prompts_of(query.forget_condition))
            query = replace(query, posterior_mean=means)
        if "thresholds" in self.method.needs:
            none = torch.full((2, len(self.path)), torch.inf)
            thresholds, keep_thresholds = (none if self.thresholds is None else self.thresholds)[:, query.timesteps]
            query = replace(query, thresholds=thresholds, keep_thresholds=keep_thresholds)
        return query

    def _with_targets_of_base(self, rows: Rows) -> Rows:
        """Return rows whose keep target is the answer of the base, where it cannot know a forget image: not in rows made
        from one, nor under the prompt of one."""
        memorized = torch.tensor(self.samples.memorized_rows)
        is_known = (rows.condition < len(self.samples.conditions)) & ~torch.isin(rows.condition, memorized)
        chosen = (rows.keep_weight != 0) & ~rows.from_forget & is_known
        index = chosen.nonzero().flatten()
        if len(index) == 0 and not self.network.sharded:
            return rows
        # All ranks of a sharded network run it equally often; a row that is not needed does no harm.
        asked = rows[index if len(index) else torch.zeros(1, dtype=torch.long)].to(self.device)
        conditions = self.samples.conditions_of(asked.condition)
        answers = self.network.predict_of_base(asked.noisy, self.model_timesteps[asked.timesteps], conditions).cpu()
        targets = rows.keep_target.clone()
        targets[index] = answers[: len(index)]
        return replace(rows, keep_target=targets)

    def restore(self, saved: dict) -> None:
        """Go on with the thresholds and the searched conditions of a checkpoint.

        Args:
            saved: from `load_state`; one that is older than searched conditions has none.
        """
        self.thresholds = None if saved["thresholds"] is None else saved["thresholds"][...]
        if self.adversary is not None and saved.get("searched") is not None:
            self.adversary.load({name: tensor[...] for name, tensor in saved["searched"].items()})

    def predict(self, rows: Rows) -> Tensor:
        """Return the network's output for rows on the device."""
        conditions = self.samples.conditions_of(rows.condition)
        return self.network.predict(rows.noisy, self.model_timesteps[rows.timesteps], conditions)

    def measure_thresholds(self, settings: Settings, training_set: TrainingSet) -> None:
        """Measure, with the starting model, the losses up to which a forget image is pushed: a quantile of those of images
        to keep, the mean of those of strangers, or the higher of both."""
        started, samples, rows = time.perf_counter(), self.samples, training_set.calibration_rows
        source = threshold_source(settings, self.method)
        numbers = None
        if samples.conditions is not None:
            numbers = [samples.keep_conditions[row] for row in rows]
        keep = self._losses(
            lambda image, generator: samples.keep.load(rows[image], generator),
            len(rows),
            numbers,
            settings,
            settings.calibrate_forgetting,
            CALIBRATION,
        )
        tau, calls = keep, NUM_BINS * DRAWS_PER_BIN
        if source != "keep":
            if samples.conditions is not None:
                numbers = [samples.forget_conditions[image] for image in samples.stranger_sources]
            strangers = self._losses(
                samples.strangers.load, len(samples.strangers), numbers, settings, None, STRANGERS
            )
            tau, calls = strangers if source == "strangers" else torch.maximum(keep, strangers), 2 * calls
        self.thresholds = torch.stack([tau, keep]) if "thresholds" in self.method.needs else tau
        self.network.reshard()
        if self.thresholds.isnan().any():
            raise RunError(
                "the starting model's losses are not finite, so no threshold of forgetting can be measured; use"
                " --mixed_precision bf16 or no, or check the model"
            )
        logger.info(
            f"Measured the thresholds of forgetting: {calls} network calls, {time.perf_counter() - started:.1f} s"
        )

    def _losses(
        self,
        load: Callable[[int, np.random.Generator], Tensor],
        num_images: int,
        conditions: list[int] | None,
        settings: Settings,
        quantile: float | None,
        purpose: int,
    ) -> Tensor:
        """Return the thresholds `(T,)` that images of one kind have, each under its condition."""

        def predict_on_host(noisy: Tensor, timesteps: Tensor, images: list[int]) -> Tensor:
            told = None if conditions is None else [conditions[image] for image in images]
            model_timesteps = self.model_timesteps[timesteps.to(self.device)]
            output = self.network.predict(noisy.to(self.device), model_timesteps, self.samples.conditions_of(told))
            return output.float().cpu()

        span = min(low for low, _ in self.forget_ranges), max(high for _, high in self.forget_ranges)
        return measure_thresholds(
            load,
            num_images,
            self.path,
            predict_on_host,
            span,
            quantile,
            settings.seed,
            settings.eval_batch_size,
            purpose,
        )

    def make_gradients(self, run: Run, rule: Rule) -> PairedGradients:
        """Return the gradient engine of this run."""
        accelerator = run.accelerator
        return PairedGradients(
            self.network.parameters,
            rule,
            # Of a method that subtracts nothing they are part of the rows.
            thresholds=self.thresholds if self.method.subtracts_forget else None,
            reduce=torch.distributed.all_reduce if accelerator.num_processes > 1 else None,
            scaler=accelerator.scaler,
            owns_grad=accelerator.distributed_type != DistributedType.DEEPSPEED,
        )
