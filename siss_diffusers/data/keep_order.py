"""The order in which images to keep are drawn, without copies of forget images."""

from collections.abc import Callable, Sequence

import numpy as np
from tqdm.auto import tqdm

from siss_diffusers.data.images import Images
from siss_diffusers.draws import epoch_order
from siss_diffusers.errors import UsageError


def digest_images(
    images: Images,
    indices: Sequence[int],
    process_index: int = 0,
    num_processes: int = 1,
    gather: Callable[[list], list] = list,
) -> list[bytes]:
    """The digest of each of these images, computed in equal parts by all processes.

    Args:
        gather: concatenates the lists of all processes, such as `accelerate.utils.gather_object`.

    Raises:
        UsageError: on every process, where any of them cannot use an image.
    """
    bounds = np.linspace(0, len(indices), num_processes + 1).astype(int)
    part, failure = [], None
    indices = indices[bounds[process_index] : bounds[process_index + 1]]
    try:
        for index in tqdm(indices, desc="Reading images", disable=process_index > 0 or len(indices) < 5_000):
            part.append(images.digest(int(index)))
    except UsageError as error:
        failure = str(error)
    parts = gather([(part, failure)])
    for _, failure in parts:
        if failure is not None:
            raise UsageError(failure)
    return [digest for part, _ in parts for digest in part]


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
    """

    def __init__(
        self, images: Images, candidates: np.ndarray, forgotten: set[bytes], seed: int, limit: int | None = None
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
        self.copies = np.zeros(len(images), dtype=bool)

    def __getitem__(self, position: int) -> int:
        """The row at a position.

        Raises:
            UsageError: where an image on the way there cannot be used.
        """
        self.walk(position + 1)
        if position < len(self.drawn):
            return int(self.drawn[position])
        epoch, index = divmod(position, len(self.drawn))
        return int(self.drawn[epoch_order(self.seed, 0, epoch, len(self.drawn))[index]])

    def walk(self, num_positions: int, digest: Callable[[Images, Sequence[int]], list[bytes]] = digest_images) -> None:
        """Check as many rows as the first `num_positions` positions need.

        Args:
            digest: `digest_images`, or with its arguments for several processes that all call this.
        """
        wanted = min(num_positions, self.limit)
        while len(self.drawn) < wanted and self.walked < len(self.first_pass):
            rows = self.first_pass[self.walked : self.walked + wanted - len(self.drawn)]
            self.drawn = np.concatenate([self.drawn, rows[~self._are_copies(rows, digest)]])
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
            found += part[~self._are_copies(part, digest_images)].tolist()
            start += len(part)
        return sorted(found)

    def counts(self) -> dict[str, int]:
        """For `unlearning.json`: images to keep and duplicates removed, as far as is known, and images compared."""
        removed = int(self.copies.sum())
        return {
            "keep": min(self.limit, len(self.candidates) - removed),
            "duplicates_removed": removed,
            "checked": int(self.checked.sum()),
        }

    def _are_copies(self, rows: np.ndarray, digest: Callable) -> np.ndarray:
        new = rows[~self.checked[rows]]
        for row, found in zip(new, digest(self.images, new), strict=True):
            self.digests[row] = np.frombuffer(found, dtype=np.uint8)
            self.copies[row] = found in self.forgotten
            self.checked[row] = True
        return self.copies[rows]
