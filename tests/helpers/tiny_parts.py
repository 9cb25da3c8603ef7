"""Tokenizers, text encoders and autoencoders of random weights, of which the tiny pipelines are made."""

import torch
from diffusers import AutoencoderKL
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from siss_diffusers.assets.make_tiny_flow import make_chat_tokenizer
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


def t5_tokenizer(length: int = 24) -> T5Tokenizer:
    """A Unigram over characters and a few words, which sees case."""
    words = {f"▁{word}" for prompt in WORDS for word in prompt.split()}
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocab += [(piece, -10.0) for piece in ("▁", *map(chr, range(33, 127)))] + [(word, -2.0) for word in sorted(words)]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=length)


def t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """A text encoder 32 channels wide."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",  # that of T5 1.1
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return T5EncoderModel(config)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE with merges learnt from a few words, which sees case and white space."""
    return make_chat_tokenizer(WORDS, 300)


def language_model_config(tokenizer, num_layers: int) -> dict:
    """Of a language model 16 channels wide."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 1024,
    }


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


def flow_autoencoder() -> AutoencoderKL:
    """As those of Stable Diffusion 3 and FLUX.1: with a shift, and no convolution around the latents."""
    return autoencoder(scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False)


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
