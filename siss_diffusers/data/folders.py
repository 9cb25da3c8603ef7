"""Folders of images. Every file is an image, metadata, or something that is named: nothing is left out in silence.

`datasets` takes files and folders called `train` or `test` for splits, and leaves out formats that it does not list,
folders behind links, and files that the metadata do not list.
"""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from siss_diffusers.data.listing import (
    DATA_SUFFIXES,
    TABLES,
    FolderFiles,
    describe_passed_over,
    holds_pictures,
    is_image,
    list_folder,
    refuse_archives,
    suffix_of,
)
from siss_diffusers.data.metadata import METADATA_FILES, concatenate, file_columns, read_metadata
from siss_diffusers.data.names import NamesOnDisk
from siss_diffusers.errors import UsageError, describe_error


# Names that people give to metadata, under which they would be passed over.
MISNAMED = (
    *("metadata.json", "metadata.jsonlines", "metadata.ndjson", "metadata.txt", "metadata.tsv", "metadata.jsonl.txt"),
    *("metadata.csv.txt", "metadata.json.txt", "metadata.yaml", "metadata.yml", "metadata.xlsx", "metadata.arrow"),
)


def require_every_file(flag: str, files: FolderFiles) -> None:
    """Add the images without the suffix of one, and refuse files that are no images: for a folder of which nothing may be
    left out.

    Raises:
        UsageError: naming the first few files.
    """
    images = [path for path in files.others if is_image(path)]
    files.images = sorted(files.images + images)
    files.others = sorted(set(files.others) - set(images))
    for paths, where, cure in (
        (files.hidden, "are hidden", "rename them without a dot, or remove them"),
        (
            files.litter,
            "are hidden, or have names that systems give to files of their own",
            "rename them, or remove them",
        ),
    ):
        pictures = [path for path in paths if holds_pictures(path)]
        if pictures:
            raise UsageError(
                f"{flag}: {len(pictures)} images or archives to forget {where} and would not be read"
                f" ({files.examples(pictures)}); {cure}"
            )
    if files.above:
        raise UsageError(
            f"{flag}: {files.examples(files.above)} leads to a folder that holds {files.root} itself, which is not read"
            " from there; remove the link"
        )
    if files.others:
        cure = "convert them to PNG or JPEG, or remove them"
        suffixes = {suffix_of(path) for path in files.others}
        if suffixes & set(DATA_SUFFIXES):
            cure = "save the images in them as files"
        elif any("metadata" in os.path.basename(path).lower() for path in files.others):
            cure = "metadata go into metadata.jsonl, an object on each line"
        elif suffixes & set(TABLES):
            cure = "metadata go into metadata.jsonl, an object on each line; remove other files"
        raise UsageError(
            f"{flag}: {len(files.others)} files of what is to forget cannot be read as images"
            f" ({files.examples(files.others)}); {cure}"
        )


def check_metadata_names(flag: str, files: FolderFiles, every_file: bool = False) -> None:
    """Refuse metadata of images under a name that is not read, in a folder without metadata that are. Below a training set
    they are passed over: programs of photo albums write a `metadata.json` into each.

    Args:
        every_file: refuse them there, too, as in a folder of images to forget.

    Raises:
        UsageError: saying how to name it.
    """
    candidates = [path for path in files.metadata + files.others if is_misnamed(path)]
    for path in sorted(candidates, key=lambda path: (path.count(os.sep), path)):
        folder = os.path.dirname(path)
        named = any(os.path.join(folder, name) in files.metadata for name in METADATA_FILES)
        # Below the root it may be a part of a data set of another kind.
        is_read = every_file or path in files.metadata
        is_of_images = is_read and any(image.startswith(folder + os.sep) for image in files.images)
        if not named and (folder == files.root or is_of_images):
            raise UsageError(
                f"{flag}: {path} is not read under this name; write a JSON object with file_name and the caption on each"
                " line, and call the file metadata.jsonl, or remove it, or give it another name"
            )


def is_misnamed(path: str) -> bool:
    """Tell whether people mean metadata by the name of a file, and it is not that which is read."""
    name = os.path.basename(path)
    return name.lower() in MISNAMED or (name.lower() in METADATA_FILES and name not in METADATA_FILES)


