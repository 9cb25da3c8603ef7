"""What each choice within a step of SISS gains on its own: `python benchmarks/options.py [--json FILE]`.

Every row is the step as it is (`as is`: fused AdamW, rows grouped by the side they serve, scaled-dot-product attention)
with one thing changed. `lagged`: a step under --forget_scale_every that takes the scale of an earlier one. The moving
average is timed by itself, as it is optional. `--compile` adds the compiled network, which takes minutes first.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from diffusers.training_utils import EMAModel
from step_cost import MAX_GRAD_NORM, Model, describe_machine, draw_queries, make_models, measure_seconds

from siss_diffusers import METHODS, PairedGradients, Query, scaling_rule
from siss_diffusers.gradients import engine
from siss_diffusers.methods import Rows


WARMUP = 2
LAGGED_SCALE = 0.1
VARIANTS = ("as is", "AdamW not fused", "rows not grouped", "attention not fused", "channels_last", "lagged")


def ungrouped(rows: Rows):
    """Every row forward once and backward for both sides, as where nothing is known of the weights."""
    yield rows, True, True


class Step:
    """One optimizer step of SISS, from images, timesteps and noise on the host to new weights."""

    def __init__(self, variant: str, model: Model, device: torch.device) -> None:
        torch.manual_seed(0)
        self.variant = variant
        self.network = model.build().to(device)
        if variant == "channels_last":
            self.network.to(memory_format=torch.channels_last)
        if variant == "attention not fused":
            for module in self.network.modules():
                if isinstance(module, Attention):
                    module.set_processor(AttnProcessor())
        if variant == "compiled":
            self.network.compile()
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-6, fused=variant != "AdamW not fused")
        self.method = METHODS["siss"]()
        self.gradients = PairedGradients(self.network.parameters(), self.method.rule(scaling_rule("relative", 0.1)))

    def __call__(self, query: Query) -> None:
        grouped = engine.split_by_side
        if self.variant == "rows not grouped":
            engine.split_by_side = ungrouped
        try:
            self.gradients.compute(
                [self.method.rows(query)],
                lambda rows: self.network(rows.noisy, rows.timesteps).sample,
                MAX_GRAD_NORM,
                forget_scale=LAGGED_SCALE if self.variant == "lagged" else None,
            )
        finally:
            engine.split_by_side = grouped
        self.optimizer.step()


def median_seconds(function: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(WARMUP + repeats):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[WARMUP:])


def measure_average(model: Model, device: torch.device, repeats: int) -> dict[str, float]:
    """Seconds of a step of the moving average, with fused operations over lists and in a loop over parameters."""
    parameters = list(model.build().to(device).parameters())
    averages = {name: EMAModel(parameters, foreach=name == "foreach") for name in ("foreach", "loop")}
    return {
        name: median_seconds(lambda average=average: average.step(parameters), repeats)
        for name, average in averages.items()
    }


def parse_args() -> argparse.Namespace:
    models = list(make_models(None))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=models, default=models, metavar="MODEL", help=", ".join(models))
    parser.add_argument("--batch", type=int, default=8, help="Pairs per step. Default: 8.")
    parser.add_argument("--repeats", type=int, default=12, help="Timed steps of each variant. Default: 12.")
    parser.add_argument("--compile", action="store_true", help="Add the compiled network.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Write the figures there, too.")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = describe_machine(device)
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(f"\n{'model':18} {'variant':20} {'seconds':>8} {'quartiles':>15} {'to as is':>9}")
    results, averages = [], []
    for name in args.models:
        model = make_models(None)[name]
        variants = (*VARIANTS, "compiled") if args.compile else VARIANTS
        steps = {variant: Step(variant, model, device) for variant in variants}
        seconds = measure_seconds(steps, draw_queries(model, args.batch, WARMUP + args.repeats), device)
        as_is = statistics.median(seconds["as is"])
        for variant, values in seconds.items():
            median, quartiles = statistics.median(values), np.quantile(values, [0.25, 0.75]).tolist()
            row = {"model": name, "batch": args.batch, "variant": variant, "seconds_median": median}
            results.append(row | {"seconds_quartiles": quartiles, "ratio_to_as_is": median / as_is})
            print(
                f"{name:18} {variant:20} {median:8.3f} {quartiles[0]:7.3f}-{quartiles[1]:.3f} {median / as_is:9.3f}",
                flush=True,
            )
        found = measure_average(model, device, args.repeats)
        averages.append({"model": name} | found)
        print(f"{name:18} moving average: foreach {found['foreach']:.4f} s, loop {found['loop']:.4f} s")
    if args.json:
        content = {"machine": machine, "results": results, "moving_average": averages}
        args.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
