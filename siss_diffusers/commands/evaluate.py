"""Measure what a model forgot and what it kept: base and unlearned models, on the same seeds.

Takes Stable Diffusion pipelines and adapters, or unconditional pipelines with a `UNet2DModel`. Writes `evaluation.json`,
`report.html` and pictures. The forget set is named as for the training scripts. docs/evaluation.md says what each figure
means and how far it can be trusted.
"""

import argparse
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch import Tensor

from siss_diffusers.commands.common import (
    add_sampling_arguments,
    encode,
    load_resolution,
    load_stable_diffusion,
    on_all_processes,
    read_prompts,
    warn_of_long_prompts,
)
from siss_diffusers.data.captions import load_captions
from siss_diffusers.data.images import Images, ImageTransform
from siss_diffusers.data.split import split_data
from siss_diffusers.errors import UsageError
from siss_diffusers.families.trust import is_adapter, load_pipeline_class, loading
from siss_diffusers.flags import (
    add_forget_set_arguments,
    check_forget_set_arguments,
    natural_number,
    non_negative_float,
    positive_float,
    positive_int,
)
from siss_diffusers.hub.contents import weights_digest
from siss_diffusers.metrics.clip import QUALITY_PROMPTS, Clip, clip_iqa, clip_score
from siss_diffusers.metrics.clusters import CopyCluster
from siss_diffusers.metrics.copies import (
    MAX_KEEP_IMAGES,
    CopyDetectors,
    copy_statistics,
    correlation,
    for_detectors,
    frame_copies,
    pixel_l2,
)
from siss_diffusers.metrics.damage import damaged
from siss_diffusers.metrics.distribution import density_coverage, frechet_distance, kernel_distance, precision_recall
from siss_diffusers.metrics.features import copy_similarity, extract, load_torchscript, pixel_features
from siss_diffusers.metrics.inception_score import inception_score
from siss_diffusers.metrics.injection import denoised_injections
from siss_diffusers.metrics.likelihood import bits_per_dimension
from siss_diffusers.metrics.noise_norm import TextNoiseNorms
from siss_diffusers.metrics.sampling import sample_images, sample_prompts
from siss_diffusers.metrics.sharpness import sharpness
from siss_diffusers.noising import GaussianPath
from siss_diffusers.report import write_report
from siss_diffusers.storage.files import write_json


