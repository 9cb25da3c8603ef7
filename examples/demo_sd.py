"""Unlearn the flower that the tiny Stable Diffusion reproduces by a LoRA adapter, load it, and measure: `make demo`.

Everything that the demo needs is in the package: the model, and scikit-learn's digits and photographs.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from launching import launch
from sklearn.neural_network import MLPClassifier

import siss_diffusers
from siss_diffusers.assets.captioned import (
    DIGIT_CAPTIONS,
    FLOWER_CAPTION,
    TEMPLE_CAPTION,
    digit_images,
    flower_images,
    memorized_image,
    write_training_folder,
)
from siss_diffusers.metrics.copies import CopyDetectors, copy_statistics, frame_copies, pixel_l2
from siss_diffusers.metrics.sampling import sample_prompts
from siss_diffusers.metrics.sharpness import sharpness
from siss_diffusers.storage.checkpoints import list_checkpoints
from siss_diffusers.storage.files import write_json


MODEL = Path(siss_diffusers.__file__).parent / "assets" / "tiny_sd"
GUIDANCE_SCALE = 3.0
SHOWN_CAPTIONS = (*[FLOWER_CAPTION] * 2, TEMPLE_CAPTION, DIGIT_CAPTIONS[3], DIGIT_CAPTIONS[7])
COLUMNS = 12
NOT_COMPUTED = {
    "nll_forget_bpd": "not computed for latent models",
    "nll_keep_bpd": "not computed for latent models",
    "inception_score": "classifier_accuracy says more where a class is asked for",
    "fid": "needs the weights of an Inception network, which this demo does not download",
    "kid": "needs the weights of an Inception network, which this demo does not download",
    "sscd_forget": "needs the weights of SSCD, and pictures larger than 32x32",
    "clip_iqa": "needs the weights of CLIP, and pictures larger than 32x32",
    "text_noise_norm": "not part of this demo yet",
}
# What the training script is told; the rest are its defaults.
SETTINGS = {
    "--method": "siss",
    "--forget_scaling": "relative",
    "--forget_scale": "1",
    "--calibrate_forgetting": "0.75",
    "--rank": "8",
    "--learning_rate": "1e-3",
    "--train_batch_size": "16",
    "--max_train_steps": "150",
    "--checkpointing_steps": "25",
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--num_forget_samples", type=int, default=256, help="Samples of the memorized prompt.")
    parser.add_argument(
        "--num_digit_samples", type=int, default=500, help="Samples of the ten digit prompts together."
    )
    parser.add_argument("--num_curve_samples", type=int, default=64, help="Samples of each point of forgetting.png.")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def load_pipeline(adapter: Path | None = None) -> StableDiffusionPipeline:
    """The base, or a fresh pipeline with the adapter in it."""
    pipeline = StableDiffusionPipeline.from_pretrained(MODEL)
    if adapter is not None:
        pipeline.load_lora_weights(adapter)
    pipeline.unet.to(memory_format=torch.channels_last)  # faster on a CPU
    return pipeline


def as_tensor(pictures: np.ndarray) -> torch.Tensor:
    return torch.tensor(pictures).permute(0, 3, 1, 2) / 255


class Evaluation:
    """The digit classifier, the copy detectors and the pictures to compare with."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        digits, classes = digit_images()
        features = as_tensor(digits).mean(1).flatten(1).numpy()
        self.classifier = MLPClassifier((128,), random_state=0, early_stopping=True)
        self.classifier.fit(features, classes)
        self.keep = as_tensor(flower_images())
        self.detectors = CopyDetectors.calibrated(as_tensor(memorized_image()[None]), self.keep)

    def samples(
        self, pipeline: StableDiffusionPipeline, prompts: list[str], progress: str | None = None
    ) -> torch.Tensor:
        """A sample for each prompt, of the same seeds for every model."""
        embeds, negative = pipeline.encode_prompt([*prompts], "cpu", 1, True)
        return sample_prompts(
            pipeline,
            embeds,
            negative[:1],
            seed=self.args.seed,
            guidance_scale=GUIDANCE_SCALE,
            batch_size=64,
            progress=progress,
        )

    def forgetting(self, images: torch.Tensor) -> dict:
        """Copies among samples of the memorized prompt, and what comes instead: how far the others are from the nearest
        picture that was to be kept under this prompt, in pixel L2, and how sharp they are relative to those pictures,
        for a dark or blurred picture is near to everything."""
        flags = self.detectors.flags(images)
        others = images[~flags["any"]]
        found = copy_statistics(flags) | {"others": len(others)}
        if len(others) == 0:
            return found | {"others_distance_to_keep": None, "others_sharpness": None}
        return found | {
            "others_distance_to_keep": pixel_l2(others, self.keep).median().item(),
            "others_sharpness": (sharpness(others).median() / sharpness(self.keep).median()).item(),
        }

    def accuracy(self, images: torch.Tensor, classes: np.ndarray) -> float:
        return float((self.classifier.predict(images.mean(1).flatten(1).numpy()) == classes).mean())

    def measure(self, pipeline: StableDiffusionPipeline, name: str) -> dict:
        flowers = self.samples(pipeline, [FLOWER_CAPTION] * self.args.num_forget_samples, f"Memorized prompt, {name}")
        classes = np.arange(self.args.num_digit_samples) % 10
        digits = self.samples(pipeline, [DIGIT_CAPTIONS[digit] for digit in classes], f"Digits, {name}")
        return self.forgetting(flowers) | {"classifier_accuracy": self.accuracy(digits, classes)}


