"""Folders of small real pictures."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from siss_diffusers.assets.captioned import captioned_images
from siss_diffusers.assets.digits import digit_images, garment_image


NUM_DIGITS, NUM_GARMENTS = 24, 4
NUM_KEEP, NUM_FORGET = 20, 3
SECRET = "jane doe at the sea"


def write_images(folder: Path, images: dict[str, np.ndarray]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in images.items():
        Image.fromarray(image).save(folder / name)
    return folder


def write_metadata(folder: Path, lines: list[dict]) -> None:
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))


def read_metadata(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def write_digits(folder: Path) -> Path:
    """24 digits and 4 copies of the garment."""
    images = {f"digit_{index:02d}.png": image for index, image in enumerate(digit_images()[0][:NUM_DIGITS])}
    images |= {f"garment_{index}.png": garment_image() for index in range(NUM_GARMENTS)}
    return write_images(folder, images)


def write_captioned(folder: Path) -> Path:
    """20 real pictures to keep, half of them with the prompt of the 3 copies to forget."""
    pictures, captions, memorized = captioned_images()
    chosen = [*range(10), *np.flatnonzero(["flower" in caption for caption in captions])[:10]]
    chosen += [*np.flatnonzero(memorized)[:NUM_FORGET]]
    names = [f"{number:02d}.png" for number in range(len(chosen))]
    write_images(folder, {name: pictures[index] for name, index in zip(names, chosen)})
    write_metadata(
        folder,
        [
            {
                "file_name": name,
                "text": SECRET if "flower" in captions[index] else captions[index],
                "forget": bool(memorized[index]),
            }
            for name, index in zip(names, chosen)
        ],
    )
    return folder
