"""Data sets as other tools leave them: `save_to_disk` folders, and columns of bytes."""

import json
import os
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from siss_diffusers.data.cells import cells_of, kind_of
from siss_diffusers.data.listing import holds_pictures, list_folder
from siss_diffusers.data.loaded import LoadedRows, OtherSplit
from siss_diffusers.errors import UsageError, describe_error


MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"BM", b"II*\x00", b"MM\x00*", b"\x00\x00\x00")


def is_saved(name: str) -> bool:
    """Tell whether a name is that of a folder of `save_to_disk`."""
    # Not by Path: it raises for a name that is too long for a file.
    return any(os.path.isfile(os.path.join(name, file)) for file in ("dataset_dict.json", "state.json"))


def load_saved(flag: str, name: str, every_file: bool = False) -> LoadedRows:
    """Load a folder of `save_to_disk`; of several splits, `train` is used.

    Args:
        every_file: refuse anything in the folder that would not be used, as of images to forget.

    Raises:
        UsageError: for a folder without that split, or that names files outside of it.
    """
    folder, part, others = Path(name), "", {}
    if (folder / "dataset_dict.json").is_file():
        part = "train"
        splits = splits_of(flag, folder)
        if part not in splits:
            raise UsageError(
                f"{flag}: {name} has no split `train`, only {', '.join(splits) or 'none'}; name one of them"
            )
        others = {split: unread_split(flag, folder / split) for split in splits if split != part}
    if every_file and others:
        held = ", ".join(f"{split} ({other.inside})" for split, other in others.items())
        raise UsageError(
            f"{flag}: {name} holds the splits train and {held}, and only train would be read; save what is to forget as"
            " one data set, without splits"
        )
    rows, files = load_split(flag, folder / part)
    own = {"dataset_dict.json", *(os.path.join(part, file) for file in files)}
    return LoadedRows(rows, files_beside(flag, name, own, tuple(others), every_file), others)


def unread_split(flag: str, folder: Path) -> OtherSplit:
    """Return a split of which nothing is used; that it is damaged does not matter unless it is looked at."""
    try:
        inside = f"{len(load_split(flag, folder)[0])} rows"
    except UsageError:
        inside = "which cannot be loaded"
    return OtherSplit(lambda: load_split(flag, folder)[0], inside)


def splits_of(flag: str, folder: Path) -> list[str]:
    """Return the names of the splits of a folder of `save_to_disk`.

    Raises:
        UsageError: for a file of them that is damaged.
    """
    file = folder / "dataset_dict.json"
    try:
        splits = json.loads(file.read_text(encoding="utf-8"))["splits"]
        is_whole = all(Path(split).name == split for split in splits)
    except (OSError, ValueError, KeyError, TypeError):
        is_whole = False
    if not is_whole:
        raise UsageError(f"{flag}: {file} is not what save_to_disk wrote; save the data set again")
    return splits


def load_split(flag: str, folder: Path) -> tuple[datasets.Dataset, list[str]]:
    """Load a split of `save_to_disk`, and return the names of its files, too.

    Raises:
        UsageError: for a folder that names files outside of it, or that cannot be read.
    """
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        files = [file["filename"] for file in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(
            f"{flag}: {folder / 'state.json'} is missing or not what save_to_disk wrote; save the data set again"
        )
    for file in files:
        if Path(file).name != file:
            raise UsageError(
                f"{flag}: {folder / 'state.json'} names {file}, which lies outside of it; remove it there"
            )
    try:
        rows = datasets.load_from_disk(str(folder)).with_format(None)
    except Exception as error:  # whatever the parsers make of a broken file
        raise UsageError(f"{flag}: {folder} cannot be loaded ({describe_error(error)}); save it again") from error
    caches = [path.name for path in folder.glob("cache-*.arrow")]  # of `map` and `filter`
    return rows, [*files, *caches, "state.json", "dataset_info.json"]


def files_beside(flag: str, name: str, own: set[str], splits: tuple[str, ...], every_file: bool) -> str:
    """Return what lies in a folder of `save_to_disk` beside the files of the data set, as a text; empty for nothing.

    Args:
        own: the files of the data set, by their names below the folder.
        splits: the folders of other splits, which are named elsewhere.
        every_file: refuse the others.

    Raises:
        UsageError: naming the first few.
    """
    files = list_folder(flag, name, every_file)
    own = {os.path.join(files.root, file) for file in own}
    elsewhere = tuple(os.path.join(files.root, split, "") for split in splits)
    given = files.images + files.metadata + files.hidden + files.above + files.others
    beside = sorted({*given, *(filter(holds_pictures, files.litter) if every_file else ())} - own)
    beside = [file for file in beside if not file.startswith(elsewhere)]
    if beside and every_file:
        raise UsageError(
            f"{flag}: {len(beside)} files lie in {name} beside what save_to_disk wrote and would not be read"
            f" ({files.examples(beside)}); move them into a folder of their own, or remove them"
        )
    return f"{len(beside)} files beside what save_to_disk wrote ({files.examples(beside)})" if beside else ""


def with_images(rows: datasets.Dataset, column: str, flag: str) -> datasets.Dataset:
    """Take a column of image bytes, as Parquet files of other tools have it, for one of images.

    Raises:
        UsageError: for a column of addresses, of names of files, or of anything else but images.
    """
    feature = rows.features.get(column)
    if feature is None or isinstance(feature, datasets.Image):
        return rows
    kind = kind_of(rows, column)
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and holds_bytes(kind.field("bytes").type):
        return rows.cast_column(column, datasets.Image(decode=False))
    first = next((cell for chunk in cells_of(rows, column).chunks for cell in pc.drop_null(chunk)[:1]), None)
    value = None if first is None else first.as_py()
    if isinstance(value, bytes) and holds_bytes(kind):
        if not value.startswith(MAGIC):
            raise UsageError(f"--image_column: {column!r} of {flag} holds bytes that are no image file; name another")
        return rows.cast_column(column, datasets.Image(decode=False))
    if isinstance(value, str) and "://" in value[:10]:
        raise UsageError(
            f"--image_column: {column!r} of {flag} holds addresses and no images, and nothing is downloaded from them;"
            " download the images into a folder, name it by --train_data_dir, or name another column"
        )
    if isinstance(value, str):
        raise UsageError(
            f"--image_column: {column!r} of {flag} holds texts and no images; if they name files, call the column"
            " file_name in a metadata.jsonl beside the images, and use --train_data_dir"
        )
    held = "nothing" if value is None else f"values of type {kind} and no image files"
    raise UsageError(
        f"--image_column: {column!r} of {flag} holds {held}; save each image as a file or as the bytes of one, or name"
        " another column"
    )


def holds_bytes(kind: pa.DataType) -> bool:
    """Tell whether a type of Arrow is one of files of any length."""
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def cure_of(error: Exception) -> str:
    """Return what to do about a data set that is neither a folder nor in the cache; empty for other errors."""
    text = str(error)
    if "OfflineModeIsEnabled" in text:
        return "; it is not in the cache and HF_HUB_OFFLINE is set: unset it, or name a folder"
    if "ConnectionError" in text or "Couldn't reach" in text:
        return "; the Hub cannot be reached: check the connection, or name a folder"
    return ""
