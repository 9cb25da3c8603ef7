"""Find the memorized prompt, isolate its picture, unlearn it, prove it: `make demo-audit`.

The three commands of `siss` and the training script between them, on the tiny Stable Diffusion.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from launching import launch

import siss_diffusers
from siss_diffusers.assets.captioned import CAPTIONS, FLOWER_CAPTION, write_training_folder


MODEL = Path(siss_diffusers.__file__).parent / "assets" / "tiny_sd"
SAMPLING = ("--guidance_scale", "3", "--batch_size", "64")


def siss(*arguments: str) -> None:
    """Run a command of `siss` as a user would, and show it."""
    shown = [Path(argument).name if argument == str(MODEL) else argument for argument in arguments]
    print(f"\n$ siss {' '.join(shown)}", flush=True)
    subprocess.run([sys.executable, "-m", "siss_diffusers", *arguments], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo-audit"))
    args = parser.parse_args()
    started = time.perf_counter()
    output_dir = args.output_dir
    shutil.rmtree(output_dir, ignore_errors=True)
    output_dir.mkdir(parents=True)
    (output_dir / "prompts.txt").write_text("\n".join(CAPTIONS) + "\n")
    ordinary = [caption for caption in CAPTIONS if caption != FLOWER_CAPTION]
    (output_dir / "ordinary.txt").write_text("\n".join(ordinary) + "\n")

    siss(
        *("audit", "--pretrained_model_name_or_path", str(MODEL), "--output_dir", str(output_dir / "audit")),
        *("--prompts_file", str(output_dir / "prompts.txt")),
        *("--ordinary_prompts_file", str(output_dir / "ordinary.txt")),
        *SAMPLING,
    )
    siss(
        *("curate", "--pretrained_model_name_or_path", str(MODEL), "--output_dir", str(output_dir / "curated")),
        *("--audit", str(output_dir / "audit")),
        *SAMPLING,
    )
    launch(
        "train_siss_sd.py",
        {
            "--pretrained_model_name_or_path": str(MODEL),
            "--train_data_dir": str(output_dir / "curated" / "images"),
            "--output_dir": str(output_dir / "adapter"),
            "--use_lora": None,
            "--max_train_steps": "150",
            "--cache_dir": str(output_dir / "cache"),
            "--report_to": "none",
        },
    )
    # The training set itself, not the curated samples: what the model must keep, and the picture that it memorized.
    data = write_training_folder(output_dir / "data")
    siss(
        *("evaluate", "--base", str(MODEL), "--unlearned", str(output_dir / "adapter")),
        *("--train_data_dir", str(data), "--cache_dir", str(output_dir / "cache")),
        *("--output_dir", str(output_dir / "report"), "--num_samples", "128", "--num_ordinary_samples", "64"),
        *("--relearning_steps", "40", "--num_relearning_samples", "32"),
        *SAMPLING,
    )
    audit = json.loads((output_dir / "audit" / "audit.json").read_text())
    curation = json.loads((output_dir / "curated" / "curation.json").read_text())
    flagged = [row for row in audit["prompts"] if row["flagged"]]
    print(
        f"\n{len(flagged)} of {len(audit['prompts'])} prompts flagged; curated {curation['prompts'][0]['forget']} pictures"
        f" to forget, {curation['prompts'][0]['keep']} to keep; all in {time.perf_counter() - started:.0f} s."
        f" Open {output_dir / 'report' / 'report.html'}."
    )


if __name__ == "__main__":
    main()
