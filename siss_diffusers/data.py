"""Images, the split into what to keep and what to forget, and pairs of the two with everything drawn for them."""

import argparse
import hashlib
import os
import re
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from io import BytesIO
from itertools import count, islice
from pathlib import Path
from typing import Protocol

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torchvision.transforms.functional as TF
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import load_dataset
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from siss_diffusers.draws import PAIR, epoch_order, keyed_generator, mixture_components, shuffled_index
from siss_diffusers.errors import UsageError
from siss_diffusers.methods import Method


# ReTrack searches the neighbours of a forget image among at most this many keep images.
MAX_NEIGHBOR_CANDIDATES = 10_000
# A picture of a pixel by a million is a file of nothing, until its shorter side is resized to 512.
MAX_RESIZED_PIXELS = 100_000_000


def reason(error: BaseException) -> str:
    """What an error says, in one line, with its kind where that is needed to understand it."""
    line = next(iter(str(error).strip().splitlines()), "")
    return line if line and isinstance(error, OSError | ValueError) else f"{type(error).__name__} {line}".strip()


@cache
def image_formats() -> list[str]:
    """All but EPS: Pillow has Ghostscript run such a file, and it is a program."""
    Image.init()
    return [name for name in Image.ID if name != "EPS"]


def open_image(source: str | Path | bytes) -> Image.Image:
    """A picture of which only the header is read, from a file or its bytes.

    Raises:
        Exception: of any kind, for Pillow does not say of which.
    """
    if isinstance(source, bytes):
        return Image.open(BytesIO(source), formats=image_formats())
    if not os.path.isfile(source):  # a pipe would never end
        raise FileNotFoundError("it is not there, or no regular file")
    return Image.open(source, formats=image_formats())


