"""The first Python that a reader copies runs as it stands."""

import json
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from siss_diffusers.assets.captioned import captioned_images
from siss_diffusers.methods import METHODS
from tests.helpers.paths import ROOT, TINY_SD


MODEL = "CompVis/stable-diffusion-v1-4"


def python_block() -> str:
    """Return the one block of Python in README.md."""
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return block


def write_folder(folder: Path, pictures: np.ndarray, captions: list[str]) -> None:
    folder.mkdir(parents=True)
    lines = []
    for index, (picture, caption) in enumerate(zip(pictures, captions)):
        Image.fromarray(picture).save(folder / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


@pytest.fixture
def working_directory(tmp_path, monkeypatch) -> Path:
    """The folders that the snippet names, and nothing else."""
    pictures, captions, memorized = captioned_images()
    is_flower = np.array([caption.endswith("flower") for caption in captions])
    for name, rows in (
        ("to_forget", np.flatnonzero(memorized)[:1]),
        ("to_keep", [*range(16), *np.flatnonzero(is_flower & ~memorized)[:16]]),
    ):
        write_folder(tmp_path / "images" / name, pictures[rows], [captions[row] for row in rows])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_snippet_runs_as_it_stands(working_directory):
    block = python_block()
    assert MODEL in block and len(block.splitlines()) <= 8
    exec(compile(block.replace(MODEL, str(TINY_SD)), "README.md", "exec"), {})
    assert Image.open("after.png").size == (32, 32)
    files = {file.name for file in Path("sd-v1-4-adapter").iterdir()}
    assert files == {"pytorch_lora_weights.safetensors", "unlearning.json", "train_log.jsonl", "receipt.json"}


def test_every_method_has_a_row_with_its_arguments():
    section = (ROOT / "README.md").read_text().split("## Methods\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| [`")]
    written = {re.findall(r"`(\w+)`", row[0])[0]: re.findall(r"`(\w+)`", row[-1]) for row in rows}
    assert written == {name: list(method.hyperparameters()) for name, method in METHODS.items()}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180
