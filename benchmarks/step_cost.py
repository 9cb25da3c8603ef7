"""Seconds and peak memory of one optimizer step, side by side: `python benchmarks/step_cost.py [--json]`.

plain: ordinary diffusers fine-tuning of the same batch. siss, siss_no_is: ours. siss_lagged: ours in between the steps of
--forget_scale_every that find a scale. redirect: with 1,000 images to keep on the device. two_backward: the published SISS step, written from its equations. What is timed, and how, is in benchmarks/README.md.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TextIO

import numpy as np
import step_cost_sd
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel

from siss_diffusers import METHODS, GaussianPath, PairedGradients, Query, importance_weights, scaling_rule
from siss_diffusers.assets.digits import digit_images, garment_image
from siss_diffusers.gradients.grouping import split_by_side
from siss_diffusers.settings.shared import DEFAULT_REDIRECT_IMAGES


VARIANTS = ("plain", "redirect", "siss", "siss_lagged", "siss_no_is", "two_backward")
LAM = 0.5
LAGGED_SCALE = 0.1
SCALING_NORM = 5.0  # of the published digits experiment; its value does not change the cost
MAX_GRAD_NORM = 1.0
WARMUP = 2
PEAK_STEPS = 3
# Environment of a process whose peak is measured: freed blocks go back to the system at once, so that resident memory is
# what is in use.
FREE_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

Images = Callable[[int, torch.Generator], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Model:
    """A network, its data, and the batches that are measured by default.

    Args:
        build: the network, `network(noisy, timesteps).sample`.
        images: from a number of pairs and a generator to keep and forget images, `(B, C, H, W)`.
        batches: pairs per step.
        make_scheduler: the noise levels, which decide how many rows serve both sides.
    """

    build: Callable[[], torch.nn.Module]
    images: Images
    batches: tuple[int, ...]
    make_scheduler: Callable[[], DDPMScheduler] = DDPMScheduler


def make_unet(channels: int, size: int, widths: tuple[int, ...]) -> UNet2DModel:
    """As in the paper's digits model: attention in the middle block only."""
    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=widths,
        down_block_types=("DownBlock2D",) * len(widths),
        up_block_types=("UpBlock2D",) * len(widths),
    )


