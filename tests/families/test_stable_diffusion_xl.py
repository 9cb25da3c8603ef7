"""What only Stable Diffusion XL does: the size of pictures as a condition, zeros as the empty prompt, a VAE that overflows."""

import json
import shutil

import pytest
import torch
from PIL import Image

from siss_diffusers import unlearn
from siss_diffusers.errors import UsageError
from siss_diffusers.families import NamedPipeline, Sampling, StableDiffusionXL, find_family
from siss_diffusers.storage.files import write_json
from tests.helpers.tiny_sdxl import build_pipeline


FAMILY = StableDiffusionXL(3, 16)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdxl")
    build_pipeline().save_pretrained(folder)
    return folder


def picture(width: int, height: int, seed: int) -> Image.Image:
    pixels = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def test_pictures_of_different_sizes_share_a_condition(tmp_path):
    """Whatever the sizes of a pair are, the network is told one size, that which the pipeline tells it in sampling."""
    pipeline, told = build_pipeline(), []

    def record(unet, args, kwargs):
        told.extend(kwargs["added_cond_kwargs"]["time_ids"].tolist())

    pipeline.unet.register_forward_pre_hook(record, with_kwargs=True)
    pairs = {"keep": [(24, 40), (64, 32), (16, 16)], "forget": [(48, 48), (20, 33)]}
    images = {
        name: [(picture(*size, seed), "a photograph") for seed, size in enumerate(sizes)]
        for name, sizes in pairs.items()
    }
    unlearn(
        pipeline,
        **images,
        method="siss",
        max_train_steps=3,
        train_batch_size=4,
        calibrate_forgetting="off",
        output_dir=str(tmp_path / "out"),
        drop_near_duplicates=False,
    )
    assert len(told) >= 12 and told == [[16, 16, 0, 0, 16, 16]] * len(told)
    log = [json.loads(line) for line in (tmp_path / "out" / "train_log.jsonl").read_text().splitlines()]
    assert len(log) == 3
    told.clear()
    pipeline("a photograph", num_inference_steps=1, height=16, width=16, output_type="latent")
    assert told == [[16, 16, 0, 0, 16, 16]] * 2


@pytest.mark.parametrize("zeros", [True, False])
def test_guidance_steers_away_from_what_the_pipeline_steers_away_from(zeros):
    pipeline = build_pipeline()
    pipeline.register_to_config(force_zeros_for_empty_prompt=zeros)
    conditions, empty = (FAMILY.embed(pipeline, [prompt]) for prompt in ("a photograph", ""))
    found = FAMILY.sample(pipeline, conditions, empty, Sampling(2, 7.5, seed=3))
    pipeline.scheduler = FAMILY.sampling_scheduler(pipeline.scheduler)
    options = {"num_inference_steps": 2, "guidance_scale": 7.5, "height": 16, "width": 16}
    expected = pipeline("a photograph", generator=torch.Generator().manual_seed(3), output_type="pt", **options).images
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_vae_in_half_precision_encodes_and_decodes_in_float32():
    pipeline, whole = build_pipeline(), build_pipeline()
    pipeline.vae.to(torch.float16)
    whole.vae.to(torch.float16).to(torch.float32)  # the same rounded weights
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    mean, deviation = FAMILY.encode(pipeline, pixels)
    assert mean.dtype == torch.float32 and pipeline.vae.dtype == torch.float16
    assert mean.equal(FAMILY.encode(whole, pixels)[0])
    assert FAMILY.decode(pipeline, mean).equal(FAMILY.decode(whole, mean)) and pipeline.vae.dtype == torch.float16


REFUSED = {
    "the UNet takes 9 channels": ("unet", {"in_channels": 9}),
    "is told a guidance scale, as latent consistency models": ("unet", {"time_cond_proj_dim": 8}),
    "is not told the size of a picture": ("unet", {"addition_embed_type": None}),
    "normalized channel by channel, as those of Playground 2.5": ("vae", {"latents_mean": [0.0] * 4}),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_models_of_another_kind_are_refused(sentence, saved, tmp_path):
    component, change = REFUSED[sentence]
    folder = shutil.copytree(saved, tmp_path / "model")
    file = folder / component / "config.json"
    write_json(file, json.loads(file.read_text()) | change)
    source = NamedPipeline(str(folder))
    with pytest.raises(UsageError, match=sentence):
        find_family(source).from_source(source)


def test_a_scheduler_of_another_kind_is_refused(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    write_json(folder / "model_index.json", index | {"scheduler": ["diffusers", "EDMEulerScheduler"]})
    write_json(folder / "scheduler/scheduler_config.json", {"_class_name": "EDMEulerScheduler"})
    with pytest.raises(UsageError, match="has the scheduler EDMEulerScheduler, and Stable Diffusion XL is trained on"):
        find_family(NamedPipeline(str(folder)))
