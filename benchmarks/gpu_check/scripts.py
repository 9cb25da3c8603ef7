"""Part a: the scripts as a user starts them, on the tiny models of the package, and the adapter loaded again."""

import argparse
import math
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common import ROOT, Results, as_flags, make_parser, read_lines, run_part, write_captioned, write_digits

import siss_diffusers
from siss_diffusers.families import NamedPipeline, StableDiffusion
from siss_diffusers.families.loading import load_for_sampling
from siss_diffusers.storage.files import LORA_FILE, read_json


ASSETS = Path(siss_diffusers.__file__).parent / "assets"
SD, UNCONDITIONAL = "train_siss_sd.py", "train_siss_unconditional.py"
UNET = "unet/diffusion_pytorch_model.safetensors"
AT_ONCE, SECONDS_OF_A_CASE = 4, 100
END = 1_500  # characters of what a script printed that are kept where it fails
LOOK = {"--validation_steps": "2", "--num_validation_images": "4"}
LOOK_SD, LOOK_UNCONDITIONAL = LOOK | {"--num_inference_steps": "5"}, LOOK | {"--ddpm_num_inference_steps": "5"}
SISS = {"--method": "siss", "--calibrate_forgetting": "off"}


@dataclass(frozen=True)
class Case:
    """A run of a script.

    Args:
        flags: beside those of every run; None: a switch.
        needs: a package that may be missing.
        environment: what a launcher would set.
        tiny: whether it also runs when the check is shrunk.
    """

    name: str
    script: str
    flags: dict[str, str | None]
    needs: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    tiny: bool = False

    @property
    def weights(self) -> str:
        return LORA_FILE if "--use_lora" in self.flags else UNET


LORA = {"--use_lora": None}
ADAPTER_CASE = "LoRA, bf16, siss, validation"
CASES = (
    Case(ADAPTER_CASE, SD, LORA | {"--mixed_precision": "bf16"} | SISS | LOOK_SD, tiny=True),
    Case(
        "LoRA, compiled",
        SD,
        LORA | {"--mixed_precision": "bf16"},
        environment={"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"},
    ),
    Case("LoRA, fp16", SD, LORA | {"--mixed_precision": "fp16"} | LOOK_SD),
    Case("full, fp16, siss", SD, {"--mixed_precision": "fp16"} | SISS | LOOK_SD),
    Case("full, bf16", SD, {"--mixed_precision": "bf16"}),
    Case("full", SD, {}),
    Case("full, 8-bit Adam", SD, {"--use_8bit_adam": None} | SISS, needs="bitsandbytes"),
    Case("full, EMA, gradient checkpointing", SD, {"--use_ema": None, "--gradient_checkpointing": None} | LOOK_SD),
    Case("LoRA, latents not cached", SD, LORA | {"--no-cache_latents": None, "--mixed_precision": "bf16"}),
    Case("LoRA, cached latents, workers", SD, LORA | {"--dataloader_num_workers": "2"}),
    Case("LoRA, deterministic", SD, LORA | {"--deterministic": None, "--mixed_precision": "bf16"}),
    Case(
        "unconditional, bf16, EMA",
        UNCONDITIONAL,
        {"--mixed_precision": "bf16", "--use_ema": None} | LOOK_UNCONDITIONAL,
    ),
    Case("unconditional, fp16, siss", UNCONDITIONAL, {"--mixed_precision": "fp16"} | SISS | LOOK_UNCONDITIONAL),
)


def base_flags(script: str, data: Path) -> dict[str, str | None]:
    """Return the flags of every run of a script."""
    shared = {"--max_train_steps": "4", "--train_batch_size": "4", "--report_to": "none"}
    if script == SD:
        model = {
            "--pretrained_model_name_or_path": str(ASSETS / "tiny_sd"),
            "--train_data_dir": str(data / "captioned"),
        }
        return shared | model
    model = {"--pretrained_model_name_or_path": str(ASSETS / "tiny_ddpm_digits"), "--forget_files": "garment.png"}
    return shared | model | {"--train_data_dir": str(data / "digits")}