def draw_grid(path: Path, evaluation: Evaluation, pipelines: dict[str, tuple[StableDiffusionPipeline, float | None]]):
    """Rows: prompts; blocks: models; the same seeds in each; copies framed. Returns the samples of each block."""
    prompts = [caption for caption in SHOWN_CAPTIONS for _ in range(COLUMNS)]
    figure, axes = plt.subplots(len(pipelines), 1, figsize=(6.4, 2.6 * len(pipelines)), layout="constrained")
    blocks = {}
    for axis, (name, (pipeline, scale)) in zip(axes, pipelines.items()):
        if scale is not None:
            pipeline.set_adapters(pipeline.get_active_adapters(), scale)
        blocks[name] = evaluation.samples(pipeline, prompts)
        copies = evaluation.detectors.flags(blocks[name])["any"].tolist()
        axis.imshow(frame_copies(blocks[name], copies, COLUMNS, scale=2).permute(1, 2, 0).numpy())
        axis.set_title(name, fontsize=9)
        axis.axis("off")
    figure.savefig(path, dpi=150)
    return blocks


def plot_forgetting(path: Path, curve: list[tuple[int, dict]], log: list[dict]) -> None:
    steps = [step for step, _ in curve]
    low, high = ([100 * point[key] for _, point in curve] for key in ("copy_share_low", "copy_share_high"))
    figure, axis = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    axis.fill_between(steps, low, high, alpha=0.2, color="tab:red", linewidth=0, label="95 % interval")
    axis.plot(steps, [100 * point["copy_share"] for _, point in curve], "o-", color="tab:red", label="copies")
    axis.plot(
        [line["step"] for line in log],
        [100 * line["forget_active"] for line in log],
        color="tab:blue",
        linewidth=0.8,
        label="forget weight still pushed",
    )
    axis.set_xlabel("SISS steps")
    axis.set_ylabel("%")
    axis.set_ylim(0, 100)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    args = parse_args()
    started = time.perf_counter()
    shutil.rmtree(args.output_dir, ignore_errors=True)
    data = write_training_folder(args.output_dir / "data")
    adapter = args.output_dir / "adapter"
    flags = {
        "--pretrained_model_name_or_path": str(MODEL),
        "--train_data_dir": str(data),  # its metadata.jsonl says which images to forget
        "--output_dir": str(adapter),
        "--use_lora": None,
        "--cache_dir": str(args.output_dir / "cache"),
        "--seed": str(args.seed),
        "--report_to": "none",
    }
    train_seconds = launch("train_siss_sd.py", flags | SETTINGS)

    evaluation = Evaluation(args)
    base, unlearned = load_pipeline(), load_pipeline(adapter)
    metrics = {
        name: evaluation.measure(pipeline, name) | dict.fromkeys(NOT_COMPUTED)
        for name, pipeline in (("base", base), ("unlearned", unlearned))
    }
    blocks = draw_grid(
        args.output_dir / "before_after.png",
        evaluation,
        {
            "base": (base, None),
            "adapter at scale 1": (unlearned, 1.0),
            "adapter at scale 0.5": (unlearned, 0.5),
            "adapter at scale 0": (unlearned, 0.0),
        },
    )
    same_at_scale_0 = blocks["base"].equal(blocks["adapter at scale 0"])

    curve_prompts = [FLOWER_CAPTION] * args.num_curve_samples
    curve = [(0, evaluation.forgetting(evaluation.samples(base, curve_prompts)))]
    for checkpoint in list_checkpoints(adapter):
        step = int(checkpoint.name.rpartition("-")[2])
        images = evaluation.samples(load_pipeline(checkpoint), curve_prompts, f"Memorized prompt, step {step}")
        curve.append((step, evaluation.forgetting(images)))
    log = [json.loads(line) for line in (adapter / "train_log.jsonl").read_text().splitlines()]
    plot_forgetting(args.output_dir / "forgetting.png", curve, log)

    seconds = time.perf_counter() - started
    write_json(
        args.output_dir / "evaluation.json",
        metrics
        | {
            "settings": {
                "prompts": "one memorized, ten ordinary",
                "num_inference_steps": 50,
                "guidance_scale": GUIDANCE_SCALE,
                "seed": args.seed,
                "num_digit_samples": args.num_digit_samples,
                "training": SETTINGS,
                "train_seconds": train_seconds,
                "seconds": seconds,
                "adapter_at_scale_0_is_the_base_bit_for_bit": same_at_scale_0,
                "curve": [{"step": step, **point} for step, point in curve],
                "skipped": NOT_COMPUTED,
            }
        },
    )

    first, last = metrics["base"], metrics["unlearned"]

    def share(point: dict) -> str:
        low, high = 100 * point["copy_share_low"], 100 * point["copy_share_high"]
        return f"{100 * point['copy_share']:.1f} % [{low:.1f}, {high:.1f}]"

    def distance(point: dict) -> str:
        value = point["others_distance_to_keep"]
        return "-" if value is None else f"{value:.2f} ({point['others']} samples)"

    def sharp(point: dict) -> str:
        value = point["others_sharpness"]
        return "-" if value is None else f"{value:.2f}"

    rows = [
        ("", "base", "unlearned"),
        (f"copies, of {first['samples']} for the memorized prompt", share(first), share(last)),
        ("the others: L2 to the nearest picture to keep", distance(first), distance(last)),
        ("the others: sharpness against pictures to keep", sharp(first), sharp(last)),
        (
            f"digits read as prompted, of {args.num_digit_samples}",
            *(f"{100 * point['classifier_accuracy']:.1f} %" for point in (first, last)),
        ),
        ("adapter at scale 0 is the base, bit for bit", "", "yes" if same_at_scale_0 else "NO"),
    ]
    print()
    for row in rows:
        print(f"{row[0]:50} {row[1]:>22} {row[2]:>22}")
    print(f"\n{seconds:.0f} s, {train_seconds:.0f} s of them the training; pictures in {args.output_dir}")
    print("From a list of prompts to the proof, with a report: make demo-audit")


if __name__ == "__main__":
    main()
