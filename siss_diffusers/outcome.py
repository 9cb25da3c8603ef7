"""What `unlearn(...)` returns: the pipeline that has forgotten, and what can be done with it."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from siss_diffusers.storage.files import read_json


if TYPE_CHECKING:
    from siss_diffusers.data.split import GivenRows
    from siss_diffusers.families import Family
    from siss_diffusers.settings import Settings

# What a run leaves beside its result that is not part of it.
OF_THE_RUN = ("checkpoint-", "tmp-", "superseded-", "logs")


@dataclass
class Outcome:
    """A pipeline that has forgotten.

    Args:
        pipeline: the pipeline with the trained weights, or with the adapter in it.
        folder: where the run left its records, and its result if it was told to.
        holds_model: whether the result is in the folder, too.
        temporary: the owner of a folder that nobody named; the folder goes with this object.
    """

    pipeline: Any
    folder: Path
    family: "Family"
    settings: "Settings"
    given: "GivenRows"
    holds_model: bool = True
    temporary: TemporaryDirectory | None = field(default=None, repr=False)

    @property
    def record(self) -> dict:
        """The content of `unlearning.json`: what was done, and nothing that tells to whom."""
        return read_json(self.folder / "unlearning.json")

    def save(self, folder: str | Path) -> Path:
        """Save what a script leaves in its `--output_dir`: the pipeline or the adapter, `unlearning.json`,
        `train_log.jsonl` and the local `receipt.json`.

        Returns:
            The folder.
        """
        from siss_diffusers.training.adapters import save_lora

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.settings.adapter is not None:
            save_lora(self.family.network(self.pipeline), folder, type(self.pipeline), self.family.network_name)
        else:
            self.pipeline.save_pretrained(folder)
        for path in sorted(self.folder.iterdir()):
            if path.is_file() and not path.name.startswith(OF_THE_RUN) and folder.resolve() != self.folder.resolve():
                shutil.copy2(path, folder / path.name)  # with its mode: the receipt is its owner's alone
        return folder

    def push_to_hub(self, repo_id: str, token: str | None = None, private: bool = False) -> str:
        """Publish the result with its card, as `siss push` does.

        Returns:
            A sentence with the address of the commit.

        Raises:
            UsageError: where the repository cannot be created.
            RunError: where the upload fails.
        """
        from siss_diffusers.hub.upload import check_repo_id, create_repository, push_run

        check_repo_id(repo_id, "repo_id")
        repo_id = create_repository(repo_id, token, private)
        if self.holds_model:
            return push_run(self.folder, repo_id, token)
        with TemporaryDirectory() as folder:
            return push_run(self.save(folder), repo_id, token)
