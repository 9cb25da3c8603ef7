"""Part c: seconds, peak memory and use of the card of one optimizer step at full size.

UNets of the size of Stable Diffusion 1.5 (512 px) and SDXL (1024 px) and a transformer of the size of Flux.1 (512 px), random
weights, bfloat16 autocast, float32 trainable weights, fused AdamW; latents and embeddings are random and cached: no VAE, no
text encoder. plain: ordinary diffusers fine-tuning of the same batch. siss: ours under the rule `relative`. siss_lagged: the
same with the forget scale known beforehand, one scalar loss. redirect: the default, with 1,000 images to keep on the
device. *_lora: the same by LoRA of the attention projections, rank 4, the frozen weights in bfloat16.

The variants take turns. Those that train in full share one network and its optimizer, and those by LoRA another, so
that a card need not hold them all. Where even that does not fit, full and LoRA are timed one after the other, and
where those do not fit either, each variant by itself; `turns_with` says which it was. Peak memory is of a pass of its
own, with the model of that variant alone on the device, counted after the model is built. What does not fit at all is
null, with the reason. `share`: floating-point operations of the matrix products, convolutions and attention that a step
really ran, forward and backward (recomputation under --gradient_checkpointing too), per second, in units of what
the card did in bfloat16 products of 8192x8192 matrices.
"""

import argparse
import gc
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import Results, make_parser, run_part
from networks import MODELS, Step, Window, draw_windows, is_lora, make_steps
from step_cost import PEAK_STEPS, WARMUP, describe_machine, measure_seconds

from siss_diffusers.errors import UsageError


MATRIX_SIZE, MATRIX_WARMUP, MATRIX_REPEATS = 8192, 10, 20

MakeSteps = Callable[[Sequence[str]], dict[str, Step]]


def attempt(measure: Callable[[], object]) -> tuple[object, str | None]:
    """Return what it returns, or None and the reason where memory does not suffice; what it took is free afterwards."""
    result = reason = None
    try:
        result = measure()
    except torch.OutOfMemoryError as error:
        reason = " ".join(str(error).partition(" If reserved")[0].split())
    gc.collect()  # a network is full of cycles
    torch.cuda.empty_cache()  # does nothing without a GPU
    return result, reason


def take_turns(
    make: MakeSteps, variants: Sequence[str], windows: list[Window], device: torch.device
) -> dict[str, tuple[list[float], list[str], str | None]]:
    """Return for each variant its seconds, with whom it took turns, and why there are no seconds."""
    seconds, reason = attempt(lambda: measure_seconds(make(variants), windows, device))
    if reason is None:
        return {variant: (seconds[variant], list(variants), None) for variant in variants}
    if len(variants) == 1:
        return {variants[0]: ([], list(variants), reason)}
    groups = [[variant for variant in variants if is_lora(variant) == lora] for lora in (False, True)]
    parts = groups if all(groups) else [[variant] for variant in variants]
    return {name: timed for part in parts for name, timed in take_turns(make, part, windows, device).items()}


def measure_alone(make: MakeSteps, variant: str, windows: list[Window], device: torch.device) -> tuple:
    """Return the peak bytes on the device over a few steps (None on a CPU), and the operations of a step."""
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
    """Return the floating-point operations per second of large bfloat16 matrix products."""
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
    """Return a quotient; None where a part of it is missing."""
    return None if value is None or reference is None else value / reference


def measure(
    args: argparse.Namespace, name: str, batch: int, matrix_rate: float | None, only: Sequence[str]
) -> list[dict]:
    """Return the rows of a model and a batch size, of some of its variants."""
    model = MODELS[name].shrunk() if args.tiny else MODELS[name]
    variants = [variant for variant in model.variants if variant in only]
    windows = draw_windows(model.latents, batch, batch, WARMUP + args.repeats)
    make = partial(make_steps, args, model, batch)
    alone = {variant: attempt(partial(measure_alone, make, variant, windows, args.device)) for variant in variants}
    fitting = [variant for variant in variants if alone[variant][1] is None]
    timed = take_turns(make, fitting, windows, args.device) if fitting else {}
    medians = {variant: statistics.median(entry[0]) if entry[0] else None for variant, entry in timed.items()}
    rows = []
    for variant in variants:
        figures, reason = alone[variant]
        peak, operations = figures or (None, None)
        seconds, turns_with, reason = timed.get(variant, ([], [], reason))
        median = medians.get(variant)
        plain = "plain_lora" if is_lora(variant) else "plain"
        rows.append(
            {
                "model": name,
                "batch": batch,
                "variant": variant,
                "seconds_median": median,
                "seconds_quartiles": np.quantile(seconds, [0.25, 0.75]).tolist() if seconds else None,
                "ratio_to_plain": ratio(median, medians.get(plain)),
                "images_per_second": ratio(batch, median),
                "peak_bytes": peak,
                "operations": operations,
                "share_of_matrix_rate": ratio(ratio(operations, median), matrix_rate),
                "turns_with": [other for other in turns_with if other != variant],
                "reason": reason,
            }
        )
    return rows


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="Default: all.")
    parser.add_argument("--variants", nargs="+", help="Default: all that a model has.")
    parser.add_argument(
        "--batches", nargs="+", type=int, metavar="N", help="Pairs per step, even. Default: 16 for sd15, else 4."
    )
    parser.add_argument("--repeats", type=int, help="Timed steps of each variant. Default: 10, and 1 with --tiny.")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="Recompute activations: less memory.")
    parser.add_argument("--channels_last", action="store_true", help="The memory format of weights and latents.")
    args = parser.parse_args(argv)
    if args.repeats is None:
        args.repeats = 1 if args.tiny else 10
    if args.repeats < 1:
        parser.error("--repeats must be at least 1")
    if any(batch < 2 or batch % 2 for batch in args.batches or ()):
        parser.error("--batches must be even: half of the pairs are made from forget images")
    return args


def measure_steps(args: argparse.Namespace, results: Results) -> None:
    """Measure the models one after the other, those by LoRA first: they fit anywhere."""
    if not args.tiny and not torch.cuda.is_available():
        raise UsageError("no GPU was found; --tiny runs narrow models on the CPU, to see that it runs")
    args.device = torch.device("cpu" if args.tiny else "cuda")
    machine, matrix_rate = describe_machine(args.device), None
    if not args.tiny:
        matrix_rate = measure_matrix_rate(args.device)
        machine |= {"dtype": "bfloat16 autocast", "matrix_flops_per_second": matrix_rate}
        machine["memory_bytes"] = torch.cuda.mem_get_info()[1]
    options = {name: getattr(args, name) for name in ("gradient_checkpointing", "channels_last")}
    results.add("machine", **machine, **options)
    for name in dict.fromkeys(args.models):
        variants = MODELS[name].variants if args.variants is None else args.variants
        for batch in args.batches or (2 if args.tiny else MODELS[name].batch,):
            for lora in (True, False):
                only = [variant for variant in variants if is_lora(variant) == lora]
                for row in measure(args, name, batch, matrix_rate, only):
                    results.add(f"{name}, {row['variant']}", **row)


if __name__ == "__main__":
    run_part(measure_steps, parse_args())
