"""Flat gradient buffers: views, shards and inner products."""

from itertools import combinations_with_replacement

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from siss_diffusers.combine import Products


# Inner products are taken in float64, for a float32 sum of squares over millions of elements is off by 1e-4; in chunks,
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