INJECTION_TIMES, INJECTION_DRAWS = (0.2, 0.4, 0.6, 0.8), 4  # times as shares of the schedule
MAX_DAMAGED, MAX_ORDINARY_PROMPTS = 16, 64
NOISE_SEED = 2**32
MIN_SILHOUETTE = 0.25  # below, k-means has split what is one cluster
RELEARNING_POINTS, RELEARNING_BATCH = 4, 16
DISTRIBUTION_METRICS = ("fid", "kid", "precision", "recall", "density", "coverage")
MIN_DISTRIBUTION = 6  # of which density and coverage take five neighbours
TOO_FEW = "too few samples that are no copies, or too few images to keep to compare them with"
GRID_COLUMNS, GRID_SAMPLES = 16, 64
OF_STABLE_DIFFUSION = (
    *("resolution", "dtype", "guidance_scale", "num_ordinary_samples", "paraphrases_file", "prompt_noise"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", required=True, help="The model before: a pipeline, as a folder or on the Hub.")
    parser.add_argument("--unlearned", required=True, help="The model after: a pipeline, or an adapter for the base.")
    parser.add_argument(
        "--also",
        nargs="+",
        default=[],
        metavar="NAME=MODEL",
        help="More models or adapters to put beside them, such as one that never saw the images.",
    )
    parser.add_argument("--output_dir", default="evaluation", help="Where the report goes; default: evaluation.")
    parser.add_argument("--overwrite_output_dir", action="store_true", help="Replace the report in --output_dir.")
    data = parser.add_argument_group("data")
    data.add_argument("--train_data_dir", help="The training set: a folder of images.")
    data.add_argument("--dataset_name", help="The training set: a name on the Hub, or a local folder.")
    data.add_argument("--dataset_config_name", help="The configuration of the data set.")
    data.add_argument("--image_column", default="image", help="The column of the images; default: image.")
    data.add_argument("--caption_column", default="text", help="The column of the prompts; default: text.")
    data.add_argument("--cache_dir", help="Where downloaded models and data sets are kept.")
    add_forget_set_arguments(data)
    samples = parser.add_argument_group("samples")
    samples.add_argument(
        "--num_samples",
        type=positive_int,
        default=256,
        help="Samples of each model; of Stable Diffusion, of the forget images' prompts together. Default: 256.",
    )
    samples.add_argument(
        "--num_ordinary_samples",
        type=natural_number,
        default=256,
        help="Stable Diffusion: samples of the keep images' other prompts together. Default: 256.",
    )
    add_sampling_arguments(samples, batch_size=32)
    metrics = parser.add_argument_group("metrics")
    metrics.add_argument("--copy_detector", help="A TorchScript file of a copy detector, such as SSCD's.")
    metrics.add_argument(
        "--copy_detector_size", type=positive_int, default=288, help="Pictures are resized for it; default: 288."
    )
    metrics.add_argument(
        "--feature_extractor", help="A TorchScript file of a feature extractor, for FID, KID, precision, coverage."
    )
    metrics.add_argument(
        "--feature_size", type=positive_int, default=299, help="Pictures are resized for it; default: 299."
    )
    metrics.add_argument(
        "--classifier", help="A TorchScript file that maps pictures to class logits, for the inception score."
    )
    metrics.add_argument("--classifier_size", type=positive_int, help="Pictures are resized for it.")
    metrics.add_argument(
        "--clip_model",
        help="A CLIP of transformers, such as openai/clip-vit-base-patch16, for CLIP score and CLIP-IQA.",
    )
    metrics.add_argument(
        "--num_likelihood_images",
        type=natural_number,
        default=32,
        help="Unconditional models: keep images whose likelihood is computed; default: 32.",
    )
    metrics.add_argument(
        "--paraphrases_file", help="Stable Diffusion: a text file of other wordings of the memorized prompts."
    )
    metrics.add_argument(
        "--prompt_noise",
        type=positive_float,
        nargs="*",
        default=[],
        help="Stable Diffusion: sample with noise on the prompt's embedding, so many times its standard deviation.",
    )
    metrics.add_argument(
        "--relearning_steps",
        type=natural_number,
        default=0,
        help="Fine-tune each model but the base on neighbours of the forget images for so many steps and watch whether"
        " copies return; default: 0, not at all.",
    )
    metrics.add_argument(
        "--relearning_rate", type=non_negative_float, default=1e-4, help="Learning rate of that; default: 1e-4."
    )
    metrics.add_argument(
        "--num_relearning_samples", type=positive_int, default=64, help="Samples at each of its points; default: 64."
    )


class Detectors:
    """All copy detectors in use. None flags an image to keep: thresholds are calibrated so, and k-means is left out where
    it does."""

    def __init__(self, references: Tensor, keep: Tensor, args: argparse.Namespace) -> None:
        self.args = args
        self.base = CopyDetectors.calibrated(for_detectors(references), for_detectors(keep))
        self.settings = {
            "pixel_l2": {"threshold": self.base.max_distance},
            "correlation": {"threshold": self.base.min_correlation},
        }
        self.network, self.clusters = None, None
        if args.copy_detector is not None:
            self.network = load_torchscript(args.copy_detector, "--copy_detector").to(PartialState().device)
            self.reference_features = self.features(references)
            highest = copy_similarity(self.features(keep), self.reference_features).max().item()
            self.min_similarity = (1 + highest) / 2
            self.settings["network"] = {"threshold": self.min_similarity}

    def features(self, images: Tensor) -> Tensor:
        size, batch = self.args.copy_detector_size, self.args.batch_size
        return extract(self.network, images, size=size, batch_size=batch, flag="--copy_detector")

    def similarity(self, images: Tensor) -> Tensor:
        """Cosine to the nearest forget image in the features of --copy_detector."""
        return copy_similarity(self.features(images), self.reference_features)

    def add_clusters(self, samples: Tensor, keep: Tensor) -> str | None:
        """k-means on the base's samples, as in the SISS paper; the reason where it cannot tell copies from the rest."""
        features = pixel_features(for_detectors(samples))
        clusters = CopyCluster.fit(features, pixel_features(self.base.references), seed=self.args.seed)
        if clusters is None or clusters.silhouette < MIN_SILHOUETTE:
            return "the base's samples do not fall into two clusters, one of them that of the forget images"
        flagged = clusters.flags(pixel_features(for_detectors(keep))).float().mean().item()
        if flagged > 0:
            return f"the memorized cluster also takes {100 * flagged:.1f} % of the images to keep"
        self.clusters = clusters
        self.settings["cluster"] = {"silhouette": clusters.silhouette}
        return None

    def flags(self, images: Tensor) -> dict[str, Tensor]:
        small = for_detectors(images)
        flags = self.base.flags(small)
        del flags["any"]
        if self.network is not None:
            flags["network"] = self.similarity(images) > self.min_similarity
        if self.clusters is not None:
            flags["cluster"] = self.clusters.flags(pixel_features(small))
        return flags | {"any": torch.stack(list(flags.values())).any(0)}

    def damage_table(self, references: Tensor) -> dict[str, dict[str, float]]:
        """For each detector and kind of damage the share of damaged forget images that it still flags; of the first
        `MAX_DAMAGED`."""
        caught: dict[str, dict[str, list]] = {}
        for index, reference in enumerate(references[:MAX_DAMAGED]):
            for damage, image in {"none": reference, **damaged(reference, self.args.seed + index)}.items():
                for name, flag in self.flags(image[None]).items():
                    caught.setdefault(name, {}).setdefault(damage, []).append(bool(flag))
        return {name: {d: float(np.mean(hits)) for d, hits in row.items()} for name, row in caught.items()}


class Model:
    """What both kinds of model have in common: the data, the detectors, and what is computed from samples alone.

    Args:
        keep, forget: the data; forget images that are equal count once.
    """

    def __init__(self, args: argparse.Namespace, keep: Images, forget: Images, alike: Sequence[int]) -> None:
        self.args = args
        self.reference_indices = unique_images(forget)
        self.references = load_pictures(forget, self.reference_indices)
        self.keep_indices = np.random.default_rng(args.seed).permutation(list(alike))[:MAX_KEEP_IMAGES].tolist()
        self.keep = load_pictures(keep, self.keep_indices)
        self.detectors = Detectors(self.references, self.keep, args)
        self.skipped: dict[str, str] = {}
        self.extractor = self.classifier = None
        if args.feature_extractor is not None:
            self.extractor = load_torchscript(args.feature_extractor, "--feature_extractor").to(PartialState().device)
        else:
            self.skipped |= dict.fromkeys(DISTRIBUTION_METRICS, "needs --feature_extractor, a TorchScript file")
        if args.classifier is not None:
            self.classifier = load_torchscript(args.classifier, "--classifier").to(PartialState().device)
        else:
            self.skipped["inception_score"] = "needs --classifier, a TorchScript file"
        if args.copy_detector is None:
            self.skipped["sscd_forget"] = "needs --copy_detector, a TorchScript file such as SSCD's"
        self.clip = None
        if args.clip_model is not None:
            self.clip = Clip(args.clip_model, PartialState().device, "--clip_model", args.cache_dir)
            self.quality_texts = self.clip.of_texts(QUALITY_PROMPTS)
        else:
            self.skipped["clip_score"] = self.skipped["clip_iqa"] = "needs --clip_model"
        self.skipped["classifier_accuracy"] = "no prompt names a class to check"
        if args.relearning_steps == 0:
            self.skipped["relearning"] = "asked for by --relearning_steps"

    def from_samples(self, images: Tensor) -> dict:
        """Copies among the samples, and what the others are like."""
        flags = self.detectors.flags(images)
        others = images[~flags["any"]]
        found = copy_statistics(flags) | {"others": len(others)}
        if len(others):
            small, keep = for_detectors(others), for_detectors(self.keep)
            found["others_distance_to_keep"] = pixel_l2(small, keep).median().item()
            found["others_sharpness"] = (sharpness(others).median() / sharpness(self.keep).median()).item()
        else:
            found |= {"others_distance_to_keep": None, "others_sharpness": None}
        if self.clip is not None and len(others):
            embedded = self.clip.of_images(others, self.args.batch_size)
            found["clip_iqa"] = clip_iqa(embedded, *self.quality_texts).mean().item()
        if self.detectors.network is not None:
            found["sscd_forget"] = self.detectors.similarity(images).mean().item()
        return found

    def distribution(self, images: Tensor, reference: Tensor | None) -> dict:
        """How samples that are no copies lie to images to keep, in the features of --feature_extractor; the inception
        score by --classifier."""
        args, found = self.args, {}
        if self.classifier is not None:
            if len(images) == 0:
                self.skipped["inception_score"] = TOO_FEW
            else:
                logits = extract(
                    self.classifier,
                    images,
                    size=args.classifier_size,
                    batch_size=args.batch_size,
                    flag="--classifier",
                    normalize=False,
                )
                score, spread = inception_score(logits.softmax(1), splits=min(10, len(images)))
                found |= {"inception_score": score, "inception_score_std": spread}
        if self.extractor is not None:
            if reference is None or min(len(images), len(reference)) < MIN_DISTRIBUTION:
                self.skipped |= dict.fromkeys(DISTRIBUTION_METRICS, TOO_FEW)
            else:
                real, fake = (
                    extract(
                        self.extractor,
                        pictures,
                        size=args.feature_size,
                        batch_size=args.batch_size,
                        flag="--feature_extractor",
                    )
                    for pictures in (reference, images)
                )
                found |= {"fid": frechet_distance(real, fake), "kid": kernel_distance(real, fake)}
                found["precision"], found["recall"] = precision_recall(real, fake)
                found["density"], found["coverage"] = density_coverage(real, fake)
        return found

    def injections(
        self, path: GaussianPath, clean: Tensor, predict: Callable, decode: Callable, references: Tensor
    ) -> dict[str, list[float]]:
        """Correlation of each forget image with what the model makes of a noised version of it, by timestep.

        Args:
            clean: the forget images as the network sees them; `references` as they are compared.
        """
        found, references = {}, for_detectors(references)
        grid = torch.linspace(0, len(path) - 1, self.args.num_inference_steps).long().tolist()
        for share in INJECTION_TIMES:
            index = int(share * (len(path) - 1))
            denoised = denoised_injections(
                clean,
                path,
                predict,
                index=index,
                sampling_indices=grid,
                num_draws=INJECTION_DRAWS,
                batch_size=self.args.batch_size,
                seed=self.args.seed,
            )
            found[str(int(path.model_timesteps[index]))] = [
                correlation(picture[None], reference[None]).item()
                for draw in denoised
                for picture, reference in zip(for_detectors(decode(draw)), references)
            ]
        return found

    def relearn(self, unet, path: GaussianPath, clean: Tensor, predict: Callable, sample: Callable) -> list[dict]:
        """Ordinary fine-tuning on the keep images nearest to a forget image; the share of copies on the way.

        Args:
            clean: `(N, ...)`, the neighbours as the network sees them.
            predict: `(noisy, indices into the path, rows of clean) -> output`.
            sample: pictures from the network as it is now.
        """
        args, points = self.args, []
        batch_size = min(RELEARNING_BATCH, args.batch_size)
        every = max(args.relearning_steps // RELEARNING_POINTS, 1)
        generator = torch.Generator().manual_seed(args.seed)
        unet.requires_grad_(True).train()
        optimizer = torch.optim.AdamW(unet.parameters(), lr=args.relearning_rate)
        for step in range(args.relearning_steps + 1):
            if step % every == 0 or step == args.relearning_steps:
                points.append({"step": step} | copy_statistics(self.detectors.flags(sample())))
            if step < args.relearning_steps:
                rows = torch.randint(len(clean), (batch_size,), generator=generator)
                indices = torch.randint(len(path), (batch_size,), generator=generator)
                batch = clean[rows].cpu()
                noise = torch.randn(batch.shape, generator=generator)
                noisy, target = path.add_noise(batch, noise, indices), path.target(batch, noise, indices)
                output = predict(noisy.to(unet.device), indices, rows)
                F.mse_loss(output.float(), target.to(output.device)).backward()
                torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        return points

    def neighbors(self, count: int = 64) -> Tensor:
        """Rows of `keep` that are nearest to any forget image."""
        distance = pixel_l2(for_detectors(self.keep), for_detectors(self.references))
        return distance.argsort()[:count]


def unique_images(images: Images) -> list[int]:
    """Different pictures only, in their order: a memorized image is often in the forget set many times."""
    found = {images.digest(index): index for index in reversed(range(len(images)))}
    return sorted(found.values())


def load_pictures(images: Images, indices: Sequence[int]) -> Tensor:
    """`(N, C, H, W)` in [0, 1]."""
    return torch.stack([images.load(int(index)) for index in indices]) / 2 + 0.5


class Unconditional(Model):
    """Pipelines with a `UNet2DModel`."""

    def __init__(self, args: argparse.Namespace, keep: Images, forget: Images) -> None:
        super().__init__(args, keep, forget, range(len(keep)))
        for name in ("text_noise_norm", "clip_score", "paraphrases", "prompt_noise"):
            self.skipped[name] = "the model is unconditional: there is no text"

    @staticmethod
    def load(args: argparse.Namespace, name: str, where: str):
        from diffusers import DDPMPipeline

        with loading(where, flag_of(name)):
            pipeline = DDPMPipeline.from_pretrained(where, cache_dir=args.cache_dir, use_safetensors=True)
        pipeline.unet.to(PartialState().device)
        return pipeline

    def sample(self, pipeline, count: int, progress: str | None = None) -> Tensor:
        def batch(start: int) -> Tensor:
            size = min(self.args.batch_size, count - start)
            return sample_images(
                pipeline.unet,
                pipeline.scheduler,
                size,
                seed=self.args.seed + start,
                num_inference_steps=self.args.num_inference_steps,
                batch_size=size,
            )

        return torch.cat(on_all_processes(batch, range(0, count, self.args.batch_size), progress))

    def measure(self, name: str, where: str) -> tuple[dict, dict[str, Tensor]]:
        args, pipeline = self.args, self.load(self.args, name, where)
        path = GaussianPath.from_scheduler(pipeline.scheduler)
        device = PartialState().device
        images = self.sample(pipeline, args.num_samples, f"Samples, {name}")
        if name == "base":
            reason = self.detectors.add_clusters(images, self.keep)
            if reason is not None:
                self.skipped["copies by cluster"] = reason
        found = self.from_samples(images)
        found |= self.distribution(images[~self.detectors.flags(images)["any"]], self.keep)

        def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
            return pipeline.unet(noisy, timesteps).sample

        pipeline.unet.eval()
        chosen = self.keep[: args.num_likelihood_images]
        pictures = torch.cat([self.references, chosen]).mul(255).round() / 255
        bits = bits_per_dimension(
            pictures.to(device), path.to(device), predict, batch_size=args.batch_size, seed=args.seed
        )
        found["nll_forget_bpd"] = bits[: len(self.references)].mean().item()
        found["nll_keep_bpd"] = bits[len(self.references) :].mean().item() if len(chosen) else None
        if not len(chosen):
            self.skipped["nll_keep_bpd"] = "asked for by --num_likelihood_images"
        likeness = self.injections(
            path.to(device),
            (self.references * 2 - 1).to(device),
            predict,
            lambda draw: draw.cpu() / 2 + 0.5,
            self.references,
        )
        found["injection"] = {timestep: float(np.mean(values)) for timestep, values in likeness.items()}
        if args.relearning_steps and name != "base":

            def predict_indexed(noisy: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
                return predict(noisy, path.model_timesteps[indices].to(device))

            found["relearning"] = self.relearn(
                pipeline.unet,
                path,
                self.keep[self.neighbors()] * 2 - 1,
                predict_indexed,
                lambda: self.sample(pipeline, args.num_relearning_samples),
            )
        return found, {"samples": images}


class StableDiffusion(Model):
    """`StableDiffusionPipeline`s, and adapters for the base."""

    def __init__(self, args: argparse.Namespace, keep: Images, forget: Images) -> None:
        forget_captions = load_captions(forget, args.caption_column).to_pylist()
        captions = load_captions(keep, args.caption_column).to_pylist()
        self.prompts = sorted(set(forget_captions))
        if args.num_samples < len(self.prompts):
            raise UsageError(f"--num_samples must be at least {len(self.prompts)}, the prompts of the forget images")
        number = {prompt: index for index, prompt in enumerate(self.prompts)}
        alike = [index for index, caption in enumerate(captions) if caption in number]
        super().__init__(args, keep, forget, alike or range(len(keep)))
        self.reference_prompts = torch.tensor([number[forget_captions[index]] for index in self.reference_indices])
        # None: no image to keep has a forget image's prompt, so there is nothing to learn it anew from.
        self.keep_prompts = torch.tensor([number[captions[index]] for index in self.keep_indices]) if alike else None
        # In the order of how often they occur, so that a few samples are of what matters.
        counts = Counter(caption for caption in captions if caption not in number)
        self.ordinary = [caption for caption, _ in counts.most_common(MAX_ORDINARY_PROMPTS)]
        self.ordinary_images = None
        if self.extractor is not None and self.ordinary:
            of_ordinary = [index for index, caption in enumerate(captions) if caption in set(self.ordinary)]
            chosen = np.random.default_rng(args.seed).permutation(of_ordinary)[:MAX_KEEP_IMAGES]
            self.ordinary_images = load_pictures(keep, chosen)
        self.paraphrases = read_prompts("--paraphrases", None, args.paraphrases_file)
        for name in ("nll_forget_bpd", "nll_keep_bpd"):
            self.skipped[name] = "not computed for latent models"
        if not self.paraphrases:
            self.skipped["paraphrases"] = "asked for by --paraphrases_file"
        if not args.prompt_noise:
            self.skipped["prompt_noise"] = "asked for by --prompt_noise"
        if self.keep_prompts is None and args.relearning_steps:
            self.skipped["relearning"] = "no image to keep has the prompt of a forget image"
        if not self.ordinary or not args.num_ordinary_samples:
            reason = "there are no other prompts in the training set, or none were asked for"
            names = ["ordinary_copy_share", "drift", "clip_score", "inception_score", *DISTRIBUTION_METRICS]
            self.skipped |= {name: reason for name in names if name not in self.skipped}
        if args.guidance_scale <= 1:
            self.skipped["text_noise_norm"] = "without guidance (--guidance_scale above 1) there is none"

    def load(self, name: str, where: str):
        flag = flag_of(name)
        if name != "base" and is_adapter(where, flag):
            pipeline = load_stable_diffusion(self.args, self.args.base, "--base", adapter=where, adapter_flag=flag)
        else:
            pipeline = load_stable_diffusion(self.args, where, flag)
        if name == "base":
            warn_of_long_prompts(pipeline, [*self.prompts, *self.ordinary, *self.paraphrases])
        return pipeline

    def sample(
        self, pipeline, prompts: Sequence[str], count: int, noise: float = 0.0, progress: str | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Samples, the prompts in turn, and the noise norm of each at every step `(S, N)`, where there is guidance."""
        table, negative = encode(pipeline, prompts)

        def batch(start: int) -> tuple[Tensor, Tensor | None]:
            rows = torch.arange(start, min(start + self.args.batch_size, count)) % len(prompts)
            embeds = table[rows.to(table.device)]
            if noise:
                # Of each sample by itself, and not the noise that its latents start from.
                seeds = [NOISE_SEED + self.args.seed + index for index in range(start, start + len(rows))]
                drawn = [
                    torch.randn(embeds.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds
                ]
                embeds = embeds + noise * embeds.std(dim=(1, 2), keepdim=True) * torch.stack(drawn).to(embeds)
            with TextNoiseNorms(pipeline.unet, GaussianPath.from_scheduler(pipeline.scheduler)) as norms:
                images = sample_prompts(
                    pipeline,
                    embeds,
                    negative,
                    seed=self.args.seed + start,
                    num_inference_steps=self.args.num_inference_steps,
                    guidance_scale=self.args.guidance_scale,
                    batch_size=len(rows),
                    resolution=self.args.resolution,
                )
            return images, norms.per_step().cpu() if self.args.guidance_scale > 1 else None

        found = on_all_processes(batch, range(0, count, self.args.batch_size), progress)
        norms = torch.cat([norm for _, norm in found], 1) if self.args.guidance_scale > 1 else None
        return torch.cat([images for images, _ in found]), norms

    def measure(self, name: str, where: str) -> tuple[dict, dict[str, Tensor]]:
        args, pipeline = self.args, self.load(name, where)
        images, norms = self.sample(pipeline, self.prompts, args.num_samples, progress=f"Memorized, {name}")
        if name == "base":
            reason = self.detectors.add_clusters(images, self.keep)
            if reason is not None:
                self.skipped["copies by cluster"] = reason
        found, pictures = self.from_samples(images), {"memorized prompt": images}
        if norms is not None:
            found |= {"text_noise_norm": norms.mean().item(), "text_noise_norm_by_step": norms.mean(1).tolist()}
        if args.num_ordinary_samples and self.ordinary:
            ordinary, _ = self.sample(pipeline, self.ordinary, args.num_ordinary_samples, progress=f"Ordinary, {name}")
            pictures["ordinary prompts"] = ordinary
            flags = self.detectors.flags(ordinary)["any"]
            found["ordinary_copy_share"] = flags.float().mean().item()
            found |= self.distribution(ordinary[~flags], self.ordinary_images)
            if self.clip is not None:
                # The prompts took turns.
                texts = self.clip.of_texts(self.ordinary)[torch.arange(len(ordinary)) % len(self.ordinary)]
                scores = clip_score(self.clip.of_images(ordinary, args.batch_size), texts)
                found["clip_score"] = scores.mean().item()
        for kind, variations in (("paraphrases", self.paraphrases), ("prompt_noise", args.prompt_noise)):
            rows = []
            for number, variation in enumerate(variations):
                prompts, noise = ([variation], 0.0) if kind == "paraphrases" else (self.prompts, variation)
                drawn, _ = self.sample(pipeline, prompts, args.num_relearning_samples, noise)
                label = {"prompt_number": number} if kind == "paraphrases" else {"noise": variation}
                rows.append(label | copy_statistics(self.detectors.flags(drawn)))
            if rows:
                found[kind] = rows
        relearn = args.relearning_steps > 0 and name != "base" and self.keep_prompts is not None
        found |= self.in_latent_space(pipeline, relearn)
        return found, pictures

    def in_latent_space(self, pipeline, relearn: bool) -> dict:
        """The injection of the forget images and the relearning attack, under each image's own prompt."""
        path = GaussianPath.from_scheduler(pipeline.scheduler)
        device, batch_size = pipeline.device, self.args.batch_size
        factor = pipeline.vae.config.scaling_factor
        table, _ = encode(pipeline, self.prompts)

        @torch.no_grad()
        def to_latents(pictures: Tensor) -> Tensor:
            batches = (pictures * 2 - 1).to(device, pipeline.vae.dtype).split(batch_size)
            return torch.cat([pipeline.vae.encode(batch).latent_dist.mean for batch in batches]).float() * factor

        @torch.no_grad()
        def decode(latents: Tensor) -> Tensor:
            batches = (latents / factor).to(pipeline.vae.dtype).split(batch_size)
            decoded = torch.cat([pipeline.vae.decode(batch).sample.float().cpu() for batch in batches])
            return (decoded / 2 + 0.5).clamp(0, 1)

        def predict(noisy: Tensor, timesteps: Tensor, prompts: Tensor) -> Tensor:
            dtype = pipeline.unet.dtype  # another while it is fine-tuned
            states = table[prompts.to(device)].to(dtype)
            return pipeline.unet(noisy.to(dtype), timesteps, states).sample.float()

        pipeline.unet.eval()
        likeness: dict[str, list[float]] = {}
        for prompt in self.reference_prompts.unique().tolist():
            references = self.references[self.reference_prompts == prompt]
            of_prompt = self.injections(
                path.to(device),
                to_latents(references),
                lambda noisy, timesteps, prompt=prompt: predict(noisy, timesteps, torch.full((len(noisy),), prompt)),
                decode,
                references,
            )
            for timestep, values in of_prompt.items():
                likeness.setdefault(timestep, []).extend(values)
        found = {"injection": {timestep: float(np.mean(values)) for timestep, values in likeness.items()}}
        if relearn:
            if hasattr(pipeline.unet, "peft_config"):
                # What an attacker would do who has the weights: the adapter cannot be taken off, all of it is trained.
                pipeline.fuse_lora()
                pipeline.unload_lora_weights()
            pipeline.to(torch.float32)
            neighbors = self.neighbors()
            prompts = self.keep_prompts[neighbors]

            def predict_indexed(noisy: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
                return predict(noisy, path.model_timesteps[indices].to(device), prompts[rows])

            found["relearning"] = self.relearn(
                pipeline.unet,
                path,
                to_latents(self.keep[neighbors]),
                predict_indexed,
                lambda: self.sample(pipeline, self.prompts, self.args.num_relearning_samples)[0],
            )
        return found


def flag_of(name: str) -> str:
    return f"--{name}" if name in ("base", "unlearned") else "--also"


def check_arguments(args: argparse.Namespace) -> tuple[dict[str, str], bool]:
    """The models by name, and whether they are Stable Diffusion.

    Raises:
        UsageError: naming the flag.
    """
    if (args.dataset_name is None) == (args.train_data_dir is None):
        raise UsageError("give the training set by either --train_data_dir or --dataset_name")
    check_forget_set_arguments(args)
    models = {"base": args.base, "unlearned": args.unlearned}
    for entry in args.also:
        name, _, where = entry.partition("=")
        # The name becomes part of a file's name.
        if not re.fullmatch(r"[\w.-]+", name) or not where or name in (*models, "settings"):
            raise UsageError(f"--also takes NAME=MODEL, every NAME once, of letters, digits, ., _ and -, not {entry}")
        models[name] = where
    pipeline_class = load_pipeline_class(args.base, "--base", cache_dir=args.cache_dir)
    stable_diffusion = pipeline_class == "StableDiffusionPipeline"
    if not stable_diffusion:
        if pipeline_class not in ("DDPMPipeline", "DDIMPipeline"):
            raise UsageError(f"--base: {args.base} is a {pipeline_class}, which is not supported yet")
        defaults = argparse.ArgumentParser()
        add_arguments(defaults)
        for name in OF_STABLE_DIFFUSION:
            if getattr(args, name) != defaults.get_default(name):
                raise UsageError(f"--{name} is for Stable Diffusion, and {args.base} is a {pipeline_class}")
    for name, where in models.items():
        if name != "base" and stable_diffusion and is_adapter(where, flag_of(name)):
            continue
        if load_pipeline_class(where, flag_of(name), cache_dir=args.cache_dir) != pipeline_class:
            raise UsageError(f"{flag_of(name)}: {where} is no {pipeline_class}, as the base is")
    output_dir = Path(args.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise UsageError(f"--output_dir: {output_dir} is a file; name a folder")
    if output_dir.exists() and not args.overwrite_output_dir and any(output_dir.iterdir()):
        raise UsageError(f"--output_dir: {output_dir} is not empty; add --overwrite_output_dir or name another folder")
    return models, stable_diffusion


def choose_size(args: argparse.Namespace, stable_diffusion: bool) -> tuple[int, int]:
    """Channels and side of the pictures."""
    from diffusers import UNet2DModel

    if stable_diffusion:
        return 3, load_resolution(args, args.base, "--base")
    with loading(args.base, "--base"):
        config = UNet2DModel.load_config(args.base, subfolder="unet", cache_dir=args.cache_dir)
        return config["in_channels"], config["sample_size"]


def main(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    models, stable_diffusion = check_arguments(args)
    channels, size = choose_size(args, stable_diffusion)
    transform = ImageTransform(channels=channels, resolution=size, center_crop=True, random_flip=False)
    state = PartialState()
    train, forget, order, _ = split_data(args, transform, state)
    keep, counts = train.select(np.sort(order.drawn)), {"train": len(train), "forget": len(forget), **order.counts()}
    evaluation = (StableDiffusion if stable_diffusion else Unconditional)(args, keep, forget)
    results, samples = {}, {}
    for name, where in models.items():
        results[name], samples[name] = evaluation.measure(name, where)
    if not state.is_main_process:
        return

    kind = "ordinary prompts" if stable_diffusion else "samples"
    for name, images in samples.items():
        if name != "base" and kind in images:
            results[name]["drift"] = drift(samples["base"][kind], images[kind], evaluation.detectors)
    # A metric that could not be computed is null, with its reason.
    for metrics in results.values():
        metrics |= {name: None for name in evaluation.skipped if name not in metrics and " " not in name}
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    content = results | {
        "settings": {
            "detectors": evaluation.detectors.settings,
            "damage_table": evaluation.detectors.damage_table(evaluation.references),
            "keep_flagged": {
                name: flags.float().mean().item()
                for name, flags in evaluation.detectors.flags(evaluation.keep).items()
            },
            "forget_images": len(evaluation.references),
            "unlearned_weights": weights_digest(Path(args.unlearned)) if os.path.isdir(args.unlearned) else None,
            "data": counts,
            "num_inference_steps": args.num_inference_steps,
            "guidance_scale": args.guidance_scale if stable_diffusion else None,
            "seed": args.seed,
            "relearning_rate": args.relearning_rate if args.relearning_steps else None,
            "versions": {name: version(name) for name in ("torch", "diffusers", "siss_diffusers")},
            "seconds": time.perf_counter() - started,
            "skipped": evaluation.skipped,
        }
    }
    write_json(output_dir / "evaluation.json", content)
    pictures = draw_pictures(output_dir, evaluation, samples)
    write_report(output_dir / "report.html", content, pictures)
    print_summary(content, output_dir)


def drift(before: Tensor, after: Tensor, detectors: Detectors) -> float | None:
    """How far the samples that were no copies have moved: median distance between two of one seed, relative to the
    contrast of the first. 0 for the same picture, about sqrt(2) for unrelated ones."""
    ordinary = ~detectors.flags(before)["any"]
    if not ordinary.any():
        return None
    before, after = before[ordinary], after[ordinary]
    contrast = (before - before.mean(dim=(2, 3), keepdim=True)).flatten(1).norm(dim=1)
    return ((after - before).flatten(1).norm(dim=1) / contrast.clamp(min=1e-6)).median().item()


def draw_pictures(output_dir: Path, evaluation: Model, samples: dict[str, dict[str, Tensor]]) -> dict[str, Path]:
    """Grids of samples of the same seeds, copies framed, by caption."""
    from torchvision.io import write_png

    pictures = {}
    for name, grids in samples.items():
        for kind, images in grids.items():
            shown = images[:GRID_SAMPLES]
            columns = min(GRID_COLUMNS, len(shown))
            scale = max(64 // shown.shape[-1], 1)
            copies = evaluation.detectors.flags(shown)["any"].tolist()
            file = output_dir / f"{name}_{kind.replace(' ', '_')}.png"
            write_png(frame_copies(shown, copies, columns, scale), str(file))
            pictures[f"{name}, {kind}"] = file
    return pictures


def print_summary(content: dict, output_dir: Path) -> None:
    names = [name for name in content if name != "settings"]
    rows = [("copies, %", "copy_share", 100), ("of others: L2 to the nearest to keep", "others_distance_to_keep", 1)]
    rows += [("of others: sharpness against those to keep", "others_sharpness", 1)]
    rows += [("ordinary samples: drift from the base's", "drift", 1)]
    rows += [(key, key, 1) for key in ("inception_score", "fid", "kid", "nll_forget_bpd", "nll_keep_bpd")]
    rows += [("text_noise_norm", "text_noise_norm", 1)]
    print(f"\n{'':44}" + "".join(f"{name:>16}" for name in names))
    for label, key, factor in rows:
        values = [content[name].get(key) for name in names]
        if any(value is not None for value in values):
            cells = ["-" if value is None else f"{factor * value:.3f}" for value in values]
            print(f"{label:44}" + "".join(f"{cell:>16}" for cell in cells))
    print(f"\nThe report, with intervals and what was left out: {output_dir / 'report.html'}")
