"""Part d: a whole run of `train_siss_sd.py`, from the command to the saved adapter, and where its time goes.

35 steps of 16 images at 512 px, LoRA in bf16, of a pipeline of the size of Stable Diffusion 1.5 with random weights, which is
written beforehand; with cached latents, and then without.
"""

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import ROOT, Results, as_flags, make_parser, read_lines, run_part, write_captioned

import siss_diffusers
from siss_diffusers.storage.files import LORA_FILE


TINY_SD = Path(siss_diffusers.__file__).parent / "assets" / "tiny_sd"
END = 1_500  # characters of what the script printed that are kept where it fails
# What the script logs of its parts, in seconds.
LOGGED = {
    "encoding_seconds": r"Encoded \d+ images in ([\d.]+) s",
    "threshold_seconds": r"Measured the thresholds of forgetting: \d+ network calls, ([\d.]+) s",
}


def write_pipeline(folder: Path) -> None:
    """Write a pipeline of Stable Diffusion 1.5's size, random weights in half precision."""
    import torch
    from diffusers import DDPMScheduler, StableDiffusionPipeline
    from step_cost_sd import build_models

    from siss_diffusers.assets.captioned import CAPTIONS
    from siss_diffusers.assets.make_tiny_sd import make_tokenizer

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):  # a billion random numbers
        unet, vae, text_encoder = build_models(full_size=True)
    tokenizer = make_tokenizer(CAPTIONS)
    tokenizer.model_max_length = 77
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDPMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).to("cpu").save_pretrained(folder)


def run_once(flags: dict[str, str | None], output: Path, seconds: float) -> dict:
    """Run the script, and take its time apart."""
    command = [sys.executable, str(ROOT / "train_siss_sd.py"), *as_flags(flags | {"--output_dir": str(output)})]
    started = time.perf_counter()
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=max(seconds, 1)
        )
    except subprocess.TimeoutExpired:
        return {"ok": False, "error": f"still running after {seconds:.0f} s"}
    total = time.perf_counter() - started
    if done.returncode != 0:
        return {"ok": False, "seconds": total, "error": done.stdout[-END:]}
    parts = {name: re.search(pattern, done.stdout) for name, pattern in LOGGED.items()}
    parts = {name: None if match is None else float(match[1]) for name, match in parts.items()}
    steps = [line["step_seconds"] for line in read_lines(output / "train_log.jsonl")]
    known = sum(steps) + sum(value or 0 for value in parts.values())
    return {
        "ok": (output / LORA_FILE).is_file(),
        "seconds": total,
        "steps": len(steps),
        "training_seconds": sum(steps),
        "first_step_seconds": steps[0],
        "last_step_seconds": steps[-1],
        **parts,
        "starting_loading_and_saving_seconds": total - known,
    }


def run_whole(args: argparse.Namespace, results: Results) -> None:
    """Write the pipeline and the pictures, and run with cached latents and without."""
    ends = time.perf_counter() + args.seconds
    model, steps, images, resolution = TINY_SD, 2, 4, 32
    if not args.tiny:
        model, steps, images, resolution = args.folder / "model", 35, 16, 512
        started = time.perf_counter()
        write_pipeline(model)
        results.add("pipeline written", seconds=time.perf_counter() - started)
    data = args.folder / "pictures"
    write_captioned(data, resolution)
    flags = {
        "--pretrained_model_name_or_path": str(model),
        "--train_data_dir": str(data),
        "--resolution": str(resolution),
        "--use_lora": None,
        "--mixed_precision": "bf16",
        "--train_batch_size": str(images),
        "--eval_batch_size": "16",
        "--max_train_steps": str(steps),
        "--report_to": "none",
        "--overwrite_output_dir": None,
    }
    if args.tiny:  # its thresholds take longer than its steps
        flags |= {"--method": "siss", "--calibrate_forgetting": "off"}
    variants = {"cached": {}} if args.tiny else {"cached": {}, "not cached": {"--no-cache_latents": None}}
    for name, more in variants.items():
        left = ends - time.perf_counter()
        results.add(name, **run_once(flags | more, args.folder / name.replace(" ", "_"), left))


if __name__ == "__main__":
    run_part(run_whole, make_parser(__doc__).parse_args())
