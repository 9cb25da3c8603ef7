"""Seconds, peak memory and use of the GPU of one optimizer step at full size: `python benchmarks/gpu.py [--json FILE]`.

UNets of the size of Stable Diffusion 1.5 (512 px) and SDXL (1024 px), random weights, bfloat16 autocast, float32
trainable weights, fused AdamW; latents and embeddings are random and cached: no VAE, no text encoder. plain: ordinary
diffusers fine-tuning of the same batch. siss: ours under the rule `relative`. siss_lagged: the same with the forget
scale known beforehand, one scalar loss. plain_lora, siss_lora: by LoRA of the attention projections, rank 4, the frozen
weights in bfloat16.

The variants take turns. Those that train in full share one network and its optimizer, and those by LoRA another, so
that a card need not hold five. Where even that does not fit, full and LoRA are timed one after the other, and
where those do not fit either, each variant by itself; `turns_with` says which it was. Peak memory is of a pass of its
own, with the model of that variant alone on the device, counted after the model is built. What does not fit at all is
null, with the reason. `share`: floating-point operations of the matrix products, convolutions and attention that a step
really ran, forward and backward (recomputation under --gradient_checkpointing too), per second, in units of what
the card did in bfloat16 products of 8192x8192 matrices.
"""

import argparse
import gc
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from step_cost import PEAK_STEPS, WARMUP, describe_machine, measure_seconds
from step_cost_sd import LAM, MAX_GRAD_NORM, PROMPT_LENGTH
from torch.utils.flop_counter import FlopCounterMode

from siss_diffusers import METHODS, GaussianPath, PairedGradients, Query, scaling_rule
from siss_diffusers.errors import UsageError
from siss_diffusers.families import StableDiffusion
from siss_diffusers.process import run
from siss_diffusers.settings import AdapterSettings
from siss_diffusers.training.adapters import add_lora


VARIANTS = ("plain", "siss", "siss_lagged", "plain_lora", "siss_lora")
LAGGED_SCALE = 0.1
MATRIX_SIZE, MATRIX_WARMUP, MATRIX_REPEATS = 8192, 10, 20

Window = list[Query]  # the micro-batches of one optimizer step
Step = Callable[[Window], None]
MakeSteps = Callable[[Sequence[str]], dict[str, Step]]


@dataclass(frozen=True)
class Model:
    """A UNet by its configuration, and that of a narrow one; pairs per step by default."""

    config: dict[str, object]
    narrow: dict[str, object]
    batch: int


