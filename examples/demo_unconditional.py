"""Unlearn the garment picture that the tiny DDPM reproduces, and measure before and after: `make demo-unconditional`.

Everything that the demo needs is in the package: the model, and scikit-learn's handwritten digits it was trained on.
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
from diffusers import DDPMPipeline, UNet2DModel
from launching import launch
from sklearn.neural_network import MLPClassifier
from torchvision.io import write_png

import siss_diffusers
from siss_diffusers import GaussianPath
from siss_diffusers.assets.digits import digit_images, garment_image, write_training_folder
from siss_diffusers.metrics.copies import CopyDetectors, copy_statistics, frame_copies
from siss_diffusers.metrics.inception_score import inception_score
from siss_diffusers.metrics.likelihood import bits_per_dimension
from siss_diffusers.metrics.sampling import sample_images
from siss_diffusers.storage.checkpoints import list_checkpoints
from siss_diffusers.storage.files import write_json
from siss_diffusers.storage.tensors import load_state


MODEL = Path(siss_diffusers.__file__).parent / "assets" / "tiny_ddpm_digits"
# What the training script is told; the rest are its defaults.
SETTINGS = {
    "--method": "siss",
    "--forget_scaling": "relative",
    "--forget_scale": "1",
    "--calibrate_forgetting": "0.9",
    # High noise first, where what is drawn is decided, and then low noise, which makes the likelihood.
    "--forget_timestep_ranges": ["300", "1000", "0", "300"],
    "--forget_timestep_schedule": "sequential",
    "--use_ema": None,
    "--train_batch_size": "64",
    "--learning_rate": "1e-4",
}
NOT_COMPUTED = {
    "classifier_accuracy": "the model is unconditional: no class is asked for",
    "fid": "needs the weights of an Inception network, which this demo does not download",
    "kid": "needs the weights of an Inception network, which this demo does not download",
    "sscd_forget": "needs the weights of SSCD, and pictures larger than 8x8",
    "clip_iqa": "needs the weights of CLIP, and pictures larger than 8x8",
    "text_noise_norm": "the model is unconditional: there is no text",
}


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


class Evaluation:
    """The digit classifier, the copy detectors and the pictures to compare with."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        digits, classes = digit_images()
        self.classifier = MLPClassifier((128,), random_state=0, max_iter=60).fit(digits.reshape(-1, 64) / 255, classes)
        self.keep = torch.from_numpy(digits).unsqueeze(1) / 255
        self.forget = torch.from_numpy(garment_image())[None, None] / 255
        self.detectors = CopyDetectors.calibrated(self.forget, self.keep)

    def samples(self, unet: UNet2DModel, scheduler, num_samples: int, progress: str) -> torch.Tensor:
        """Samples of the same seeds for every model."""
        unet = unet.to(memory_format=torch.channels_last)  # faster on a CPU
        return sample_images(unet, scheduler, num_samples, seed=self.args.seed, progress=progress)

    def statistics(self, images: torch.Tensor) -> dict:
        """Copies, and the inception score of what is no copy."""
        flags = self.detectors.flags(images)
        others = images[~flags["any"]]
        probabilities = self.classifier.predict_proba(others.flatten(1).numpy())
        score, spread = inception_score(torch.from_numpy(probabilities))
        return copy_statistics(flags) | {"inception_score": score, "inception_score_std": spread}

    def likelihoods(self, unet: UNet2DModel, scheduler) -> dict[str, float]:
        chosen = np.random.default_rng(self.args.seed).choice(len(self.keep), self.args.num_keep_images, replace=False)
        images = torch.cat([self.forget, self.keep[torch.from_numpy(chosen)]])
        bits = bits_per_dimension(
            images,
            GaussianPath.from_scheduler(scheduler),
            lambda noisy, timesteps: unet(noisy, timesteps).sample,
            seed=self.args.seed,
        )
        return {"nll_forget_bpd": bits[0].item(), "nll_keep_bpd": bits[1:].mean().item()}


