"""Curation as a library: on made-up samples, and against the pictures that `siss curate` writes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import siss_diffusers
from siss_diffusers.assets.captioned import DIGIT_CAPTIONS, FLOWER_CAPTION, memorized_image
from siss_diffusers.commands.cli import main as siss
from siss_diffusers.curation import Clustering, sample_keep_images, split_samples
from siss_diffusers.errors import UsageError
from siss_diffusers.families import NamedPipeline, Sampling, find_family
from siss_diffusers.families.loading import load_for_sampling


TINY_SD = Path(siss_diffusers.__file__).parent / "assets" / "tiny_sd"


def samples_of(num_copies: int, num_others: int, spread: float = 0.02) -> tuple[Tensor, Tensor]:
    """Return samples, the near copies of a picture first, and that picture `(3, 8, 8)`."""
    generator = torch.Generator().manual_seed(0)
    picture, other = torch.rand(2, 3, 8, 8, generator=generator)
    copies = picture + spread * torch.randn(num_copies, 3, 8, 8, generator=generator)
    others = other + 5 * spread * torch.randn(num_others, 3, 8, 8, generator=generator)
    return torch.cat([copies, others]), picture


def test_the_tightest_cluster_is_marked_without_a_reference():
    samples, _ = samples_of(6, 10)
    split = split_samples(samples)
    assert split.separated and split.silhouette > 0.5
    assert split.is_copy.tolist() == [True] * 6 + [False] * 10


def test_a_reference_of_any_size_names_the_cluster():
    samples, picture = samples_of(6, 10)
    larger = torch.nn.functional.interpolate(picture[None], (24, 24), mode="bilinear")[0]
    assert split_samples(samples, [larger]).is_copy.tolist() == [True] * 6 + [False] * 10
    assert split_samples(samples, [samples[-1]]).is_copy.tolist() == [False] * 6 + [True] * 10
    assert split_samples(samples, [picture, samples[-1]]).is_copy.all()


def test_samples_without_clusters_are_not_marked():
    noise, outlier = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.ones(1, 3, 8, 8) * 9
    for samples in (noise, torch.cat([noise, outlier]), noise[:1].expand(12, -1, -1, -1)):
        split = split_samples(samples)
        assert not split.separated and not split.is_copy.any()


def test_settings_of_the_clustering_are_used():
    samples, _ = samples_of(6, 10)
    assert not split_samples(samples, clustering=Clustering(min_silhouette=0.99)).separated
    samples[::2, 0, 0, 0] += 3
    by_first_pixel = Clustering(features=lambda pictures: pictures[:, 0, 0, :1])
    assert split_samples(samples, clustering=by_first_pixel).is_copy.long().diff().abs().all()  # every other one


@pytest.fixture(scope="module")
def model():
    source = NamedPipeline(str(TINY_SD))
    family = find_family(source, with_prompts=True).from_source(source)
    return family, load_for_sampling(source, family, "cpu")


@pytest.mark.parametrize("with_reference", [False, True])
def test_keep_images_are_those_that_siss_curate_writes(model, tmp_path, with_reference):
    reference = tmp_path / "reference.png"
    Image.fromarray(memorized_image()).save(reference)
    out = tmp_path / "out"
    siss(
        [
            *("curate", "--pretrained_model_name_or_path", str(TINY_SD), "--output_dir", str(out)),
            *("--num_images", "20", "--num_inference_steps", "8", "--guidance_scale", "3", "--batch_size", "8"),
            *("--prompts", FLOWER_CAPTION, "--seed", "3"),
            *(("--reference", str(reference)) if with_reference else ()),
        ]
    )
    rows = [json.loads(line) for line in (out / "images" / "metadata.jsonl").read_text().splitlines()]
    written = [np.asarray(Image.open(out / "images" / row["file_name"])) for row in rows if not row["forget"]]
    pictures = sample_keep_images(
        *(*model, FLOWER_CAPTION, [Image.open(reference)] if with_reference else []),
        num_images=20,
        sampling=Sampling(num_inference_steps=8, guidance_scale=3, batch_size=8, seed=3),
        clustering=Clustering(seed=3),
    )
    assert 0 < len(pictures) == len(written) < 20
    assert all(np.array_equal(np.asarray(picture), file) for picture, file in zip(pictures, written))


def test_a_prompt_without_copies_is_refused(model):
    with pytest.raises(UsageError, match="do not fall into copies.*silhouette.*give the images to keep"):
        sample_keep_images(
            *(*model, DIGIT_CAPTIONS[3]),
            num_images=12,
            sampling=Sampling(num_inference_steps=4, guidance_scale=3),
            clustering=Clustering(min_silhouette=0.9),
        )