def run_case(case: Case, folder: Path) -> dict:
    """Run a case in a process of its own, and look at what it left."""
    output = folder / "".join(letter if letter.isalnum() else "_" for letter in case.name)
    shutil.rmtree(output, ignore_errors=True)
    flags = base_flags(case.script, folder) | case.flags | {"--output_dir": str(output)}
    command = [sys.executable, str(ROOT / case.script), *as_flags(flags)]
    started = time.perf_counter()
    try:
        done = subprocess.run(
            command,
            env=os.environ | case.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS_OF_A_CASE,
        )
    except subprocess.TimeoutExpired:
        return {"ok": False, "error": f"still running after {SECONDS_OF_A_CASE} s"}
    seconds = time.perf_counter() - started
    if done.returncode != 0:
        return {"ok": False, "seconds": seconds, "error": done.stdout[-END:]}
    steps, looks = (read_lines(output / name) for name in ("train_log.jsonl", "validation_log.jsonl"))
    saved, record = (output / case.weights).is_file(), read_json(output / "unlearning.json")
    finite = bool(steps) and all(math.isfinite(line["keep_loss"]) for line in steps)
    validated = bool(looks) == ("--validation_steps" in case.flags)
    return {
        "ok": finite and saved and validated,
        "seconds": seconds,
        "steps": len(steps),
        "skipped": record["skipped_steps"],
        "last_step_seconds": steps[-1]["step_seconds"] if steps else None,
        "broken_share": looks[-1]["broken_share"] if looks else None,
        "saved": saved,
    }


@torch.no_grad()
def look_at_adapter(folder: Path, device: str) -> dict:
    """Load the adapter of a case: at scale 0 it must be the base to the bit, and at scale 1 something else."""
    source = NamedPipeline(str(ASSETS / "tiny_sd"))
    family = StableDiffusion.from_source(source)
    generator = torch.Generator().manual_seed(0)
    answers = {}
    for name in ("base", "adapter"):
        adapter = str(folder) if name == "adapter" else None
        pipeline = load_for_sampling(source, family, device, adapter=adapter)
        network, conditions = family.network(pipeline), family.embed(pipeline, ["a photograph of a flower"] * 2)
        side = network.config.sample_size
        noisy = torch.randn(2, network.config.in_channels, side, side, generator=generator.manual_seed(0)).to(device)
        timesteps = torch.tensor([10, 700], device=device)
        for scale in (0.0, 1.0) if adapter else (None,):
            if scale is not None:
                pipeline.set_adapters(pipeline.get_active_adapters(), scale)
            answers[name, scale] = family.predict(network, noisy, timesteps, conditions)
    base, off, on = answers["base", None], answers["adapter", 0.0], answers["adapter", 1.0]
    is_base, differs = bool(off.equal(base)), not on.equal(base)
    difference = (off - base).abs().max().item()
    return {"ok": is_base and differs, "scale_0_is_the_base": is_base, "largest_difference": difference}


def run_scripts(args: argparse.Namespace, results: Results) -> None:
    """Run the cases, several at once, and load the adapter of one of them."""
    write_captioned(args.folder / "captioned")
    write_digits(args.folder / "digits")
    chosen = []
    for case in CASES:
        if args.tiny and not case.tiny:
            continue
        if case.needs is not None and find_spec(case.needs) is None:
            results.add(case.name, skipped=f"{case.needs} is not installed")
            continue
        chosen.append(case)
    with ThreadPoolExecutor(1 if args.tiny else AT_ONCE) as pool:
        futures = {pool.submit(run_case, case, args.folder): case for case in chosen}
        for future in as_completed(futures):
            results.add(futures[future].name, **future.result())
    (adapter,) = [path.parent for path in args.folder.glob(f"LoRA__bf16__siss*/{LORA_FILE}")] or [None]
    if adapter is not None:
        results.add("adapter at scale 0", **look_at_adapter(adapter, "cpu" if args.tiny else "cuda"))


if __name__ == "__main__":
    run_part(run_scripts, make_parser(__doc__).parse_args())
