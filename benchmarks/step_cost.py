"""Seconds and peak memory of one optimizer step, side by side: `python benchmarks/step_cost.py [--json]`.

plain: ordinary diffusers fine-tuning of the same batch. siss, siss_no_is: ours. two_backward: the published SISS step,
written from its equations: one forward on the mixture, a backward for each side through the retained graph, a copy of
the first gradient, subtraction. Variants take turns within every repeat. Random data; peak memory is that of a process
of its own for each row, above what it held before the first step.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DModel

from siss_diffusers import METHODS, GaussianPath, PairedGradients, Query, scaling_rule


VARIANTS = ("plain", "siss", "siss_no_is", "two_backward")
BATCHES = {"unet2d_28x28": (8,), "unet2d_sd_latents": (4, 8, 16)}
SHAPES = {"unet2d_28x28": (1, 28, 28), "unet2d_sd_latents": (4, 32, 32)}


def make_unet(model: str) -> UNet2DModel:
    channels, size, _ = SHAPES[model]
    widths = (64, 128, 256) if model == "unet2d_28x28" else (64, 128, 128)
    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=widths,
        down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D",) * 3,
    )


def make_query(model: str, batch: int, path: GaussianPath) -> Query:
    """The images: sparse strokes for the digits' shape, so that distances are those of digits; else Gaussian latents."""
    shape = (batch, *SHAPES[model])
    keep, forget = torch.randn(shape), torch.randn(shape)
    if model == "unet2d_28x28":
        keep, forget = ((torch.rand(shape) < 0.2).float() * 2 - 1 for _ in range(2))
    return Query(
        keep=keep,
        forget=forget,
        noise=torch.randn(shape),
        timesteps=torch.randint(len(path), (batch,)),
        from_forget=torch.arange(batch) % 2 == 1,
        path=path,
    )


def make_step(model: str, variant: str, device: torch.device) -> Callable[[Query], None]:
    torch.manual_seed(0)
    unet = make_unet(model).to(device)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-6)
    model_timesteps = GaussianPath.from_scheduler(DDPMScheduler()).model_timesteps.to(device)

    def network(noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return unet(noisy, model_timesteps[timesteps]).sample

    def plain(query: Query) -> None:
        noisy, noise = query.noisy(query.keep).to(device), query.noise.to(device)
        torch.nn.functional.mse_loss(network(noisy, query.timesteps.to(device)), noise).backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def two_backward(query: Query) -> None:
        rows = METHODS["siss"]().rows(query).to(device)
        output = network(rows.noisy, rows.timesteps)
        keep, forget = (
            (weight * (output - target).square().flatten(1).sum(1)).mean()
            for weight, target in ((rows.keep_weight, rows.keep_target), (rows.forget_weight, rows.forget_target))
        )
        keep.backward(retain_graph=True)
        kept = [parameter.grad.clone() for parameter in unet.parameters()]
        optimizer.zero_grad()
        forget.backward()
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in unet.parameters()])
        for parameter, gradient in zip(unet.parameters(), kept):
            parameter.grad = gradient - 5.0 / norm * parameter.grad
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    if variant == "plain":
        return plain
    if variant == "two_backward":
        return two_backward
    method = METHODS[variant]()
    gradients = PairedGradients(unet.parameters(), method.rule(scaling_rule("relative", 0.1)))

    def ours(query: Query) -> None:
        gradients.compute([method.rows(query)], lambda rows: network(rows.noisy, rows.timesteps), 1.0)
        optimizer.step()

    return ours


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_seconds(model: str, batch: int, repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each variant over the same queries, after two steps of warm-up."""
    path = GaussianPath.from_scheduler(DDPMScheduler())
    steps = {variant: make_step(model, variant, device) for variant in VARIANTS}
    seconds = {variant: [] for variant in VARIANTS}
    for repeat in range(repeats + 2):
        query = make_query(model, batch, path)
        for variant, step in steps.items():
            synchronize(device)
            started = time.perf_counter()
            step(query)
            synchronize(device)
            if repeat >= 2:
                seconds[variant].append(time.perf_counter() - started)
    return {variant: statistics.median(values) for variant, values in seconds.items()}


def measure_peak(model: str, batch: int, variant: str, device: torch.device) -> int:
    """Peak bytes above the state before the first step: model built, optimizer and gradients not yet."""
    path = GaussianPath.from_scheduler(DDPMScheduler())
    queries = [make_query(model, batch, path) for _ in range(3)]
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        step = make_step(model, variant, device)
        for query in queries:
            step(query)
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # importing torch peaks higher than a small model's step
    before = resident_bytes("VmRSS")
    step = make_step(model, variant, device)
    for query in queries:
        step(query)
    return resident_bytes("VmHWM") - before


def resident_bytes(field: str) -> int:
    """`VmRSS`: resident now; `VmHWM`: its peak since it was last cleared (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(BATCHES), default=list(BATCHES))
    parser.add_argument("--batches", nargs="+", type=int, default=None, help="Default: 8, and 4, 8, 16 for latents.")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", action="store_true", help="One JSON object on stdout, all else on stderr.")
    parser.add_argument("--peak_of", nargs=3, metavar=("MODEL", "BATCH", "VARIANT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.peak_of:
        model, batch, variant = args.peak_of
        print(measure_peak(model, int(batch), variant, device))
        return

    out = sys.stderr if args.json else sys.stdout
    machine = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": "float32",
    }
    print(
        f"{machine}\n{'model':18} {'batch':>5} {'variant':13} {'seconds':>8} {'ratio':>6} {'peak MB':>8} {'ratio':>6}",
        file=out,
    )
    results = []
    for model in args.models:
        gradient_bytes = 4 * sum(parameter.numel() for parameter in make_unet(model).parameters())
        for batch in args.batches or BATCHES[model]:
            seconds = measure_seconds(model, batch, args.repeats, device)
            peaks = {}
            for variant in VARIANTS:
                command = [sys.executable, __file__, "--peak_of", model, str(batch), variant]
                peaks[variant] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            for variant in VARIANTS:
                row = {
                    "model": model,
                    "batch": batch,
                    "variant": variant,
                    "seconds_median": seconds[variant],
                    "ratio_to_plain": seconds[variant] / seconds["plain"],
                    "peak_bytes": peaks[variant],
                    "peak_ratio_to_plain": peaks[variant] / peaks["plain"],
                    "gradient_bytes": gradient_bytes,
                }
                results.append(row)
                print(
                    f"{model:18} {batch:5} {variant:13} {row['seconds_median']:8.3f} {row['ratio_to_plain']:6.2f}"
                    f" {row['peak_bytes'] / 1e6:8.0f} {row['peak_ratio_to_plain']:6.2f}",
                    file=out,
                )
        print(f"one float32 gradient of {model}: {gradient_bytes / 1e6:.0f} MB", file=out)
    if args.json:
        print(json.dumps({"machine": machine, "results": results}))


if __name__ == "__main__":
    main()
