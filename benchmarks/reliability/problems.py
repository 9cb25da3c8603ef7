"""The models that have to forget: what they are told, and what is measured of them afterwards."""

import json
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from diffusers import DDPMPipeline
from torch import Tensor


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "mnist_tshirt"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import demo_sd
import demo_unconditional
import problem as tshirt
from measure import Measurement

from siss_diffusers.assets import captioned, digits
from siss_diffusers.hub.contents import weights_digest
from siss_diffusers.metrics.broken import finite
from siss_diffusers.metrics.drift import drift
from siss_diffusers.metrics.pictures import save_grid


SHOWN = 48
Figures = dict[str, Any]


class StudyProblem(ABC):
    """A base that reproduces a picture, and data to unlearn it with.

    Args:
        folder: its data are written there.
        num_samples: of the forget prompt, or of the unconditional model.

    Class attributes:
        name: of the problem.
        base: the folder of the pipeline that has to forget.
        settings: of `unlearn`, beside those of a method.
        pairs: of a step.
        budget: rows of a run, see `Budget`.
        sampling_seed: of the samples; training seeds are small numbers.
    """

    name: str
    base: Path
    settings: dict[str, Any] = {}
    pairs: int
    budget: int
    sampling_seed = 1_000_000

    def __init__(self, folder: Path, num_samples: int) -> None:
        self.folder, self.num_samples = folder / self.name, num_samples
        if not (self.folder / "complete").exists():
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            self.write()
            (self.folder / "complete").touch()

    @property
    def digest(self) -> str:
        """Return what tells this base from another."""
        return weights_digest(self.base)

    @abstractmethod
    def write(self) -> None:
        """Write the data."""

    @abstractmethod
    def load(self) -> Any:
        """Load the base, a fresh pipeline each time."""

    @abstractmethod
    def arguments(self) -> dict[str, Any]:
        """Return the data as `unlearn` takes them."""

    @abstractmethod
    def measure(self, pipeline: Any, picture: Path | None) -> Figures:
        """Measure a pipeline, and write what it draws to a picture."""


