"""What the search for near copies finds and what it spares: `python benchmarks/near_copies.py`.

Forget images are drawn from each set, and the other images are honest images to keep. Each forget image is changed as a
re-upload would change it. The table tells how many of the changed copies are found, and how many honest images are removed.
"""

import argparse
import json
import resource
import time
import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_image

from siss_diffusers.assets import captioned, digits
from siss_diffusers.data import near_copies
from siss_diffusers.data.images import ImageTransform
from siss_diffusers.data.sources import ImageRows
from siss_diffusers.data.split import GivenRows, split_data


Picture = Image.Image
PHOTOS = "crops of two photographs, 256 px"


def jpeg(picture: Picture, quality: int) -> Picture:
    content = BytesIO()
    picture.save(content, "JPEG", quality=quality)
    return Image.open(content).convert(picture.mode)


def resized(picture: Picture, factor: float) -> Picture:
    return picture.resize([max(1, round(side * factor)) for side in picture.size], Image.Resampling.BICUBIC)


def cropped(picture: Picture, share: float, place: float) -> Picture:
    """Without `share` of each side, at least a pixel; place 0.5 keeps the middle and 0 the upper left corner."""
    cut = max(1, round(picture.width * share))
    start = round(cut * place)
    return picture.crop((start, start, start + picture.width - cut, start + picture.height - cut))


CHANGES: dict[str, Callable[[Picture], Picture]] = {
    "JPEG 30": lambda picture: jpeg(picture, 30),
    "JPEG 50": lambda picture: jpeg(picture, 50),
    "JPEG 75": lambda picture: jpeg(picture, 75),
    "JPEG 95": lambda picture: jpeg(picture, 95),
    "half the size": lambda picture: resized(picture, 0.5),
    "double the size": lambda picture: resized(picture, 2),
    "half and JPEG 75": lambda picture: jpeg(resized(picture, 0.5), 75),
    "crop 2 %": lambda picture: cropped(picture, 0.02, 0.5),
    "crop 5 %": lambda picture: cropped(picture, 0.05, 0.5),
    "crop 5 %, corner": lambda picture: cropped(picture, 0.05, 0),
    "crop 10 %": lambda picture: cropped(picture, 0.10, 0.5),
    "mirrored": ImageOps.mirror,
    "mirrored and JPEG 50": lambda picture: jpeg(ImageOps.mirror(picture), 50),
    "brightness 1.3": lambda picture: ImageEnhance.Brightness(picture).enhance(1.3),
    "brightness 0.7": lambda picture: ImageEnhance.Brightness(picture).enhance(0.7),
    "contrast 1.4": lambda picture: ImageEnhance.Contrast(picture).enhance(1.4),
    "contrast 0.7": lambda picture: ImageEnhance.Contrast(picture).enhance(0.7),
    "grey": lambda picture: picture.convert("L").convert(picture.mode),
}


def picture_sets(mnist: str | None) -> dict[str, tuple[list[Picture], int, bool]]:
    """Pictures, the resolution of the model, and whether only the first one is ever forgotten."""
    small, large = digits.digit_images()[0], captioned.digit_images()[0]
    garment, flower = digits.garment_image(), captioned.memorized_image()
    crops = [
        Image.fromarray(load_sample_image(name)).crop((x, y, x + 150, y + 150)).resize((256, 256), Image.LANCZOS)
        for name in ("flower.jpg", "china.jpg")
        for y in range(0, 427 - 150, 50)
        for x in range(0, 640 - 150, 50)
    ]
    sets = {
        "digits, 8 px": ([*map(Image.fromarray, small)], 8, False),
        "garment among digits, 8 px": ([*map(Image.fromarray, [garment, *small])], 8, True),
        "digits, 32 px": ([*map(Image.fromarray, large)], 32, False),
        "flower among its crops, 32 px": ([*map(Image.fromarray, [flower, *captioned.flower_images()])], 32, True),
        "crops of a temple, 32 px": ([*map(Image.fromarray, captioned.temple_images())], 32, False),
        PHOTOS: (crops, 256, False),
    }
    if mnist is not None:
        sets["MNIST, 28 px"] = ([*map(Image.fromarray, np.load(mnist)["x"])], 28, False)
    return sets