NARROW = {"sample_size": 8, "layers_per_block": 1, "cross_attention_dim": 32, "block_out_channels": (32, 64)}
NARROW |= {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
MODELS = {
    # The defaults of the class are Stable Diffusion 1's blocks.
    "sd15": Model({"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}, NARROW, batch=16),
    "sdxl": Model(
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 1280 + 6 * 256,  # the pooled prompt and six numbers
        },
        NARROW
        | {
            "transformer_layers_per_block": (1, 2),
            "attention_head_dim": (1, 2),
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 16 + 6 * 8,
        },
        batch=4,
    ),
}


def choose_config(args: argparse.Namespace, name: str) -> dict[str, object]:
    return MODELS[name].config | (MODELS[name].narrow if args.tiny else {})


def make_path() -> GaussianPath:
    return GaussianPath.from_scheduler(
        DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    )


def draw_windows(size: int, batch: int, micro_batch: int, count: int) -> list[Window]:
    """The same for every variant; exactly half of the pairs take the forget component. A pair shares a prompt: were
    there two, no row would serve both sides, and ours would look cheaper."""
    generator = torch.Generator().manual_seed(0)
    path, windows = make_path(), []
    for _ in range(count):
        keep, forget, noise = torch.randn(3, batch, 4, size, size, generator=generator)
        drawn = {
            "keep": keep,
            "forget": forget,
            "noise": noise,
            "timesteps": torch.randint(len(path), (batch,), generator=generator),
            "from_forget": torch.randperm(batch, generator=generator) < batch // 2,
            "keep_condition": torch.arange(batch),
            "forget_condition": torch.arange(batch),
        }
        query = Query(**drawn, path=path)
        parts = [slice(start, start + micro_batch) for start in range(0, batch, micro_batch)]
        windows.append([replace(query, **{name: value[part] for name, value in drawn.items()}) for part in parts])
    return windows


class Trainer:
    """A network and its optimizer, with the steps of the variants that train it."""

    def __init__(self, args: argparse.Namespace, config: dict, batch: int, lora: bool) -> None:
        self.device, self.channels_last = args.device, args.channels_last
        self.on_gpu = self.device.type == "cuda"
        dtype = torch.bfloat16 if self.on_gpu else torch.float32
        torch.manual_seed(0)
        with self.device:  # billions of random numbers: drawn where they are needed
            self.unet = UNet2DConditionModel(**config)
        if lora:
            add_lora(self.unet, AdapterSettings(4, 4, 0.0, StableDiffusion.lora_targets), dtype)
        self.unet.to(self.device)
        if args.channels_last:
            self.unet.to(memory_format=torch.channels_last)
        if args.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.parameters = [parameter for parameter in self.unet.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-6, fused=True)
        self.path, self.method = make_path().to(self.device), METHODS["siss"](lam=LAM)

        # The cache of embeddings: a prompt for each pair of a step.
        self.prompts = torch.randn(batch, PROMPT_LENGTH, config["cross_attention_dim"]).to(self.device, dtype)
        self.pooled = None
        if "addition_embed_type" in config:
            width = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
            self.pooled = torch.randn(batch, width).to(self.device, dtype)
            pixels = 8.0 * config["sample_size"]  # original size, corner of the crop, target size
            self.time_ids = torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]], device=self.device)

    @cached_property
    def gradients(self) -> PairedGradients:
        """Not before it is used: plain alone must not pay for its buffers."""
        return PairedGradients(self.parameters, self.method.rule(scaling_rule("relative", 0.1)))

    def step(self, variant: str, window: Window) -> None:
        """From latents on the host to new weights."""
        if variant.startswith("plain"):
            self.plain(window)
        else:
            stats = self.gradients.compute(
                [self.method.rows(query) for query in window],
                lambda rows: self.predict(rows.noisy, rows.timesteps, rows.condition),
                MAX_GRAD_NORM,
                forget_scale=LAGGED_SCALE if variant == "siss_lagged" else None,
            )
            if stats.skipped:
                raise RuntimeError(f"{variant}: a gradient is not finite, and a step that is skipped says nothing")
        self.optimizer.step()
        # Ours too: what it leaves in `.grad` is a buffer that plain's backward would add to.
        self.optimizer.zero_grad(set_to_none=True)

    def plain(self, window: Window) -> None:
        for query in window:
            clean, noise, timesteps, condition = (
                value.to(self.device, non_blocking=True)
                for value in (query.keep, query.noise, query.timesteps, query.keep_condition)
            )
            noisy = self.path.add_noise(clean, noise, timesteps)
            (F.mse_loss(self.predict(noisy, timesteps, condition), noise) / len(window)).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)

    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        if self.channels_last:
            noisy = noisy.contiguous(memory_format=torch.channels_last)
        added = None
        if self.pooled is not None:
            added = {"text_embeds": self.pooled[condition], "time_ids": self.time_ids.expand(len(condition), -1)}
        # The forward alone, as accelerate does it.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.on_gpu):
            output = self.unet(noisy, timesteps, self.prompts[condition], added_cond_kwargs=added).sample
        return output.float()


def is_lora(variant: str) -> bool:
    return variant.endswith("_lora")


def make_steps(args: argparse.Namespace, config: dict, batch: int, variants: Sequence[str]) -> dict[str, Step]:
    """One network for those in full, one for those by LoRA."""
    trainers = {lora: Trainer(args, config, batch, lora) for lora in sorted(set(map(is_lora, variants)))}
    return {variant: partial(trainers[is_lora(variant)].step, variant) for variant in variants}


def attempt(measure: Callable[[], object]) -> tuple[object, str | None]:
    """What it returns, or None and the reason, where memory does not suffice; what it took is free afterwards."""
    result = reason = None
    try:
        result = measure()
    except torch.OutOfMemoryError as error:
        reason = " ".join(str(error).partition(" If reserved")[0].split())
    gc.collect()  # a UNet is full of cycles
    torch.cuda.empty_cache()  # does nothing without a GPU
    return result, reason


