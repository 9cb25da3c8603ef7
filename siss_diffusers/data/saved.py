"""Data sets as other tools leave them: `save_to_disk` folders, columns of bytes, files of captions under other names."""

import json
import os
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from siss_diffusers.errors import UsageError, describe_error


# Metadata that `datasets` reads beside images.
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
# Names that people give to such a file, which would be passed over without a word.
MISNAMED = (
    *("metadata.json", "metadata.jsonlines", "metadata.ndjson", "metadata.txt", "metadata.tsv", "metadata.jsonl.txt"),
    *("metadata.csv.txt", "metadata.json.txt", "metadata.yaml", "metadata.yml", "metadata.xlsx", "metadata.arrow"),
)
MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"BM", b"II*\x00", b"MM\x00*", b"\x00\x00\x00")


def load_saved(flag: str, name: str) -> datasets.Dataset | None:
    """Load the split `train` of a folder of `save_to_disk`; None for anything else.

    Raises:
        UsageError: for a folder without that split, or that names files outside of it.
    """
    folder = Path(name)
    # Not by Path: it raises for a name that is too long for a file.
    if not any(os.path.isfile(os.path.join(name, file)) for file in ("dataset_dict.json", "state.json")):
        return None
    if (folder / "dataset_dict.json").is_file():
        if not (folder / "train" / "state.json").is_file():
            splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
            raise UsageError(
                f"{flag}: {name} has no split `train`, only {', '.join(splits) or 'none'}; name one of them"
            )
        folder = folder / "train"
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        files = [file["filename"] for file in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"{flag}: {folder / 'state.json'} is not what save_to_disk wrote; save the data set again")
    for file in files:
        if Path(file).name != file:
            raise UsageError(
                f"{flag}: {folder / 'state.json'} names {file}, which lies outside of it; remove it there"
            )
    try:
        return datasets.load_from_disk(str(folder)).with_format(None)
    except Exception as error:  # whatever the parsers make of a broken file
        raise UsageError(f"{flag}: {name} cannot be loaded ({describe_error(error)}); save it again") from error


def check_metadata_names(flag: str, folder: str) -> None:
    """Refuse a folder of images whose metadata has a name that is not read, beside none that is.

    Raises:
        UsageError: saying how to name it.
    """
    if not os.path.isdir(folder):
        return
    for place in (Path(folder), *(path for path in Path(folder).glob("*/") if not path.is_symlink())):
        names = {name.lower(): name for name in os.listdir(place)}
        if any(name in names.values() for name in METADATA):
            continue
        for name in (*MISNAMED, *METADATA):
            if name in names:
                raise UsageError(
                    f"{flag}: {place / names[name]} is not read under this name; write a JSON object with file_name and"
                    " the caption on each line, and call the file metadata.jsonl"
                )


def with_images(rows: datasets.Dataset, column: str, flag: str) -> datasets.Dataset:
    """Take a column of image bytes, as Parquet files of other tools have it, for one of images.

    Raises:
        UsageError: for a column of addresses, of names of files, or of anything else but images.
    """
    feature = rows.features.get(column)
    if feature is None or isinstance(feature, datasets.Image):
        return rows
    kind = rows.data.schema.field(column).type
    if pa.types.is_struct(kind) and {field.name for field in kind} == {"bytes", "path"}:
        return rows.cast_column(column, datasets.Image(decode=False))
    first = next((cell for chunk in rows.data.column(column).chunks for cell in pc.drop_null(chunk)[:1]), None)
    value = None if first is None else first.as_py()
    if isinstance(value, bytes):
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
    return rows


def cure_of(error: Exception) -> str:
    """Return what to do about a data set that is neither a folder nor in the cache; empty for other errors."""
    text = str(error)
    if "OfflineModeIsEnabled" in text:
        return "; it is not in the cache and HF_HUB_OFFLINE is set: unset it, or name a folder"
    if "ConnectionError" in text or "Couldn't reach" in text:
        return "; the Hub cannot be reached: check the connection, or name a folder"
    return ""
