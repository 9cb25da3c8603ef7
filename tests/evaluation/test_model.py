"""A measured model: samples of both kinds, the same seeds for every model, and one face for all families."""

import pytest
import torch

from siss_diffusers.assets.captioned import FLOWER_CAPTION
from siss_diffusers.evaluation.model import add_prompt_noise
from siss_diffusers.families import Conditions
from siss_diffusers.metrics import Skip
from tests.helpers.evaluating import digits_evaluator, flowers_evaluator, load_digits, load_flowers


@pytest.fixture(scope="module")
def flowers():
    return flowers_evaluator().model("base", load_flowers())


@pytest.fixture(scope="module")
def digits():
    return digits_evaluator().model("base", load_digits())


def test_samples_of_a_model_without_prompts_are_ordinary_too(digits):
    assert digits.samples.shape == (12, 1, 8, 8) and digits.ordinary_samples is digits.samples
    assert digits.noise_norms is None and list(digits.samples_by_kind()) == ["samples"]
    assert len(digits.others) == 12 - int(digits.flags["any"].sum())


def test_prompts_take_turns_and_each_sample_has_its_own_seed(flowers):
    both = [FLOWER_CAPTION, "a handwritten one"]
    samples, norms = flowers.sample(both, 4)
    alone = [flowers.sample([prompt], 4)[0] for prompt in both]
    expected = torch.stack([alone[0][0], alone[1][1], alone[0][2], alone[1][3]])
    torch.testing.assert_close(samples, expected, atol=1e-4, rtol=0)
    assert norms.shape == (4, 4) and (samples[0] - samples[2]).abs().max() > 0.01


def test_batches_and_seeds(flowers):
    prompts = [FLOWER_CAPTION]
    in_batches = flowers_evaluator(batch_size=3, seed=1).model("x", flowers.pipeline).sample(prompts, 4)[0]
    at_once = flowers.sample(prompts, 5)[0]
    torch.testing.assert_close(in_batches, at_once[1:], atol=1e-4, rtol=0)


def test_noise_on_the_prompt_changes_samples_and_not_their_own_noise(flowers):
    clean, noisy, little = (flowers.sample([FLOWER_CAPTION], 2, noise=noise)[0] for noise in (0.0, 1.0, 1e-6))
    assert (clean - noisy).abs().mean() > 0.003
    torch.testing.assert_close(clean, little, atol=1e-3, rtol=0)


def test_prompt_noise_is_relative_to_each_prompt_and_leaves_pooled_vectors():
    table = (
        torch.randn(3, 50, 40, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1.0, 10, 100])[:, None, None]
    )
    conditions = Conditions({"encoder_hidden_states": table, "text_embeds": torch.ones(3, 40)}, 3)
    noisy = add_prompt_noise(conditions, 0.5, [7, 8, 7])
    added = noisy.tensors["encoder_hidden_states"] - table
    ratio = added.std(dim=(1, 2)) / table.std(dim=(1, 2))
    torch.testing.assert_close(ratio, torch.full((3,), 0.5), atol=0.02, rtol=0)
    # The same seed gives the same noise.
    torch.testing.assert_close(added[0] / table[0].std(), added[2] / table[2].std(), atol=1e-3, rtol=1e-3)
    assert torch.equal(noisy.tensors["text_embeds"], torch.ones(3, 40))
    assert torch.equal(conditions.tensors["encoder_hidden_states"], table)


def test_without_guidance_there_is_no_noise_norm(flowers):
    model = flowers_evaluator(guidance_scale=1.0).model("x", flowers.pipeline)
    assert model.noise_norms is None and flowers.noise_norms.shape == (4, 4)


@pytest.mark.parametrize("options", [{"ordinary": ()}, {"num_ordinary_samples": 0}])
def test_without_ordinary_samples_only_the_memorized_ones_are_shown(options, flowers):
    model = flowers_evaluator(**options).model("x", flowers.pipeline)
    with pytest.raises(Skip, match="no other prompts"):
        _ = model.ordinary_samples
    assert list(model.samples_by_kind()) == ["memorized prompt"]


@pytest.mark.parametrize("load", ["flowers", "digits"])
def test_pictures_survive_encoding_and_predictions_keep_gradients(load, request):
    model = request.getfixturevalue(load)
    encoded = model.encode(model.data.keep)
    decoded = model.decode(encoded)
    assert decoded.shape == model.data.keep.shape and (decoded - model.data.keep).abs().mean() < 0.05
    noisy = encoded[:2].clone().requires_grad_()
    conditions = model.embed(list(model.data.prompts) * 2)
    output = model.predict(noisy, model.path.model_timesteps[torch.tensor([5, 600])], conditions)
    output.sum().backward()
    assert output.shape == noisy.shape and output.dtype == torch.float32 and noisy.grad.abs().sum() > 0


def test_samples_stay_when_the_pipeline_goes():
    model = digits_evaluator().model("x", load_digits())
    samples = model.samples
    model.release()
    assert model.pipeline is None and model.samples is samples
