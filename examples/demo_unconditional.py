"""Unlearn the garment picture that the tiny DDPM reproduces, and measure before and after: `make demo-unconditional`.

Everything that the demo needs is in the package: the model, and scikit-learn's handwritten digits it was trained on.
"""

import argparse
import json
import shutil
import time
from functools import partial
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from diffusers import DDPMPipeline, UNet2DModel
from launching import launch
from sklearn.neural_network import MLPClassifier

import siss_diffusers
from siss_diffusers.assets.digits import digit_images, garment_image, write_training_folder
from siss_diffusers.evaluation import EvaluationData, EvaluationSettings, Evaluator, Networks, measure
from siss_diffusers.families import NamedPipeline, Unconditional
from siss_diffusers.metrics import METRICS
from siss_diffusers.metrics.pictures import save_grid
from siss_diffusers.quiet import quiet_loading
from siss_diffusers.storage.checkpoints import list_checkpoints
from siss_diffusers.storage.files import write_json


MODEL = Path(siss_diffusers.__file__).parent / "assets" / "tiny_ddpm_digits"
CURVE_METRICS = [METRICS["copy_share"], METRICS["inception_score"]]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo-unconditional"))
    parser.add_argument(
        "--num_samples", type=int, default=4096, help="Samples of the base and of the unlearned model."
    )
    parser.add_argument("--num_curve_samples", type=int, default=384, help="Samples of each point of forgetting.png.")
    parser.add_argument("--num_keep_images", type=int, default=32, help="Digits whose likelihood is computed.")
    parser.add_argument("--max_train_steps", type=int, default=300)
    parser.add_argument("--checkpointing_steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def make_evaluator(seed: int, num_samples: int, num_keep_images: int) -> Evaluator:
    """Return what measures every model by its samples, and by the likelihood of the garment and of some digits.

    Copies are told by pixels alone, so that models can be measured without the base.
    """
    digits, classes = digit_images()
    classifier = MLPClassifier((128,), random_state=0, max_iter=60).fit(digits.reshape(-1, 64) / 255, classes)
    # The likelihood is computed of the first ones.
    chosen = np.random.default_rng(seed).choice(len(digits), num_keep_images, replace=False)
    digits = np.concatenate([digits[chosen], np.delete(digits, chosen, axis=0)])
    data = EvaluationData.without_prompts(
        forget=torch.from_numpy(garment_image())[None, None] / 255,
        keep=torch.from_numpy(digits).unsqueeze(1) / 255,
    )

    def class_probabilities(images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(classifier.predict_proba(images.flatten(1).numpy()))

    settings = EvaluationSettings(
        num_samples=num_samples,
        batch_size=256,
        seed=seed,
        num_likelihood_images=num_keep_images,
        use_clusters=False,
    )
    family = Unconditional.from_source(NamedPipeline(str(MODEL)))
    return Evaluator(family, data, settings, Networks(class_probabilities=class_probabilities))


def load_pipeline(folder: Path) -> DDPMPipeline:
    """Load a pipeline."""
    return faster(DDPMPipeline.from_pretrained(folder))


def faster(pipeline: DDPMPipeline) -> DDPMPipeline:
    """Return the pipeline in the layout of memory that is faster on a CPU."""
    pipeline.unet.to(memory_format=torch.channels_last)
    return pipeline


def plot_forgetting(path: Path, curve: list[tuple[int, dict]]) -> None:
    steps = [step for step, _ in curve]
    shares = [100 * point["copy_share"] for _, point in curve]
    low, high = ([100 * point[key] for _, point in curve] for key in ("copy_share_low", "copy_share_high"))
    scores = [point["inception_score"] for _, point in curve]
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(6.4, 5.2), layout="constrained")
    above.fill_between(steps, low, high, alpha=0.2, color="tab:red", linewidth=0, label="95 % interval")
    above.plot(steps, shares, "o-", color="tab:red", label="copies of the garment")
    above.set_ylabel("% of samples")
    above.set_ylim(bottom=0)
    above.legend(frameon=False)
    below.plot(steps, scores, "o-", color="tab:blue", label="inception score, copies removed")
    below.axhline(0.98 * scores[0], linestyle=":", color="grey", label="base less 2 %")
    below.set_ylim(0.9 * scores[0], 1.05 * scores[0])
    below.set_ylabel("inception score")
    below.set_xlabel("steps")
    below.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    args = parse_args()
    started = time.perf_counter()
    shutil.rmtree(args.output_dir, ignore_errors=True)
    garment = write_training_folder(args.output_dir / "data")
    flags = {
        "--pretrained_model_name_or_path": str(MODEL),
        "--train_data_dir": str(garment.parent),
        "--forget_files": garment.name,
        "--output_dir": str(args.output_dir / "model"),
        "--train_batch_size": "64",
        "--max_train_steps": str(args.max_train_steps),
        "--checkpointing_steps": str(args.checkpointing_steps),
        "--cache_dir": str(args.output_dir / "cache"),
        "--seed": str(args.seed),
        "--report_to": "none",
    }
    print("Unlearning the garment by train_siss_unconditional.py", flush=True)
    train_seconds = launch("train_siss_unconditional.py", flags)
    print("Measuring the base and the unlearned model on the same seeds", flush=True)

    evaluator = make_evaluator(args.seed, args.num_samples, args.num_keep_images)
    folders = {"base": MODEL, "unlearned": args.output_dir / "model"}
    evaluation = evaluator.evaluate({name: partial(load_pipeline, folder) for name, folder in folders.items()})
    samples = {name: kinds["samples"] for name, kinds in evaluation.samples.items()}
    print("Following the copies over the checkpoints", flush=True)
    curve = forgetting_curve(evaluator, args, samples)

    # The same seeds in both pictures.
    for name, picture in (("base", "before.png"), ("unlearned", "after.png")):
        shown = samples[name][:160]
        save_grid(args.output_dir / picture, shown, evaluator.detectors.flags(shown)["any"].tolist(), columns=20)
    plot_forgetting(args.output_dir / "forgetting.png", curve)
    settings = {
        "sampler": "DDIM",
        "keep_images_for_nll": args.num_keep_images,
        "curve": [{"step": step, **point} for step, point in curve],
    }
    write_json(args.output_dir / "evaluation.json", evaluation.results | {"settings": evaluation.settings | settings})
    print_table(evaluation.results, args, train_seconds, time.perf_counter() - started)


def forgetting_curve(
    evaluator: Evaluator, args: argparse.Namespace, samples: dict[str, torch.Tensor]
) -> list[tuple[int, dict]]:
    """Measure the base, every checkpoint and the result by a few samples; return the figures with the steps.

    Args:
        samples: those of the base and of the result, which begin with the seeds of the curve.
    """
    base = load_pipeline(MODEL)
    count = min(args.num_curve_samples, args.num_samples)
    models = {step: evaluator.model(f"step {step}", base) for step in (0, args.max_train_steps)}
    models[0].samples = samples["base"][:count]
    models[args.max_train_steps].samples = samples["unlearned"][:count]
    for checkpoint in list_checkpoints(args.output_dir / "model"):
        step = int(checkpoint.name.rpartition("-")[2])
        if step not in models:
            pipeline = faster(DDPMPipeline(UNet2DModel.from_pretrained(checkpoint / "unet"), base.scheduler))
            models[step] = evaluator.model(f"step {step}", pipeline, num_samples=count)
    return [(step, measure(models[step], CURVE_METRICS)[0]) for step in sorted(models)]


def print_table(results: dict, args: argparse.Namespace, train_seconds: float, seconds: float) -> None:
    """Print the figures of the base and of the unlearned model."""

    def copies(model: dict) -> str:
        low, high = 100 * model["copy_share_low"], 100 * model["copy_share_high"]
        return f"{100 * model['copy_share']:.2f} % [{low:.2f}, {high:.2f}]"

    settings = json.loads((args.output_dir / "model" / "unlearning.json").read_text())
    base, unlearned = results["base"], results["unlearned"]
    change = 100 * (unlearned["inception_score"] / base["inception_score"] - 1)
    rows = [
        ("", "base", "unlearned"),
        (f"copies of the garment, of {base['samples']}", copies(base), copies(unlearned)),
        (
            "inception score, copies removed",
            f"{base['inception_score']:.3f}",
            f"{unlearned['inception_score']:.3f} ({change:+.1f} %)",
        ),
        ("NLL of the garment, bits/dim", f"{base['nll_forget_bpd']:.2f}", f"{unlearned['nll_forget_bpd']:.2f}"),
        ("NLL of the digits, bits/dim", f"{base['nll_keep_bpd']:.2f}", f"{unlearned['nll_keep_bpd']:.2f}"),
    ]
    print()
    for label, *values in rows:
        print(f"{label:36}" + "".join(f"{value:>26}" for value in values))
    print(
        f"\n{settings['global_step']} steps in {train_seconds:.0f} s, the whole demo in {seconds:.0f} s."
        f" Pictures and evaluation.json: {args.output_dir}"
    )


if __name__ == "__main__":
    with quiet_loading():
        main()
