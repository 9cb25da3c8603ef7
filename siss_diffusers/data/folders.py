"""Folders of images. Every file is an image, metadata, or something that is named: nothing is left out in silence.

`datasets` takes files and folders called `train` or `test` for splits, and leaves out formats that it does not list,
folders behind links, and files that the metadata do not list.
"""

import os
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from siss_diffusers.data.metadata import METADATA_FILES, concatenate, file_columns, read_metadata
from siss_diffusers.data.viewing import image_formats, open_image
from siss_diffusers.errors import UsageError, describe_error


# What systems and tools leave behind. None of it was given.
LITTER_FOLDERS = frozenset(
    "__macosx __pycache__ @eadir $recycle.bin lost+found .git .svn .hg .cache .huggingface .ipynb_checkpoints .thumbnails"
    " .trash .trashes .spotlight-v100 .fseventsd .documentrevisions-v100 .temporaryitems".split()
) | {"system volume information"}
LITTER_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "picasa.ini", "icon\r", "dataset_infos.json"}
TEXTS_ABOUT_A_FOLDER = {"readme", "license", "licence", "citation", "copying", "notice", "authors", "changelog"}
ARCHIVES = frozenset(".zip .tar .tgz .gz .bz2 .xz .zst .7z .rar".split())
# Formats that Pillow opens and cannot decode.
NOT_DECODED = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}
NUM_EXAMPLES = 3


@dataclass
class FolderFiles:
    """The files below a folder, as absolute paths in their order.

    Args:
        root: the folder.
        images: files with the suffix of an image.
        metadata: `metadata.jsonl`, `metadata.csv` and `metadata.parquet`.
        hidden: images whose names, or folders' names, begin with a dot.
        others: anything else that is no litter and no text about the folder.
    """

    root: str
    images: list[str] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    def examples(self, paths: Sequence[str]) -> str:
        """Return the first few of these files, by their names below the folder."""
        names = [os.path.relpath(path, self.root) for path in paths[:NUM_EXAMPLES]]
        return ", ".join(names) + (f" and {len(paths) - NUM_EXAMPLES} more" if len(paths) > NUM_EXAMPLES else "")


@cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes of the formats that Pillow decodes."""
    formats = set(image_formats()) - NOT_DECODED
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


def list_folder(flag: str, folder: str) -> FolderFiles:
    """List the files below a folder. Links are followed; what several links lead to is listed once.

    Raises:
        UsageError: naming the flag, for a folder below it that cannot be read, and for a name that is no text.
    """
    files = FolderFiles(os.path.realpath(folder))
    # Folders behind links come last, so that files have their names without links where they have one.
    pending, linked = deque([(files.root, False)]), deque()
    seen = set()
    while pending or linked:
        path, is_hidden = pending.popleft() if pending else linked.popleft()
        real = os.path.realpath(path)
        if real in seen:
            continue
        if real != files.root and files.root.startswith(os.path.join(real, "")):
            files.others.append(path)  # a link to a folder that holds this one
            continue
        seen.add(real)
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    hidden = is_hidden or entry.name.startswith(".")
                    if not entry.is_dir():
                        sort_file(files, entry.name, entry.path, hidden)
                    elif entry.name.lower() not in LITTER_FOLDERS:
                        (linked if entry.is_symlink() else pending).append((entry.path, hidden))
        except OSError as error:
            raise UsageError(f"{flag}: cannot read the folder {path} ({describe_error(error)}); make it readable")
    for paths in (files.images, files.metadata, files.hidden, files.others):
        paths.sort()
        for path in paths:
            if not path.isascii() and not is_text(path):
                raise UsageError(f"{flag}: the name of {ascii(path)} is not valid UTF-8; rename it")
    return files


def is_text(path: str) -> bool:
    """Tell whether the name of a file is valid UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def sort_file(files: FolderFiles, name: str, path: str, is_hidden: bool) -> None:
    """Add a file where it belongs. Most are images, so these come first."""
    dot = name.rfind(".")
    suffix = name[dot:].lower() if dot > 0 else ""
    if suffix in image_suffixes():
        (files.hidden if is_hidden else files.images).append(path)
        return
    lower = name.lower()
    stem = lower[: len(lower) - len(suffix)]
    if is_hidden:
        return
    if lower in METADATA_FILES:
        files.metadata.append(path)
    elif lower not in LITTER_FILES and not (stem in TEXTS_ABOUT_A_FOLDER and suffix in ("", ".md", ".txt", ".rst")):
        files.others.append(path)


def is_image(path: str) -> bool:
    """Tell whether Pillow knows a file as an image; only its header is read."""
    try:
        with open_image(path):
            return True
    except Exception:  # of any kind, for Pillow does not say of which
        return False


def refuse_archives(flag: str, files: FolderFiles) -> None:
    """Refuse archives, which may hold images.

    Raises:
        UsageError: naming the first.
    """
    for path in files.others:
        if os.path.splitext(path)[1].lower() in ARCHIVES:
            raise UsageError(f"{flag}: {path} lies in the folder and is an archive; unpack it, or remove it")


def require_every_file(flag: str, files: FolderFiles) -> None:
    """Add the images without the suffix of one, and refuse files that are no images: for a folder of which nothing may be
    left out.

    Raises:
        UsageError: naming the first few files.
    """
    images = [path for path in files.others if is_image(path)]
    files.images = sorted(files.images + images)
    files.others = sorted(set(files.others) - set(images))
    hidden = [path for path in files.hidden if is_image(path)]
    if hidden:
        raise UsageError(
            f"{flag}: {len(hidden)} images to forget are hidden and would not be read"
            f" ({files.examples(hidden)}); rename them without a dot, or remove them"
        )
    if files.others:
        names = {os.path.basename(path).lower() for path in files.others}
        cure = "convert them to PNG or JPEG, or remove them"
        if "metadata.json" in names:
            cure = "metadata go into metadata.jsonl, an object on each line"
        raise UsageError(
            f"{flag}: {len(files.others)} files of what is to forget cannot be read as images"
            f" ({files.examples(files.others)}); {cure}"
        )