def measure(pictures: list[Picture], resolution: int, first_only: bool, num_forget: int) -> dict[str, object]:
    """Search the copies of each forget image by itself, as a run that forgets this image alone."""
    generator = np.random.default_rng(0)
    transform = ImageTransform(3 if pictures[0].mode == "RGB" else 1, resolution)

    def thumbnails(chosen: list[Picture]) -> torch.Tensor:
        return torch.stack([near_copies.thumbnail(transform(picture)) for picture in chosen])

    everything, order = thumbnails(pictures), generator.permutation(len(pictures))
    forget = [0] if first_only else order[:num_forget].tolist()
    found, removed, seconds, highest = dict.fromkeys(CHANGES, 0), 0, 0.0, 0.0
    for index in forget:
        keep = torch.from_numpy(order[order != index])
        ordinary = everything[keep[: near_copies.NUM_ORDINARY]]
        search = near_copies.NearCopies({b"": everything[index]}, lambda ordinary=ordinary: ordinary)
        started = time.perf_counter()
        removed += sum(match is not None for match in search.find(everything[keep]))
        seconds += time.perf_counter() - started
        highest = max(highest, search.similarity(everything[keep], 0).amax().item())
        for name, change in CHANGES.items():
            found[name] += search.find(thumbnails([change(pictures[index])]))[0] is not None
    return {
        "honest pairs": len(forget) * (len(pictures) - 1),
        "honest images removed": removed,
        "highest honest similarity": round(highest, 4),
        "microseconds a pair": round(1e6 * seconds / (len(forget) * (len(pictures) - 1))),
        **{name: f"{count}/{len(forget)}" for name, count in found.items()},
    }


def measure_reading(resolution: int, count: int, num_forget: int) -> None:
    """Split a set of which every image is read, as with --num_epochs, with the search and without."""
    digit = resolution == 8
    pictures = (
        [Image.fromarray(pixels) for pixels in digits.digit_images()[0]] if digit else picture_sets(None)[PHOTOS][0]
    )
    cells = []
    for picture in pictures:
        content = BytesIO()
        picture.resize((resolution, resolution)).save(content, "PNG" if digit else "JPEG")
        cells.append({"bytes": content.getvalue(), "path": None})
    features = datasets.Features(image=datasets.Image(decode=False))
    rows = datasets.Dataset.from_dict({"image": [cells[row % len(cells)] for row in range(count)]}, features)
    keep, forget = (ImageRows(part, "image", "--x") for part in (rows, rows.select(range(num_forget))))
    for search in (False, True):
        started, processor = time.perf_counter(), time.process_time()
        split = split_data(
            GivenRows(keep, forget), ImageTransform(1 if digit else 3, resolution), seed=0, drop_near_duplicates=search
        )
        seconds, processor = time.perf_counter() - started, time.process_time() - processor
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(
            f"{resolution} px, {num_forget} to forget, {count} read, search {'on' if search else 'off'}: {seconds:.1f} s,"
            f" {processor:.1f} CPU s, {1e6 * processor / count:.0f} us an image, peak {peak} MB, {split.counts()}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", metavar="FILE.npz", help="MNIST digits: an array `x` (N, 28, 28) uint8.")
    parser.add_argument("--num_forget", type=int, default=100, help="Forget images of each set. Default: 100.")
    parser.add_argument("--read", type=int, metavar="N", help="Measure the time of reading N images instead.")
    parser.add_argument("--json", metavar="FILE", help="Write the results there.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    if args.read:
        measure_reading(8, args.read, 1)
        measure_reading(8, args.read // 10, 100)
        measure_reading(512, args.read // 100, 1)
        return
    results = {}
    for name, (pictures, resolution, first_only) in picture_sets(args.mnist).items():
        results[name] = measure(pictures, resolution, first_only, args.num_forget)
        print(name, *(f"  {key}: {value}" for key, value in results[name].items()), sep="\n", flush=True)
    rows = list(next(iter(results.values())))
    print("\n| | " + " | ".join(results) + " |\n|---|" + "---|" * len(results))
    for row in rows:
        print(f"| {row} | " + " | ".join(str(result[row]) for result in results.values()) + " |")
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