class StableDiffusionProblem(StudyProblem):
    """The tiny Stable Diffusion and its flower; `keep_flowers` says how many other pictures of that prompt are kept."""

    base = demo_sd.MODEL
    settings = {"use_lora": True}
    pairs, budget = 16, 3_200
    keep_flowers: int | None = None

    def write(self) -> None:
        data = captioned.write_training_folder(self.folder / "data")
        rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
        flowers = [row for row in rows if row["text"] == captioned.FLOWER_CAPTION and not row["forget"]]
        if self.keep_flowers is None:
            return
        # Evenly spread, so that the few are different pictures.
        kept = flowers[:: len(flowers) // self.keep_flowers][: self.keep_flowers] if self.keep_flowers else []
        dropped = {row["file_name"] for row in flowers} - {row["file_name"] for row in kept}
        for name in dropped:
            (data / name).unlink()
        lines = [json.dumps(row) for row in rows if row["file_name"] not in dropped]
        (data / "metadata.jsonl").write_text("\n".join(lines) + "\n")

    def load(self) -> Any:
        return demo_sd.load_pipeline()

    def arguments(self) -> dict[str, Any]:
        return {"keep": str(self.folder / "data")}

    @cached_property
    def _reference(self) -> tuple[Any, Any, Tensor]:
        """The evaluator, the measured base, and its temples."""
        evaluator = demo_sd.make_evaluator(self.sampling_seed, self.num_samples, 200)
        base = evaluator.model("base", self.load(), num_inference_steps=25)
        return evaluator, base, self._temples(base)

    @staticmethod
    def _temples(model: Any) -> Tensor:
        return model.sample((captioned.TEMPLE_CAPTION,), 32)[0]

    def measure(self, pipeline: Any, picture: Path | None) -> Figures:
        evaluator, base, base_temples = self._reference
        model = evaluator.model("unlearned", pipeline, base, num_inference_steps=25)
        temples = self._temples(model)
        keep = model.data.keep
        figures = demo_sd.measure(
            model,
            [
                demo_sd.METRICS[key]
                for key in ("broken_share", "copy_share", "others_sharpness", "classifier_accuracy", "drift")
            ],
        )[0]
        others, usable = model.others, finite(temples)
        figures["others_brightness"] = (others.mean() / keep.mean()).item() if len(others) else None
        figures["temple_drift"] = drift(base_temples, temples) if usable.all() else None
        if picture is not None:
            shown = torch.cat([model.samples[: SHOWN - 24], temples[:12], model.ordinary_samples[:12]])
            copies = model.flags["any"][: SHOWN - 24].tolist() + [False] * 24
            save_grid(picture, shown, copies, columns=12, scale=2)
        return figures


class WithKeepImages(StableDiffusionProblem):
    name = "sd"


class WithoutKeepImages(StableDiffusionProblem):
    name, keep_flowers = "sd_none", 0


class WithThreeKeepImages(StableDiffusionProblem):
    name, keep_flowers = "sd_three", 3


class Digits(StudyProblem):
    """The tiny DDPM of 8x8 digits and its garment."""

    name = "digits"
    base = demo_unconditional.MODEL
    pairs, budget = 64, 19_200

    def write(self) -> None:
        digits.write_training_folder(self.folder / "data")

    def load(self) -> DDPMPipeline:
        return demo_unconditional.load_pipeline(self.base)

    def arguments(self) -> dict[str, Any]:
        return {"keep": str(self.folder / "data"), "forget_files": ["garment_00.png"]}

    @cached_property
    def _evaluator(self) -> Any:
        return demo_unconditional.make_evaluator(self.sampling_seed, self.num_samples, 16)

    def measure(self, pipeline: DDPMPipeline, picture: Path | None) -> Figures:
        model = self._evaluator.model("unlearned", pipeline, num_inference_steps=25)
        keys = ("broken_share", "copy_share", "others_sharpness", "inception_score", "nll_forget_bpd", "nll_keep_bpd")
        figures = demo_unconditional.measure(model, [demo_unconditional.METRICS[key] for key in keys])[0]
        others = model.others
        figures["others_brightness"] = (others.mean() / model.data.keep.mean()).item() if len(others) else None
        if picture is not None:
            save_grid(picture, model.samples[:SHOWN], model.flags["any"][:SHOWN].tolist(), columns=12, scale=6)
        return figures


class TShirt(StudyProblem):
    """The 16x16 model of `benchmarks/mnist_tshirt`."""

    name = "tshirt"
    base = Path(__file__).resolve().parents[1] / "mnist_tshirt" / "base_16x16"
    pairs, budget = 64, 19_200

    def __init__(self, folder: Path, num_samples: int, data: Path | None) -> None:
        self.data = data
        super().__init__(folder, num_samples)

    def write(self) -> None:
        tshirt.prepare(self.folder, 16, *tshirt.read_npz(self.data))
        tshirt.train_classifier(tshirt.Problem.load(self.folder), self.folder / "classifier.safetensors")

    def load(self) -> DDPMPipeline:
        return DDPMPipeline.from_pretrained(self.base)

    def arguments(self) -> dict[str, Any]:
        return {"keep": Dataset.from_parquet(str(self.folder / "training_set" / "train.parquet"))}

    @cached_property
    def _measurement(self) -> Measurement:
        problem = tshirt.Problem.load(self.folder)
        classifier = tshirt.load_classifier(problem, torch.device("cpu"))
        return Measurement(problem, classifier, problem.preset.num_inference_steps)

    def measure(self, pipeline: DDPMPipeline, picture: Path | None) -> Figures:
        samples = self._measurement.samples(pipeline, self.num_samples, seed=0)
        figures = self._measurement.of_samples(samples) | self._measurement.of_network(pipeline)
        if picture is not None:
            copies = self._measurement.detectors.flags(samples[:SHOWN])["any"].tolist()
            save_grid(picture, samples[:SHOWN], copies, columns=12, scale=4)
        return figures


PROBLEMS: dict[str, Callable[..., StudyProblem]] = {
    problem.name: problem for problem in (WithKeepImages, WithoutKeepImages, WithThreeKeepImages, Digits, TShirt)
}
