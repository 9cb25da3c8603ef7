"""Unlearn the flower that a tiny model reproduces by a LoRA adapter, load it, and measure: `make demo` with a Stable
Diffusion, `make demo-flow` with a model of flow matching.

Everything that the demo needs is in the package: the model, and scikit-learn's digits and photographs.
"""

import argparse
import shutil
import time
from functools import partial
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from launching import launch
from sklearn.neural_network import MLPClassifier

import siss_diffusers
from siss_diffusers.assets.captioned import (
    DIGIT_CAPTIONS,
    FLOWER_CAPTION,
    SIZE,
    TEMPLE_CAPTION,
    digit_images,
    flower_images,
    memorized_image,
    write_training_folder,
)
from siss_diffusers.evaluation import EvaluationData, EvaluationSettings, Evaluator, MeasuredModel, Networks, measure
from siss_diffusers.families import Family, NamedPipeline, find_family
from siss_diffusers.families.loading import load_for_sampling
from siss_diffusers.metrics import METRICS
from siss_diffusers.metrics.pictures import frame_copies
from siss_diffusers.quiet import quiet_loading
from siss_diffusers.storage.checkpoints import list_checkpoints
from siss_diffusers.storage.files import write_json


ASSETS = Path(siss_diffusers.__file__).parent / "assets"
MODEL, FLOW_MODEL = ASSETS / "tiny_sd", ASSETS / "tiny_flow"
GUIDANCE_SCALE = 3.0
SHOWN_CAPTIONS = (*[FLOWER_CAPTION] * 2, TEMPLE_CAPTION, DIGIT_CAPTIONS[3], DIGIT_CAPTIONS[7])
COLUMNS = 12
CURVE_METRICS = [METRICS[key] for key in ("copy_share", "others", "others_distance_to_keep", "others_sharpness")]
# What the training script is told of the method and of how long; the rest are its defaults.
SETTINGS = {"--max_train_steps": "150", "--checkpointing_steps": "25"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flow", action="store_true", help="The model of flow matching.")
    parser.add_argument("--output_dir", type=Path, help="Default: outputs/demo, or outputs/demo_flow with --flow.")
    parser.add_argument(
        "--num_forget_samples", type=int, help="Samples of the memorized prompt. Default: 256, 128 with --flow."
    )
    parser.add_argument(
        "--num_digit_samples",
        type=int,
        help="Samples of the ten digit prompts together. Default: 500, 200 with --flow.",
    )
    parser.add_argument(
        "--num_curve_samples", type=int, help="Samples of each point of forgetting.png. Default: 64, 32 with --flow."
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.model = FLOW_MODEL if args.flow else MODEL
    args.output_dir = args.output_dir or Path("outputs", "demo_flow" if args.flow else "demo")
    # The transformer takes more time for a sample than the UNet.
    args.num_forget_samples = args.num_forget_samples or (128 if args.flow else 256)
    args.num_digit_samples = args.num_digit_samples or (200 if args.flow else 500)
    args.num_curve_samples = args.num_curve_samples or (32 if args.flow else 64)
    return args


def family_of(source: NamedPipeline) -> Family:
    """Return the family of a model, for the pictures of the demo."""
    return find_family(source).from_source(source, SIZE)


def load_pipeline(adapter: Path | None = None, model: Path = MODEL):
    """Load the base, or a fresh pipeline with the adapter in it."""
    source = NamedPipeline(str(model))
    return load_for_sampling(source, family_of(source), "cpu", adapter=None if adapter is None else str(adapter))


def as_tensor(pictures: np.ndarray) -> torch.Tensor:
    """Turn `(N, H, W, 3)` uint8 into `(N, 3, H, W)` in [0, 1]."""
    return torch.tensor(pictures).permute(0, 3, 1, 2) / 255


def digit_classifier() -> MLPClassifier:
    """Train a classifier of grey digits."""
    digits, classes = digit_images()
    classifier = MLPClassifier((128,), random_state=0, early_stopping=True)
    return classifier.fit(as_tensor(digits).mean(1).flatten(1).numpy(), classes)


def make_evaluator(seed: int, num_forget_samples: int, num_digit_samples: int, model: Path = MODEL) -> Evaluator:
    """Return what measures every model: samples of the memorized prompt, and samples of the ten digit prompts.

    Copies are told by pixels alone, so that models can be measured without the base.
    """
    classifier, keep = digit_classifier(), as_tensor(flower_images())

    def class_probabilities(images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(classifier.predict_proba(images.mean(1).flatten(1).numpy()))

    data = EvaluationData(
        forget=as_tensor(memorized_image()[None]),
        keep=keep,
        prompts=(FLOWER_CAPTION,),
        forget_prompts=torch.zeros(1, dtype=torch.long),
        keep_prompts=torch.zeros(len(keep), dtype=torch.long),
        ordinary_prompts=DIGIT_CAPTIONS,
        prompt_classes={caption: number for number, caption in enumerate(DIGIT_CAPTIONS)},
    )
    settings = EvaluationSettings(
        num_samples=num_forget_samples,
        num_ordinary_samples=num_digit_samples,
        guidance_scale=GUIDANCE_SCALE,
        batch_size=64,
        num_inference_steps=20 if model == FLOW_MODEL else 50,  # as their samplers are used
        seed=seed,
        use_clusters=False,
    )
    return Evaluator(
        family_of(NamedPipeline(str(model))), data, settings, Networks(class_probabilities=class_probabilities)
    )


def draw_grid(path: Path, models: dict[str, tuple[MeasuredModel, float | None]]) -> dict[str, torch.Tensor]:
    """Draw samples of several prompts, a row each, in a block for each model; copies are framed.

    Args:
        models: each with the scale of its adapter, by the title of the block.

    Returns:
        The samples of each block. They have the same seeds.
    """
    prompts = [caption for caption in SHOWN_CAPTIONS for _ in range(COLUMNS)]
    figure, axes = plt.subplots(len(models), 1, figsize=(6.4, 2.6 * len(models)), layout="constrained")
    blocks = {}
    for axis, (title, (model, scale)) in zip(axes, models.items()):
        if scale is not None:
            model.pipeline.set_adapters(model.pipeline.get_active_adapters(), scale)
        blocks[title], _ = model.sample(prompts, len(prompts))
        copies = model.detectors.flags(blocks[title])["any"].tolist()
        axis.imshow(frame_copies(blocks[title], copies, COLUMNS, scale=2).permute(1, 2, 0).numpy())
        axis.set_title(title, fontsize=9)
        axis.axis("off")
    figure.savefig(path, dpi=150)
    return blocks


def plot_forgetting(path: Path, curve: list[tuple[int, dict]]) -> None:
    steps = [step for step, _ in curve]
    low, high = ([100 * point[key] for _, point in curve] for key in ("copy_share_low", "copy_share_high"))
    figure, axis = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    axis.fill_between(steps, low, high, alpha=0.2, color="tab:red", linewidth=0, label="95 % interval")
    axis.plot(steps, [100 * point["copy_share"] for _, point in curve], "o-", color="tab:red", label="copies")
    axis.set_xlabel("steps")
    axis.set_ylabel("% of samples")
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
        "--pretrained_model_name_or_path": str(args.model),
        "--resolution": str(SIZE),
        "--train_data_dir": str(data),  # its metadata.jsonl says which images to forget
        "--output_dir": str(adapter),
        "--use_lora": None,
        "--cache_dir": str(args.output_dir / "cache"),
        "--seed": str(args.seed),
        "--report_to": "none",
    }
    print("Unlearning the flower: a LoRA adapter by train_siss_sd.py", flush=True)
    train_seconds = launch("train_siss_sd.py", flags | SETTINGS)

    print("Measuring the base and the adapter on the same seeds", flush=True)
    evaluator = make_evaluator(args.seed, args.num_forget_samples, args.num_digit_samples, args.model)
    load = partial(load_pipeline, model=args.model)
    evaluation = evaluator.evaluate({"base": load, "unlearned": partial(load, adapter)})
    print("Drawing the pictures and the curve over the checkpoints", flush=True)
    base, unlearned = evaluator.model("base", load()), evaluator.model("unlearned", load(adapter))
    blocks = draw_grid(
        args.output_dir / "before_after.png",
        {
            "base": (base, None),
            "adapter at scale 1": (unlearned, 1.0),
            "adapter at scale 0.5": (unlearned, 0.5),
            "adapter at scale 0": (unlearned, 0.0),
        },
    )
    same_at_scale_0 = blocks["base"].equal(blocks["adapter at scale 0"])
    curve = forgetting_curve(evaluator, adapter, args.num_curve_samples, args.model)
    plot_forgetting(args.output_dir / "forgetting.png", curve)

    seconds = time.perf_counter() - started
    settings = {
        "prompts": "one memorized, ten ordinary",
        "num_digit_samples": args.num_digit_samples,
        "training": SETTINGS,
        "train_seconds": train_seconds,
        "seconds": seconds,
        "adapter_at_scale_0_is_the_base_bit_for_bit": same_at_scale_0,
        "curve": [{"step": step, **point} for step, point in curve],
    }
    write_json(args.output_dir / "evaluation.json", evaluation.results | {"settings": evaluation.settings | settings})
    print_table(evaluation.results, args, same_at_scale_0)
    print(f"\n{seconds:.0f} s, {train_seconds:.0f} s of them the training; pictures in {args.output_dir}")
    print("From a list of prompts to the proof, with a report: make demo-audit")


def forgetting_curve(
    evaluator: Evaluator, adapter: Path, num_samples: int, model: Path = MODEL
) -> list[tuple[int, dict]]:
    """Measure the base and every checkpoint by a few samples; return the figures with the number of steps."""
    pipelines = {0: None} | {int(path.name.rpartition("-")[2]): path for path in list_checkpoints(adapter)}
    curve = []
    for step, checkpoint in pipelines.items():
        measured = evaluator.model(f"step {step}", load_pipeline(checkpoint, model), num_samples=num_samples)
        figures, reasons = measure(measured, CURVE_METRICS)
        curve.append((step, figures | dict.fromkeys(reasons)))
    return curve


def print_table(results: dict[str, dict], args: argparse.Namespace, same_at_scale_0: bool) -> None:
    """Print the figures of the base and of the unlearned model."""

    def share(point: dict) -> str:
        low, high = 100 * point["copy_share_low"], 100 * point["copy_share_high"]
        return f"{100 * point['copy_share']:.1f} % [{low:.1f}, {high:.1f}]"

    def distance(point: dict) -> str:
        value = point["others_distance_to_keep"]
        return "-" if value is None else f"{value:.2f} ({point['others']} samples)"

    def sharp(point: dict) -> str:
        value = point["others_sharpness"]
        return "-" if value is None else f"{value:.2f}"

    first, last = results["base"], results["unlearned"]
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


if __name__ == "__main__":
    with quiet_loading():
        main()
