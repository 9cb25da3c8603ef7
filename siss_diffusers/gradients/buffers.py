"""Flat gradient buffers: views for each parameter, shards, the sums that travel with them, and inner products."""

import math
from collections.abc import Iterable
from itertools import combinations_with_replacement

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from siss_diffusers.combine import Products


# What travels with the gradients in the one collective; sums over the pairs of the whole window and all ranks.
STATS = ("ranks", "pairs", "keep_loss", "forget_loss", "keep_weight", "forget_weight", "active_weight", "stop")

# Inner products are taken in float64, because a float32 sum of squares over millions of elements is off by 1e-4; in chunks,
# which bounds the memory of the float64 copy and keeps below BLAS's limit of 2^31 elements. On a CPU the chunks are
# small enough for the allocator to reuse: at 2^22 elements each came fresh from the system, at a sixth of a step.
CPU_DOT_CHUNK, DOT_CHUNK = 2**19, 2**22


def local(parameter: nn.Parameter) -> Tensor:
    """This rank's shard of a parameter; the whole of one that is not sharded."""
    return parameter.to_local().detach() if isinstance(parameter, DTensor) else parameter.detach()


def inner_products(*flats: Tensor) -> Tensor:
    """Inner products of flat float32 tensors, each with itself and with every later one, in float64 and in one pass.

    Returns:
        For one tensor `<a, a>`, for two `<a, a>`, `<a, b>` and `<b, b>`.
    """
    size = CPU_DOT_CHUNK if flats[0].device.type == "cpu" else DOT_CHUNK
    sums = []
    for chunks in zip(*(flat.split(size) for flat in flats)):
        chunks = [chunk.double() for chunk in chunks]
        sums.append(torch.stack([torch.dot(a, b) for a, b in combinations_with_replacement(chunks, 2)]))
    return torch.stack(sums).sum(0)


def combined_square(products: Products, coefficients: tuple[float, float]) -> float:
    """Squared norm of `c_keep g_keep + c_forget g_forget`."""
    (k, f), (kk, kf, ff) = coefficients, products
    return max(k * k * kk + 2 * k * f * kf + f * f * ff, 0.0)


class GradientBuffers:
    """The flat float32 buffers that gradients accumulate in, and a few sums behind them.

    Args:
        parameters: trainable float32 parameters; those that do not require gradients are left out. All of them sharded,
            or none.
        paired: whether there is a buffer for each side, or one for both.
        owns_grad: whether `.grad` is ours to use, see `PairedGradients`.

    Attributes:
        flat: everything, the one collective of a paired step.
        keep_and_sums: the keep gradient and the sums, all that a step of one scalar loss reduces.
        keep, forget: the flat gradient of each side; the same where they are not paired.
        keep_views, forget_views: the same as views of the shape of each parameter.
        copies_of_a_shard: how many ranks hold the same shard (hybrid sharding): a sum over all ranks counts it so often.

    Raises:
        ValueError: when nothing is trainable, a trainable parameter is not float32, or only some are sharded.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], paired: bool, owns_grad: bool) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        if not self.parameters:
            raise ValueError("no parameter requires a gradient")
        if owns_grad and any(parameter.dtype != torch.float32 for parameter in self.parameters):
            raise ValueError("trainable parameters must be float32; mixed precision belongs in autocast")
        sharded = {isinstance(parameter, DTensor) for parameter in self.parameters}
        if len(sharded) > 1:
            raise ValueError("some trainable parameters are sharded and some are not; shard the whole network")
        self.sharded = sharded.pop()
        self.owns_grad = owns_grad
        self.device = self.parameters[0].device
        self.copies_of_a_shard = 1
        if self.sharded:
            mesh, placements = self.parameters[0].device_mesh, self.parameters[0].placements
            self.copies_of_a_shard = math.prod(
                mesh.size(dim) for dim, placement in enumerate(placements) if isinstance(placement, Replicate)
            )
        size = sum(local(parameter).numel() for parameter in self.parameters)
        # The keep gradient lies beside the sums: a step of one scalar loss reduces these two alone.
        spare = size if paired else 0
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

    def add(self, **sums: Tensor | float) -> None:
        """Add to the sums by name, see `STATS`."""
        for name, value in sums.items():
            self.sums[STATS.index(name)] += value

    def use_as_grad(self, views: list[Tensor]) -> None:
        """Make each parameter's `.grad` a view of a buffer."""
        for parameter, view in zip(self.parameters, views):
            parameter.grad = view

    def accumulate(self, loss: Tensor, views: list[Tensor], retain_graph: bool = False) -> None:
        """Add the gradient of a loss to a buffer."""
        if self.owns_grad:
            self.use_as_grad(views)
            loss.backward(retain_graph=retain_graph)
            return
        gradients = torch.autograd.grad(loss, self.parameters, retain_graph=retain_graph, allow_unused=True)
        used = [(view, gradient) for view, gradient in zip(views, gradients) if gradient is not None]
        torch._foreach_add_([view for view, _ in used], [gradient.float() for _, gradient in used])

    def leave_in_grad(self) -> None:
        """Hand the result, which is in the keep buffer, to the optimizer."""
        if self.owns_grad:
            self.use_as_grad(self.keep_views)

    def refuse(self, scaled: bool) -> None:
        """Let the optimizer skip the step: without a gradient, or, under a scaler, with an infinite one."""
        if not self.owns_grad:
            return
        if scaled:
            self.keep.fill_(math.inf)
            self.use_as_grad(self.keep_views)
        else:
            for parameter in self.parameters:
                parameter.grad = None

    def surrogate_loss(self) -> Tensor:
        """Return a scalar with the combined gradient for its own."""
        return sum((parameter.float() * view).sum() for parameter, view in zip(self.parameters, self.keep_views))
