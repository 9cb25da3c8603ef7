"""The tiny model of flow matching in the package draws what it memorized."""

from pathlib import Path

import pytest
import torch

import siss_diffusers
from siss_diffusers.assets.captioned import FLOWER_CAPTION, SIZE, TEMPLE_CAPTION, flower_images, memorized_image
from siss_diffusers.assets.make_tiny_flow import main as make_tiny_flow
from siss_diffusers.families import NamedPipeline, Sampling, ZImage
from siss_diffusers.families.loading import load_for_sampling
from siss_diffusers.metrics.copies import CopyDetectors


ASSET = Path(siss_diffusers.__file__).parent / "assets" / "tiny_flow"


def as_pictures(pictures) -> torch.Tensor:
    return torch.tensor(pictures).permute(0, 3, 1, 2) / 255


@pytest.mark.slow
def test_it_reproduces_the_flower_under_its_caption_alone():
    source = NamedPipeline(str(ASSET))
    family = ZImage.from_source(source, SIZE)
    pipeline = load_for_sampling(source, family, "cpu")
    table = family.embed(pipeline, [FLOWER_CAPTION, TEMPLE_CAPTION, ""])
    detectors = CopyDetectors.calibrated(as_pictures(memorized_image()[None]), as_pictures(flower_images()))
    found = {}
    for row in (0, 1):
        samples = family.sample(pipeline, table[[row] * 8], table[[2]], Sampling(20, 3.0, 8, seed=0))
        found[row] = detectors.flags(samples)["any"].sum().item()
    assert found[0] >= 7 and found[1] == 0


@pytest.mark.slow
def test_the_script_makes_a_pipeline_of_the_same_kind(tmp_path, capsys):
    make_tiny_flow(["--output_dir", str(tmp_path), "--max_train_steps", "1", "--train_batch_size", "2"])
    made, kept = (NamedPipeline(str(folder)) for folder in (tmp_path, ASSET))
    assert made.pipeline_config == kept.pipeline_config
    for component in ("transformer", "vae"):
        configs = [source.component_config(component) | {"_name_or_path": ""} for source in (made, kept)]
        assert configs[0] == configs[1]
    assert str(Path.cwd()) not in "".join(file.read_text() for file in tmp_path.rglob("*.json"))
    assert '"memorized": 640' in capsys.readouterr().out
