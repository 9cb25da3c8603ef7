"""The folder that results go into: made before the work, and gone again where the work is refused."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from siss_diffusers.errors import UsageError


def refuse_folders_given(flag: str, folder: str | Path, given: Mapping[str, str | None]) -> None:
    """Refuse to write a result into a folder that something is read from: its files would be replaced.

    Args:
        given: folders and names on the Hub, by their flags; None for what was not given.

    Raises:
        UsageError: naming both flags.
    """
    target = Path(folder).resolve()
    for name, source in given.items():
        if source and os.path.isdir(source) and Path(source).resolve().is_relative_to(target):
            raise UsageError(f"{flag} must not be, or contain, {name}; name another folder")


def refuse_folder_within(flag: str, folder: str | Path, given: Mapping[str, str | None]) -> None:
    """Refuse to write pictures into a folder of images, or below it: they would be read as images of it.

    Args:
        given: folders of images and names on the Hub, by their flags; None for what was not given.

    Raises:
        UsageError: naming both flags.
    """
    for name, source in given.items():
        if source and os.path.isdir(source) and Path(folder).resolve().is_relative_to(Path(source).resolve()):
            raise UsageError(
                f"{flag}: {folder} lies in {name}, and its pictures would be read as data; name another folder"
            )


@contextmanager
def made_folder(flag: str, folder: str | Path) -> Iterator[None]:
    """Make a folder now, by the first process: that it cannot be made must not show after hours of work.

    Where the block ends in an error, folders that were made here and are still empty are removed. Whatever was there
    before is not touched.

    Raises:
        UsageError: where the folder cannot be made or written to.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"{flag}: {folder} cannot be made ({reason}); name another folder") from error
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UsageError(f"{flag}: {folder} cannot be written to; change its permissions or name another folder")
        yield
    except BaseException:
        for path in made:
            try:
                path.rmdir()
            except OSError:  # not empty, or never made
                break
        raise
