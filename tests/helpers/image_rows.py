"""Pictures of known content as rows of a data set."""

from io import BytesIO

import datasets
import numpy as np
import torch
from PIL import Image

from siss_diffusers.data.images import Images, ImageTransform
from tests.helpers.pictures import write_images


def make_rows(paths: list[str]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image(decode=False))


def make_images(arrays: list[np.ndarray], folder, **transform) -> Images:
    names = [f"{index:02d}.png" for index in range(len(arrays))]
    write_images(folder, dict(zip(names, arrays)))
    rows = make_rows([str(folder / name) for name in names])
    return Images(rows, "image", ImageTransform(channels=1, resolution=8, **transform), "--train_data_dir")


def index_of(tensor: torch.Tensor) -> int:
    return round((tensor.mean().item() + 1) * 127.5)


def embedded(pictures: list[np.ndarray], **columns: list) -> datasets.Dataset:
    """Rows whose pictures lie in the data, as of a Parquet file."""
    cells = []
    for pixels in pictures:
        content = BytesIO()
        Image.fromarray(pixels).save(content, "PNG")
        cells.append({"bytes": content.getvalue(), "path": None})
    features = datasets.Features(image=datasets.Image(decode=False))
    rows = datasets.Dataset.from_dict({"image": cells}, features)
    for name, values in columns.items():
        rows = rows.add_column(name, values)
    return rows


def flat(number: int) -> np.ndarray:
    """An 8x8 picture of its own for each number below 65,536."""
    pixels = np.zeros((8, 8), np.uint8)
    pixels[0, :2] = divmod(number, 256)
    return pixels