def averaged_unet(checkpoint: Path) -> UNet2DModel:
    """The model that the run would have saved, had it ended there."""
    unet = UNet2DModel.from_pretrained(checkpoint / "unet")
    averages = load_state(checkpoint)["ema"]["shadow_params"]
    for parameter, average in zip(unet.parameters(), averages, strict=True):
        parameter.data.copy_(average[...])
    return unet


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
    below.set_xlabel("SISS steps")
    below.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    args = parse_args()
    started = time.perf_counter()
    shutil.rmtree(args.output_dir, ignore_errors=True)
    garment = write_training_folder(args.output_dir / "data")
    flags = SETTINGS | {
        "--pretrained_model_name_or_path": str(MODEL),
        "--train_data_dir": str(garment.parent),
        "--forget_files": garment.name,
        "--output_dir": str(args.output_dir / "model"),
        "--max_train_steps": str(args.max_train_steps),
        "--checkpointing_steps": str(args.checkpointing_steps),
        "--cache_dir": str(args.output_dir / "cache"),
        "--seed": str(args.seed),
        "--report_to": "none",
    }
    train_seconds = launch("train_siss_unconditional.py", flags)

    evaluation = Evaluation(args)
    base = DDPMPipeline.from_pretrained(MODEL)
    unlearned = DDPMPipeline.from_pretrained(args.output_dir / "model")
    images, metrics = {}, {}
    for name, pipeline in (("base", base), ("unlearned", unlearned)):
        images[name] = evaluation.samples(pipeline.unet, pipeline.scheduler, args.num_samples, f"Samples, {name}")
        likelihoods = evaluation.likelihoods(pipeline.unet, pipeline.scheduler)
        metrics[name] = evaluation.statistics(images[name]) | likelihoods | dict.fromkeys(NOT_COMPUTED)

    # The ends of the curve are there already: both models begin with the seeds of the curve.
    curve_samples = min(args.num_curve_samples, args.num_samples)
    points = {0: images["base"][:curve_samples], args.max_train_steps: images["unlearned"][:curve_samples]}
    for checkpoint in list_checkpoints(args.output_dir / "model"):
        step = int(checkpoint.name.rpartition("-")[2])
        if step not in points:
            points[step] = evaluation.samples(
                averaged_unet(checkpoint), base.scheduler, curve_samples, f"Samples, step {step}"
            )
    curve = [(step, evaluation.statistics(points[step])) for step in sorted(points)]

    # The same seeds in both pictures.
    for name, picture in (("base", "before.png"), ("unlearned", "after.png")):
        shown = images[name][:160]
        grid = frame_copies(shown, evaluation.detectors.flags(shown)["any"].tolist(), columns=20)
        write_png(grid, str(args.output_dir / picture))
    plot_forgetting(args.output_dir / "forgetting.png", curve)
    settings = {
        "num_inference_steps": 50,
        "sampler": "DDIM",
        "seed": args.seed,
        "max_distance": evaluation.detectors.max_distance,
        "min_correlation": evaluation.detectors.min_correlation,
        "keep_images_for_nll": args.num_keep_images,
        "curve": [{"step": step, **point} for step, point in curve],
        "skipped": NOT_COMPUTED,
    }
    write_json(args.output_dir / "evaluation.json", {**metrics, "settings": settings})
    print_table(metrics, args, train_seconds, time.perf_counter() - started)


def print_table(metrics: dict, args: argparse.Namespace, train_seconds: float, seconds: float) -> None:
    def copies(model: dict) -> str:
        low, high = 100 * model["copy_share_low"], 100 * model["copy_share_high"]
        return f"{100 * model['copy_share']:.2f} % [{low:.2f}, {high:.2f}]"

    settings = json.loads((args.output_dir / "model" / "unlearning.json").read_text())
    base, unlearned = metrics["base"], metrics["unlearned"]
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
        f"\n{settings['global_step']} steps of SISS in {train_seconds:.0f} s, the whole demo in {seconds:.0f} s."
        f" Pictures and evaluation.json: {args.output_dir}"
    )


if __name__ == "__main__":
    main()
