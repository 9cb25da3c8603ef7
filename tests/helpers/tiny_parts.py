"""Tokenizers, text encoders and autoencoders of random weights, of which the tiny pipelines are made."""

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from siss_diffusers.assets.make_tiny_sd import make_tokenizer


WORDS = ("a photograph",)


def clip_tokenizer(length: int = 24) -> CLIPTokenizer:
    tokenizer = make_tokenizer(WORDS)
    tokenizer.model_max_length = length
    return tokenizer


def clip(tokenizer: CLIPTokenizer, model_class: type = CLIPTextModel) -> CLIPTextModel | CLIPTextModelWithProjection:
    """A text encoder 16 channels wide."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model_class(config)


def autoencoder(**config) -> AutoencoderKL:
    """An autoencoder of 4 channels, with 2 pixels a latent."""
    return AutoencoderKL(
        sample_size=16,
        latent_channels=4,
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        **config,
    )


def ready(pipeline):
    """The pipeline as one that was trained: nothing drops out, and no layer starts at zero."""
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    network = pipeline.components.get("transformer") or pipeline.unet
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return pipeline
