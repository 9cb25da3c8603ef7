"""Against transformers' own forward pass, on a tiny CLIP of random weights."""

import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from siss_diffusers.assets.make_tiny_sd import make_tokenizer
from siss_diffusers.errors import UsageError
from siss_diffusers.metrics.clip import Clip, clip_iqa, clip_score


TEXTS = ["a photograph of a cat", "a photograph"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = make_tokenizer(tuple(TEXTS))
    tokenizer.save_pretrained(folder)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=shape
        | {
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 24,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config=shape | {"image_size": 16, "patch_size": 8},
        projection_dim=12,
    )
    CLIPModel(config).save_pretrained(folder)
    return folder


def test_the_score_is_that_of_transformers(folder):
    clip = Clip(str(folder), torch.device("cpu"), "--clip_model")
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).mul(255).round() / 255
    processor = CLIPImageProcessor(size={"height": 16, "width": 16}, crop_size={"height": 16, "width": 16})
    pixels = processor([image.mul(255).byte() for image in images], return_tensors="pt").pixel_values
    tokens = clip.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = clip.model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=pixels)
    expected = 100 * (output.image_embeds * output.text_embeds).sum(1).clamp(min=0)
    found = clip_score(clip.of_images(images, batch_size=1), clip.of_texts(TEXTS))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    assert clip.of_texts(["a photograph " * 40]).isfinite().all()  # cut at the limit


def test_grey_and_larger_pictures_are_taken(folder):
    clip = Clip(str(folder), torch.device("cpu"), "--clip_model")
    grey = torch.rand(3, 1, 40, 40, generator=torch.Generator().manual_seed(0))
    colour = clip.of_images(grey.expand(-1, 3, -1, -1), batch_size=2)
    assert clip.of_images(grey, batch_size=3).shape == (3, 12)
    torch.testing.assert_close(clip.of_images(grey, batch_size=3), colour)


def test_a_clip_that_is_stored_in_half_precision_is_used_in_full(folder, tmp_path):
    CLIPModel.from_pretrained(folder, dtype=torch.float16).save_pretrained(tmp_path)
    make_tokenizer(tuple(TEXTS)).save_pretrained(tmp_path)
    clip = Clip(str(tmp_path), torch.device("cpu"), "--clip_model")
    assert clip.model.dtype == torch.float32


def test_quality_is_a_softmax_over_two_texts():
    images, good, bad = torch.eye(3), torch.tensor([1.0, 0, 0]), torch.tensor([0, 1.0, 0])
    assert clip_iqa(images, good, bad, logit_scale=2.0).tolist() == pytest.approx(
        [1 / (1 + torch.tensor(-2.0).exp().item()), 1 / (1 + torch.tensor(2.0).exp().item()), 0.5]
    )


def test_what_is_no_clip_is_one_sentence(tmp_path):
    with pytest.raises(UsageError, match="--clip_model"):
        Clip(str(tmp_path), torch.device("cpu"), "--clip_model")
