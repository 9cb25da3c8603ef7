"""What the loop may ask of a family, on tiny pipelines of random weights.

A new family is one line in `TINY` of `tests/helpers/tiny_families.py`. `tests/families/test_<name>.py` has what only that
family does.
"""

import inspect
import pickle

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from siss_diffusers.errors import UsageError
from siss_diffusers.families import FAMILIES, Conditions, LoadedPipeline, NamedPipeline, Sampling, find_family
from siss_diffusers.families.loading import load_for_sampling
from siss_diffusers.families.prompts import PROMPTS_AT_ONCE, Prompts, warn_of_long_prompts
from siss_diffusers.families.text_to_image import EMBEDDING_BATCH
from tests.helpers.tiny_families import PROMPTS, TINY, WITH_PROMPTS, conditions_of


with_prompts = pytest.mark.parametrize("tiny", WITH_PROMPTS, indirect=True)


def encoded(pipeline, prompt: str, more: dict) -> list[Tensor]:
    """Return the tensors of the pipeline's own `encode_prompt`, without the axis of the batch."""
    values = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    values = {
        name: values.get(name)
        for name, parameter in inspect.signature(pipeline.encode_prompt).parameters.items()
        if name in values or (name != "prompt" and parameter.default is parameter.empty)
    }
    with torch.no_grad():
        results = pipeline.encode_prompt([prompt], **(values | more))
    # Of some pipelines each is a list of the embeddings of each prompt.
    return [result[0] for result in results if result is not None and len(result) and isinstance(result[0], Tensor)]


def test_every_family_is_here():
    assert {tiny.family for tiny in TINY.values()} == set(FAMILIES)


def test_a_pipeline_is_of_one_family(tiny, folder):
    source = NamedPipeline(str(folder))
    assert [family for family in FAMILIES if family.fits(source.pipeline_config)] == [tiny.family]
    assert find_family(source) is tiny.family
    with pytest.raises(UsageError, match="not supported here; use "):
        find_family(source, with_prompts=not tiny.family.has_prompts)


def test_a_pipeline_in_memory_reads_as_the_one_on_the_disk(tiny, folder):
    named, in_memory = NamedPipeline(str(folder)), LoadedPipeline(tiny.build())
    family = tiny.family.from_source(named)
    assert find_family(in_memory).from_source(in_memory) == family
    names = [[name for name, _ in source.network_skeleton(family).named_modules()] for source in (named, in_memory)]
    assert names[0] == names[1]


@with_prompts
def test_prompts_of_the_same_tokens_are_one_condition(tiny, loaded):
    prompts = Prompts(*loaded)
    assert prompts.number(["a photograph", tiny.same, "another", "a photograph"]) == [0, 0, 1, 0]
    assert prompts.number([]) == [] and prompts.number(["another"]) == [1]
    assert prompts.number(["A photograph"]) == [2 if loaded[0].sees_case else 0]
    table, row_of = prompts.embed([1, 1, 0])
    assert len(table) == 2 and row_of == {0: 0, 1: 1}
    assert prompts.truncated == 0


@with_prompts
def test_long_prompts_are_counted_and_not_shown(loaded, caplog):
    limit = loaded[0].max_prompt_tokens(loaded[1])
    for number in (0, 1, 2):
        warn_of_long_prompts(*loaded, ["a photograph", *["secret " * limit] * number])
    assert caplog.messages == [
        f"{prompts} longer than the {limit} tokens that the model reads; the rest is ignored"
        for prompts in ("1 prompt is", "2 prompts are")
    ]


@with_prompts
def test_a_prompt_is_what_the_pipeline_makes_of_it(tiny, loaded):
    family, pipeline = loaded
    table = family.embed(pipeline, PROMPTS)
    assert table.tensors and len(table) == len(PROMPTS)
    for row, (prompt, more) in enumerate(zip(PROMPTS, (tiny.encoded, {}))):
        expected = encoded(pipeline, prompt, more)
        for name, tensor in table.tensors.items():
            if not tensor.is_floating_point():
                continue
            told = [tensor[row][: len(other)] for other in expected]  # the rest is padding
            same = [a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(told, expected)]
            assert any(same), name


def batches_of(pipeline, monkeypatch) -> list[int]:
    """Return the sizes of the batches that the pipeline's own `encode_prompt` gets from now on."""
    encode, lengths = pipeline.encode_prompt, []

    def spy(prompt, *args, **kwargs):
        lengths.append(len(prompt))
        return encode(prompt, *args, **kwargs)

    monkeypatch.setattr(pipeline, "encode_prompt", spy)
    return lengths


