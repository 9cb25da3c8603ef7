"""Near copies of forget images in the keep set: encoded again, resized, cropped a little, brightened or mirrored.

A picture is a near copy where it correlates by `MIN_SIMILARITY` with a forget image, and lies `GAP` times nearer to a
perfect copy than the most similar of the ordinary images to keep. The second condition spares handwritten digits of one
class, which correlate by up to 0.99 with each other. benchmarks/near_copies.py shows what the rule finds and spares.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from siss_diffusers.data.images import Images
from siss_diffusers.errors import UsageError
from siss_diffusers.similarity import correlation, correlations, shrink


MIN_SIMILARITY = 0.95
GAP = 5
ALIKE = 0.9
# Ordinary images that differ from a forget image by at most this share of its contrast are copies of it, whatever the
# others are like. The nearest honest pair of the benchmark, two digits, differs by 0.14.
SURE = 0.125
# So few numbers do not tell a copy from a picture of the same thing, unless they are equal.
MIN_NUMBERS = 1_000
# Pictures are compared at this size at most. A crop by 5 % moves what it shows by less than a pixel then.
SIZE = 32
# What a crop by up to 6 % has enlarged.
ZOOMS = (1.0, 1.02, 1.04, 1.06)
# A first look at so many pixels a side, which is cheap, passes what correlates by so much. No copy of the benchmark that
# the second look accepts is below 0.84 there.
FIRST_SIZE, FIRST_SIMILARITY = 8, 0.8
# How many ordinary images the second condition looks at.
NUM_ORDINARY = 512


@dataclass(frozen=True)
class Match:
    """A near copy.

    Args:
        digest: of the forget image that it is most similar to.
        similarity: the highest correlation with it, up to 1.
    """

    digest: bytes
    similarity: float


def thumbnail(pixels: Tensor) -> Tensor:
    """Return a picture `(C, H, W)` in [-1, 1] as it is compared: small, in [0, 1].

    In float64, so that the rounding of a matrix product, which may depend on how many pictures it has, decides nothing.
    """
    return shrink(pixels[None], SIZE)[0].double() / 2 + 0.5


class NearCopies:
    """Tells which pictures are near copies of a forget image.

    The answer for a picture depends on the forget images and on the ordinary images alone, not on the pictures that are
    asked about with it.

    Args:
        references: a thumbnail of each distinct forget image by its digest.
        ordinary: returns thumbnails `(M, C, H, W)` of images to keep, copies among them or not; called at most once, where
            a picture is suspicious.
    """

    def __init__(self, references: dict[bytes, Tensor], ordinary: Callable[[], Tensor]) -> None:
        self.digests = list(references)
        self.references = torch.stack(list(references.values()))
        self._read_ordinary = ordinary
        self._limits: dict[int, Limits] = {}
        self._variants: tuple[int, Tensor] | None = None

    @cached_property
    def ordinary(self) -> Tensor:
        """Return thumbnails of ordinary images to keep, without those that are copies of a forget image for sure. Where these are
        many, they would pass for the kind of picture that is ordinary."""
        pictures = self._read_ordinary()
        copies = torch.zeros(len(pictures), dtype=torch.bool)
        for index, rows in self.candidates(pictures):
            copies[rows] |= self.distance(pictures[rows], index) <= self.sure_distance(index)
        return pictures[~copies]

    def find(self, pictures: Tensor) -> list[Match | None]:
        """Return for each picture `(N, C, H, W)`, from `thumbnail`, the forget image that it is a near copy of."""
        matches: list[Match | None] = [None] * len(pictures)
        for index, rows in self.candidates(pictures):
            for row, similarity in zip(rows.tolist(), self.similarity(pictures[rows], index).tolist()):
                best = matches[row]
                if similarity < MIN_SIMILARITY or (best is not None and similarity <= best.similarity):
                    continue
                limits = self.limits(index)
                if similarity >= limits.similarity and self.distance(pictures[[row]], index).item() <= limits.distance:
                    matches[row] = Match(self.digests[index], similarity)
        return matches

    def candidates(self, pictures: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield each forget image that some pictures are similar to at a first look, and the rows of these."""
        small, references = shrink(pictures, FIRST_SIZE), shrink(self.references, FIRST_SIZE)
        first = torch.maximum(correlations(small, references), correlations(small, references.flip(-1)))
        candidates = first >= FIRST_SIMILARITY
        for index in candidates.any(0).nonzero().flatten().tolist():
            yield index, candidates[:, index].nonzero().flatten()

    def sure_distance(self, index: int) -> float:
        """Return how far away at most a picture is a copy of a forget image for sure; 0 for equal pictures."""
        reference = self.references[index]
        return SURE * reference.std().item() if reference.numel() >= MIN_NUMBERS else 0.0

    def similarity(self, pictures: Tensor, index: int) -> Tensor:
        """Return the highest correlation of pictures `(N, C, H, W)` with a forget image, `(N,)`: enlarged a little,
        moved by up to a pixel, and mirrored."""
        return correlation(pictures, self.variants(index)).round(decimals=6)

    def distance(self, pictures: Tensor, index: int) -> Tensor:
        """Return the least root mean square difference of pixels in [0, 1] to a forget image, `(N,)`: enlarged a little
        and mirrored."""
        differences = [(pictures - variant).square().flatten(1).mean(1).sqrt() for variant in self.variants(index)]
        return torch.stack(differences).amin(0).round(decimals=6)

    def variants(self, index: int) -> Tensor:
        """Return a forget image as a crop or a mirror would leave it, `(V, C, H, W)`. Those of one image are asked for several
        times in a row, and are kept until another is asked for: of thousands of images they would fill the memory."""
        latest = self._variants
        if latest is None or latest[0] != index:
            latest = self._variants = (index, self._enlarged_and_mirrored(index))
        return latest[1]

    def _enlarged_and_mirrored(self, index: int) -> Tensor:
        zooms = torch.tensor(ZOOMS, dtype=torch.float64)
        grids = torch.zeros(len(zooms), 2, 3, dtype=torch.float64)
        grids[:, 0, 0] = grids[:, 1, 1] = 1 / zooms
        enlarged = self.references[index].expand(len(zooms), -1, -1, -1)
        grid = F.affine_grid(grids, list(enlarged.shape), align_corners=False)
        enlarged = F.grid_sample(enlarged, grid, padding_mode="border", align_corners=False)
        return torch.cat([enlarged, enlarged.flip(-1)])

    def limits(self, index: int) -> "Limits":
        """Return how similar and how near a picture must be to a forget image to be its near copy."""
        if index not in self._limits:
            similarity = self.similarity(self.ordinary, index)
            if len(similarity) and similarity.median() >= ALIKE:
                distance = self.distance(self.ordinary, index).median().item() / GAP
                sure = self.sure_distance(index)
                self._limits[index] = Limits(MIN_SIMILARITY, max(distance, sure) if sure else 0.0)
            else:
                # Near copies among the ordinary images, which are above, say nothing about the others.
                highest = max([value for value in similarity.tolist() if value < MIN_SIMILARITY], default=0.0)
                self._limits[index] = Limits(max(MIN_SIMILARITY, 1 - (1 - highest) / GAP), inf)
        return self._limits[index]


@dataclass(frozen=True)
class Limits:
    """How similar at least, and how far away at most, a near copy is."""

    similarity: float
    distance: float


def read_thumbnails(images: Images, rows: Sequence[int] | np.ndarray) -> Tensor:
    """Return thumbnails `(N, C, H, W)` of rows; those that cannot be read are left out: they need not be drawn."""
    thumbnails = []
    for row in rows:
        try:
            thumbnails.append(thumbnail(images.load(int(row))))
        except UsageError:
            continue
    # One flat picture where there is none: it is similar to nothing.
    return torch.stack(thumbnails or [torch.zeros(images.transform.channels, SIZE, SIZE, dtype=torch.float64)])
