"""What `unlearn(...)` returns: the pipeline that has forgotten, and what can be done with it."""

import copy
import shutil
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from siss_diffusers.data.captions import load_captions
from siss_diffusers.data.images import ImageTransform
from siss_diffusers.data.split import GivenRows, split_data
from siss_diffusers.errors import UsageError
from siss_diffusers.families import Family, LoadedPipeline, NamedPipeline
from siss_diffusers.families.loading import load_for_sampling
from siss_diffusers.settings import Settings
from siss_diffusers.storage.files import read_json
from siss_diffusers.storage.folders import made_folder
from siss_diffusers.training.adapters import save_lora


if TYPE_CHECKING:
    from siss_diffusers.evaluation import Evaluation

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
    family: Family
    settings: Settings
    given: GivenRows
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

        Raises:
            UsageError: where the folder cannot be made.
        """
        folder = Path(folder).expanduser()
        with made_folder("folder", folder):
            if self.settings.adapter is not None:
                save_lora(self.family.network(self.pipeline), folder, type(self.pipeline), self.family.network_name)
            else:
                self.pipeline.save_pretrained(folder)
            for path in sorted(self.folder.iterdir()):
                of_the_run = not path.is_file() or path.name.startswith(OF_THE_RUN)
                if not of_the_run and folder.resolve() != self.folder.resolve():
                    shutil.copy2(path, folder / path.name)  # with its mode: the receipt is its owner's alone
        return folder

    def evaluate(self, folder: str | Path | None = None, base: Any = None, **settings: Any) -> "Evaluation":
        """Measure what the pipeline forgot and what it kept, as `siss evaluate` does.

        Args:
            folder: where `evaluation.json`, pictures and `report.html` are written; None writes nothing.
            base: the pipeline before. None: with an adapter, this pipeline without it; else the pipeline is loaded again
                from where it came from.
            settings: of `EvaluationSettings`, such as `num_samples=256`.

        Raises:
            UsageError: where the base is not known, or a setting is not one of the evaluation.
        """
        from siss_diffusers.evaluation import EvaluationSettings, evaluate, write_evaluation

        known = [field.name for field in fields(EvaluationSettings)]
        unknown = [name for name in settings if name not in known]
        if unknown:
            raise UsageError(f"an evaluation has no setting {unknown[0]!r}; the settings are {', '.join(known)}")
        chosen = EvaluationSettings(
            **{"guidance_scale": self.settings.guidance_scale, "seed": self.settings.seed} | settings
        )
        split = split_data(
            self.given,
            evaluation_transform(self.family),
            self.settings.seed,
            drop_near_duplicates=self.settings.drop_near_duplicates,
        )
        keep, prompts = split.train.select(np.sort(split.order.drawn)), [None, None]
        if self.family.has_prompts:
            prompts = [
                load_captions(images, self.settings.caption_column).to_pylist() for images in (keep, split.forget)
            ]
        if folder is not None:
            folder = Path(folder).expanduser()
        models = {"base": lambda: self._base(base), "unlearned": lambda: self._unlearned(chosen.relearning_steps > 0)}
        try:
            with made_folder("folder", folder) if folder is not None else nullcontext():
                evaluation = evaluate(self.family, models, keep, split.forget, *prompts, settings=chosen)
        finally:
            self._set_adapter(True)
        evaluation.settings["data"] = split.counts()
        if folder is not None:
            write_evaluation(folder, evaluation)
        return evaluation

    def _set_adapter(self, enabled: bool) -> None:
        if self.settings.adapter is not None:
            network = self.family.network(self.pipeline)
            network.enable_adapters() if enabled else network.disable_adapters()

    def _base(self, base: Any) -> Any:
        if base is not None:
            return LoadedPipeline(base, "base").pipeline
        if self.settings.adapter is not None:
            self._set_adapter(False)
            return self.pipeline
        name = self.pipeline.config.get("_name_or_path")
        if not name:
            raise UsageError(
                "evaluate: name the pipeline before by `base`; the trained one does not tell where it is from"
            )
        variant, revision = self.settings.variant, self.settings.revision
        source = NamedPipeline(name, "base", revision=revision, variant=variant)
        return load_for_sampling(source, self.family, self.pipeline.device)

    def _unlearned(self, is_trained: bool) -> Any:
        self._set_adapter(True)
        return copy.deepcopy(self.pipeline) if is_trained else self.pipeline

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


def evaluation_transform(family: Family) -> ImageTransform:
    """Return how pictures are read to be compared: without anything random."""
    return ImageTransform(channels=family.channels, resolution=family.resolution, center_crop=True)
