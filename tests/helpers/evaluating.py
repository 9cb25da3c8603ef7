"""Evaluators of the shipped tiny models, on a few real pictures, and other metrics than the real ones."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import DDPMPipeline, StableDiffusionPipeline

from siss_diffusers.assets.captioned import DIGIT_CAPTIONS, FLOWER_CAPTION, flower_images, memorized_image
from siss_diffusers.assets.digits import digit_images, garment_image
from siss_diffusers.evaluation import EvaluationData, EvaluationSettings, Evaluator, Networks
from siss_diffusers.families import NamedPipeline, StableDiffusion, Unconditional
from siss_diffusers.metrics import METRICS, PROBES, Entry, Metric, Probe
from tests.helpers.paths import TINY_MODEL, TINY_SD


def digits_evaluator(networks: Networks | None = None, **settings) -> Evaluator:
    """Return an evaluator of the unconditional model."""
    keep = torch.from_numpy(digit_images()[0][:30]).unsqueeze(1) / 255
    data = EvaluationData.without_prompts(torch.from_numpy(garment_image())[None, None] / 255, keep)
    few = {"num_samples": 12, "num_inference_steps": 4, "num_likelihood_images": 2, "batch_size": 16}
    family = Unconditional.from_source(NamedPipeline(str(TINY_MODEL)))
    return Evaluator(family, data, EvaluationSettings(**few | settings), networks)


def load_digits() -> DDPMPipeline:
    return DDPMPipeline.from_pretrained(TINY_MODEL)


def flowers_evaluator(networks: Networks | None = None, ordinary=DIGIT_CAPTIONS[:2], **settings) -> Evaluator:
    """Return an evaluator of the text-to-image model."""
    forget, keep = (
        torch.tensor(images).permute(0, 3, 1, 2) / 255 for images in (memorized_image()[None], flower_images()[:10])
    )
    data = EvaluationData(
        forget=forget,
        keep=keep,
        prompts=(FLOWER_CAPTION,),
        forget_prompts=torch.zeros(1, dtype=torch.long),
        keep_prompts=torch.zeros(10, dtype=torch.long),
        ordinary_prompts=ordinary,
        prompt_classes={prompt: number for number, prompt in enumerate(ordinary)},
    )
    few = {"num_samples": 4, "num_ordinary_samples": 4, "num_inference_steps": 4, "guidance_scale": 3.0}
    family = StableDiffusion.from_source(NamedPipeline(str(TINY_SD)))
    return Evaluator(family, data, EvaluationSettings(**few | settings), networks)


def load_flowers() -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(TINY_SD)


@contextmanager
def only_entries(*entries: Entry) -> Iterator[None]:
    """Replace all metrics and probes, and restore them in their order."""
    tables = [(METRICS, Metric, dict(METRICS)), (PROBES, Probe, dict(PROBES))]
    for table, kind, _ in tables:
        table.clear()
        table.update({entry.key: entry for entry in entries if isinstance(entry, kind)})
    try:
        yield
    finally:
        for table, _, content in tables:
            table.clear()
            table.update(content)