@with_prompts
def test_prompts_are_embedded_in_batches(loaded, monkeypatch):
    family, pipeline = loaded
    lengths = batches_of(pipeline, monkeypatch)
    count = EMBEDDING_BATCH + 1
    many = family.embed(pipeline, [PROMPTS[0]] * count)
    assert max(lengths) <= EMBEDDING_BATCH and sum(lengths) == count == len(many)
    for name, tensor in family.embed(pipeline, PROMPTS[:1]).tensors.items():
        torch.testing.assert_close(many.tensors[name], tensor.expand_as(many.tensors[name]), rtol=1e-4, atol=1e-5)


@with_prompts
def test_a_prompt_is_embedded_in_a_batch_of_the_same_size_whatever_the_others(loaded, monkeypatch):
    """Kernels are chosen by shape, and two of them may differ in the last bits."""
    family, pipeline = loaded
    lengths = batches_of(pipeline, monkeypatch)
    prompts = Prompts(family, pipeline)
    numbers = prompts.number(["a photograph", *(f"a photograph of {number}" for number in range(PROMPTS_AT_ONCE))])
    (alone, _), (table, row_of) = prompts.embed(numbers[:1]), prompts.embed(numbers)
    assert lengths == [PROMPTS_AT_ONCE] * 3 and len(table) == len(numbers) and row_of[numbers[0]] == 0
    for name, tensor in alone.tensors.items():
        row = table.tensors[name][0]
        if any(word in other for other in alone.tensors for word in ("mask", "lengths")):
            # Prompts are padded to the longest of their batch, so that the shape depends on the others.
            torch.testing.assert_close(tensor[0], row[: len(tensor[0])] if row.ndim else row, rtol=1e-4, atol=1e-5)
        else:
            assert tensor[0].equal(row)


def test_pictures_reach_the_vae_one_by_one(tiny, folder):
    """32 pictures of 512 pixels at once would take 24 GiB."""
    if not tiny.family.has_latents:
        return
    source = NamedPipeline(str(folder))
    family, sizes = tiny.family.from_source(source, tiny.resolution), []
    for pipeline in (load_for_sampling(source, family, "cpu"), source.load_without_network(family)):
        for part in (pipeline.vae.encoder, pipeline.vae.decoder):
            part.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
        pictures = torch.rand(3, family.channels, family.resolution, family.resolution)
        mean, _ = family.encode(pipeline, pictures * 2 - 1)
        family.decode(pipeline, family.latent_scaling(pipeline)(mean))
    assert sizes == [1] * 12


@torch.no_grad()
def reconstructed(vae, pixels: Tensor) -> Tensor:
    """Return what a VAE by itself makes of pictures `(B, C, H, W)`; for one of videos each is a frame."""
    frames = pixels[:, :, None] if "temperal_downsample" in vae.config else pixels
    encoded = vae.encode(frames)
    latents = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latent
    return vae.decode(latents).sample.reshape(pixels.shape)


def test_pictures_survive_the_way_to_the_network_and_back(loaded):
    family, pipeline = loaded
    pictures = torch.rand(2, family.channels, family.resolution, family.resolution)
    mean, deviation = family.encode(pipeline, pictures * 2 - 1)
    scaling = family.latent_scaling(pipeline)
    assert mean.shape == deviation.shape
    if family.has_latents:
        scaling = pickle.loads(pickle.dumps(scaling))  # other processes scale what is cached
        expected = (reconstructed(pipeline.vae, pictures * 2 - 1) / 2 + 0.5).clamp(0, 1)
    else:
        assert (deviation == 0).all()
        expected = pictures
    torch.testing.assert_close(family.decode(pipeline, scaling(mean)), expected, rtol=1e-4, atol=1e-5)


