"""Folders and data sets as rows whose images are not yet decoded."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow.compute as pc
import yaml
from datasets import load_dataset

from siss_diffusers.data.images import Images, ImageTransform
from siss_diffusers.data.saved import check_metadata_names, cure_of, load_saved, with_images
from siss_diffusers.errors import UsageError, describe_error


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
            raise UsageError(f"{flag}: cannot read {file} ({describe_error(error)}); repair or remove it")
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
    if (saved := load_saved(flag, name)) is not None:
        return saved
    check_metadata_names(flag, name)
    try:
        if image_folder:
            return load_dataset("imagefolder", data_dir=name, cache_dir=cache_dir, split="train")
        check_declared_files(flag, name)
        return load_dataset(name, config_name, cache_dir=cache_dir, split="train")
    except UsageError:
        raise
    except Exception as error:  # whatever the parsers make of a broken file
        cause = error.__cause__ or error  # what went wrong while generating, not that it did
        raise UsageError(
            f"{flag}: {name or repr(name)} cannot be loaded ({describe_error(cause)}){cure_of(cause)}"
        ) from error


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


@dataclass(frozen=True)
class ImageRows:
    """Rows with a column of images that are not yet decoded.

    Args:
        rows: the data set.
        column: of the images; `datasets.Image(decode=False)`.
        flag: where the rows come from, for messages.
    """

    rows: datasets.Dataset
    column: str
    flag: str

    def images(self, transform: ImageTransform) -> Images:
        return Images(self.rows, self.column, transform, self.flag)


def load_image_rows(
    flag: str,
    source: str,
    column: str,
    *,
    is_folder: bool,
    config_name: str | None = None,
    cache_dir: str | None = None,
) -> ImageRows:
    """Load the rows of an image folder, or of a data set, their images not yet decoded.

    Args:
        source: the folder, or the name of the data set.

    Raises:
        UsageError: naming the flag, for a source that cannot be read or has no such column.
    """
    if is_folder and not os.path.isdir(source):
        raise UsageError(f"{flag}: no folder {source or repr(source)}")
    rows = load_rows(flag, source, config_name, cache_dir, image_folder=is_folder)
    downloads = (cache_dir, datasets.config.HF_DATASETS_CACHE, huggingface_hub.constants.HF_HUB_CACHE)
    roots = [source] if os.path.isdir(source) else [str(root) for root in downloads if root]
    return undecoded(rows, column, flag, roots)


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
    plain = (datasets.Value, datasets.ClassLabel)
    kept = [
        name
        for name, feature in rows.features.items()
        if name == column or isinstance(getattr(feature, "feature", feature), plain)
    ]
    rows = rows.select_columns(kept).cast_column(column, datasets.Image(decode=False))
    if roots is not None:
        check_image_paths(rows, column, flag, roots)
    return ImageRows(rows, column, flag)
