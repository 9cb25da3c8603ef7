"""What only families of flow matching do: shifted noise levels, guidance that is told, and what they refuse."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pytest
import torch

from siss_diffusers.data.captions import same_captions
from siss_diffusers.errors import UsageError
from siss_diffusers.families import Flux, NamedPipeline, Sampling, StableDiffusion3, find_family
from siss_diffusers.metrics.noise_norm import TextNoiseNorms
from siss_diffusers.settings import TextToImageSettings
from siss_diffusers.storage.files import write_json
from siss_diffusers.unlearning import with_family_defaults
from tests.helpers import tiny_flux, tiny_sd3
from tests.helpers.commands import siss_error


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of each tiny pipeline."""
    root = tmp_path_factory.mktemp("flow")
    builders = {"sd3": tiny_sd3.build_pipeline, "flux": tiny_flux.build_pipeline, "schnell": tiny_flux.build_schnell}
    for name, build in builders.items():
        build().save_pretrained(root / name)
    return {name: root / name for name in builders}


def family_of(folder, resolution=16):
    source = NamedPipeline(str(folder))
    return find_family(source).from_source(source, resolution)


def test_the_noise_levels_of_training_are_shifted_where_the_scheduler_says_so():
    """By 3 for Stable Diffusion 3; by nothing where the shift goes by the size, as in the official script."""
    levels = torch.arange(1, 1001) / 1000
    sd3, flux = StableDiffusion3(3, 16).path(tiny_sd3.build_pipeline()), Flux(3, 16).path(tiny_flux.build_pipeline())
    torch.testing.assert_close(sd3.sigmas, 3 * levels / (1 + 2 * levels), rtol=0, atol=1e-6)
    torch.testing.assert_close(sd3.model_timesteps, 1000 * sd3.sigmas, rtol=0, atol=1e-3)
    torch.testing.assert_close(flux.sigmas, levels, rtol=0, atol=1e-6)
    torch.testing.assert_close(flux.model_timesteps, flux.sigmas, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["flux", "schnell"])
def test_dev_is_told_a_guidance_scale_and_schnell_is_not(name, saved):
    family = family_of(saved[name])
    assert family.guidance_embeds == (name == "flux")
    pipeline, told = tiny_flux.build_pipeline(family.guidance_embeds), []
    pipeline.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: told.append(kwargs["guidance"]), with_kwargs=True
    )
    conditions = family.embed(pipeline, ["a photograph"])
    with torch.no_grad():
        family.predict(pipeline.transformer, torch.zeros(1, 4, 8, 8), torch.tensor([0.5]), conditions)
    family.sample(pipeline, conditions, conditions, Sampling(1, 2.0))
    assert [None if scale is None else scale.item() for scale in told] == (
        [3.5, 2.0] if name == "flux" else [None] * 2
    )


def test_the_resolution_is_that_of_the_pipeline():
    flux, sd3 = tiny_flux.build_pipeline(), tiny_sd3.build_pipeline()
    assert Flux.latent_size(flux.transformer.config) == flux.default_sample_size
    assert StableDiffusion3.latent_size(sd3.transformer.config) == sd3.default_sample_size


def test_the_noise_norm_of_velocities_is_not_zero_where_sampling_begins():
    """At pure noise the predicted noise is the noisy sample itself, with any prompt."""
    pipeline, family = tiny_sd3.build_pipeline(), StableDiffusion3(3, 16)
    conditions, empty = (family.embed(pipeline, [prompt]) for prompt in ("a photograph", ""))
    path, calls = family.path(pipeline), []

    def record(network, args, kwargs, output):
        calls.append(output[0])

    handle = pipeline.transformer.register_forward_hook(record, with_kwargs=True)
    with TextNoiseNorms(pipeline.transformer, path) as norms:
        family.sample(pipeline, conditions, empty, Sampling(3, 4.0, seed=1))
        family.sample(pipeline, conditions, empty, Sampling(3, 4.0, seed=2))
    handle.remove()
    expected = [(both[1] - both[0]).norm().item() for both in calls]
    assert norms.per_step().shape == (3, 2) and min(expected) > 0
    np.testing.assert_allclose(norms.per_step().T.flatten(), expected, rtol=1e-5)


def test_captions_in_other_case_are_others_where_the_text_encoder_sees_it():
    captions = pa.chunked_array([["A cat", "a  cat ", "a dog"]])
    assert same_captions(captions, ["a cat"]).tolist() == [True, True, False]
    assert same_captions(captions, ["a cat"], sees_case=True).tolist() == [False, True, False]


def changed(folder, tmp_path, file, change):
    """A copy of a pipeline with another value in a configuration."""
    copy = shutil.copytree(folder, tmp_path / "model")
    write_json(copy / file, json.loads((copy / file).read_text()) | change)
    return copy


INDEX, NETWORK = "model_index.json", "transformer/config.json"
REFUSED = {
    "names no text_encoder_3, which Stable Diffusion 3 or 3.5 needs": ("sd3", INDEX, {"text_encoder_3": [None, None]}),
    "the transformer takes 6 channels and the VAE makes 4": ("sd3", NETWORK, {"in_channels": 6}),
    "the transformer takes 96 channels and the VAE makes 16": ("flux", NETWORK, {"in_channels": 96}),
    "FluxFillPipeline, which is not supported here; use": ("flux", INDEX, {"_class_name": "FluxFillPipeline"}),
    "has the scheduler DDIMScheduler, and FLUX.1 is trained on the noise levels of a FlowMatchEulerDiscreteScheduler": (
        *("flux", INDEX, {"scheduler": ["diffusers", "DDIMScheduler"]}),
    ),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_models_of_another_kind_are_refused(sentence, saved, tmp_path):
    name, file, change = REFUSED[sentence]
    with pytest.raises(UsageError, match=sentence):
        family_of(changed(saved[name], tmp_path, file, change))


def test_a_scheduler_of_flow_matching_is_refused_for_stable_diffusion(pipeline_folder, tmp_path):
    change = {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
    with pytest.raises(
        UsageError, match="has the scheduler FlowMatchEulerDiscreteScheduler, and Stable Diffusion 1.x"
    ):
        family_of(changed(pipeline_folder, tmp_path, INDEX, change))


@pytest.mark.parametrize(
    ("name", "resolution", "sentence"),
    [
        ("sd3", 18, "takes multiples of 8"),
        ("sd3", 64, "knows the positions of 32 pixels"),
        ("flux", 12, "multiples of 8"),
    ],
)
def test_a_resolution_that_the_model_does_not_take_is_refused(name, resolution, sentence, saved):
    with pytest.raises(UsageError, match=f"--resolution {resolution} cannot be used: .*{sentence}"):
        family_of(saved[name], resolution)


def test_what_is_for_unets_is_refused(saved):
    settings = TextToImageSettings(enable_xformers_memory_efficient_attention=True)
    with pytest.raises(
        UsageError, match="--enable_xformers_memory_efficient_attention is for UNets, and FLUX.1 has none"
    ):
        with_family_defaults(settings, family_of(saved["flux"]), NamedPipeline(str(saved["flux"])))


def test_dev_is_not_measured_beside_schnell(saved, captioned_folder, tmp_path, capfd):
    flags = ("--base", str(saved["flux"]), "--unlearned", str(saved["schnell"]), "--resolution", "16")
    more = ("--train_data_dir", str(captioned_folder), "--output_dir", str(tmp_path / "out"))
    assert "another size than the base, or is told other things" in siss_error(capfd, "evaluate", *flags, *more)