def load_folder(
    flag: str,
    folder: str,
    *,
    columns: Sequence[str] = ("image",),
    every_file: bool = False,
    files: FolderFiles | None = None,
) -> tuple[datasets.Dataset, str]:
    """Load the rows of a folder of images, in the order of their paths or of their metadata. No image is decoded.

    Args:
        columns: of the images that will be used: the first of these that there is.
        every_file: refuse a file that would not be used, as of a folder of images to forget.
        files: what is in the folder, where it was listed already.

    Returns:
        The rows, with the columns of the metadata; without metadata, with a column `label` where all images lie in
        folders of one level that have several names. And how many files of what kind were passed over, as a text.

    Raises:
        UsageError: naming the flag, for a folder without images, and for files that cannot or must not be used.
    """
    files = files or list_folder(flag, folder, every_file)
    check_metadata_names(flag, files, every_file)
    refuse_archives(flag, files)
    if every_file:
        require_every_file(flag, files)
    if not files.images and not files.metadata:
        inside = describe_passed_over(files)
        raise UsageError(
            f"{flag}: there are no images in {folder}"
            + (f", only {inside}{cure_of_data(flag, files)}" if inside else "")
        )
    try:
        rows, listed = rows_of_metadata(flag, files) if files.metadata else (rows_of_paths(files), None)
    except (ValueError, TypeError, NotImplementedError, pa.ArrowException) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{flag}: {folder} cannot be loaded ({describe_error(error)})") from error
    if listed is None:
        return rows, describe_passed_over(files)
    everything = pa.chunked_array([cells for column in listed.values() for cells in column], pa.string())
    unlisted = unlisted_images(files, everything)
    used = next((column for column in columns if column in listed), None)
    elsewhere: list[str] = []
    if used is not None and len(listed) > 1:
        elsewhere = sorted(set(unlisted_images(files, pa.chunked_array(listed[used], pa.string()))) - set(unlisted))
    if every_file:
        refuse_unlisted(flag, files, unlisted, elsewhere)
    # What is listed is used, whatever its name.
    files.others, files.hidden = (not_in(paths, everything) for paths in (files.others, files.hidden))
    return rows, describe_passed_over(files, unlisted, elsewhere)


def refuse_unlisted(flag: str, files: FolderFiles, unlisted: Sequence[str], elsewhere: Sequence[str]) -> None:
    """Refuse images that no row of the metadata has, or none in the column that is used.

    Raises:
        UsageError: naming the first few.
    """
    count, metadata = len(files.images), files.examples(files.metadata)
    if unlisted:
        raise UsageError(
            f"{flag}: {len(unlisted)} of {count} images to forget are not in {metadata} ({files.examples(unlisted)}); add"
            " a line for each there, or remove them"
        )
    if elsewhere:
        raise UsageError(
            f"{flag}: {len(elsewhere)} of {count} images to forget are in a column of {metadata} that is not used"
            f" ({files.examples(elsewhere)}); add a line with file_name for each there, or move them out of the folder"
        )


def cure_of_data(flag: str, files: FolderFiles) -> str:
    """Return what to do with a folder of data of another kind than images; empty for anything else."""
    if not {suffix_of(path) for path in files.others} & {*DATA_SUFFIXES, ".jsonl", ".csv"}:
        return ""
    return "; name a data set by --dataset_name" if flag == "--train_data_dir" else "; save its images as files"


def image_cells(paths: pa.Array) -> pa.StructArray:
    """Return paths as cells of a column of images."""
    return pa.StructArray.from_arrays([pa.nulls(len(paths), pa.binary()), paths], names=["bytes", "path"])


def rows_of_paths(files: FolderFiles) -> datasets.Dataset:
    """Return a row for each image, with the name of its folder as `label` where these names are classes."""
    columns: dict[str, pa.Array] = {"image": image_cells(pa.array(files.images, pa.string()))}
    features = datasets.Features(image=datasets.Image())
    folders = [path[: path.rindex(os.sep)] for path in files.images]
    names = {folder: os.path.basename(folder) for folder in set(folders)}
    classes = sorted(set(names.values()))
    if len(classes) > 1 and len({folder.count(os.sep) for folder in names}) == 1:
        features["label"] = datasets.ClassLabel(names=classes)
        number = {name: index for index, name in enumerate(classes)}
        columns["label"] = pa.array([number[names[folder]] for folder in folders], pa.int64())
    return datasets.Dataset(pa.table(columns).cast(features.arrow_schema))