def digit_pairs(file: str | None) -> Images:
    """Digits to keep and the garment to forget, as 28x28 pictures: how far apart they are decides how many rows serve
    both sides."""
    digits = digit_images()[0] if file is None else np.load(file)["x"]

    def resized(pictures: np.ndarray) -> torch.Tensor:
        pictures = torch.from_numpy(pictures).unsqueeze(1).float() / 127.5 - 1
        return F.interpolate(pictures, size=(28, 28), mode="bilinear")

    garment = resized(garment_image()[None])

    def draw(batch: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.randint(len(digits), (batch,), generator=generator)
        return resized(digits[chosen.numpy()]), garment.expand(batch, -1, -1, -1)

    return draw


def latent_pairs(size: int, batch: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of pictures of 8 times that size, as far apart as random ones are."""
    keep, forget = torch.randn(2, batch, 4, size, size, generator=generator)
    return keep, forget


# Of Stable Diffusion, which never reaches pure noise, so that hardly a row of random latents serves both sides.
SD_SCHEDULER = partial(DDPMScheduler, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


def make_models(digits_file: str | None) -> dict[str, Model]:
    return {
        "unet2d_28x28": Model(lambda: make_unet(1, 28, (64, 128, 256)), digit_pairs(digits_file), (8,)),
        "unet2d_sd_latents": Model(
            lambda: make_unet(4, 32, (64, 128, 128)), partial(latent_pairs, 32), (4, 8, 16), SD_SCHEDULER
        ),
        "unet2d_sd_latents_64": Model(
            lambda: make_unet(4, 64, (64, 128, 128)), partial(latent_pairs, 64), (8,), SD_SCHEDULER
        ),
    }


def draw_queries(model: Model, batch: int, count: int) -> list[Query]:
    """The same for every variant; exactly half of the pairs take the forget component."""
    generator = torch.Generator().manual_seed(0)
    path = GaussianPath.from_scheduler(model.make_scheduler())
    queries = []
    for _ in range(count):
        keep, forget = model.images(batch, generator)
        queries.append(
            Query(
                keep=keep,
                forget=forget,
                noise=torch.randn(keep.shape, generator=generator),
                timesteps=torch.randint(len(path), (batch,), generator=generator),
                from_forget=torch.randperm(batch, generator=generator) < batch // 2,
                path=path,
            )
        )
    return queries


class Step:
    """One optimizer step of a variant, from images, timesteps and noise on the host to new weights."""

    def __init__(self, variant: str, model: Model, device: torch.device) -> None:
        torch.manual_seed(0)
        self.network = model.build().to(device)
        self.device = device
        self.scheduler = model.make_scheduler()
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-6, fused=True)
        self.compute_gradients = getattr(self, variant, self.ours)
        self.forget_scale = LAGGED_SCALE if variant == "siss_lagged" else None
        if self.compute_gradients in (self.ours, self.redirect):
            self.method = METHODS[variant.removesuffix("_lagged")]()
            rule = self.method.rule(scaling_rule("relative", 0.1))
            self.gradients = PairedGradients(self.network.parameters(), rule)
        if variant == "redirect":
            images, _ = model.images(DEFAULT_REDIRECT_IMAGES, torch.Generator().manual_seed(1))
            self.keep_posterior = step_cost_sd.keep_posterior(images.to(device))

    def __call__(self, query: Query) -> None:
        self.compute_gradients(query)
        self.optimizer.step()
        if self.compute_gradients not in (
            self.ours,
            self.redirect,
        ):  # whose gradients are views of a buffer that it clears itself
            self.optimizer.zero_grad(set_to_none=True)

    def redirect(self, query: Query) -> None:
        self.ours(step_cost_sd.with_posterior_means(query, self.keep_posterior))

    def ours(self, query: Query) -> None:
        self.gradients.compute(
            [self.method.rows(query)],
            lambda rows: self.network(rows.noisy, rows.timesteps).sample,
            MAX_GRAD_NORM,
            forget_scale=self.forget_scale,
        )

    def plain(self, query: Query) -> None:
        clean, noise, timesteps = (
            value.to(self.device, non_blocking=True) for value in (query.keep, query.noise, query.timesteps)
        )
        noisy = self.scheduler.add_noise(clean, noise, timesteps)
        F.mse_loss(self.network(noisy, timesteps).sample, noise).backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), MAX_GRAD_NORM)

    def two_backward(self, query: Query) -> None:
        """Algorithm of arXiv 2503.01034: the losses of both sides through one forward, each with a backward through
        all rows; losses summed over pixels, `S / |g_f|` of the forget gradient subtracted."""
        keep, forget, noise, timesteps, from_forget = (
            value.to(self.device, non_blocking=True)
            for value in (query.keep, query.forget, query.noise, query.timesteps, query.from_forget)
        )
        alphas_cumprod = self.scheduler.alphas_cumprod.to(self.device)[timesteps].reshape(-1, 1, 1, 1)
        alpha, sigma = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
        noisy = alpha * torch.where(from_forget.reshape(-1, 1, 1, 1), forget, keep) + sigma * noise
        noise_keep, noise_forget = (noisy - alpha * keep) / sigma, (noisy - alpha * forget) / sigma
        log_ratio = (noise_keep.square() - noise_forget.square()).flatten(1).sum(1) / 2
        weight_keep, weight_forget = importance_weights(log_ratio, LAM)

        output = self.network(noisy, timesteps).sample
        loss_keep, loss_forget = (
            (weight * (output - target).square().flatten(1).sum(1)).mean()
            for weight, target in ((weight_keep, noise_keep), (weight_forget, noise_forget))
        )
        parameters = list(self.network.parameters())
        loss_keep.backward(retain_graph=True)
        gradient_keep = [parameter.grad.clone() for parameter in parameters]
        self.optimizer.zero_grad(set_to_none=True)
        loss_forget.backward()
        coefficient = SCALING_NORM / torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        for parameter, gradient in zip(parameters, gradient_keep):
            parameter.grad = gradient - coefficient * parameter.grad
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)


def count_rows(variant: str, queries: list[Query]) -> tuple[float, float]:
    """Rows that run forward and rows that run backward, each time they do: means over the steps."""
    batch = len(queries[0].keep)
    if variant not in METHODS or variant == "redirect":
        return batch, 2 * batch if variant == "two_backward" else batch  # siss_lagged, redirect: as plain
    rows = [METHODS[variant]().rows(query) for query in queries]
    forward, backward = [], []
    for row in rows:
        groups = [(len(group), keep + forget) for group, keep, forget in split_by_side(row)]
        forward.append(sum(size for size, _ in groups))
        backward.append(sum(size * sides for size, sides in groups))
    return statistics.mean(forward), statistics.mean(backward)


def measure_seconds(steps: dict[str, Callable], inputs: list, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each variant's step on each input after the warm-up. The variants take turns, and turns to be first."""
    variants = list(steps)
    seconds = {variant: [] for variant in variants}
    for repeat, value in enumerate(inputs):
        first = repeat % len(variants)
        for variant in variants[first:] + variants[:first]:
            if device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            steps[variant](value)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[variant].append(time.perf_counter() - started)
    return {variant: values[WARMUP:] for variant, values in seconds.items()}


def measure_peak(make_step: Callable[[], Callable], inputs: list, device: torch.device) -> int | None:
    """Peak bytes of weights, optimizer state, gradients and activations over a few steps. To be called in a process
    of its own. On a CPU: resident memory above that of the process before the model was built; None but on Linux."""
    if device.type == "cpu":
        if platform.system() != "Linux":
            return None
        # Not `ru_maxrss`: it cannot be reset, and a child starts with its parent's.
        Path("/proc/self/clear_refs").write_text("5")
        before = resident_bytes("VmRSS")
    step = make_step()
    for value in inputs:
        step(value)
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else resident_bytes("VmHWM") - before


def resident_bytes(field: str) -> int:
    """`VmRSS`: resident now; `VmHWM`: its peak since it was last cleared."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def peak_in_child(args: argparse.Namespace, model: str, batch: int, variant: str) -> int | None:
    command = [sys.executable, __file__, "--peak_of", model, str(batch), variant]
    if args.digits is not None:
        command += ["--digits", args.digits]
    command += ["--resolution", str(args.resolution)]
    if args.full_size:
        command.append("--full_size")
    return json.loads(
        subprocess.run(command, env=os.environ | FREE_AT_ONCE, stdout=subprocess.PIPE, text=True, check=True).stdout
    )


def measure_stable_diffusion(args: argparse.Namespace, device: torch.device, out: TextIO) -> list[dict]:
    """The table of `--sd`; ratios are to `plain`, and to `plain_cached`, which does the same work as ours."""
    print(
        f"\n{'model':16} {'batch':>5} {'variant':13} {'seconds':>8} {'quartiles':>15} {'plain':>6} {'cached':>7}"
        f" {'images/s':>9} {'peak MB':>8}",
        file=out,
    )
    results = []
    for batch in args.batches or (8,):
        peaks = {variant: peak_in_child(args, "unet2d_condition", batch, variant) for variant in step_cost_sd.VARIANTS}
        inputs = step_cost_sd.draw_batches(args.resolution, batch, WARMUP + args.repeats)
        steps = {variant: step_cost_sd.Step(variant, args.full_size, device) for variant in step_cost_sd.VARIANTS}
        seconds = measure_seconds(steps, inputs, device)
        medians = {variant: statistics.median(values) for variant, values in seconds.items()}
        for variant, median in medians.items():
            quartiles = np.quantile(seconds[variant], [0.25, 0.75]).tolist()
            row = {
                "model": "unet2d_condition",
                "batch": batch,
                "variant": variant,
                "seconds_median": median,
                "seconds_quartiles": quartiles,
                "ratio_to_plain": median / medians["plain"],
                "ratio_to_plain_cached": median / medians["plain_cached"],
                "images_per_second": batch / median,
                "peak_bytes": peaks[variant],
                "peak_ratio_to_plain": None if peaks[variant] is None else peaks[variant] / peaks["plain"],
            }
            results.append(row)
            print(
                f"{row['model']:16} {batch:5} {variant:13} {median:8.3f} {quartiles[0]:7.3f}-{quartiles[1]:.3f}"
                f" {row['ratio_to_plain']:8.2f} {row['ratio_to_plain_cached']:7.2f} {row['images_per_second']:9.1f}"
                f" {(peaks[variant] or 0) / 1e6:8.0f}",
                file=out,
                flush=True,
            )
    return results


def describe_machine(device: torch.device) -> dict[str, object]:
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "processor": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": "float32",
    }


def cpu_name() -> str:
    """`platform.processor()` is empty or just the architecture on Linux."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    models = list(make_models(None))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=models, default=models, metavar="MODEL", help=", ".join(models))
    parser.add_argument("--batches", nargs="+", type=int, help="Pairs per step. Default: 8; 4, 8 and 16 for latents.")
    parser.add_argument("--repeats", type=int, default=12, help="Timed steps of each variant. Default: 12.")
    parser.add_argument("--digits", type=str, metavar="FILE.npz", help="28x28 digits: `x` (N, 28, 28) uint8.")
    parser.add_argument("--quick", action="store_true", help="Two repeats: to see that it runs, not to quote.")
    parser.add_argument("--json", action="store_true", help="One JSON object on stdout, all else on stderr.")
    parser.add_argument("--sd", action="store_true", help="Stable Diffusion instead: see step_cost_sd.py.")
    parser.add_argument(
        "--full_size", action="store_true", help="With --sd: Stable Diffusion 1.5's architecture, for a GPU."
    )
    parser.add_argument(
        "--resolution", type=int, help="With --sd: side of the pictures. Default: 256, or 512 with --full_size."
    )
    parser.add_argument("--peak_of", nargs=3, metavar=("MODEL", "BATCH", "VARIANT"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.repeats < 1 or any(batch < 2 for batch in args.batches or []):
        parser.error("--repeats must be at least 1, --batches at least 2")
    if args.quick:
        args.repeats = 2
    if args.resolution is None:
        args.resolution = 512 if args.full_size else 256
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = make_models(args.digits)
    if args.peak_of:
        name, batch, variant = args.peak_of
        if name == "unet2d_condition":
            inputs = step_cost_sd.draw_batches(args.resolution, int(batch), PEAK_STEPS)
            make_step = partial(step_cost_sd.Step, variant, args.full_size, device)
        else:
            inputs = draw_queries(models[name], int(batch), PEAK_STEPS)
            make_step = partial(Step, variant, models[name], device)
        print(json.dumps(measure_peak(make_step, inputs, device)))
        return

    out = sys.stderr if args.json else sys.stdout
    machine = describe_machine(device)
    print(", ".join(f"{key} {value}" for key, value in machine.items()), file=out)
    if args.sd:
        results = measure_stable_diffusion(args, device, out)
        if args.json:
            print(json.dumps({"machine": machine, "results": results}))
        return
    print(
        f"\n{'model':17} {'batch':>5} {'variant':12} {'seconds':>8} {'quartiles':>15} {'ratio':>6} {'forward':>8}"
        f" {'backward':>8} {'peak MB':>8} {'ratio':>6} {'gradients':>10}",
        file=out,
    )
    results = []
    for name in args.models:
        model = models[name]
        gradient_bytes = 4 * sum(parameter.numel() for parameter in model.build().parameters())
        for batch in args.batches or model.batches:
            queries = draw_queries(model, batch, WARMUP + args.repeats)
            # First, for a child should not have to share the machine with the models of the timing.
            peaks = {variant: peak_in_child(args, name, batch, variant) for variant in VARIANTS}
            steps = {variant: Step(variant, model, device) for variant in VARIANTS}
            seconds = measure_seconds(steps, queries, device)
            for variant in VARIANTS:
                forward_rows, backward_rows = count_rows(variant, queries[WARMUP:])
                median, peak = statistics.median(seconds[variant]), peaks[variant]
                quartiles = np.quantile(seconds[variant], [0.25, 0.75]).tolist()
                row = {
                    "model": name,
                    "batch": batch,
                    "variant": variant,
                    "seconds_median": median,
                    "seconds_quartiles": quartiles,
                    "ratio_to_plain": median / statistics.median(seconds["plain"]),
                    "forward_rows": forward_rows,
                    "backward_rows": backward_rows,
                    "peak_bytes": peak,
                    "peak_ratio_to_plain": None if peak is None else peak / peaks["plain"],
                    "gradient_bytes": gradient_bytes,
                }
                results.append(row)
                memory = f"{'-':>8} {'-':>6} {'-':>10}"
                if peak is not None:
                    above = (peak - peaks["plain"]) / gradient_bytes
                    memory = f"{peak / 1e6:8.0f} {row['peak_ratio_to_plain']:6.2f} {above:+10.2f}"
                print(
                    f"{name:17} {batch:5} {variant:12} {median:8.3f} {quartiles[0]:7.3f}-{quartiles[1]:.3f}"
                    f" {row['ratio_to_plain']:8.2f} {forward_rows:8.1f} {backward_rows:8.1f} {memory}",
                    file=out,
                    flush=True,
                )
    print("\nforward, backward: rows run in a step; gradients: peak above plain's, in float32 gradients.", file=out)
    if args.json:
        print(json.dumps({"machine": machine, "results": results}))


if __name__ == "__main__":
    main()