def test_pictures_are_decoded_in_the_precision_of_the_vae_whatever_the_training_casts(loaded):
    family, pipeline = loaded
    mean, _ = family.encode(pipeline, torch.rand(2, family.channels, family.resolution, family.resolution) * 2 - 1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cast = family.decode(pipeline, mean)
    assert cast.equal(family.decode(pipeline, mean))


def test_the_answer_of_the_network_has_the_shape_of_the_sample(loaded):
    family, pipeline = loaded
    mean, _ = family.encode(pipeline, torch.zeros(2, family.channels, family.resolution, family.resolution))
    conditions, empty = conditions_of(family, pipeline, 2)
    timesteps = family.path(pipeline).model_timesteps[[10, 700]]
    with torch.no_grad():
        answer = family.predict(family.network(pipeline), mean, timesteps, None if empty is None else conditions)
    assert answer.shape == mean.shape and answer.isfinite().all()


def test_a_call_of_the_network_makes_nothing_on_another_device(loaded):
    """`meta` stands for a GPU: an operation with a tensor of the host fails."""
    family, pipeline = loaded
    mean, _ = family.encode(pipeline, torch.zeros(2, family.channels, family.resolution, family.resolution))
    conditions, empty = conditions_of(family, pipeline, 2)
    timesteps = family.path(pipeline).model_timesteps[[10, 700]].to("meta")
    if "lengths" in conditions.tensors:
        pytest.skip("the network takes lists of prompts, whose lengths are read on the host")
    told = None if empty is None else conditions.to("meta")
    answer = family.predict(family.network(pipeline).to("meta"), mean.to("meta"), timesteps, told)
    assert answer.device.type == "meta" and answer.shape == mean.shape


def test_samples_are_those_of_the_pipeline_and_do_not_depend_on_the_batch(tiny, loaded):
    family, pipeline = loaded
    conditions, empty = conditions_of(family, pipeline, 3)
    samples = [
        family.sample(pipeline, conditions, empty, Sampling(2, 3.0, batch_size, seed=5)) for batch_size in (1, 3)
    ]
    torch.testing.assert_close(samples[0], samples[1], rtol=0, atol=1e-5)
    asked = {"batch_size": 3}
    if family.has_prompts:
        pipeline.scheduler = family.sampling_scheduler(pipeline.scheduler)
        side = {"height": family.resolution, "width": family.resolution}
        asked = {"prompt": PROMPTS[:1] * 3} | side | tiny.guided | tiny.called
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)]
    own = pipeline(num_inference_steps=2, generator=generators, output_type="np", **asked).images
    torch.testing.assert_close(samples[1], torch.from_numpy(own).permute(0, 3, 1, 2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("step", [0, 20, 45])
def test_a_step_of_the_scheduler_with_the_target_as_output_stays_on_the_path(loaded, step):
    """The noise levels, the targets and the timesteps that are trained on are those that the sampler takes."""
    family, pipeline = loaded
    path, scheduler = family.path(pipeline), type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    if path.prediction_type != "flow_prediction":
        scheduler = DDIMScheduler.from_config(scheduler.config, timestep_spacing="leading")
        scheduler.set_timesteps(50)
        here, there = scheduler.timesteps[step : step + 2].split(1)
    else:  # before `set_timesteps` its noise levels are those of training
        scheduler = family.training_scheduler(scheduler)
        here, there = ((path.sigmas - sigma).abs().argmin()[None] for sigma in scheduler.sigmas[step : step + 2])
    sample, noise = torch.rand(1, 4, 8, 8) * 1.8 - 0.9, torch.randn(1, 4, 8, 8)  # schedulers clip to [-1, 1]
    output, timestep = path.target(sample, noise, here), scheduler.timesteps[step]
    found = scheduler.step(output, timestep, path.add_noise(sample, noise, here)).prev_sample
    torch.testing.assert_close(found, path.add_noise(sample, noise, there), rtol=1e-4, atol=1e-4)


def test_conditions_are_rows():
    table = Conditions({"a": torch.arange(6).reshape(3, 2), "b": torch.arange(3.0)}, 3)
    assert table[[2, 0]].tensors["a"].tolist() == [[4, 5], [0, 1]] and len(table[1:]) == 2
    assert table[torch.tensor([1])].tensors["b"].tolist() == [1.0]
    both = Conditions.cat([table, table[[0]]])
    assert len(both) == 4 and both.tensors["b"].tolist() == [0.0, 1.0, 2.0, 0.0]
    longer = Conditions({"a": torch.ones(1, 4, dtype=torch.int64), "b": torch.zeros(1)}, 1)
    assert Conditions.cat([table, longer]).tensors["a"].tolist()[2:] == [[4, 5, 0, 0], [1, 1, 1, 1]]
    states = [Conditions({"a": torch.ones(1, length, 2)}, 1) for length in (1, 3)]
    assert Conditions.cat(states).tensors["a"].sum((1, 2)).tolist() == [2, 6]
    half = table.to("cpu", torch.bfloat16)
    assert half.tensors["b"].dtype == torch.bfloat16 and half.tensors["a"].dtype == torch.int64
    assert len(Conditions({}, 5)[2:4]) == 2