def rows_of_metadata(flag: str, files: FolderFiles) -> tuple[datasets.Dataset, dict[str, list[pa.Array]]]:
    """Return a row for each line of the metadata, and the files that each column of images names.

    Raises:
        UsageError: for metadata that cannot be read, or that name a file outside of their folder.
    """
    folders = Counter(os.path.dirname(path) for path in files.metadata)
    twice = next((path for path, count in folders.items() if count > 1), None)
    if twice is not None:
        raise UsageError(f"{flag}: {twice} holds two files of metadata ({files.examples(files.metadata)}); remove one")
    names, tables = NamesOnDisk(files.images, files.others + files.hidden), []
    listed: dict[str, list[pa.Array]] = {}
    for file in files.metadata:
        table = read_metadata(flag, Path(file))
        for name, column in file_columns(table).items():
            paths = [path_of(flag, file, entry, names, name) if entry else None for entry in table[name].to_pylist()]
            cells = pa.array(paths, pa.string())
            listed.setdefault(column, []).append(cells)
            if column != name and column in table.column_names:
                table = table.drop_columns(column)
            table = table.set_column(table.column_names.index(name), column, cells)
        tables.append(table)
    table = concatenate(tables)
    for column in listed:
        cells = image_cells(table[column].combine_chunks())
        table = table.set_column(table.column_names.index(column), column, cells)
    features = datasets.Features.from_arrow_schema(table.schema)
    features = datasets.Features(
        {name: datasets.Image() if name in listed else feature for name, feature in features.items()}
    )
    # A schema of Parquet may say that a text is something else; what the features say holds.
    rows = datasets.Dataset(table.replace_schema_metadata().cast(features.arrow_schema))
    return rows, listed


def not_in(paths: Sequence[str], listed: pa.ChunkedArray) -> list[str]:
    """Return the paths that are not listed."""
    array = pa.array(paths, pa.string())
    return array.filter(pc.invert(pc.is_in(array, listed))).to_pylist()


def unlisted_images(files: FolderFiles, listed: pa.ChunkedArray) -> list[str]:
    """Return the images that are not listed, by this path or by one through a link."""
    unlisted = not_in(files.images, listed)
    if not unlisted:
        return []
    elsewhere = listed.filter(pc.invert(pc.is_in(listed, pa.array(files.images, pa.string())))).drop_null().to_pylist()
    behind_links = {os.path.realpath(path) for path in elsewhere}
    if not behind_links:  # or the path of every mask would be looked up
        return unlisted
    return [path for path in unlisted if os.path.realpath(path) not in behind_links]


def path_of(flag: str, file: str, entry: str, names: NamesOnDisk, column: str) -> str:
    """Return the path of a file that metadata name.

    Args:
        file: of the metadata, beside or above the file.
        entry: the name there.
        names: of the files of the folder.
        column: of the name.

    Raises:
        UsageError: for a name outside of the folder of the metadata, or an address.
    """
    folder = os.path.dirname(file)
    path = f"{folder}{os.sep}{entry}"
    if path in names.usual:
        return path
    where = f"{flag}: {file} has the {column} '{entry}'"
    if "://" in entry:
        raise UsageError(
            f"{where}, which is an address, and nothing is downloaded from it; download the image into {folder}, and name"
            " the file"
        )
    relative = os.path.normpath(entry if os.path.isabs(entry) else entry.replace("\\", "/"))
    if os.path.isabs(relative):
        relative = below(relative, folder, names)
    if relative.split("/")[0] == "..":
        raise UsageError(f"{where}, which lies outside of its folder; name files in {folder}")
    return names.on_disk(os.path.join(folder, relative))


def below(path: str, folder: str, names: NamesOnDisk) -> str:
    """Return an absolute path as one from a folder, also where it has the name of the folder through a link."""
    relative = os.path.relpath(path, folder)
    if relative.split("/")[0] != "..":
        return relative
    return os.path.join(os.path.relpath(names.real_folder(os.path.dirname(path)), folder), os.path.basename(path))
