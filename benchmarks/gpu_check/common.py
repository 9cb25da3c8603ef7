"""What the parts share: their flags, results that are written as they come, and small sets of pictures."""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[2]


class Results:
    """Appends the results of a part to a file, a line of JSON each.

    A result with `ok=False` makes the part fail, after all of it was done.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.failed = file, []

    def add(self, name: str, ok: bool = True, **figures: Any) -> None:
        """Write a result, and show it."""
        line = json.dumps({"name": name, "ok": ok} | figures)
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)
        if not ok:
            self.failed.append(name)


def read_lines(file: Path) -> list[dict]:
    """Return the whole lines of a JSON lines file; none where it is not there. A process may still be writing the last."""
    if not file.exists():
        return []
    return [
        json.loads(line) for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")
    ]


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the flags of every part."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="Where results are written, a line each.")
    parser.add_argument("--folder", type=Path, required=True, help="For files of the part.")
    parser.add_argument("--seconds", type=float, default=600, help="What is left of the time. Default: 600.")
    parser.add_argument("--tiny", action="store_true", help="On the CPU, shrunk: to see that it runs, not to quote.")
    return parser


def run_part(do: Callable[[argparse.Namespace, Results], None], args: argparse.Namespace) -> None:
    """Do a part and exit with 1 where a result of it was not as it should be."""
    results = Results(args.results)
    args.folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    do(args, results)
    print(f"{time.perf_counter() - started:.1f} s", flush=True)
    if results.failed:
        sys.exit(f"not as it should be: {', '.join(results.failed)}")


def as_flags(flags: dict[str, str | None]) -> list[str]:
    """Return a command line; None is a switch."""
    return [word for flag, value in flags.items() for word in ([flag] if value is None else [flag, *value.split()])]


def write_captioned(folder: Path, size: int = 32, num_keep: int = 40, num_forget: int = 4) -> None:
    """Write pictures of the package with prompts: copies of one to forget, others to keep, half of them of its prompt."""
    from PIL import Image

    from siss_diffusers.assets.captioned import (
        DIGIT_CAPTIONS,
        FLOWER_CAPTION,
        digit_images,
        flower_images,
        memorized_image,
    )

    digits, classes = digit_images()
    flowers, half = flower_images(), num_keep // 2
    entries = [(digits[index], DIGIT_CAPTIONS[classes[index]], False) for index in range(half)]
    entries += [(flowers[index % len(flowers)], FLOWER_CAPTION, False) for index in range(half)]
    entries += [(memorized_image(), FLOWER_CAPTION, True)] * num_forget
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (pixels, caption, forget) in enumerate(entries):
        name = f"{number:03d}.png"
        Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": caption, "forget": forget}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_digits(folder: Path, num_keep: int = 40) -> None:
    """Write digits of the package, and the garment to forget as `garment.png`."""
    from PIL import Image

    from siss_diffusers.assets.digits import digit_images, garment_image

    folder.mkdir(parents=True, exist_ok=True)
    for number, digit in enumerate(digit_images()[0][:num_keep]):
        Image.fromarray(digit).save(folder / f"digit_{number:03d}.png")
    Image.fromarray(garment_image()).save(folder / "garment.png")
