"""What the loop may ask of a family, on tiny pipelines of random weights."""

import pytest
import torch
from diffusers import DDPMPipeline, StableDiffusionPipeline

from siss_diffusers.errors import UsageError
from siss_diffusers.families import (
    FAMILIES,
    Conditions,
    LoadedPipeline,
    NamedPipeline,
    Sampling,
    StableDiffusion,
    Unconditional,
    find_family,
)
from siss_diffusers.families.prompts import Prompts
from tests.helpers.paths import TINY_MODEL


@pytest.fixture
def stable_diffusion(pipeline_folder):
    source = NamedPipeline(str(pipeline_folder))
    family = find_family(source).from_source(source)
    pipeline = source.load_without_network(family)
    assert pipeline.unet is None
    source.load_network(family, pipeline)
    return family, pipeline


def test_a_pipeline_is_of_one_family(pipeline_folder):
    for folder, expected in ((TINY_MODEL, Unconditional), (pipeline_folder, StableDiffusion)):
        source = NamedPipeline(str(folder))
        assert [family for family in FAMILIES if family.fits(source.pipeline_config)] == [expected]
        with pytest.raises(UsageError, match="not supported here; use "):
            find_family(source, with_prompts=not expected.has_prompts)


@pytest.mark.parametrize("pipeline_class", [DDPMPipeline, StableDiffusionPipeline])
def test_a_pipeline_in_memory_reads_as_the_one_on_the_disk(pipeline_class, pipeline_folder):
    folder = TINY_MODEL if pipeline_class is DDPMPipeline else pipeline_folder
    named, loaded = NamedPipeline(str(folder)), LoadedPipeline(pipeline_class.from_pretrained(folder))
    assert find_family(named).from_source(named) == find_family(loaded).from_source(loaded)
    assert [name for name, _ in named.network_skeleton(find_family(named)(1, 8)).named_modules()] == [
        name for name, _ in loaded.network_skeleton(find_family(loaded)(1, 8)).named_modules()
    ]


def test_prompts_of_the_same_tokens_are_one_condition(stable_diffusion):
    prompts = Prompts(*stable_diffusion)
    assert prompts.number(["a photograph", "A  Photograph", "another", "a photograph"]) == [0, 0, 1, 0]
    assert prompts.number([]) == [] and prompts.number(["another"]) == [1]
    table, row_of = prompts.embed([1, 1, 0])
    assert len(table) == 2 and row_of == {0: 0, 1: 1}
    assert prompts.truncated == 0
    prompts.number(["long " * 100])
    assert prompts.truncated == 1


def test_a_prompt_is_what_the_pipeline_makes_of_it(stable_diffusion):
    family, pipeline = stable_diffusion
    table = family.embed(pipeline, ["a photograph", ""])
    whole, _ = pipeline.encode_prompt(["a photograph", ""], "cpu", 1, False)
    assert table.tensors["encoder_hidden_states"].equal(whole)


def test_latents_survive_the_way_to_the_network_and_back(stable_diffusion):
    family, pipeline = stable_diffusion
    pictures = torch.rand(2, 3, family.resolution, family.resolution)
    mean, deviation = family.encode(pipeline, pictures * 2 - 1)
    assert mean.shape == deviation.shape == (2, 4, 8, 8) and (deviation > 0).all()
    decoded = family.decode(pipeline, family.latent_scaling(pipeline)(mean))
    expected = (pipeline.vae.decode(mean).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(decoded, expected.detach())


def test_samples_are_those_of_the_pipeline_and_do_not_depend_on_the_batch(stable_diffusion):
    from diffusers import DDIMScheduler

    family, pipeline = stable_diffusion
    table = family.embed(pipeline, ["a photograph", ""])
    conditions, empty = table[[0, 0, 0]], table[[1]]
    samples = [
        family.sample(pipeline, conditions, empty, Sampling(2, 3.0, batch_size, seed=5)) for batch_size in (1, 3)
    ]
    torch.testing.assert_close(samples[0], samples[1], rtol=0, atol=1e-5)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    own = pipeline(
        ["a photograph"] * 3,
        num_inference_steps=2,
        guidance_scale=3.0,
        height=family.resolution,
        width=family.resolution,
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 6, 7)],
        output_type="pt",
    ).images
    torch.testing.assert_close(samples[1], own, rtol=0, atol=1e-5)


def test_conditions_are_rows():
    table = Conditions({"a": torch.arange(6).reshape(3, 2), "b": torch.arange(3.0)}, 3)
    assert table[[2, 0]].tensors["a"].tolist() == [[4, 5], [0, 1]] and len(table[1:]) == 2
    assert table[torch.tensor([1])].tensors["b"].tolist() == [1.0]
    both = Conditions.cat([table, table[[0]]])
    assert len(both) == 4 and both.tensors["b"].tolist() == [0.0, 1.0, 2.0, 0.0]
    half = table.to("cpu", torch.bfloat16)
    assert half.tensors["b"].dtype == torch.bfloat16 and half.tensors["a"].dtype == torch.int64
    assert len(Conditions({}, 5)[2:4]) == 2
