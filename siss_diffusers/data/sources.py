"""Folders and data sets as rows whose images are not yet decoded."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.compute as pc
import yaml
from datasets import load_dataset

from siss_diffusers.data.cells import cells_of, image_files
from siss_diffusers.data.column_values import marked_rows, rows_where
from siss_diffusers.data.folders import check_metadata_names, load_folder
from siss_diffusers.data.forget_set import columns_of_marks
from siss_diffusers.data.images import Images, ImageTransform
from siss_diffusers.data.listing import (
    DATA_SUFFIXES,
    NUM_EXAMPLES,
    FolderFiles,
    describe_passed_over,
    list_folder,
    require_folder,
    suffix_of,
)
from siss_diffusers.data.loaded import LoadedRows, OtherSplit
from siss_diffusers.data.saved import cure_of, is_saved, load_saved, with_images
from siss_diffusers.errors import UsageError, describe_error


SPLIT_NAMES = {"train", "training", "test", "testing", "eval", "evaluation", "validation", "valid", "val", "dev"}


def check_declared_files(flag: str, folder: str) -> bool:
    """Check that the data card of a local data set names only files within it.

    Returns:
        Whether there is a card that says what the data are.

    Raises:
        UsageError: for any others, before `datasets` looks for them.
    """
    is_described = False
    for name in (datasets.config.REPOCARD_FILENAME, datasets.config.REPOYAML_FILENAME):
        file = Path(folder, name)
        if not file.is_file():
            continue
        try:
            card = huggingface_hub.metadata_load(file) if name.endswith(".md") else yaml.safe_load(file.read_text())
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise UsageError(f"{flag}: cannot read {file} ({describe_error(error)}); repair or remove it")
        card = card if isinstance(card, dict) else {}
        configs = card.get("configs")
        is_described = is_described or bool(configs or card.get("dataset_info"))
        for config in configs if isinstance(configs, list) else []:
            for declared in declared_files(config):
                if "://" in declared or os.path.isabs(declared) or ".." in Path(declared).parts:
                    raise UsageError(
                        f"{flag}: {file} names {declared}, which lies outside of {folder}; remove it there"
                    )
    return is_described


def declared_files(config: object) -> Iterator[str]:
    """Yield `data_files` and `data_dir` of a configuration in a data card: a pattern, or a list of them or of splits."""
    if isinstance(config, dict):
        files = config.get("data_files")
        found = [config.get("data_dir"), *(files if isinstance(files, list) else [files])]
        for item in found:
            paths = item.get("path") if isinstance(item, dict) else item
            yield from (path for path in (paths if isinstance(paths, list) else [paths]) if isinstance(path, str))


def load_rows(
    flag: str,
    name: str,
    config_name: str | None = None,
    cache_dir: str | None = None,
    columns: Sequence[str] = ("image",),
) -> LoadedRows:
    """Load a data set: its split `train`, or all of a local folder of images. No image is read.

    Args:
        columns: of the images that will be used: the first of these that there is.

    Raises:
        UsageError: for anything that cannot be loaded.
    """
    if is_saved(name):
        return load_saved(flag, name)
    if os.path.isfile(name) and suffix_of(name) != ".py":  # `datasets` says what is wrong with a script
        require_folder(flag, name)
    folder = image_folder_of(flag, name, columns) if config_name is None else None
    if folder is not None:
        return folder
    try:
        splits = dict(load_dataset(name, config_name, cache_dir=cache_dir))
    except Exception as error:  # whatever the parsers make of a broken file
        cause = error.__cause__ or error  # what went wrong while generating, not that it did
        raise UsageError(
            f"{flag}: {name or repr(name)} cannot be loaded ({describe_error(cause)}){cure_of(cause)}"
        ) from error
    if "train" not in splits:
        raise UsageError(f"{flag}: {name} has no split train, only {', '.join(splits)}")
    unread = images_in_no_split(flag, name, splits)
    rows = splits.pop("train")
    return LoadedRows(rows, unread, {split: loaded_split(other) for split, other in splits.items()})


def loaded_split(rows: datasets.Dataset) -> OtherSplit:
    """Return rows of which nothing is used."""
    return OtherSplit(lambda: rows, f"{len(rows)} rows")


def images_in_no_split(flag: str, name: str, splits: Mapping[str, datasets.Dataset]) -> str:
    """Return how many images of a local folder `datasets` put into no split, as a text; empty if there are none."""
    if not os.path.isdir(name) or next(iter(splits.values())).builder_name != "imagefolder":
        return ""
    files = list_folder(flag, name)
    images = pa.array(files.images, pa.string())
    for rows in splits.values():
        for column, feature in rows.features.items():
            if isinstance(feature, datasets.Image):
                paths = pc.struct_field(image_files(rows, column), "path")
                images = images.filter(pc.invert(pc.is_in(images, paths)))
    unread = images.to_pylist()
    return f"{len(unread)} images that are in no split ({files.examples(unread)})" if unread else ""


def image_folder_of(flag: str, name: str, columns: Sequence[str]) -> LoadedRows | None:
    """Load a local folder that holds images and no other data; None for any other data set.

    `datasets` would take files for splits by their names. Where every folder in it has the name of a split, they are
    splits, and `train` is used.

    Raises:
        UsageError: for files that cannot be used.
    """
    if not os.path.isdir(name) or check_declared_files(flag, name):
        return None
    files = list_folder(flag, name)
    check_metadata_names(flag, files)
    suffixes = Counter(map(suffix_of, files.others))
    tables = sum(suffixes[suffix] for suffix in (".csv", ".json", ".jsonl", ".txt"))
    if not files.images or len(files.images) < tables or any(suffixes[suffix] for suffix in (*DATA_SUFFIXES, ".py")):
        return None
    parts = {os.path.relpath(path, files.root).split(os.sep)[0] for path in files.images + files.metadata}
    splits = {part for part in parts if part.lower() in SPLIT_NAMES}
    if splits != parts or len(parts) < 2 or "train" not in parts:
        return LoadedRows(*load_folder(flag, name, columns=columns, files=files))
    rows, passed_over = load_folder(flag, os.path.join(name, "train"), columns=columns)
    others = {split: unread_folder(flag, files, split, columns) for split in sorted(splits - {"train"})}
    beside = describe_passed_over(files.beside("train"))
    return LoadedRows(rows, ", ".join(filter(None, [passed_over, beside])), others)


def unread_folder(flag: str, files: FolderFiles, split: str, columns: Sequence[str]) -> OtherSplit:
    """Return a folder of which nothing is used; what is wrong in it does not matter unless it is looked at."""
    folder = os.path.join(files.root, split)
    count = sum(path.startswith(folder + os.sep) for path in files.images)
    return OtherSplit(lambda: load_folder(flag, folder, columns=columns)[0], f"{count} images")


def check_image_paths(rows: datasets.Dataset, column: str, flag: str, roots: Sequence[str]) -> None:
    """Check that every image is in the data, or a file below one of `roots` by its name (a link may lead anywhere).

    Raises:
        UsageError: for any other, before one is read.
    """
    roots = tuple({os.path.join(way(root), "") for root in roots for way in (os.path.abspath, os.path.realpath)})
    first = 0
    for cells in image_files(rows, column).chunks:  # one at a time: a filter copies the paths
        paths, in_file = (pc.struct_field(cells, part) for part in ("path", "in_file"))
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


@dataclass(frozen=True)
class ImageRows:
    """Rows with a column of images that are not yet decoded.

    Args:
        rows: the data set.
        column: of the images; `datasets.Image(decode=False)`.
        flag: where the rows come from, for messages.
        passed_over: how much of what kind is not used of what was given, as a text; empty for nothing.
        other_splits: of a data set that has several.
    """

    rows: datasets.Dataset
    column: str
    flag: str
    passed_over: str = ""
    other_splits: Mapping[str, OtherSplit] = field(default_factory=dict)

    def images(self, transform: ImageTransform) -> Images:
        return Images(self.rows, self.column, transform, self.flag)


def load_image_rows(
    flag: str,
    source: str,
    column: str,
    *,
    is_folder: bool,
    or_column: str | None = None,
    every_file: bool = False,
    config_name: str | None = None,
    cache_dir: str | None = None,
) -> ImageRows:
    """Load the rows of an image folder, or of a data set, their images not yet decoded.

    Args:
        source: the folder, or the name of the data set.
        column: of the images.
        or_column: of the images, where there is no such column.
        every_file: refuse what would not be used, or is marked as to be kept, as for images to forget.

    Raises:
        UsageError: naming the flag, for a source that cannot be read or has no such column.
    """
    columns = (column, *([] if or_column is None else [or_column]))
    if is_folder:
        require_folder(flag, source)
    if is_folder and is_saved(source):
        loaded = load_saved(flag, source, every_file)
    elif is_folder:
        loaded = LoadedRows(*load_folder(flag, source, columns=columns, every_file=every_file))
    else:
        loaded = load_rows(flag, source, config_name, cache_dir, columns)
    column = next((name for name in columns if name in loaded.rows.features), column)
    downloads = (cache_dir, datasets.config.HF_DATASETS_CACHE, huggingface_hub.constants.HF_HUB_CACHE)
    roots = [source] if os.path.isdir(source) else [str(root) for root in downloads if root]
    images = undecoded(loaded.rows, column, flag, roots)
    if every_file:
        refuse_rows_to_keep(images)
    return replace(images, passed_over=loaded.passed_over, other_splits=loaded.other_splits)


def refuse_rows_to_keep(images: ImageRows) -> None:
    """Refuse images to forget that a column `forget` says no of: all of what is given to forget is forgotten.

    Raises:
        UsageError: naming the first few.
    """
    for column in columns_of_marks(images.rows):
        cells = cells_of(images.rows, column)
        marked = None if pa.types.is_nested(cells.type) else marked_rows(images.rows, column)
        if marked is None:
            continue
        marked = {*marked, *rows_where(cells, pc.is_null).tolist()}
        kept = [row for row in range(len(images.rows)) if row not in marked]
        if kept:
            paths = (images.rows[row][images.column]["path"] for row in kept[:NUM_EXAMPLES])
            names = ", ".join(os.path.basename(path) if path else f"row {row}" for row, path in zip(kept, paths))
            raise UsageError(
                f"{images.flag}: its column `{column}` says no of {len(kept)} images ({names}), and all that is there would be"
                " forgotten; take them out, or drop the column"
            )


def undecoded(rows: datasets.Dataset, column: str, flag: str, roots: Sequence[str] | None) -> ImageRows:
    """Stop a data set from decoding images by itself, and leave out what else it would decode.

    Args:
        roots: folders below which every image file must lie; None for a data set of the caller's own.

    Raises:
        UsageError: where there is no such column, or an image lies elsewhere.
    """
    rows = with_images(rows, column, flag)
    if not isinstance(rows.features.get(column), datasets.Image):
        raise UsageError(f"--image_column: {flag} has no image column {column!r}, only {', '.join(rows.features)}")
    kept = [name for name, feature in rows.features.items() if name == column or is_plain(feature)]
    rows = rows.select_columns(kept).cast_column(column, datasets.Image(decode=False))
    if roots is not None:
        check_image_paths(rows, column, flag, roots)
    return ImageRows(rows, column, flag)


def is_plain(feature: Any) -> bool:
    """Tell whether the values of a column are plain ones, or lists or objects of these, which need no decoding."""
    if isinstance(feature, dict):
        return all(map(is_plain, feature.values()))
    if isinstance(feature, list):
        return all(map(is_plain, feature))
    inner = getattr(feature, "feature", None)
    return isinstance(feature, datasets.Value | datasets.ClassLabel) if inner is None else is_plain(inner)
