"""A PixArt-Sigma pipeline of random weights."""

import torch
from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

from tests.helpers.tiny_parts import autoencoder, ready, t5, t5_tokenizer


def build_pipeline() -> PixArtSigmaPipeline:
    torch.manual_seed(0)
    tokenizer = t5_tokenizer()
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,  # the second half is a variance
        num_layers=1,
        cross_attention_dim=16,
        caption_channels=32,
        sample_size=8,
        patch_size=2,
        use_additional_conditions=False,
        norm_num_groups=4,
    )
    pipeline = PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=t5(tokenizer),
        vae=autoencoder(scaling_factor=0.13025),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(beta_schedule="linear", beta_start=0.0001, beta_end=0.02),
    )
    return ready(pipeline)
