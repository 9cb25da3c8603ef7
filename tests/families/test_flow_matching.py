"""What only families of flow matching do: shifted noise levels, guidance that is told, and what they refuse."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

from siss_diffusers.data.captions import same_captions
from siss_diffusers.errors import UsageError
from siss_diffusers.families import Flux, NamedPipeline, Sampling, StableDiffusion3, find_family
from siss_diffusers.metrics.noise_norm import TextNoiseNorms
from siss_diffusers.noising import loss_weights, timestep_density
from siss_diffusers.settings import TextToImageSettings
from siss_diffusers.storage.files import write_json
from siss_diffusers.unlearning import with_family_defaults
from tests.helpers import tiny_flux, tiny_sd3
from tests.helpers.commands import assert_refused, siss_error, to_argv
from tests.helpers.runs import read_log
from train_siss_sd import main


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


SCHEMES = [
    ("logit_normal", 0.0, 1.0, 1.29),
    ("logit_normal", 0.5, 0.7, 1.29),
    ("mode", 0.0, 1.0, 1.29),
    ("mode", 0, 1, -0.5),
]


@pytest.mark.parametrize(("scheme", "mean", "std", "scale"), SCHEMES)
def test_noise_levels_are_drawn_as_often_as_by_the_official_scripts(scheme, mean, std, scale):
    """Theirs begin with the noisiest."""
    torch.manual_seed(0)
    count, levels = 200_000, 20
    u = compute_density_for_timestep_sampling(scheme, count, mean, std, scale)
    drawn = (levels - 1 - (u * levels).long().clamp(max=levels - 1)).bincount(minlength=levels)
    expected = count * timestep_density(scheme, levels, mean, std, scale)
    assert expected.sum().item() == pytest.approx(count)
    # The mean of (drawn - expected)^2 / expected is 1 for draws of this density.
    assert ((drawn - expected) ** 2 / expected).mean() < 2


@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "cosmap", "logit_normal"])
def test_losses_are_weighted_as_by_the_official_scripts(scheme):
    path = StableDiffusion3(3, 16).path(tiny_sd3.build_pipeline())
    timesteps = torch.tensor([0, 300, 999])
    weights = loss_weights(path, timesteps, None, scheme)
    expected = compute_loss_weighting_for_sd3(scheme, path.sigmas[timesteps])
    torch.testing.assert_close(torch.ones(3) if weights is None else weights, expected)


def test_a_scheme_changes_the_training(saved, full_args, tmp_path):
    losses = {}
    for scheme, more in {"none": {}, "logit_normal": {"--logit_mean": "3"}, "sigma_sqrt": {}}.items():
        flags = full_args | {"--pretrained_model_name_or_path": str(saved["sd3"]), "--max_train_steps": "1"} | more
        main(to_argv(flags | {"--weighting_scheme": scheme, "--output_dir": str(tmp_path / scheme)}))
        AcceleratorState._reset_state(reset_partial_state=True)
        losses[scheme] = read_log(tmp_path / scheme)[0]["keep_loss"]
        record = json.loads((tmp_path / scheme / "unlearning.json").read_text())
        assert record["settings"]["weighting_scheme"] == scheme
    assert len(set(losses.values())) == 3


REFUSED_FLAGS = {
    "--logit_mean needs --weighting_scheme logit_normal": {"--logit_mean": "-0.5"},
    "--mode_scale needs --weighting_scheme mode": {"--weighting_scheme": "logit_normal", "--mode_scale": "0.5"},
    "--mode_scale must be between -1 and 1.75": {"--weighting_scheme": "mode", "--mode_scale": "2"},
    "--weighting_scheme logit_normal cannot be used: it is for models of flow matching": {
        "--weighting_scheme": "logit_normal"
    },
}


@pytest.mark.parametrize("sentence", REFUSED_FLAGS)
def test_noise_levels_that_cannot_be_drawn_are_refused(sentence, full_args, tmp_path, capfd):
    assert_refused(main, full_args | REFUSED_FLAGS[sentence], sentence, tmp_path, capfd)
