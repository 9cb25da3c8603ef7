"""Which rows run forward and backward together."""

from collections.abc import Iterator

import torch

from siss_diffusers.methods.base import Rows


def split_in_lockstep(rows: Rows) -> Iterator[tuple[Rows, bool, bool]]:
    """As `split_by_side`, with the same number of groups on every rank: one for each side that the method has. Where no
    row serves it, one of weight zero does, because each forward and backward of a sharded network waits for all ranks."""
    for target, weight, serves_keep in (
        (rows.keep_target, rows.keep_weight, True),
        (rows.forget_target, rows.forget_weight, False),
    ):
        if target is not None:
            index = (weight != 0).nonzero().flatten()
            yield rows[index if len(index) else torch.zeros(1, dtype=torch.long)], serves_keep, not serves_keep


def split_by_side(rows: Rows) -> Iterator[tuple[Rows, bool, bool]]:
    """Group rows so that none is run backward for a side on which its weight is zero.

    Yields:
        `(rows, serves_keep, serves_forget)`: the rows of the keep side and those of the forget side; where more than an
        eighth serve both, these in a group of their own. The weights are on the host, so nothing here waits for a device.
    """
    # Not "> 0": a NaN weight must reach the gradient and skip the step, not drop out of sight.
    keep, forget = rows.keep_weight != 0, rows.forget_weight != 0
    both = keep & forget
    groups = [(keep, True, False), (forget, False, True)]
    # Another forward of a few rows costs less than a third batch, which on two cores and a narrow network costs as much
    # as five rows before the first of them; with many, the other two batches would also need more memory.
    if both.sum() > len(rows) / 8:
        groups = [(keep & ~both, True, False), (forget & ~both, False, True), (both, True, True)]
    for mask, serves_keep, serves_forget in groups:
        index = mask.nonzero().flatten()
        if len(index):
            yield rows[index], serves_keep, serves_forget
