"""The output directory: what may be in it, and what a run removes from it."""

import os
import shutil
from pathlib import Path

from siss_diffusers.errors import UsageError
from siss_diffusers.settings import Settings
from siss_diffusers.training.near_duplicates import NEAR_DUPLICATES


# What a run leaves in its output directory; `--overwrite_output_dir` removes these and nothing else.
RUN_FILES = (
    "unlearning.json",
    "train_log.jsonl",
    "validation_log.jsonl",
    "receipt.json",
    NEAR_DUPLICATES,
    "README.md",
)
RUN_FOLDERS = ("logs",)


def check_output_dir(settings: Settings) -> None:
    """Refuse an output directory that holds anything, unless told to overwrite or to resume.

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
    for flag in ("pretrained_model_name_or_path", "train_data_dir", "forget_data_dir"):
        given = getattr(settings, flag)
        if given and os.path.isdir(given):
            source, target = Path(given).resolve(), output_dir.resolve()
            if source == target or target in source.parents:
                raise UsageError(f"--output_dir must not be, or contain, --{flag}; name another folder")
    if settings.resume_from_checkpoint is None and not settings.overwrite_output_dir:
        if output_dir.is_dir() and any(output_dir.iterdir()):
            raise UsageError(
                f"--output_dir: {output_dir} is not empty; add --overwrite_output_dir to replace the run in it,"
                " --resume_from_checkpoint latest to go on with it, or name another folder"
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
