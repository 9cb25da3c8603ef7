"""What training needs of a family, on tiny pipelines of random weights: its answers are those that its pipeline draws
pictures by, its gradients are those of the official script, and its adapters load again.
"""

import copy
import warnings

import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from siss_diffusers import METHODS, PairedGradients, Query, scaling_rule
from siss_diffusers.families import Sampling
from siss_diffusers.settings import AdapterSettings
from siss_diffusers.training.adapters import add_lora, save_lora
from tests.helpers.official_losses import OFFICIAL
from tests.helpers.tiny_families import TINY, WITH_ADAPTERS, WITH_PROMPTS, conditions_of


LONG = "secret " * 600  # beyond the limit of every tokenizer

with_prompts = pytest.mark.parametrize("tiny", WITH_PROMPTS, indirect=True)
with_adapters = pytest.mark.parametrize("tiny", WITH_ADAPTERS, indirect=True)


def draw(shape: tuple[int, ...], *seeds: int) -> torch.Tensor:
    """Return standard normal samples, each of a seed of its own, as pipelines draw them."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def latent_shape(family, pipeline) -> tuple[int, ...]:
    side = family.resolution
    return tuple(family.encode(pipeline, torch.zeros(1, family.channels, side, side))[0].shape[1:])


@with_prompts
def test_long_and_empty_prompts_are_conditions_like_others(loaded):
    family, pipeline = loaded
    table = family.embed(pipeline, ["a photograph", "", LONG])
    assert len(table) == 3 and all(len(tensor) == 3 for tensor in table.tensors.values())
    ids, too_long = family.token_ids(pipeline, ["a photograph", "", LONG])
    assert len(set(ids)) == 3 and too_long == [False, False, True]
    (beyond,), _ = family.token_ids(pipeline, [LONG + " and more"])
    assert beyond == ids[2]
    noisy = draw(latent_shape(family, pipeline), 0).expand(3, -1, -1, -1)
    with torch.no_grad():
        told = family.path(pipeline).model_timesteps[[700] * 3]
        answers = family.predict(family.network(pipeline), noisy, told, table)
    assert answers.isfinite().all() and not any(answers[i].equal(answers[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


@with_prompts
def test_an_answer_does_not_depend_on_the_batch(loaded):
    """Padding and masks: a prompt is told alike beside longer ones, alone, and in a table."""
    family, pipeline = loaded
    prompts = ["a photograph", "a photograph of a word and of others"]
    together, apart = family.embed(pipeline, prompts), [family.embed(pipeline, [prompt]) for prompt in prompts]
    noisy, told = draw(latent_shape(family, pipeline), 0, 1), family.path(pipeline).model_timesteps[[300, 700]]
    network = family.network(pipeline)
    with torch.no_grad():
        answers = family.predict(network, noisy, told, together)
        for row, condition in enumerate(apart):
            for alone in (condition, together[[row]]):
                answer = family.predict(network, noisy[[row]], told[[row]], alone)
                torch.testing.assert_close(answer[0], answers[row], rtol=1e-4, atol=1e-5)


@with_prompts
def test_a_loop_over_the_answers_draws_the_picture_of_the_pipeline(tiny, loaded, monkeypatch):
    """Packing, positions, timesteps, sign and the units of the VAE, all at once."""
    family, pipeline = loaded
    conditions, empty = conditions_of(family, pipeline, 2)
    used = family.sampling_scheduler(pipeline.scheduler)
    with monkeypatch.context() as patched:
        patched.setattr(type(family), "sampling_scheduler", lambda *_: used)
        expected = family.sample(pipeline, conditions, empty, Sampling(3, tiny.scale, 2, seed=5))

    path, scheduler = family.path(pipeline), family.sampling_scheduler(pipeline.scheduler)
    scheduler.set_timesteps(3, **({"mu": 0.0} if scheduler.config.get("use_dynamic_shifting") else {}))
    if path.prediction_type == "flow_prediction":
        # As the pipeline has set them, which may shift them with the size of the picture. Solvers round timesteps.
        levels, scheduler.timesteps, scheduler.sigmas = used.timesteps / 1000, used.timesteps, used.sigmas
    else:
        levels = path.sigmas[used.timesteps]
    latents = draw(latent_shape(family, pipeline), 5, 6)
    with torch.no_grad():
        for timestep, sigma in zip(used.timesteps, levels):
            told = torch.tensor(np.interp(sigma, path.sigmas, path.model_timesteps), dtype=torch.float32).expand(2)
            output = family.predict(family.network(pipeline), latents, told, conditions)
            latents = scheduler.step(output, timestep, latents).prev_sample
    torch.testing.assert_close(family.decode(pipeline, latents), expected, rtol=0, atol=2e-5)


# --- parity with the official scripts


def test_every_family_is_compared_with_an_official_script():
    assert set(OFFICIAL) == {TINY[name].family for name in WITH_PROMPTS}


def flat_gradient(network) -> torch.Tensor:
    return torch.cat(
        [
            (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).flatten()
            for parameter in network.parameters()
        ]
    )


@with_prompts
def test_a_step_of_naive_deletion_has_the_gradient_of_the_official_script(loaded):
    family, pipeline = loaded
    network = family.network(pipeline).requires_grad_(True)
    shape, path = latent_shape(family, pipeline), family.path(pipeline)
    conditions = family.embed(pipeline, ["a photograph", "another"])
    keep, noise, indices = draw(shape, 0, 1), draw(shape, 2, 3), torch.tensor([250, 800])
    query = Query(
        keep=keep,
        forget=draw(shape, 4, 5),
        noise=noise,
        timesteps=indices,
        from_forget=torch.tensor([False, False]),
        path=path,
        keep_condition=torch.tensor([0, 1]),
        forget_condition=torch.tensor([0, 0]),
    )
    method = METHODS["naive_deletion"]()

    def predict(rows):
        return family.predict(network, rows.noisy, path.model_timesteps[rows.timesteps], conditions[rows.condition])

    rule = method.rule(scaling_rule("fixed", 0.1))
    PairedGradients(list(network.parameters()), rule).compute([method.rows(query)], predict)
    found = flat_gradient(network).clone()
    network.zero_grad()
    OFFICIAL[type(family)](network, conditions.tensors, pipeline, keep, noise, indices).backward()
    expected = flat_gradient(network) * keep[0].numel()  # here losses are sums over pixels
    assert expected.norm() > 0
    assert (found - expected).norm() / expected.norm() < 1e-6


# --- adapters


def scales_of(network) -> set[float]:
    """Return alpha / rank of every layer with an adapter."""
    layers = [module for module in network.modules() if isinstance(module, LoraLayer)]
    return {scale for layer in layers for scale in layer.scaling.values()}


@with_adapters
def test_an_adapter_loads_at_its_scale_and_leaves_the_base_at_scale_0(loaded, tmp_path):
    family, pipeline = loaded
    network = family.network(pipeline)
    conditions, _ = conditions_of(family, pipeline, 2)
    noisy, told = draw(latent_shape(family, pipeline), 0, 1), family.path(pipeline).model_timesteps[[300, 700]]

    @torch.no_grad()
    def answer(network) -> torch.Tensor:
        return family.predict(network, noisy, told, conditions)

    base, fresh = answer(network), copy.deepcopy(network)
    torch.manual_seed(0)
    add_lora(network, AdapterSettings(2, 6.0, 0.0, family.lora_targets), torch.float32)
    assert answer(network).equal(base)  # it starts as the identity
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    assert scales_of(network) == {3.0}
    adapted = answer(network)
    assert (adapted - base).abs().max() > 1e-4
    save_lora(network, tmp_path, type(pipeline), family.network_name)

    pipeline.register_modules(**{family.network_name: fresh})
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # diffusers warns of keys that fit nothing
        pipeline.load_lora_weights(tmp_path, adapter_name="forget", use_safetensors=True)
    torch.testing.assert_close(answer(fresh), adapted, rtol=1e-5, atol=1e-6)
    assert scales_of(fresh) == {3.0}
    pipeline.set_adapters("forget", 0.0)
    assert answer(fresh).equal(base)
    pipeline.unload_lora_weights()
    assert answer(family.network(pipeline)).equal(base)


def test_builders_make_the_same_pipeline_again():
    for tiny in TINY.values():
        networks = [getattr(tiny.build(), tiny.family.network_name) for _ in range(2)]
        first, second = (network.state_dict() for network in networks)
        assert all(first[name].equal(second[name]) for name in first)
