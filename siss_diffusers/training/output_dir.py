"""The output directory: what may be in it, and what a run removes from it."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from siss_diffusers.errors import UsageError
from siss_diffusers.settings import Settings
from siss_diffusers.storage.files import RUN_FILES
from siss_diffusers.storage.folders import refuse_folders_given


# Beside the files; `--overwrite_output_dir` removes these and nothing else.
RUN_FOLDERS = ("logs",)
# The settings that may name a folder that is read.
FOLDERS_READ = ("pretrained_model_name_or_path", "train_data_dir", "dataset_name", "forget_data_dir")


def check_output_dir(settings: Settings, read: Mapping[str, str] | None = None) -> None:
    """Refuse an output directory that holds anything, unless told to overwrite or to resume.

    Args:
        read: folders and names on the Hub that are read, by their names in messages; None: those that the settings name.

    Raises:
        UsageError: naming the flags that help. Nothing is removed here.
    """
    output_dir = Path(settings.output_dir)
    if not settings.output_dir:
        raise UsageError("--output_dir must not be empty; name a folder")
    try:
        is_file = output_dir.exists() and not output_dir.is_dir()
    except OSError as error:
        raise UsageError(f"--output_dir cannot be used ({error.strerror}); name another folder")
    if is_file:
        raise UsageError(f"--output_dir: {output_dir} is a file; name a folder")
    by_flags = {f"--{name}": getattr(settings, name) for name in FOLDERS_READ}
    refuse_folders_given("--output_dir", output_dir, by_flags if read is None else read)
    if settings.report_to != "none":
        check_logging_dir(output_dir / settings.logging_dir, output_dir)
    if settings.resume_from_checkpoint is None and not settings.overwrite_output_dir:
        if output_dir.is_dir() and any(output_dir.iterdir()):
            raise UsageError(
                f"--output_dir: {output_dir} is not empty; add --overwrite_output_dir to replace the run in it,"
                " --resume_from_checkpoint latest to go on with it, or name another folder"
            )


def check_logging_dir(folder: Path, output_dir: Path) -> None:
    """Check that the folder of the tracker can be made: that it cannot must not show after data and model are read.

    Raises:
        UsageError: naming what is in its place.
    """
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if folder.is_relative_to(output_dir) and output_dir.is_relative_to(there):
        return  # the output directory itself is still to be made, which says so where it fails
    if not there.is_dir():
        raise UsageError(f"--logging_dir: {there} is a file; name another folder, or remove it")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(
            f"--logging_dir: {there} cannot be written to; name another folder, or change its permissions"
        )


def clear_output_dir(output_dir: Path, model_files: tuple[str, ...]) -> None:
    """Remove what an earlier run left, and nothing that it did not write.

    Args:
        model_files: files and folders of the model that the script saves.
    """
    folders = [output_dir / name for name in (*RUN_FOLDERS, *model_files)]
    folders += [path for kind in ("", "tmp-", "superseded-") for path in output_dir.glob(f"{kind}checkpoint-*")]
    for folder in folders:
        if folder.is_dir():
            shutil.rmtree(folder)
    for name in (*RUN_FILES, *model_files):
        (output_dir / name).unlink(missing_ok=True)