def read_image(source: str | Path | bytes) -> Image.Image:
    """The whole picture, decoded.

    Raises:
        ValueError: saying what is wrong with it.
    """
    try:
        with open_image(source) as image:
            image.load()
            return image
    except Exception as error:
        raise ValueError(reason(error)) from error


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
        interpolation: of the resizing, a value of torchvision's `InterpolationMode`.
    """

    channels: int
    resolution: int
    center_crop: bool = False
    random_flip: bool = False
    preserve_input_precision: bool = False
    interpolation: str = "bilinear"

    def __call__(self, image: Image.Image, generator: np.random.Generator | None = None) -> Tensor:
        """`(C, resolution, resolution)` float32 in [-1, 1]; without a generator nothing is random.

        Raises:
            ValueError: for a picture that cannot be used.
        """
        if max(image.size) / max(min(image.size), 1) * self.resolution**2 > MAX_RESIZED_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are too narrow to resize; crop it")
        if self.preserve_input_precision and image.mode.startswith("I;16"):
            levels = torch.from_numpy(np.asarray(image).astype(np.uint16))
            picture = TF.convert_image_dtype(levels, torch.float32).expand(self.channels, -1, -1)
        else:
            picture = to_channels(image, self.channels)
        picture = TF.resize(picture, self.resolution, TF.InterpolationMode(self.interpolation))
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

    def all_square(self, indices: Iterable[int] | None = None) -> bool:
        """Whether cropping has nothing to choose in these images, or in all; reads headers only.

        Raises:
            UsageError: naming the file, where it cannot be read.
        """
        for index in range(len(self)) if indices is None else indices:
            try:
                with open_image(source_of(self.rows[int(index)][self.column])) as image:
                    if image.width != image.height:
                        return False
            except Exception as error:
                raise self._unreadable(index, reason(error))
        return True

    def open(self, index: int) -> Image.Image:
        """The whole picture, decoded.

        Raises:
            UsageError: naming the file, where it cannot be read.
        """
        try:
            return read_image(source_of(self.rows[index][self.column]))
        except ValueError as error:
            raise self._unreadable(index, str(error))

    def load(self, index: int, generator: np.random.Generator | None = None) -> Tensor:
        """`(C, H, W)` float32 in [-1, 1]; without a generator nothing is random."""
        image = self.open(index)
        try:
            return self.transform(image, generator)
        except ValueError as error:
            raise UsageError(f"{self.flag}: cannot use {self._name(index)}: {reason(error)}")

    def digest(self, index: int) -> bytes:
        """Identifies the decoded pixels, whatever the file format. Also proves that the image can be used."""
        self.load(index)
        image = self.open(index)
        if not image.mode.startswith("I;16"):
            image = image.convert("RGB")
        return hashlib.blake2b(f"{image.size}".encode() + image.tobytes(), digest_size=16).digest()

    def _name(self, index: int) -> str:
        return self.rows[index][self.column]["path"] or f"image {index}"

    def _unreadable(self, index: int, why: str) -> UsageError:
        return UsageError(f"{self.flag}: cannot read {self._name(index)} ({why}); repair or remove it")


def source_of(cell: dict) -> str | bytes:
    """What is in a cell of a column `datasets.Image(decode=False)`."""
    return cell["path"] if cell["bytes"] is None else cell["bytes"]


def check_declared_files(flag: str, folder: str) -> None:
    """The data card of a local data set may name its files: only those within it.

    Raises:
        UsageError: for any others, before `datasets` looks for them.
    """
    for name in (datasets.config.REPOCARD_FILENAME, datasets.config.REPOYAML_FILENAME):
        file = Path(folder, name)
        if not file.is_file():
            continue
        try:
            card = huggingface_hub.metadata_load(file) if name.endswith(".md") else yaml.safe_load(file.read_text())
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise UsageError(f"{flag}: cannot read {file} ({reason(error)}); repair or remove it")
        configs = card.get("configs") if isinstance(card, dict) else None
        for config in configs if isinstance(configs, list) else []:
            for declared in declared_files(config):
                if "://" in declared or os.path.isabs(declared) or ".." in Path(declared).parts:
                    raise UsageError(
                        f"{flag}: {file} names {declared}, which lies outside of {folder}; remove it there"
                    )


def declared_files(config: object) -> Iterator[str]:
    """`data_files` and `data_dir` of a configuration in a data card: a pattern, or a list of patterns or of splits."""
    if isinstance(config, dict):
        files = config.get("data_files")
        found = [config.get("data_dir"), *(files if isinstance(files, list) else [files])]
        for item in found:
            paths = item.get("path") if isinstance(item, dict) else item
            yield from (path for path in (paths if isinstance(paths, list) else [paths]) if isinstance(path, str))


def load_rows(
    flag: str, name: str, config_name: str | None = None, cache_dir: str | None = None, image_folder: bool = False
) -> datasets.Dataset:
    """The split `train` of a data set, or of a folder of images with or without metadata. No image is read.

    Raises:
        UsageError: for anything that cannot be loaded.
    """
    try:
        if image_folder:
            return load_dataset("imagefolder", data_dir=name, cache_dir=cache_dir, split="train")
        check_declared_files(flag, name)
        return load_dataset(name, config_name, cache_dir=cache_dir, split="train")
    except UsageError:
        raise
    except Exception as error:  # whatever the parsers make of a broken file
        cause = error.__cause__ or error  # what went wrong while generating, not that it did
        raise UsageError(f"{flag}: {name or repr(name)} cannot be loaded ({reason(cause)})") from error


def check_image_paths(rows: datasets.Dataset, column: str, flag: str, roots: Sequence[str]) -> None:
    """Every image must be a file below one of `roots`, by its name (symbolic links may lead anywhere), or in the data.

    Raises:
        UsageError: for any other, before one is read.
    """
    roots = tuple({os.path.join(way(root), "") for root in roots for way in (os.path.abspath, os.path.realpath)})
    first = 0
    for cells in rows.data.column(column).chunks:  # one at a time: a filter copies the paths
        paths, in_file = pc.struct_field(cells, "path"), pc.is_null(pc.struct_field(cells, "bytes"))
        missing = pc.index(pc.and_(pc.is_null(paths), in_file), True).as_py()
        if missing >= 0:
            raise UsageError(
                f"{flag}: row {first + missing} has no image; remove it, or name its file in the metadata"
            )
        paths = paths.filter(in_file)
        for root in roots:
            below = pc.and_(pc.starts_with(paths, root), pc.invert(pc.match_substring(paths, "..")))
            paths = paths.filter(pc.invert(below))
        for path in paths.to_pylist():
            if "::" in path:
                raise UsageError(f"{flag}: {path} lies in an archive; unpack it")
            if ".." in Path(path).parts or not os.path.abspath(path).startswith(roots):
                raise UsageError(f"{flag}: {path} lies outside of the data set; copy or link it there")
        first += len(cells)


def load_image_rows(args: argparse.Namespace, flag: str, folder: str | None) -> datasets.Dataset:
    """The rows of an image folder, or of --dataset_name where `folder` is None, their images not yet decoded."""
    if folder is not None and not os.path.isdir(folder):
        raise UsageError(f"{flag}: no folder {folder or repr(folder)}")
    source, config_name = (args.dataset_name, args.dataset_config_name) if folder is None else (folder, None)
    rows = load_rows(flag, source, config_name, args.cache_dir, image_folder=folder is not None)
    column = args.image_column if folder is None or folder == args.train_data_dir else "image"
    if not isinstance(rows.features.get(column), datasets.Image):
        raise UsageError(f"--image_column: {flag} has no image column {column!r}, only {', '.join(rows.features)}")
    # No others that would be decoded with every row.
    plain = (datasets.Value, datasets.ClassLabel)
    kept = [
        name
        for name, feature in rows.features.items()
        if name == column or isinstance(getattr(feature, "feature", feature), plain)
    ]
    rows = rows.select_columns(kept).cast_column(column, datasets.Image(decode=False))
    downloads = (args.cache_dir, datasets.config.HF_DATASETS_CACHE, huggingface_hub.constants.HF_HUB_CACHE)
    roots = [source] if os.path.isdir(source) else [str(root) for root in downloads if root]
    check_image_paths(rows, column, flag, roots)
    return rows


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
        return named_rows(rows.data.column(image_column), forget_files, Path(train_data_dir).resolve())

    if forget_column is None:
        feature = rows.features.get("forget")
        if not (isinstance(feature, datasets.Value) and feature.dtype == "bool"):
            return None
        forget_column = "forget"
    if forget_column not in rows.features:
        raise UsageError(f"--forget_column: no column {forget_column!r}; the data has {', '.join(rows.features)}")
    feature, column = rows.features[forget_column], rows.data.column(forget_column)
    if forget_value is None:
        if not (isinstance(feature, datasets.Value) and feature.dtype == "bool"):
            raise UsageError(f"--forget_value is needed, since the column {forget_column!r} is not boolean")
        return rows_where(column, lambda values: pc.fill_null(values, False)).tolist()
    if pa.types.is_nested(column.type):
        raise UsageError(f"--forget_column: {forget_column!r} holds lists; name a column of single values")
    int2str = feature.int2str if isinstance(feature, datasets.ClassLabel) else str

    def has_value(values: pa.Array) -> pa.Array:
        if pa.types.is_string(values.type):
            return pc.fill_null(pc.equal(values, forget_value), False)
        distinct = values.unique()
        matches = [
            value is not None and forget_value in (str(value), str(int2str(value))) for value in distinct.to_pylist()
        ]
        return pc.is_in(values, distinct.filter(pa.array(matches, pa.bool_())))

    return rows_where(column, has_value).tolist()


def rows_where(column: pa.ChunkedArray, condition: Callable[[pa.Array], pa.Array]) -> np.ndarray:
    """Numbers of the rows for which `condition` holds, `(M,)` int64. A chunk at a time: what it makes of a column of a
    million rows never lies in memory at once."""
    found, first = [np.empty(0, dtype=np.int64)], 0
    for values in column.chunks:
        found.append(np.flatnonzero(condition(values).to_numpy(zero_copy_only=False)) + first)
        first += len(values)
    return np.concatenate(found)


def named_rows(cells: pa.ChunkedArray, names: Sequence[str], root: Path) -> list[int]:
    """The rows of the image files of these names, or of these paths below `root`.

    Raises:
        UsageError: for a name of no file, or of several.
    """
    wanted = {Path(name).as_posix() for name in names}
    whole = pa.array([str(root / name) for name in wanted], pa.string())
    last_parts = pa.array([name for name in wanted if "/" not in name], pa.string())
    paths = pc.struct_field(cells, "path")

    def is_named(values: pa.Array) -> pa.Array:
        last = pc.replace_substring_regex(values, rf"(?s)^.*{re.escape(os.sep)}", "")
        return pc.or_(pc.is_in(values, whole), pc.is_in(last, last_parts))

    rows = rows_where(paths, is_named)
    by_name: dict[str, list[int]] = {}
    for index, path in zip(rows.tolist(), map(Path, paths.take(pa.array(rows)).to_pylist())):
        below = {path.relative_to(root).as_posix()} if path.is_relative_to(root) else set()
        for name in {path.name, *below} & wanted:
            by_name.setdefault(name, []).append(index)
    found = []
    for name in names:
        matches = by_name.get(Path(name).as_posix(), [])
        if len(matches) != 1:
            problem = "is not in" if not matches else f"names {len(matches)} files of"
            raise UsageError(f"--forget_files: {name} {problem} --train_data_dir; give its path relative to it")
        found += matches
    return sorted(set(found))


def split_data(
    args: argparse.Namespace,
    transform: ImageTransform,
    accelerator: Accelerator,
    num_positions: int | None = None,
    max_keep: int | None = None,
) -> tuple[Images, Images, KeepOrder, list[bytes]]:
    """What to keep and what to forget, by the flags of `add_unlearning_arguments`.

    Args:
        num_positions: how far the order of the images to keep is checked; None: every image.
        max_keep: use only so many images of the keep set.

    Returns:
        The training set, the forget set, the order of what to keep of the former, and the digests of the latter.

    Raises:
        UsageError: for a set that is empty, or an image that is needed and cannot be used.
    """
    train_flag = "--train_data_dir" if args.train_data_dir else "--dataset_name"
    with accelerator.main_process_first():
        rows = load_image_rows(args, train_flag, args.train_data_dir)
        forget_rows = None
        if args.forget_data_dir is not None:
            forget_rows = load_image_rows(args, "--forget_data_dir", args.forget_data_dir)
    train = Images(rows, args.image_column, transform, train_flag)

    candidates = np.arange(len(train))
    if forget_rows is not None:
        forget = Images(forget_rows, "image", transform, "--forget_data_dir")
    else:
        forget_indices = forget_rows_of(
            rows, args.image_column, args.forget_files, args.forget_column, args.forget_value, args.train_data_dir
        )
        if forget_indices is None:
            raise UsageError(
                "nothing to forget: give --forget_data_dir, --forget_files or --forget_column, or a data set with a"
                " boolean column `forget`"
            )
        forget = train.select(forget_indices)
        candidates = np.delete(candidates, forget_indices)
    if len(forget) == 0:
        raise UsageError("the forget set is empty; check --forget_data_dir, --forget_column and --forget_value")

    digest = partial(
        digest_images,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        gather=gather_object if accelerator.num_processes > 1 else list,
    )
    forget_digests = digest(train, forget_indices) if forget_rows is None else digest(forget, range(len(forget)))
    order = KeepOrder(train, candidates, set(forget_digests), args.seed, max_keep)
    order.walk(len(train) if num_positions is None else num_positions, digest)
    if len(order.drawn) == 0:
        raise UsageError(
            "nothing to keep: every image of the training set is in the forget set; widen --train_data_dir"
        )
    return train, forget, order, forget_digests


def load_captions(images: Images, column: str, rows: np.ndarray | None = None) -> pa.ChunkedArray:
    """The prompt of every image, as strings of Arrow; of several, the first.

    Args:
        rows: which images must have one; default: all.

    Raises:
        UsageError: where the column or a prompt is missing.
    """
    if column not in images.rows.features:
        raise UsageError(
            f"{images.flag} has no captions: there is no column {column!r}, only {', '.join(images.rows.features)};"
            ' add lines {"file_name": ..., "text": ...} in a metadata.jsonl, or name the column by --caption_column'
        )
    captions = images.rows.with_format("arrow")[column][:]
    if pa.types.is_nested(captions.type):
        not_empty = pc.greater(pc.list_value_length(captions), 0)
        captions = pc.list_element(pc.if_else(not_empty, captions, pa.scalar(None, captions.type)), 0)
    if not (pa.types.is_string(captions.type) or pa.types.is_large_string(captions.type)):
        captions = pa.chunked_array([pa.nulls(len(captions), pa.string())])
    missing = pc.is_null(captions).to_numpy()
    missing = missing if rows is None else missing[rows]
    if missing.any():
        raise UsageError(
            f"{images.flag}: {missing.sum()} of {len(missing)} images have no caption in --caption_column {column!r};"
            ' add them ("" is a caption)'
        )
    return captions


def same_captions(captions: pa.ChunkedArray, wanted: Iterable[str]) -> np.ndarray:
    """Which captions are one of `wanted` but for case and white space, which the tokenizer of Stable Diffusion does not
    see either: `(len(captions),)` bool."""

    def normalised(texts: pa.Array) -> pa.Array:
        return pc.utf8_trim_whitespace(pc.replace_substring_regex(pc.utf8_lower(texts), r"\s+", " "))

    known = normalised(pa.array(set(wanted), captions.type))
    found = np.zeros(len(captions), dtype=bool)
    found[rows_where(captions, lambda texts: pc.is_in(normalised(texts), known))] = True
    return found


class LoadsImages(Protocol):
    """Images or latents by number: `load` gives `(C, H, W)`; without a generator nothing is random."""

    def __len__(self) -> int: ...

    def load(self, index: int, generator: np.random.Generator | None = None) -> Tensor: ...


def nearest_neighbors(
    keep: LoadsImages,
    forget: LoadsImages,
    num_neighbors: int,
    candidates: Sequence[int],
    keep_conditions: Mapping[int, int] | None = None,
    forget_conditions: Sequence[int] | None = None,
) -> list[list[int]]:
    """For each forget image the `num_neighbors` candidates of its condition that are nearest in L2.

    Raises:
        UsageError: where there are fewer than `num_neighbors`.
    """
    targets = torch.stack([forget.load(index) for index in range(len(forget))]).flatten(1)
    distances = torch.empty(len(forget), len(candidates))
    for column, index in enumerate(candidates):
        distances[:, column] = (targets - keep.load(index).flatten()).square().sum(1)
    if keep_conditions is not None:
        conditions = torch.tensor([keep_conditions[index] for index in candidates])
        distances[torch.tensor(forget_conditions)[:, None] != conditions] = torch.inf
    fewest = int(distances.isfinite().sum(1).min()) if len(candidates) else 0
    if fewest < num_neighbors:
        prompt = "" if keep_conditions is None else " with the prompt of a forget image"
        raise UsageError(
            f"--method_args num_neighbors={num_neighbors}: there are only {fewest} images to keep{prompt}; lower it"
        )
    nearest = distances.topk(num_neighbors, largest=False).indices
    return [[candidates[column] for column in row] for row in nearest.tolist()]


class Latents:
    """The latents of images under a VAE, drawn afresh from its posterior each time.

    Args:
        images: what to encode.
        encode: maps `(C, H, W)` pixels to mean and standard deviation of the posterior, `(c, h, w)` each, on the host.
            One image at a time, so that the latents do not depend on what else is encoded.
        scaling_factor: of the VAE.
    """

    def __init__(
        self, images: Images, encode: Callable[[Tensor], tuple[Tensor, Tensor]], scaling_factor: float
    ) -> None:
        self.images = images
        self.encode = encode
        self.scaling_factor = scaling_factor
        self.cached: dict[int, tuple[Tensor, Tensor]] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def cache(self, indices: Iterable[int], progress: bool = False) -> None:
        """Encode these images once, in memory; others cannot be loaded any more, so the VAE can be freed."""
        indices = sorted(set(indices))
        self.cached = {
            index: self.encode(self.images.load(index))
            for index in tqdm(indices, desc="Encoding images", disable=not progress or len(indices) < 500)
        }
        self.encode = None

    @property
    def cached_bytes(self) -> int:
        return sum(4 * (mean.numel() + std.numel()) for mean, std in self.cached.values())

    def load(self, index: int, generator: np.random.Generator | None = None) -> Tensor:
        """`(c, h, w)` float32, scaled: a draw from the posterior, or its mean without a generator."""
        mean, std = self.encode(self.images.load(index, generator)) if self.cached is None else self.cached[index]
        if generator is not None:
            mean = mean + std * torch.from_numpy(generator.standard_normal(mean.shape, dtype=np.float32))
        return mean * self.scaling_factor


class PairDataset(Dataset):
    """Item `p` is pair `p % num_pairs` of window `p // num_pairs`: one keep and one forget image, and all draws.

    Args:
        keep, forget: what to keep and what to forget.
        keep_order: which of `keep` is at each position.
        method: decides what else a query needs.
        num_pairs: pairs in the window of one optimizer step, over all processes and micro-batches.
        timestep_range: `(lo, hi)`; timesteps are uniform in lo <= t < hi.
        seed: of every draw.
        neighbors: from `nearest_neighbors`, for a method with `num_neighbors`.
        keep_conditions, forget_conditions: the condition of each image that is drawn, where there are conditions.
    """

    def __init__(
        self,
        keep: LoadsImages,
        forget: LoadsImages,
        keep_order: KeepOrder,
        method: Method,
        num_pairs: int,
        timestep_range: tuple[int, int],
        seed: int,
        neighbors: list[list[int]] | None = None,
        keep_conditions: Mapping[int, int] | None = None,
        forget_conditions: Sequence[int] | None = None,
    ) -> None:
        self.keep = keep
        self.forget = forget
        self.keep_order = keep_order
        self.method = method
        self.num_pairs = num_pairs
        self.timestep_range = timestep_range
        self.seed = seed
        self.neighbors = neighbors
        self.keep_conditions = keep_conditions
        self.forget_conditions = forget_conditions

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        window, pair = divmod(position, self.num_pairs)
        generator = keyed_generator(self.seed, PAIR, window, pair)
        keep_index = self.keep_order[position]
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
        if self.keep_conditions is not None:
            item["keep_condition"] = torch.tensor(self.keep_conditions[keep_index])
            item["forget_condition"] = torch.tensor(self.forget_conditions[forget_index])
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


def first_positions(sampler: WindowSampler, num_windows: int) -> list[int]:
    """What this process draws in the first `num_windows` windows."""
    batches = islice(replace(sampler, first_window=0), num_windows * sampler.accumulation_steps)
    return [position for batch in batches for position in batch]


def window_loader(pairs: PairDataset, sampler: WindowSampler, num_workers: int = 0) -> DataLoader:
    """Batches of `pairs` in the order of `sampler`, as dictionaries of the tensors of a `Query`."""
    return DataLoader(
        pairs, batch_sampler=sampler, num_workers=num_workers, worker_init_fn=ignore_signals if num_workers else None
    )


def ignore_signals(_: int) -> None:
    """What a terminal or a scheduler sends to every process is for the main process, which stops its workers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
