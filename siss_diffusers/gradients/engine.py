"""The gradient engine: two gradients per optimizer step, one collective, no copy that is not needed."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from siss_diffusers.combine import Products, Rule
from siss_diffusers.gradients.buffers import STATS, GradientBuffers, combined_square, inner_products
from siss_diffusers.gradients.grouping import split_by_side, split_in_lockstep
from siss_diffusers.gradients.stats import StepStats
from siss_diffusers.methods.base import Rows
from siss_diffusers.noising import mean_squared_error


UNKNOWN = Products(math.nan, math.nan, math.nan)


class PairedGradients:
    """Computes the combined gradient of one optimizer step and leaves it in `.grad`.

    Three modes, chosen by what the rule needs:

    - *paired* (the rule needs inner products): keep and forget rows accumulate into two flat float32 buffers, of which
      each parameter's `.grad` is a view; one collective.
    - *forget first* (the rule needs the forget norm only, or the coefficient is constant but for calibration): the
      forget rows of the whole window, a collective, rescaling in place, then the keep rows into the same buffer and a
      second collective. One buffer; rows that serve both sides run forward twice.
    - *single* (constant coefficients): one scalar loss, one buffer, one collective.

    Parameters sharded by FSDP2 (`fully_shard`, `DTensor`) are reduced by FSDP2 itself, in each backward; the buffers hold
    this rank's shards, and the one collective of a step carries a few numbers. All ranks then need the same number of
    micro-batches, none of them empty.

    Args:
        parameters: trainable float32 parameters; those that do not require gradients are left out. All of them sharded,
            or none.
        rule: from `Method.rule`.
        thresholds: `(T,)`, the loss per pixel above which a forget row at each index of the path is dropped between
            forward and backward (calibrated forgetting); None for none.
        reduce: sums a flat tensor over all ranks, in place, such as `torch.distributed.all_reduce`; None for one rank.
        scaler: the gradient scaler of fp16. The combined gradient is left scaled, as `scaler.step` expects it.
        owns_grad: whether `.grad` is the engine's to use. Not under DeepSpeed ZeRO, whose hooks take away what
            accumulates there: parameters may then be in half precision, `.grad` is left alone, and `surrogate_loss`
            carries the combined gradient over.

    Raises:
        ValueError: when nothing is trainable, a trainable parameter is not float32, or only some are sharded.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        rule: Rule,
        *,
        thresholds: Tensor | None = None,
        reduce: Callable[[Tensor], object] | None = None,
        scaler: torch.amp.GradScaler | None = None,
        owns_grad: bool = True,
    ) -> None:
        self.rule = rule
        self.reduce = reduce or (lambda tensor: None)
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        if rule.needs == "products":
            self.mode = "paired"
        elif rule.needs == "forget_norm" or thresholds is not None:
            self.mode = "forget_first"
        else:
            self.mode = "single"

        self.buffers = GradientBuffers(parameters, paired=self.mode == "paired", owns_grad=owns_grad)
        self.thresholds = None if thresholds is None else thresholds.to(self.buffers.device)

    def _reduce(self, gradients: Tensor) -> None:
        if not self.buffers.sharded:
            self.reduce(gradients)

    def compute(
        self,
        window: Sequence[Rows],
        predict: Callable[[Rows], Tensor],
        max_grad_norm: float | None = None,
        stop: bool = False,
        forget_scale: float | None = None,
    ) -> StepStats:
        """Run forward and backward over a window of micro-batches, combine, clip, and leave the result in `.grad`.

        Call `optimizer.step()` afterwards in every case: where `skipped` is set, `.grad` is None, or, under a scaler,
        infinite, so that the scaler skips the step and lowers its scale.

        Args:
            window: this rank's rows of all micro-batches of the step, on the host.
            predict: the network's output `(R, C, H, W)` for rows on the device, the numbers of their conditions on the
                host. Under DDP, inside `no_sync`; a network with buffers also needs `broadcast_buffers=False`, because
                ranks differ in how often they call it.
            max_grad_norm: bound of the norm of the combined gradient of losses summed over pixels; None for none.
            stop: this rank was asked to stop after this step, by a signal, say. It travels with the gradients, so that
                all ranks know of it at the same step without a collective of its own.
            forget_scale: c, known beforehand (that of an earlier step, say), in place of the rule's: the step is then
                that of one scalar loss, as in the mode *single*. Rows above their thresholds are dropped as ever.
        """
        if self.mode == "single":
            return self._compute_single(window, predict, max_grad_norm, stop, self.rule(UNKNOWN))
        if forget_scale is not None:
            return self._compute_single(window, predict, max_grad_norm, stop, (1.0, -forget_scale))
        self.buffers.flat.zero_()
        self._count(window, stop)
        if self.mode == "forget_first":
            return self._compute_forget_first(window, predict, max_grad_norm)

        for rows in window:
            for group, serves_keep, serves_forget in (
                split_in_lockstep(rows) if self.buffers.sharded else split_by_side(rows)
            ):
                self._backward(group, predict, serves_keep, serves_forget)
        self._reduce(self.buffers.flat)
        sums, unit, squares = self._read(window, inner_products(self.buffers.keep, self.buffers.forget))
        products = Products(*squares)
        finite = all(map(math.isfinite, squares))
        coefficients = self._calibrated(products, sums) if finite else (1.0, 0.0)
        squared_norm = combined_square(products, coefficients) if finite else math.nan
        return self._finish(sums, unit, products, coefficients, squared_norm, -coefficients[1], max_grad_norm)

    def _compute_single(
        self,
        window: Sequence[Rows],
        predict: Callable[[Rows], Tensor],
        max_grad_norm: float | None,
        stop: bool,
        coefficients: tuple[float, float],
    ) -> StepStats:
        """Combine the losses before the linear backward: the buffer gets c_keep g_keep + c_forget g_forget."""
        self.buffers.keep_and_sums.zero_()
        self._count(window, stop)
        for rows in window:
            self._single_backward(rows, predict, coefficients)
        self._reduce(self.buffers.keep_and_sums)
        sums, unit, (squared_norm,) = self._read(window, inner_products(self.buffers.keep))
        return self._finish(sums, unit, UNKNOWN, (1.0, 0.0), squared_norm, -coefficients[1], max_grad_norm)

    def _compute_forget_first(
        self, window: Sequence[Rows], predict: Callable[[Rows], Tensor], max_grad_norm: float | None
    ) -> StepStats:
        for rows in window:
            for group in self._rows_of_side(rows, rows.forget_target, rows.forget_weight):
                self._backward(group, predict, serves_keep=False, serves_forget=True)
        self._reduce(self.buffers.flat)
        sums, unit, (forget_forget,) = self._read(window, inner_products(self.buffers.forget))
        products = Products(math.nan if sums["keep_weight"] > 0 else 0.0, math.nan, forget_forget)
        coefficients = self._calibrated(products, sums) if math.isfinite(forget_forget) else (1.0, 0.0)

        # Every rank holds the whole forget gradient now, and the second collective will sum it over the ranks; of shards
        # each rank holds its own, and what comes is added.
        self.buffers.forget.mul_(coefficients[1] / (1 if self.buffers.sharded else sums["ranks"]))
        self.buffers.sums.zero_()
        self.buffers.add(ranks=1, pairs=sum(rows.num_pairs for rows in window))
        if coefficients[0] != 0:
            for rows in window:
                for group in self._rows_of_side(rows, rows.keep_target, rows.keep_weight):
                    self._backward(group, predict, serves_keep=True, serves_forget=False)
        self._reduce(self.buffers.flat)
        keep_sums, _, (combined,) = self._read(window, inner_products(self.buffers.keep))
        sums["keep_loss"] = keep_sums["keep_loss"]
        return self._finish(sums, unit, products, (1.0, 0.0), combined, -coefficients[1], max_grad_norm)

    def _rows_of_side(self, rows: Rows, target: Tensor | None, weight: Tensor) -> list[Rows]:
        """Return the rows that serve one side, as one group, or none."""
        index = (weight != 0).nonzero().flatten()
        if self.buffers.sharded and target is not None and len(index) == 0:
            index = torch.zeros(1, dtype=torch.long)  # see `split_in_lockstep`
        return [rows[index]] if len(index) else []

    def _count(self, window: Sequence[Rows], stop: bool) -> None:
        self.row_losses = []
        self.buffers.add(ranks=1, stop=float(stop))
        for rows in window:
            self.buffers.add(
                pairs=rows.num_pairs, keep_weight=rows.keep_weight.sum(), forget_weight=rows.forget_weight.sum()
            )

    def _backward(self, rows: Rows, predict: Callable[[Rows], Tensor], serves_keep: bool, serves_forget: bool) -> None:
        """Run one forward of a group, and one backward for each side that it serves."""
        rows = rows.to(self.buffers.device)
        output = predict(rows).float()
        if serves_keep:
            loss = self._sum("keep", rows, rows.keep_weight * mean_squared_error(output, rows.keep_target))
            self._accumulate(loss, self.buffers.keep_views, retain_graph=serves_forget)
            self.buffers.add(keep_loss=loss.detach())
        if serves_forget:
            error = mean_squared_error(output, rows.forget_target)
            weight = self._active_weight(rows, error)
            self._accumulate(self._sum("forget", rows, weight * error), self.buffers.forget_views)
            self.buffers.add(forget_loss=(rows.forget_weight * error.detach()).sum(), active_weight=weight.sum())

    def _single_backward(
        self, rows: Rows, predict: Callable[[Rows], Tensor], coefficients: tuple[float, float]
    ) -> None:
        """Run one forward and one backward of the scalar loss `c_keep L_keep + c_forget L_forget`."""
        if not self.buffers.sharded:
            rows = rows[((rows.keep_weight != 0) | (rows.forget_weight != 0)).nonzero().flatten()]
        if len(rows) == 0:
            return
        rows = rows.to(self.buffers.device)
        output = predict(rows).float()
        loss = output.new_zeros(())
        if rows.keep_target is not None:
            keep_loss = self._sum("keep", rows, rows.keep_weight * mean_squared_error(output, rows.keep_target))
            loss = loss + coefficients[0] * keep_loss
            self.buffers.add(keep_loss=keep_loss.detach())
        if rows.forget_target is not None:
            error = mean_squared_error(output, rows.forget_target)
            weight = self._active_weight(rows, error)
            loss = loss + coefficients[1] * self._sum("forget", rows, weight * error)
            self.buffers.add(forget_loss=(rows.forget_weight * error.detach()).sum(), active_weight=weight.sum())
        self._accumulate(loss, self.buffers.keep_views)

    def _accumulate(self, loss: Tensor, views: list[Tensor], retain_graph: bool = False) -> None:
        """Add the gradient of a loss to a buffer, scaled under a scaler."""
        self.buffers.accumulate(loss if self.scaler is None else self.scaler.scale(loss), views, retain_graph)

    def surrogate_loss(self) -> Tensor:
        """Return a scalar whose gradient is the combined gradient of the last step, the same on all ranks."""
        return self.buffers.surrogate_loss()

    def _sum(self, side: str, rows: Rows, losses: Tensor) -> Tensor:
        """Return the sum over rows, and remember each of them: a skipped step says which were not finite."""
        self.row_losses.append((side, rows.timesteps, losses.detach()))
        return losses.sum()

    def _non_finite_rows(self) -> dict[str, list[int]]:
        found = {}
        for side, timesteps, losses in self.row_losses:
            found.setdefault(side, []).extend(timesteps[~losses.isfinite()].tolist())
        return {side: sorted(timesteps) for side, timesteps in found.items() if timesteps}

    def _active_weight(self, rows: Rows, error: Tensor) -> Tensor:
        """Return the forget weights, 0 for a row whose loss exceeds its threshold (calibrated forgetting)."""
        if self.thresholds is None:
            return rows.forget_weight
        return torch.where(error.detach() > self.thresholds[rows.timesteps], 0.0, rows.forget_weight)

    def _calibrated(self, products: Products, sums: dict[str, float]) -> tuple[float, float]:
        keep_coefficient, forget_coefficient = self.rule(products)
        if self.thresholds is None:
            return keep_coefficient, forget_coefficient
        return keep_coefficient, forget_coefficient * self._active_share(sums)

    @staticmethod
    def _active_share(sums: dict[str, float]) -> float:
        return sums["active_weight"] / sums["forget_weight"] if sums["forget_weight"] > 0 else 0.0

    def _read(self, window: Sequence[Rows], squares: Tensor) -> tuple[dict[str, float], float, list[float]]:
        """Wait for the device, once; return sums, the unit of the gradients, and inner products in that unit."""
        if self.buffers.sharded:
            # Each rank has the sums of its rows and the inner products of its shards.
            parts = torch.cat([self.buffers.sums.double(), squares / self.buffers.copies_of_a_shard])
            self.reduce(parts)
            all_sums, squares = parts.split([len(STATS), len(squares)])
        else:
            all_sums = self.buffers.sums.double()
        scale = (
            self.buffers.sums.new_ones(())
            if self.scaler is None
            else self.scaler.scale(self.buffers.sums.new_ones(()))
        )
        values = torch.cat([all_sums, scale.double().reshape(1), squares]).tolist()
        sums, squares = dict(zip((*STATS, "scale"), values)), values[len(STATS) + 1 :]
        # Losses were means over pixels, sums over pairs, and scaled; gradients are wanted of losses summed over
        # pixels and averaged over pairs. FSDP2 takes the mean over ranks.
        pixels = window[0].noisy.shape[1:].numel()
        unit = pixels * (sums["ranks"] if self.buffers.sharded else 1) / (sums["pairs"] * sums["scale"])
        return sums, unit, [unit * unit * square for square in squares]

    def _finish(
        self,
        sums: dict[str, float],
        unit: float,
        products: Products,
        coefficients: tuple[float, float],
        squared_norm: float,
        forget_scale: float,
        max_grad_norm: float | None,
    ) -> StepStats:
        losses = [sums["keep_loss"] / sums["pairs"], sums["forget_loss"] / sums["pairs"]]
        skipped = not all(map(math.isfinite, [*losses, squared_norm]))
        norms = [None if math.isnan(square) else math.sqrt(square) for square in (products[0], products[2])]
        if skipped:
            self.buffers.refuse(scaled=self.scaler is not None)
        else:
            # Under a scaler the gradient is left scaled: `scaler.step` unscales it, exactly, by a power of two.
            factor = unit * sums["scale"]
            if max_grad_norm is not None:
                factor *= min(1.0, max_grad_norm / (math.sqrt(squared_norm) + 1e-6))
            self.buffers.keep.mul_(coefficients[0] * factor)
            if coefficients[1] != 0:
                self.buffers.keep.add_(self.buffers.forget, alpha=coefficients[1] * factor)
            self.buffers.leave_in_grad()
        return StepStats(
            keep_loss=losses[0],
            forget_loss=losses[1],
            grad_norm_keep=norms[0],
            grad_norm_forget=norms[1],
            grad_norm=math.sqrt(squared_norm) if not skipped else math.nan,
            forget_scale=forget_scale + 0.0,  # not -0.0
            forget_active=None if self.thresholds is None else self._active_share(sums),
            one_sided=sums["keep_weight"] == 0 or sums["forget_weight"] == 0,
            skipped=skipped,
            non_finite=self._non_finite_rows() if skipped else {},
            stop=sums["stop"] > 0,
        )
