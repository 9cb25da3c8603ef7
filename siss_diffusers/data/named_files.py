"""Rows of image files that are named one by one."""

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from siss_diffusers.data.column_values import rows_where
from siss_diffusers.data.names import NamesOnDisk
from siss_diffusers.errors import UsageError


logger = logging.getLogger(__name__)


def below_folder(name: str, folder: str) -> str:
    """Return a name in its shortest form; of an absolute path to a file below a folder, by whatever links, the name below
    it."""
    if os.path.isabs(name) and os.path.exists(folder):
        written = Path(os.path.normpath(name))
        # A link may lead to a folder below it, and not to it.
        for path in (written, Path(os.path.realpath(written.parent), written.name)):
            for parent in (path, *path.parents):
                if os.path.exists(parent) and os.path.samefile(parent, folder):
                    return Path(os.path.relpath(path, parent)).as_posix()
    return Path(os.path.normpath(name)).as_posix()


def as_in_rows(names: Sequence[str], paths: pa.ChunkedArray, root: Path) -> list[str]:
    """Return names of files with the characters that the paths of the rows have for letters with accents."""
    if all(name.isascii() for name in names):
        return list(names)
    rows = rows_where(paths, lambda values: pc.fill_null(pc.invert(pc.string_is_ascii(values)), False))
    known = [os.path.relpath(path, root) for path in paths.take(pa.array(rows)).to_pylist()]
    on_disk = NamesOnDisk(known, [os.path.basename(path) for path in known])
    return [on_disk.on_disk(name) for name in names]


def named_rows(cells: pa.ChunkedArray, names: Sequence[str], folder: str) -> list[int]:
    """Return the rows of the image files of these paths below `folder`, or of these names wherever below it. Where a name is both,
    it is the path; a file that several rows name has all of them.

    Raises:
        UsageError: for a name of no file, or of several.
    """
    root = Path(folder).resolve()
    paths = pc.struct_field(cells, "path")
    below = as_in_rows([below_folder(name, folder) for name in names], paths, root)
    whole = pa.array([str(root / name) for name in below], pa.string())
    last_parts = pa.array([name for name in below if "/" not in name], pa.string())

    def is_named(values: pa.Array) -> pa.Array:
        last = pc.replace_substring_regex(values, rf"(?s)^.*{re.escape(os.sep)}", "")
        return pc.or_(pc.is_in(values, whole), pc.is_in(last, last_parts))

    rows = rows_where(paths, is_named)
    by_path: dict[str, list[int]] = {}
    for index, path in zip(rows.tolist(), paths.take(pa.array(rows)).to_pylist()):
        by_path.setdefault(path, []).append(index)
    by_name: dict[str, list[str]] = {}
    for path in by_path:
        by_name.setdefault(os.path.basename(path), []).append(path)
    found: set[int] = set()
    for name, given in zip(below, names):
        exact, files = str(root / name), by_name.get(name, [])
        others = [os.path.relpath(path, root) for path in files if path != exact]
        if exact in by_path:
            if others:
                logger.warning(
                    f"--forget_files: {given} is also the name of {', '.join(others)}, which is not forgotten"
                )
            files = [exact]
        elif len(files) > 1:
            raise UsageError(
                f"--forget_files: {given} names {len(files)} files of --train_data_dir ({', '.join(others[:3])}); give its"
                " path relative to it"
            )
        elif not files:
            raise UsageError(f"--forget_files: {given} {why_not_there(root, name)}")
        found.update(by_path[files[0]])
    return sorted(found)


def why_not_there(root: Path, name: str) -> str:
    """Return why no row has an image file of this name below a folder, and the cure."""
    path, folder = root / name, "--train_data_dir"
    if os.path.isabs(name) or name.split("/")[0] == "..":
        return f"is not in {folder}; name a file in it, or give the folder of the file by --forget_data_dir"
    if path.is_dir():
        return "is a folder; name the files in it, or give a folder of images to forget by --forget_data_dir"
    if not path.is_file():
        return f"is not in {folder}; give its path relative to it"
    hidden = next((part for part in Path(name).parts if part.startswith(".")), None)
    if hidden is not None:
        return f"is in {folder} and is not read, since {hidden} is hidden; rename it without a dot"
    return (
        f"is in {folder} and is not read, since the metadata do not list it or its suffix is not that of an image; add it"
        " there, or convert it to PNG or JPEG"
    )
