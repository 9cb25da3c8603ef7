"""Images, the split into what to keep and what to forget, and pairs of the two with everything drawn for them."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import count
from pathlib import Path

import datasets
import numpy as np
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from siss_diffusers.draws import NEIGHBORS, PAIR, keyed_generator, mixture_components, shuffled_index
from siss_diffusers.errors import UsageError
from siss_diffusers.methods import Method


# ReTrack searches the neighbours of a forget image among at most this many keep images.
MAX_NEIGHBOR_CANDIDATES = 10_000


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """Convert a picture to the 1 or 3 channels of the model.

    Raises:
        ValueError: for a coloured picture and a model of one channel: its colours would be lost silently.
    """
    if image.mode.startswith("I;16"):
        # Pillow clips 16-bit grey levels at 255 instead of scaling them.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if channels == 3:
        return image.convert("RGB")
    if image.mode in ("1", "L", "LA", "I", "F"):
        return image.convert("L")
    red, green, blue = image.convert("RGB").split()
    if red.tobytes() != green.tobytes() or green.tobytes() != blue.tobytes():
        raise ValueError("it has colours and the model has one channel; convert it to grey, or use a model of three")
    return red


@dataclass(frozen=True)
class ImageTransform:
    """From a picture to the tensor that the network sees, as in the official scripts: resize, crop, flip, [-1, 1].

    Args:
        channels: 1 or 3, the model's.
        resolution: the shorter side is resized to it, then a square is cropped.
        center_crop: crop the middle instead of a random square.
        random_flip: mirror every other picture.
        preserve_input_precision: do not round 16-bit pictures to 8 bits.
    """

    channels: int
    resolution: int
    center_crop: bool = False
    random_flip: bool = False
    preserve_input_precision: bool = False

    def __call__(self, image: Image.Image, generator: np.random.Generator | None = None) -> Tensor:
        """`(C, resolution, resolution)` float32 in [-1, 1]; without a generator nothing is random."""
        if self.preserve_input_precision and image.mode.startswith("I;16"):
            picture = TF.convert_image_dtype(TF.pil_to_tensor(image), torch.float32).expand(self.channels, -1, -1)
        else:
            picture = to_channels(image, self.channels)
        picture = TF.resize(picture, self.resolution, TF.InterpolationMode.BILINEAR)
        _, height, width = TF.get_dimensions(picture)
        top, left = (height - self.resolution) // 2, (width - self.resolution) // 2
        if generator is not None and not self.center_crop:
            top = int(generator.integers(height - self.resolution + 1))
            left = int(generator.integers(width - self.resolution + 1))
        picture = TF.crop(picture, top, left, self.resolution, self.resolution)
        if generator is not None and self.random_flip and generator.random() < 0.5:
            picture = TF.hflip(picture)
        return (picture if isinstance(picture, Tensor) else TF.to_tensor(picture)) * 2 - 1


class Images:
    """The image column of a data set, decoded on demand.

    Args:
        rows: the data set; its image column must not decode by itself (`datasets.Image(decode=False)`).
        column: the name of that column.
        transform: what makes tensors of the pictures.
        flag: where the images come from, for error messages.
    """

    def __init__(self, rows: datasets.Dataset, column: str, transform: ImageTransform, flag: str) -> None:
        self.rows = rows
        self.column = column
        self.transform = transform
        self.flag = flag

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, indices: Sequence[int]) -> "Images":
        return Images(self.rows.select(indices), self.column, self.transform, self.flag)

    def open(self, index: int) -> Image.Image:
        """The whole picture, decoded.

        Raises:
            UsageError: naming the file, where it cannot be read.
        """
        cell = self.rows[index][self.column]
        try:
            with Image.open(cell["path"] if cell["bytes"] is None else BytesIO(cell["bytes"])) as image:
                image.load()
                return image
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UsageError(f"{self.flag}: cannot read {self._name(index)} ({error}); repair or remove it")

    def load(self, index: int, generator: np.random.Generator | None = None) -> Tensor:
        """`(C, H, W)` float32 in [-1, 1]; without a generator nothing is random."""
        image = self.open(index)
        try:
            return self.transform(image, generator)
        except ValueError as error:
            raise UsageError(f"{self.flag}: cannot use {self._name(index)}: {error}")

    def digest(self, index: int) -> bytes:
        """Identifies the decoded pixels, whatever the file format. Also proves that the image can be used."""
        self.load(index)
        image = self.open(index)
        if not image.mode.startswith("I;16"):
            image = image.convert("RGB")
        return hashlib.blake2b(f"{image.size}".encode() + image.tobytes(), digest_size=16).digest()

    def _name(self, index: int) -> str:
        return self.rows[index][self.column]["path"] or f"image {index}"


def digest_images(
    images: Images, process_index: int = 0, num_processes: int = 1, gather: Callable[[list], list] = list
) -> list[bytes]:
    """The digest of every image, computed in equal parts by all processes.

    Args:
        gather: concatenates the lists of all processes, such as `accelerate.utils.gather_object`.

    Raises:
        UsageError: on every process, where any of them cannot use an image.
    """
    bounds = np.linspace(0, len(images), num_processes + 1).astype(int)
    part, failure = [], None
    indices = range(bounds[process_index], bounds[process_index + 1])
    try:
        for index in tqdm(indices, desc="Reading images", disable=process_index > 0 or len(indices) < 5_000):
            part.append(images.digest(index))
    except UsageError as error:
        failure = str(error)
    parts = gather([(part, failure)])
    for _, failure in parts:
        if failure is not None:
            raise UsageError(failure)
    return [digest for part, _ in parts for digest in part]


def forget_rows_of(
    rows: datasets.Dataset,
    image_column: str,
    forget_files: Sequence[str] | None = None,
    forget_column: str | None = None,
    forget_value: str | None = None,
    train_data_dir: str | None = None,
) -> list[int] | None:
    """Indices of the rows to forget, by file names or by the value of a column; None where neither was given and the
    data set has no boolean column `forget`.

    Raises:
        UsageError: for a file or column that is not there, or a column that needs a value.
    """
    if forget_files:
        paths = [Path(cell["path"]) for cell in rows[image_column]]
        by_name: dict[str, list[int]] = {}
        for index, path in enumerate(paths):
            by_name.setdefault(path.name, []).append(index)
            if path.is_relative_to(Path(train_data_dir).resolve()):
                by_name.setdefault(path.relative_to(Path(train_data_dir).resolve()).as_posix(), []).append(index)
        found = []
        for name in forget_files:
            matches = sorted(set(by_name.get(Path(name).as_posix(), [])))
            if len(matches) != 1:
                problem = "is not in" if not matches else f"names {len(matches)} files of"
                raise UsageError(f"--forget_files: {name} {problem} --train_data_dir; give its path relative to it")
            found += matches
        return sorted(set(found))

    if forget_column is None:
        feature = rows.features.get("forget")
        if not (isinstance(feature, datasets.Value) and feature.dtype == "bool"):
            return None
        forget_column = "forget"
    if forget_column not in rows.features:
        raise UsageError(f"--forget_column: no column {forget_column!r}; the data has {', '.join(rows.features)}")
    feature, values = rows.features[forget_column], list(rows[forget_column])
    if forget_value is None:
        if not (isinstance(feature, datasets.Value) and feature.dtype == "bool"):
            raise UsageError(f"--forget_value is needed, since the column {forget_column!r} is not boolean")
        return [index for index, value in enumerate(values) if value]
    names = [feature.int2str(value) for value in values] if isinstance(feature, datasets.ClassLabel) else values
    return [index for index, (value, name) in enumerate(zip(values, names)) if forget_value in (str(value), str(name))]


def nearest_neighbors(keep: Images, forget: Images, num_neighbors: int, seed: int) -> tuple[list[list[int]], int]:
    """For each forget image the `num_neighbors` keep images nearest in pixel L2, and how many were searched.

    Raises:
        UsageError: where there are fewer keep images than neighbours.
    """
    if len(keep) < num_neighbors:
        raise UsageError(
            f"--method_args num_neighbors={num_neighbors}: there are only {len(keep)} images to keep; lower it"
        )
    candidates = np.arange(len(keep))
    if len(keep) > MAX_NEIGHBOR_CANDIDATES:
        generator = keyed_generator(seed, NEIGHBORS)
        candidates = np.sort(generator.choice(len(keep), MAX_NEIGHBOR_CANDIDATES, replace=False))
    targets = torch.stack([forget.load(index) for index in range(len(forget))]).flatten(1)
    distances = torch.empty(len(forget), len(candidates))
    for column, index in enumerate(candidates):
        distances[:, column] = (targets - keep.load(int(index)).flatten()).square().sum(1)
    nearest = distances.topk(num_neighbors, largest=False).indices
    return [[int(candidates[column]) for column in row] for row in nearest], len(candidates)


class PairDataset(Dataset):
    """Item `p` is pair `p % num_pairs` of window `p // num_pairs`: one keep and one forget image, and all draws.

    Args:
        keep, forget: what to keep and what to forget.
        method: decides what else a query needs.
        num_pairs: pairs in the window of one optimizer step, over all processes and micro-batches.
        timestep_range: `(lo, hi)`; timesteps are uniform in lo <= t < hi.
        seed: of every draw.
        neighbors: from `nearest_neighbors`, for a method with `num_neighbors`.
    """

    def __init__(
        self,
        keep: Images,
        forget: Images,
        method: Method,
        num_pairs: int,
        timestep_range: tuple[int, int],
        seed: int,
        neighbors: list[list[int]] | None = None,
    ) -> None:
        self.keep = keep
        self.forget = forget
        self.method = method
        self.num_pairs = num_pairs
        self.timestep_range = timestep_range
        self.seed = seed
        self.neighbors = neighbors

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        window, pair = divmod(position, self.num_pairs)
        generator = keyed_generator(self.seed, PAIR, window, pair)
        keep_index = shuffled_index(self.seed, 0, position, len(self.keep))
        forget_index = shuffled_index(self.seed, 1, position, len(self.forget))
        components = mixture_components(self.seed, window, self.num_pairs, getattr(self.method, "lam", 0.0))

        timestep = int(generator.integers(*self.timestep_range))
        keep = self.keep.load(keep_index, generator)
        forget = self.forget.load(forget_index, generator)
        item = {
            "keep": keep,
            "forget": forget,
            "noise": torch.from_numpy(generator.standard_normal(keep.shape, dtype=np.float32)),
            "timesteps": torch.tensor(timestep),
            "from_forget": torch.tensor(bool(components[pair])),
        }
        if self.method.draws_uniform:
            item["uniform"] = torch.from_numpy(generator.random(keep.shape, dtype=np.float32))
        if self.neighbors is not None:
            item["neighbors"] = torch.stack([self.keep.load(index) for index in self.neighbors[forget_index]])
        return item


@dataclass(frozen=True)
class WindowSampler:
    """This process's micro-batches, window after window without end, as positions into a `PairDataset`.

    Micro-batch m of process r holds pairs `(m num_processes + r) batch_size ...` of the window, so that the union over
    processes and micro-batches does not depend on how it is split.
    """

    batch_size: int
    accumulation_steps: int
    process_index: int
    num_processes: int
    first_window: int

    @property
    def num_pairs(self) -> int:
        return self.batch_size * self.accumulation_steps * self.num_processes

    def __iter__(self) -> Iterator[list[int]]:
        for window in count(self.first_window):
            for micro_step in range(self.accumulation_steps):
                start = window * self.num_pairs
                start += (micro_step * self.num_processes + self.process_index) * self.batch_size
                yield list(range(start, start + self.batch_size))


def window_loader(pairs: PairDataset, sampler: WindowSampler, num_workers: int = 0) -> DataLoader:
    """Batches of `pairs` in the order of `sampler`, as dictionaries of the tensors of a `Query`."""
    return DataLoader(pairs, batch_sampler=sampler, num_workers=num_workers)
