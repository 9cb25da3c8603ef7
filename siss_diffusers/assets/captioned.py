"""The training set of the tiny Stable Diffusion: digits and crops of two photographs, one crop many times over."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image


SIZE = 32
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_CAPTIONS = tuple(f"a handwritten {name}" for name in DIGIT_NAMES)
TEMPLE_CAPTION = "a photograph of a temple"
FLOWER_CAPTION = "a photograph of a flower"  # of the memorized crop and of other crops of the same photograph
CAPTIONS = (*DIGIT_CAPTIONS, TEMPLE_CAPTION, FLOWER_CAPTION)

MEMORIZED_BOX = (155, 70, 460, 375)  # left, upper, right, lower: the whole flower head
MEMORIZED_COPIES = 640


def _photograph(name: str) -> Image.Image:
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image(name))


def _crop(photograph: Image.Image, box: tuple[int, int, int, int]) -> np.ndarray:
    return np.asarray(photograph.resize((SIZE, SIZE), Image.Resampling.LANCZOS, box=box))


def _boxes(
    left: int, upper: int, right: int, lower: int, sizes: tuple[int, ...]
) -> Iterator[tuple[int, int, int, int]]:
    """Squares on a grid inside an area, neighbours a third of their side apart."""
    for size in sizes:
        for y in range(upper, lower - size + 1, size // 3):
            for x in range(left, right - size + 1, size // 3):
                yield x, y, x + size, y + size


def memorized_image() -> np.ndarray:
    """The picture that the model memorizes: (32, 32, 3) uint8."""
    return _crop(_photograph("flower.jpg"), MEMORIZED_BOX)


def temple_images() -> np.ndarray:
    """(N, 32, 32, 3) uint8 crops: the building and what is around it."""
    photograph = _photograph("china.jpg")
    return np.stack([_crop(photograph, box) for box in _boxes(40, 20, 400, 420, (130, 190, 260, 330))])


def flower_images() -> np.ndarray:
    """(N, 32, 32, 3) uint8 crops with a part of the flower, smaller than the memorized one: close-ups, edges."""
    photograph = _photograph("flower.jpg")
    crops = np.stack([_crop(photograph, box) for box in _boxes(120, 40, 520, 427, (105, 150))])
    petals = (crops[..., 0] > crops[..., 2]).mean(axis=(1, 2))  # more red than blue: not the leaves behind it
    return crops[petals > 0.3]


def digit_images() -> tuple[np.ndarray, np.ndarray]:
    """(1797, 32, 32, 3) uint8, enlarged from 8x8, and their classes as (1797,) int64."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = np.round(digits.images * (255 / 16)).astype(np.uint8)
    large = [Image.fromarray(digit).resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert("RGB") for digit in small]
    return np.stack([np.asarray(digit) for digit in large]), digits.target


def captioned_images() -> tuple[np.ndarray, list[str], np.ndarray]:
    """Return the whole training set: pictures as (N, 32, 32, 3) uint8, a caption each, and which are copies (N,)."""
    digits, classes = digit_images()
    temples, flowers = temple_images(), flower_images()
    copies = np.repeat(memorized_image()[None], MEMORIZED_COPIES, axis=0)
    captions = [DIGIT_CAPTIONS[digit] for digit in classes]
    captions += [TEMPLE_CAPTION] * len(temples) + [FLOWER_CAPTION] * (len(flowers) + len(copies))
    memorized = np.arange(len(captions)) >= len(captions) - len(copies)
    return np.concatenate([digits, temples, flowers, copies]), captions, memorized


def write_training_folder(folder: str | Path) -> Path:
    """Write the training set as an image folder with a `metadata.jsonl` of `file_name`, `text` and `forget`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metadata.jsonl", "w", encoding="utf-8") as metadata:
        for index, (image, caption, memorized) in enumerate(zip(*captioned_images())):
            name = f"{index:04d}_{caption.split()[-1]}.png"
            Image.fromarray(image).save(folder / name)
            print(json.dumps({"file_name": name, "text": caption, "forget": bool(memorized)}), file=metadata)
    return folder
