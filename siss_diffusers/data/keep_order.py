"""The order in which images to keep are drawn, without copies of forget images."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from siss_diffusers.data.images import Images
from siss_diffusers.data.near_copies import NUM_ORDINARY, Match, NearCopies, read_thumbnails, thumbnail
from siss_diffusers.draws import epoch_order
from siss_diffusers.errors import UsageError


T = TypeVar("T")
ROWS_AT_ONCE = 1_024  # thumbnails of so many rows are in memory


def read_in_parts(
    read: Callable[[Sequence[int]], list[T]],
    indices: Sequence[int],
    process_index: int = 0,
    num_processes: int = 1,
    gather: Callable[[list], list] = list,
) -> list[T]:
    """Return what `read` returns for these rows, read in equal parts by all processes.

    Args:
        read: returns an item for each of a few rows.
        gather: concatenates the lists of all processes, such as `accelerate.utils.gather_object`.

    Raises:
        UsageError: on every process, where any of them cannot use an image.
    """
    bounds = np.linspace(0, len(indices), num_processes + 1).astype(int)
    part, failure = [], None
    indices = indices[bounds[process_index] : bounds[process_index + 1]]
    with tqdm(
        total=len(indices), desc="Reading images", disable=process_index > 0 or len(indices) < 5_000
    ) as progress:
        try:
            for start in range(0, len(indices), ROWS_AT_ONCE):
                part += read(indices[start : start + ROWS_AT_ONCE])
                progress.update(len(part) - progress.n)
        except UsageError as error:
            failure = str(error)
    parts = gather([(part, failure)])
    for _, failure in parts:
        if failure is not None:
            raise UsageError(failure)
    return [item for part, _ in parts for item in part]


def look_at(images: Images, rows: Sequence[int]) -> list[tuple[bytes, Tensor]]:
    """Return the digest and the thumbnail of each of these images."""
    looks = (images.look(int(row)) for row in rows)
    return [(digest, thumbnail(pixels)) for digest, pixels in looks]


class KeepOrder:
    """The rows to keep, in the endless order in which they are drawn: reshuffled passes over the rows of the training
    set that are no forget rows, exact copies of forget images left out.

    Whether a row is a copy is known once it is decoded, so the first pass is a shuffle of all candidates that is walked
    only as far as positions are asked for, its copies skipped. A shuffle without some of its elements is a shuffle of
    the others, so this is exactly the order of a set that had its copies removed beforehand. By the end of the first
    pass every candidate was decoded, and later passes shuffle what was kept. What is at a position depends on nothing
    but seed and data: not on how far the order was walked before, nor by which process.

    Args:
        images: the training set; rows are numbers into it.
        candidates: `(N,)` int64, the rows that are not in the forget set by their numbers, ascending.
        forgotten: digests of the forget images.
        limit: use only so many images, the first of the first pass.
        thumbnails: of the forget images by digest; near copies of them are left out, too. None: exact copies only.
    """

    def __init__(
        self,
        images: Images,
        candidates: np.ndarray,
        forgotten: set[bytes],
        seed: int,
        limit: int | None = None,
        thumbnails: dict[bytes, Tensor] | None = None,
    ) -> None:
        self.images = images
        self.candidates = candidates
        self.forgotten = forgotten
        self.seed = seed
        self.limit = min(limit or len(candidates), len(candidates))
        self.first_pass = candidates[epoch_order(seed, 0, 0, len(candidates))]
        self.walked = 0  # of `first_pass`
        self.drawn = np.empty(0, dtype=np.int64)  # of those, what is kept, in order
        # By row. Pages of zeros take memory only once they are written to.
        self.digests = np.zeros((len(images), 16), dtype=np.uint8)
        self.checked = np.zeros(len(images), dtype=bool)
        self.copies = np.zeros(len(images), dtype=bool)  # exact ones
        self.near_copies: dict[int, Match] = {}
        self.near: NearCopies | None = None
        if thumbnails is not None:
            # The same ordinary images however far the order is walked.
            self.near = NearCopies(thumbnails, partial(read_thumbnails, images, self.first_pass[:NUM_ORDINARY]))

    def __getitem__(self, position: int) -> int:
        """Return the row at a position.

        Raises:
            UsageError: where an image on the way there cannot be used.
        """
        self.walk(position + 1)
        if position < len(self.drawn):
            return int(self.drawn[position])
        epoch, index = divmod(position, len(self.drawn))
        return int(self.drawn[epoch_order(self.seed, 0, epoch, len(self.drawn))[index]])

    def walk(self, num_positions: int, in_parts: Callable[..., list] = read_in_parts) -> None:
        """Check as many rows as the first `num_positions` positions need.

        Args:
            in_parts: `read_in_parts`, or with its arguments for several processes that all call this.
        """
        wanted = min(num_positions, self.limit)
        while len(self.drawn) < wanted and self.walked < len(self.first_pass):
            rows = self.first_pass[self.walked : self.walked + wanted - len(self.drawn)]
            self.drawn = np.concatenate([self.drawn, rows[~self._are_copies(rows, in_parts)]])
            self.walked += len(rows)

    def first(self, count: int, among: np.ndarray | None = None) -> list[int]:
        """Up to `count` distinct rows to keep, the first of the first pass, ascending: a random sample of them.

        Args:
            among: `(len(images),)` bool, which rows to choose from.
        """
        rows = self.first_pass[: self.limit]
        if among is not None:
            rows = rows[among[rows]]
        found, start = [], 0
        while len(found) < count and start < len(rows):
            part = rows[start : start + count - len(found)]
            found += part[~self._are_copies(part)].tolist()
            start += len(part)
        return sorted(found)

    def counts(self) -> dict[str, int]:
        """For `unlearning.json`: images to keep and duplicates removed, as far as is known, and images compared."""
        exact, near = int(self.copies.sum()), len(self.near_copies)
        return {
            "keep": min(self.limit, len(self.candidates) - exact - near),
            "duplicates_removed": exact,
            "near_duplicates_removed": near,
            "checked": int(self.checked.sum()),
        }

    def _are_copies(self, rows: np.ndarray, in_parts: Callable[..., list] = read_in_parts) -> np.ndarray:
        new = rows[~self.checked[rows]]
        for row, (found, match) in zip(new.tolist(), in_parts(self._compare, new), strict=True):
            self.digests[row] = np.frombuffer(found, dtype=np.uint8)
            self.copies[row] = found in self.forgotten
            self.checked[row] = True
            if match is not None:
                self.near_copies[row] = match
        return self.copies[rows] | np.array([row in self.near_copies for row in rows.tolist()], dtype=bool)

    def _compare(self, rows: Sequence[int]) -> list[tuple[bytes, Match | None]]:
        """Return the digest of each of these rows, and the forget image that it is a near copy of."""
        if self.near is None:
            return [(self.images.digest(int(row)), None) for row in rows]
        looks = look_at(self.images, rows)
        others = [index for index, (digest, _) in enumerate(looks) if digest not in self.forgotten]
        matches: dict[int, Match | None] = {}
        if others:
            matches = dict(
                zip(others, self.near.find(torch.stack([looks[index][1] for index in others])), strict=True)
            )
        return [(digest, matches.get(index)) for index, (digest, _) in enumerate(looks)]