def take_turns(
    make: MakeSteps, variants: Sequence[str], windows: list[Window], device: torch.device
) -> dict[str, tuple[list[float], list[str], str | None]]:
    """For each variant its seconds, with whom it took turns, and why there are no seconds."""
    seconds, reason = attempt(lambda: measure_seconds(make(variants), windows, device))
    if reason is None:
        return {variant: (seconds[variant], variants, None) for variant in variants}
    if len(variants) == 1:
        return {variants[0]: ([], variants, reason)}
    groups = [[variant for variant in variants if is_lora(variant) == lora] for lora in (False, True)]
    parts = groups if all(groups) else [[variant] for variant in variants]
    return {name: found for part in parts for name, found in take_turns(make, part, windows, device).items()}


def measure_alone(make: MakeSteps, variant: str, windows: list[Window], device: torch.device) -> tuple:
    """Peak bytes on the device over a few steps (None on a CPU), and the floating-point operations of a step."""
    step, peak = make([variant])[variant], None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        for window in windows[-PEAK_STEPS:]:
            step(window)
        peak = torch.cuda.max_memory_allocated()
    operations = []
    # Counting is slow on a CPU, where nobody asks how many there are: one step will do.
    for window in windows[-PEAK_STEPS if device.type == "cuda" else -1 :]:
        with FlopCounterMode(display=False) as counter:
            step(window)
        operations.append(counter.get_total_flops())
    return peak, statistics.mean(operations)


def measure_matrix_rate(device: torch.device) -> float:
    """Floating-point operations per second of large bfloat16 matrix products."""
    left, right = torch.randn(2, MATRIX_SIZE, MATRIX_SIZE, device=device, dtype=torch.bfloat16)
    product, seconds = torch.empty_like(left), []
    for _ in range(MATRIX_WARMUP + MATRIX_REPEATS):
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started.record()
        torch.mm(left, right, out=product)
        ended.record()
        torch.cuda.synchronize()
        seconds.append(started.elapsed_time(ended) / 1000)
    return 2 * MATRIX_SIZE**3 / statistics.median(seconds[MATRIX_WARMUP:])


def ratio(value: float | None, reference: float | None) -> float | None:
    return None if value is None or reference is None else value / reference


def measure(args: argparse.Namespace, name: str, batch: int, matrix_rate: float | None) -> list[dict]:
    """The rows of a model and a batch size."""
    config = choose_config(args, name)
    windows = draw_windows(config["sample_size"], batch, batch, WARMUP + args.repeats)
    make = partial(make_steps, args, config, batch)
    alone = {variant: attempt(partial(measure_alone, make, variant, windows, args.device)) for variant in VARIANTS}
    fitting = [variant for variant in VARIANTS if alone[variant][1] is None]
    timed = take_turns(make, fitting, windows, args.device) if fitting else {}
    medians = {variant: statistics.median(found[0]) if found[0] else None for variant, found in timed.items()}
    rows = []
    for variant in VARIANTS:
        found, reason = alone[variant]
        peak, operations = found or (None, None)
        seconds, turns_with, reason = timed.get(variant, ([], [], reason))
        median = medians.get(variant)
        rows.append(
            {
                "model": name,
                "batch": batch,
                "variant": variant,
                "seconds_median": median,
                "seconds_quartiles": np.quantile(seconds, [0.25, 0.75]).tolist() if seconds else None,
                "ratio_to_plain": ratio(median, medians.get("plain")),
                "ratio_to_plain_lora": ratio(median, medians.get("plain_lora")) if is_lora(variant) else None,
                "images_per_second": ratio(batch, median),
                "peak_bytes": peak,
                "operations": operations,
                "share_of_matrix_rate": ratio(ratio(operations, median), matrix_rate),
                "turns_with": [other for other in turns_with if other != variant],
                "reason": reason,
            }
        )
    return rows