def describe_passed_over(files: FolderFiles, unlisted: Sequence[str] = ()) -> str:
    """Return how many files of what kind are not used; empty if all are."""
    parts = []
    if files.others:
        kinds = Counter(os.path.splitext(path)[1].lower() or "without suffix" for path in files.others)
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5))
        parts.append(f"{len(files.others)} files that are no images by their suffix ({counts})")
    if files.hidden:
        parts.append(f"{len(files.hidden)} hidden images")
    if unlisted:
        parts.append(f"{len(unlisted)} images that the metadata do not list ({files.examples(unlisted)})")
    return ", ".join(parts)


def load_folder(
    flag: str, folder: str, *, every_file: bool = False, files: FolderFiles | None = None
) -> tuple[datasets.Dataset, str]:
    """Load the rows of a folder of images, in the order of their paths or of their metadata. No image is decoded.

    Args:
        every_file: refuse a file that would not be used, as of a folder of images to forget.
        files: what is in the folder, where it was listed already.

    Returns:
        The rows, with the columns of the metadata; without metadata, with a column `label` where all images lie in
        folders of one level that have several names. And how many files of what kind were passed over, as a text.

    Raises:
        UsageError: naming the flag, for a folder without images, and for files that cannot or must not be used.
    """
    files = files or list_folder(flag, folder)
    refuse_archives(flag, files)
    if every_file:
        require_every_file(flag, files)
    if not files.images and not files.metadata:
        inside = describe_passed_over(files)
        raise UsageError(f"{flag}: there are no images in {folder}" + (f", only {inside}" if inside else ""))
    try:
        rows, unlisted = rows_of_metadata(flag, files) if files.metadata else (rows_of_paths(files), [])
    except (ValueError, TypeError, NotImplementedError, pa.ArrowException) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{flag}: {folder} cannot be loaded ({describe_error(error)})") from error
    if every_file and unlisted:
        raise UsageError(
            f"{flag}: {len(unlisted)} of {len(files.images)} images to forget are not in"
            f" {files.examples(files.metadata)} ({files.examples(unlisted)}); add a line for each there, or remove them"
        )
    return rows, describe_passed_over(files, unlisted)


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


def rows_of_metadata(flag: str, files: FolderFiles) -> tuple[datasets.Dataset, list[str]]:
    """Return a row for each line of the metadata, and the images that none of them names.

    Raises:
        UsageError: for metadata that cannot be read, or that name a file outside of their folder.
    """
    folders = Counter(os.path.dirname(path) for path in files.metadata)
    twice = next((path for path, count in folders.items() if count > 1), None)
    if twice is not None:
        raise UsageError(f"{flag}: {twice} holds two files of metadata ({files.examples(files.metadata)}); remove one")
    known, tables, image_columns = frozenset(files.images), [], set()
    listed: list[pa.Array] = []
    for file in files.metadata:
        table = read_metadata(flag, Path(file))
        for name, column in file_columns(table).items():
            paths = [path_of(flag, file, entry, known, name) if entry else None for entry in table[name].to_pylist()]
            cells = pa.array(paths, pa.string())
            listed.append(cells)
            if column != name and column in table.column_names:
                table = table.drop_columns(column)
            table = table.set_column(table.column_names.index(name), column, cells)
            image_columns.add(column)
        tables.append(table)
    table = concatenate(tables)
    for column in image_columns:
        cells = image_cells(table[column].combine_chunks())
        table = table.set_column(table.column_names.index(column), column, cells)
    features = datasets.Features.from_arrow_schema(table.schema)
    features = datasets.Features(
        {name: datasets.Image() if name in image_columns else feature for name, feature in features.items()}
    )
    # A schema of Parquet may say that a text is something else; what the features say holds.
    rows = datasets.Dataset(table.replace_schema_metadata().cast(features.arrow_schema))
    return rows, unlisted_images(files, pa.chunked_array(listed, pa.string()))


def unlisted_images(files: FolderFiles, listed: pa.ChunkedArray) -> list[str]:
    """Return the images that no line of the metadata names, by this path or by one through a link."""
    images = pa.array(files.images, pa.string())
    unlisted = images.filter(pc.invert(pc.is_in(images, listed))).to_pylist()
    if not unlisted:
        return []
    elsewhere = listed.filter(pc.invert(pc.is_in(listed, images))).drop_null().to_pylist()
    behind_links = {os.path.realpath(path) for path in elsewhere}
    return [path for path in unlisted if os.path.realpath(path) not in behind_links]


def path_of(flag: str, file: str, entry: str, known: frozenset[str], column: str) -> str:
    """Return the path of a file that metadata name.

    Args:
        file: of the metadata, beside or above the file.
        entry: the name there.
        known: the images of the folder.
        column: of the name.

    Raises:
        UsageError: for a name outside of the folder of the metadata, or an address.
    """
    folder = os.path.dirname(file)
    path = f"{folder}{os.sep}{entry}"
    if path in known:
        return path
    relative = os.path.normpath(entry if "://" in entry else entry.replace("\\", "/"))
    if "://" in entry or os.path.isabs(entry) or os.path.isabs(relative) or relative.split("/")[0] == "..":
        raise UsageError(
            f"{flag}: {file} has the {column} '{entry}', which lies outside of its folder; name files in {folder}"
        )
    return os.path.join(folder, relative)
