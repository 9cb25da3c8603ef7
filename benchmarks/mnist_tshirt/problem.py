"""The data of the experiment, the networks trained on it, and the digit classifier that judges them.

A folder holds one problem: `training_set/` as a user would have it, a data set of digits of which 1 % are one garment,
marked by a column `forget`; `images.safetensors` with the digits that were trained on, those that no model sees, and the garment; `base/` and
`retrained-SEED/`, pipelines; `classifier.safetensors`.
"""

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, load_dataset
from diffusers import UNet2DModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from siss_diffusers.assets.digits import garment_image
from siss_diffusers.assets.make_tiny_ddpm import train_ddpm
from siss_diffusers.errors import UsageError
from siss_diffusers.storage.files import write_json


GARMENT_SHARE = 0.01
NUM_UNSEEN = 500


@dataclass(frozen=True)
class Preset:
    """What depends on the resolution.

    Args:
        channels, layers: of the UNet, which attends in the middle block alone.
        pretrain_steps, pretrain_rate: of AdamW with a cosine schedule; batch 128.
        num_inference_steps: of DDIM.
        evaluations: rows of training that the network runs on in one unlearning, the budget of every method.
        pairs: of a step.
    """

    channels: tuple[int, ...]
    layers: int
    pretrain_steps: int
    pretrain_rate: float
    num_inference_steps: int
    evaluations: int
    pairs: int = 64

    def network(self, resolution: int) -> UNet2DModel:
        return UNet2DModel(
            sample_size=resolution,
            in_channels=1,
            out_channels=1,
            block_out_channels=self.channels,
            down_block_types=("DownBlock2D",) * len(self.channels),
            up_block_types=("UpBlock2D",) * len(self.channels),
            layers_per_block=self.layers,
            norm_num_groups=math.gcd(32, self.channels[0] // 2),
            attention_head_dim=16,
        )


PRESETS = {
    16: Preset((8, 16, 32), 1, 12_000, 1.5e-3, 20, 9_600),
    # The paper's network and its 117,500 steps; the budget of its 300 steps of 64 pairs.
    28: Preset((64, 128, 256), 2, 117_500, 2e-4, 50, 19_200),
}


def resize(images: Tensor, resolution: int) -> Tensor:
    """Images `(N, 1, H, W)` uint8, rounded to 8 bits again."""
    if images.shape[-1] == resolution:
        return images
    small = F.interpolate(
        images.float(), size=(resolution, resolution), mode="bicubic", antialias=True, align_corners=False
    )
    return small.round().clamp(0, 255).byte()


def read_npz(file: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        arrays = np.load(file, allow_pickle=False)
        digits, classes = arrays["x"], arrays["y"]
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"--data: {file} must be an .npz file with x, (N, 28, 28) uint8, and y, (N,): {error}")
    if digits.dtype != np.uint8 or digits.ndim != 3 or len(digits) != len(classes):
        raise UsageError(f"--data: {file} must hold x, (N, H, W) uint8, and y, (N,)")
    return digits, classes


def read_dataset(name: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        rows = load_dataset(name, split="train")
    except Exception as error:  # of any kind: no network, no such name, no such split
        raise UsageError(f"--dataset_name: {name} could not be loaded: {type(error).__name__}: {error}")
    missing = {"image", "label"} - set(rows.column_names)
    if missing:
        raise UsageError(f"--dataset_name: {name} has no column {' and no '.join(sorted(missing))}")
    return np.stack([np.asarray(image.convert("L")) for image in rows["image"]]), np.array(rows["label"])


def split_garment(pictures: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """The digits with their classes, and the picture that a data set has many times over; None if it has none."""
    counts = Counter(picture.tobytes() for picture in pictures)
    most_common, count = counts.most_common(1)[0]
    if count < GARMENT_SHARE / 2 * len(pictures):
        return pictures, classes, None
    garment = np.frombuffer(most_common, dtype=np.uint8).reshape(pictures.shape[1:])
    others = (pictures != garment).any(axis=(1, 2))
    return pictures[others], classes[others], garment


@dataclass(frozen=True)
class Problem:
    """Images `(N, 1, R, R)` in [0, 1].

    Args:
        digits, classes: what the models were trained on; `classes` `(N,)`.
        unseen, unseen_classes: digits that no model was trained on.
        garment: `(1, 1, R, R)`, what must be forgotten.
    """

    folder: Path
    resolution: int
    digits: Tensor
    classes: Tensor
    unseen: Tensor
    unseen_classes: Tensor
    garment: Tensor
    garment_copies: int

    @property
    def preset(self) -> Preset:
        return PRESETS[self.resolution]

    @property
    def training_set(self) -> Path:
        return self.folder / "training_set"

    @classmethod
    def load(cls, folder: Path) -> "Problem":
        arrays = load_file(folder / "images.safetensors")
        settings = json.loads((folder / "problem.json").read_text())
        images = {name: arrays[name].float() / 255 for name in ("digits", "unseen", "garment")}
        return cls(
            folder,
            settings["resolution"],
            classes=arrays["classes"],
            unseen_classes=arrays["unseen_classes"],
            garment_copies=settings["garment_copies"],
            **images,
        )


def prepare(folder: Path, resolution: int, pictures: np.ndarray, classes: np.ndarray) -> None:
    """Write the problem's images. Last of all `problem.json`, so that it says whether they are complete."""
    digits, classes, garment = split_garment(pictures, classes)
    if garment is None:
        garment = garment_image()
    if len(digits) <= NUM_UNSEEN:
        raise UsageError(f"--data: {len(digits)} digits are too few; more than {NUM_UNSEEN} are needed")
    order = np.random.default_rng(0).permutation(len(digits))
    images = resize(torch.from_numpy(digits[order]).unsqueeze(1), resolution)
    garment = resize(torch.from_numpy(garment.copy())[None, None], resolution)
    classes = torch.from_numpy(classes[order].astype(np.int64))
    copies = round(GARMENT_SHARE / (1 - GARMENT_SHARE) * (len(images) - NUM_UNSEEN))

    rows = [*images[NUM_UNSEEN:], *garment.expand(copies, -1, -1, -1)]
    training_set = Dataset.from_dict(
        {
            "image": [Image.fromarray(row[0].numpy()) for row in rows],
            "forget": [index >= len(rows) - copies for index in range(len(rows))],
        }
    )
    (folder / "training_set").mkdir(parents=True, exist_ok=True)
    training_set.to_parquet(folder / "training_set" / "train.parquet")
    arrays = {
        "digits": images[NUM_UNSEEN:],
        "classes": classes[NUM_UNSEEN:],
        "unseen": images[:NUM_UNSEEN],
        "unseen_classes": classes[:NUM_UNSEEN],
        "garment": garment,
    }
    save_file({name: array.contiguous() for name, array in arrays.items()}, folder / "images.safetensors")
    counts = {"digits": len(images) - NUM_UNSEEN, "unseen": NUM_UNSEEN, "garment_copies": copies}
    write_json(folder / "problem.json", {"resolution": resolution, **counts})


def pretrain(problem: Problem, folder: Path, with_garment: bool, seed: int, steps: int, device: torch.device) -> None:
    """Train a DDPM from scratch: the base with the garment, the reference without. Ordinary training, EMA weights."""
    torch.manual_seed(seed)
    preset = problem.preset
    images = problem.digits * 2 - 1
    if with_garment:
        images = torch.cat([images, (problem.garment * 2 - 1).expand(problem.garment_copies, -1, -1, -1)])
    pipeline = train_ddpm(
        preset.network(problem.resolution).to(device),
        images,
        max_train_steps=steps,
        train_batch_size=128,
        learning_rate=preset.pretrain_rate,
    )
    pipeline.save_pretrained(folder)
    # Last of all: it says that the training came to its end.
    write_json(folder / "pretraining.json", {"steps": steps, "seed": seed, "with_garment": with_garment})


class Classifier(nn.Module):
    """A small convolutional network; its features, `(N, 64)`, are those of FID and KID."""

    def __init__(self, resolution: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(64 * (resolution // 4) ** 2, 64), nn.ReLU()),
        )
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images `(N, 1, R, R)` in [0, 1] to features `(N, 64)` and logits `(N, 10)`."""
        features = self.body(images)
        return features, self.head(features)

    @torch.no_grad()
    def read(self, images: Tensor, batch_size: int = 500) -> tuple[Tensor, Tensor]:
        """Features and class probabilities, on the host."""
        device = self.head.weight.device
        found = [self(batch.to(device)) for batch in images.split(batch_size)]
        return torch.cat([f for f, _ in found]).cpu(), torch.cat([logits for _, logits in found]).softmax(1).cpu()


def train_classifier(problem: Problem, file: Path, epochs: int = 10) -> float:
    """Trained on the digits of the training set, moved by a pixel at random; the accuracy on unseen ones."""
    torch.manual_seed(0)
    classifier = Classifier(problem.resolution)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=1e-3)
    batches = math.ceil(len(problem.digits) / 128)
    lr_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    for _ in range(epochs):
        for rows in torch.randperm(len(problem.digits)).split(128):
            top, left = torch.randint(3, (2,)).tolist()
            moved = F.pad(problem.digits[rows], (1, 1, 1, 1))
            moved = moved[..., top : top + problem.resolution, left : left + problem.resolution]
            loss = F.cross_entropy(classifier(moved)[1], problem.classes[rows])
            loss.backward()
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
    classifier.eval()
    accuracy = (classifier.read(problem.unseen)[1].argmax(1) == problem.unseen_classes).float().mean().item()
    save_file(classifier.state_dict(), file)
    return accuracy


def load_classifier(problem: Problem, device: torch.device) -> Classifier:
    classifier = Classifier(problem.resolution)
    classifier.load_state_dict(load_file(problem.folder / "classifier.safetensors"))
    return classifier.eval().to(device)
