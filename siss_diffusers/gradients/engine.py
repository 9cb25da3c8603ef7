"""The gradient engine: two gradients per optimizer step, one collective, no copy that is not needed."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from siss_diffusers.combine import Products, Rule
from siss_diffusers.gradients.buffers import combined_square, inner_products, local
from siss_diffusers.gradients.grouping import split_by_side, split_in_lockstep
from siss_diffusers.methods.base import Rows
from siss_diffusers.noising import mean_squared_error


# What travels with the gradients in the one collective; sums over the pairs of the whole window and all ranks.
STATS = ("ranks", "pairs", "keep_loss", "forget_loss", "keep_weight", "forget_weight", "active_weight", "stop")
UNKNOWN = Products(math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class StepStats:
    """What one optimizer step saw. Losses are weighted means over pairs and pixels, norms are those of the gradients
    of losses summed over pixels; None where a scaling rule never forms the quantity.

    Args:
        forget_scale: c of the step `g_keep - c g_forget`, after calibration; as given, of a step with a lagged one.
        forget_active: share of the forget weight whose loss is still below its threshold; None without thresholds.
        one_sided: no row of the window served the keep side, or none the forget side.
        skipped: a gradient was not finite. The optimizer must not move the weights; see `PairedGradients.compute`.
        non_finite: of a skipped step, for each side the timesteps (indices of the path) of this rank's rows whose loss
            was not finite; empty where only a gradient was not.
        stop: some rank asked to stop, see `PairedGradients.compute`; the same on all ranks.
    """

    keep_loss: float
    forget_loss: float
    grad_norm_keep: float | None
    grad_norm_forget: float | None
    grad_norm: float
    forget_scale: float
    forget_active: float | None
    one_sided: bool
    skipped: bool
    non_finite: dict[str, list[int]]
    stop: bool


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
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        if not self.parameters:
            raise ValueError("no parameter requires a gradient")
        if owns_grad and any(parameter.dtype != torch.float32 for parameter in self.parameters):
            raise ValueError("trainable parameters must be float32; mixed precision belongs in autocast")
        sharded = {isinstance(parameter, DTensor) for parameter in self.parameters}
        if len(sharded) > 1:
            raise ValueError("some trainable parameters are sharded and some are not; shard the whole network")
        self.sharded = sharded.pop()
        self.rule = rule
        self.reduce = reduce or (lambda tensor: None)
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self.owns_grad = owns_grad
        if rule.needs == "products":
            self.mode = "paired"
        elif rule.needs == "forget_norm" or thresholds is not None:
            self.mode = "forget_first"
        else:
            self.mode = "single"

        self.device = self.parameters[0].device
        self.thresholds = None if thresholds is None else thresholds.to(self.device)
        # How many ranks hold the same shard (hybrid sharding): a sum over all ranks counts it so many times.
        self.copies_of_a_shard = 1
        if self.sharded:
            mesh, placements = self.parameters[0].device_mesh, self.parameters[0].placements
            self.copies_of_a_shard = math.prod(
                mesh.size(dim) for dim, placement in enumerate(placements) if isinstance(placement, Replicate)
            )
        size = sum(local(parameter).numel() for parameter in self.parameters)
        # The keep gradient beside the sums: a step with a lagged scale reduces these two alone.
        spare = size if self.mode == "paired" else 0
        self.flat = torch.zeros(spare + size + len(STATS), device=self.device)
        self.keep_and_sums = self.flat[spare:]
        self.sums = self.keep_and_sums[size:]
        self.keep = self.keep_and_sums[:size]
        self.forget = self.flat[:size]
        self.keep_views = self._views(self.keep)
        self.forget_views = self._views(self.forget)

    def _views(self, flat: Tensor) -> list[Tensor]:
        # With the strides of the parameter (channels_last), so that autograd adds in place and optimizers may fuse.
        views, offset = [], 0
        for parameter in self.parameters:
            part = local(parameter)
            view = flat[offset : offset + part.numel()].as_strided(part.shape, part.stride())
            offset += part.numel()
            if self.sharded:
                layout = {"shape": parameter.shape, "stride": parameter.stride(), "run_check": False}
                view = DTensor.from_local(view, parameter.device_mesh, parameter.placements, **layout)
            views.append(view)
        return views

    def _fill(self, views: list[Tensor]) -> None:
        for parameter, view in zip(self.parameters, views):
            parameter.grad = view

    def _add(self, **sums: Tensor | float) -> None:
        for name, value in sums.items():
            self.sums[STATS.index(name)] += value

    def _reduce(self, gradients: Tensor) -> None:
        if not self.sharded:
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
            predict: the network's output `(R, C, H, W)` for rows on the device. Under DDP, inside `no_sync`; a network
                with buffers also needs `broadcast_buffers=False`, for ranks differ in how often they call it.
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
        self.flat.zero_()
        self._count(window, stop)
        if self.mode == "forget_first":
            return self._compute_forget_first(window, predict, max_grad_norm)

        for rows in window:
            for group, serves_keep, serves_forget in split_in_lockstep(rows) if self.sharded else split_by_side(rows):
                self._backward(group, predict, serves_keep, serves_forget)
        self._reduce(self.flat)
        sums, unit, squares = self._read(window, inner_products(self.keep, self.forget))
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
        """The combination is linear and done before the backward: the buffer gets c_keep g_keep + c_forget g_forget."""
        self.keep_and_sums.zero_()
        self._count(window, stop)
        for rows in window:
            self._single_backward(rows, predict, coefficients)
        self._reduce(self.keep_and_sums)
        sums, unit, (squared_norm,) = self._read(window, inner_products(self.keep))
        return self._finish(sums, unit, UNKNOWN, (1.0, 0.0), squared_norm, -coefficients[1], max_grad_norm)

    def _compute_forget_first(
        self, window: Sequence[Rows], predict: Callable[[Rows], Tensor], max_grad_norm: float | None
    ) -> StepStats:
        for rows in window:
            for group in self._rows_of_side(rows, rows.forget_target, rows.forget_weight):
                self._backward(group, predict, serves_keep=False, serves_forget=True)
        self._reduce(self.flat)
        sums, unit, (forget_forget,) = self._read(window, inner_products(self.forget))
        products = Products(math.nan if sums["keep_weight"] > 0 else 0.0, math.nan, forget_forget)
        coefficients = self._calibrated(products, sums) if math.isfinite(forget_forget) else (1.0, 0.0)

        # Every rank holds the whole forget gradient now, and the second collective will sum it over the ranks; of shards
        # each rank holds its own, and what comes is added.
        self.forget.mul_(coefficients[1] / (1 if self.sharded else sums["ranks"]))
        self.sums.zero_()
        self._add(ranks=1, pairs=sum(rows.num_pairs for rows in window))
        if coefficients[0] != 0:
            for rows in window:
                for group in self._rows_of_side(rows, rows.keep_target, rows.keep_weight):
                    self._backward(group, predict, serves_keep=True, serves_forget=False)
        self._reduce(self.flat)
        keep_sums, _, (combined,) = self._read(window, inner_products(self.keep))
        sums["keep_loss"] = keep_sums["keep_loss"]
        return self._finish(sums, unit, products, (1.0, 0.0), combined, -coefficients[1], max_grad_norm)

    def _rows_of_side(self, rows: Rows, target: Tensor | None, weight: Tensor) -> list[Rows]:
        """The rows that serve one side, as one group, or none."""
        index = (weight != 0).nonzero().flatten()
        if self.sharded and target is not None and len(index) == 0:
            index = torch.zeros(1, dtype=torch.long)  # see `split_in_lockstep`
        return [rows[index]] if len(index) else []

    def _count(self, window: Sequence[Rows], stop: bool) -> None:
        self.row_losses = []
        self._add(ranks=1, stop=float(stop))
        for rows in window:
            self._add(pairs=rows.num_pairs, keep_weight=rows.keep_weight.sum(), forget_weight=rows.forget_weight.sum())

    def _backward(self, rows: Rows, predict: Callable[[Rows], Tensor], serves_keep: bool, serves_forget: bool) -> None:
        """One forward of a group, and one backward for each side that it serves."""
        rows = rows.to(self.device)
        output = predict(rows).float()
        if serves_keep:
            loss = self._sum("keep", rows, rows.keep_weight * mean_squared_error(output, rows.keep_target))
            self._accumulate(loss, self.keep_views, retain_graph=serves_forget)
            self._add(keep_loss=loss.detach())
        if serves_forget:
            error = mean_squared_error(output, rows.forget_target)
            weight = self._active_weight(rows, error)
            self._accumulate(self._sum("forget", rows, weight * error), self.forget_views)
            self._add(forget_loss=(rows.forget_weight * error.detach()).sum(), active_weight=weight.sum())

    def _single_backward(
        self, rows: Rows, predict: Callable[[Rows], Tensor], coefficients: tuple[float, float]
    ) -> None:
        """One forward and one backward of the scalar loss `c_keep L_keep + c_forget L_forget`."""
        if not self.sharded:
            rows = rows[((rows.keep_weight != 0) | (rows.forget_weight != 0)).nonzero().flatten()]
        if len(rows) == 0:
            return
        rows = rows.to(self.device)
        output = predict(rows).float()
        loss = output.new_zeros(())
        if rows.keep_target is not None:
            keep_loss = self._sum("keep", rows, rows.keep_weight * mean_squared_error(output, rows.keep_target))
            loss = loss + coefficients[0] * keep_loss
            self._add(keep_loss=keep_loss.detach())
        if rows.forget_target is not None:
            error = mean_squared_error(output, rows.forget_target)
            weight = self._active_weight(rows, error)
            loss = loss + coefficients[1] * self._sum("forget", rows, weight * error)
            self._add(forget_loss=(rows.forget_weight * error.detach()).sum(), active_weight=weight.sum())
        self._accumulate(loss, self.keep_views)

    def _accumulate(self, loss: Tensor, views: list[Tensor], retain_graph: bool = False) -> None:
        """Add the gradient of a loss to a buffer."""
        if self.scaler is not None:
            loss = self.scaler.scale(loss)
        if self.owns_grad:
            self._fill(views)
            loss.backward(retain_graph=retain_graph)
            return
        gradients = torch.autograd.grad(loss, self.parameters, retain_graph=retain_graph, allow_unused=True)
        found = [(view, gradient) for view, gradient in zip(views, gradients) if gradient is not None]
        torch._foreach_add_([view for view, _ in found], [gradient.float() for _, gradient in found])

    def surrogate_loss(self) -> Tensor:
        """A scalar with the combined gradient of the last step for its own, the same on all ranks."""
        return sum((parameter.float() * view).sum() for parameter, view in zip(self.parameters, self.keep_views))

    def _sum(self, side: str, rows: Rows, losses: Tensor) -> Tensor:
        """The sum over rows, each remembered, should the step have to say which of them were not finite."""
        self.row_losses.append((side, rows.timesteps, losses.detach()))
        return losses.sum()

    def _non_finite_rows(self) -> dict[str, list[int]]:
        found = {}
        for side, timesteps, losses in self.row_losses:
            found.setdefault(side, []).extend(timesteps[~losses.isfinite()].tolist())
        return {side: sorted(timesteps) for side, timesteps in found.items() if timesteps}

    def _active_weight(self, rows: Rows, error: Tensor) -> Tensor:
        """Calibrated forgetting: a row whose forget loss already exceeds its threshold is pushed no further."""
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
        """The one wait for the device: sums, the unit of the gradients, and inner products in that unit."""
        if self.sharded:
            # Each rank has the sums of its rows and the inner products of its shards.
            parts = torch.cat([self.sums.double(), squares / self.copies_of_a_shard])
            self.reduce(parts)
            all_sums, squares = parts.split([len(STATS), len(squares)])
        else:
            all_sums = self.sums.double()
        scale = self.sums.new_ones(()) if self.scaler is None else self.scaler.scale(self.sums.new_ones(()))
        values = torch.cat([all_sums, scale.double().reshape(1), squares]).tolist()
        sums, squares = dict(zip((*STATS, "scale"), values)), values[len(STATS) + 1 :]
        # Losses were means over pixels, sums over pairs, and scaled; gradients are wanted of losses summed over
        # pixels and averaged over pairs. FSDP2 takes the mean over ranks.
        pixels = window[0].noisy.shape[1:].numel()
        unit = pixels * (sums["ranks"] if self.sharded else 1) / (sums["pairs"] * sums["scale"])
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
            self._refuse()
        else:
            # Under a scaler the gradient is left scaled: `scaler.step` unscales it, exactly, by a power of two.
            factor = unit * sums["scale"]
            if max_grad_norm is not None:
                factor *= min(1.0, max_grad_norm / (math.sqrt(squared_norm) + 1e-6))
            self.keep.mul_(coefficients[0] * factor)
            if coefficients[1] != 0:
                self.keep.add_(self.forget, alpha=coefficients[1] * factor)
            if self.owns_grad:
                self._fill(self.keep_views)
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

    def _refuse(self) -> None:
        if not self.owns_grad:
            return
        if self.scaler is None:
            for parameter in self.parameters:
                parameter.grad = None
        else:
            self.keep.fill_(math.inf)
            self._fill(self.keep_views)