def measure_run(args: argparse.Namespace) -> list[dict]:
    """Seconds of a run by LoRA after the warm-up, with the images of a step in one micro-batch and one by one."""
    config, steps, images = choose_config(args, "sd15"), 2 if args.tiny else 35, 4 if args.tiny else 16
    size, runs = config["sample_size"], []
    for micro_batch in (images, 1):
        windows = draw_windows(size, images, micro_batch, WARMUP + steps)
        make = partial(make_steps, args, config, images)
        seconds, _, reason = take_turns(make, ["siss_lora"], windows, args.device)["siss_lora"]
        total = sum(seconds) if seconds else None
        print(
            f"{steps} steps x {images} images at {8 * size} px of an SD-1.5-size LoRA run, in micro-batches of"
            f" {micro_batch}: {reason or format(total, '.1f') + ' s'}",
            flush=True,
        )
        run_of = {"steps": steps, "images": images, "micro_batch": micro_batch}
        runs.append(run_of | {"seconds": total, "reason": reason})
    return runs


def print_row(row: dict) -> None:
    def cell(value: float | None, form: str, width: int) -> str:
        return f"{'-' if value is None else format(value, form):>{width}}"

    quartiles = row["seconds_quartiles"]
    print(
        f"{row['model']:6} {row['batch']:5} {row['variant']:12} {cell(row['seconds_median'], '.3f', 8)}"
        f" {'-' if quartiles is None else '{:.3f}-{:.3f}'.format(*quartiles):>15}"
        f" {cell(row['ratio_to_plain'], '.2f', 6)} {cell(row['ratio_to_plain_lora'], '.2f', 6)}"
        f" {cell(row['images_per_second'], '.1f', 9)} {cell(ratio(row['peak_bytes'], 1e9), '.1f', 8)}"
        f" {cell(row['share_of_matrix_rate'], '.0%', 6)}  {row['reason'] or ''}".rstrip(),
        flush=True,
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="Default: both.")
    parser.add_argument(
        "--batches", nargs="+", type=int, metavar="N", help="Pairs per step, even. Default: 16 for sd15, 4 for sdxl."
    )
    parser.add_argument("--repeats", type=int, default=10, help="Timed steps of each variant. Default: 10.")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="Recompute activations: less memory.")
    parser.add_argument("--channels_last", action="store_true", help="The memory format of weights and latents.")
    parser.add_argument("--json", type=str, metavar="FILE", help="Write the results there.")
    parser.add_argument(
        "--tiny", action="store_true", help="Narrow models on the CPU in float32: to see that it runs, not to quote."
    )
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error("--repeats must be at least 1")
    if any(batch < 2 or batch % 2 for batch in args.batches or ()):
        parser.error("--batches must be even: half of the pairs are made from forget images")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if not args.tiny and not torch.cuda.is_available():
        raise UsageError("no GPU was found; --tiny runs narrow models on the CPU, to see that it runs")
    args.device = torch.device("cpu" if args.tiny else "cuda")
    machine = describe_machine(args.device)
    machine |= {"gradient_checkpointing": args.gradient_checkpointing, "channels_last": args.channels_last}
    matrix_rate = None
    if not args.tiny:
        matrix_rate, memory = measure_matrix_rate(args.device), torch.cuda.mem_get_info()[1]
        machine |= {"dtype": "bfloat16 autocast", "memory_bytes": memory, "matrix_flops_per_second": matrix_rate}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(
        f"\n{'model':6} {'batch':>5} {'variant':12} {'seconds':>8} {'quartiles':>15} {'plain':>6} {'lora':>6}"
        f" {'images/s':>9} {'peak GB':>8} {'share':>6}",
        flush=True,
    )
    results = []
    for name in dict.fromkeys(args.models):
        for batch in args.batches or (2 if args.tiny else MODELS[name].batch,):
            rows = measure(args, name, batch, matrix_rate)
            results += rows
            for row in rows:
                print_row(row)
    print("\nplain, lora: times as long as plain and as plain_lora; share: of the rate of matrix products.\n")
    run_seconds = measure_run(args) if "sd15" in args.models else None
    if args.json:
        report = {"machine": machine, "results": results, "run_seconds": run_seconds}
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    run(main, "gpu.py")
