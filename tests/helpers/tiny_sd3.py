"""A Stable Diffusion 3.5 pipeline of random weights."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextModelWithProjection

from tests.helpers.tiny_parts import clip, clip_tokenizer, flow_autoencoder, ready, t5, t5_tokenizer


def build_pipeline() -> StableDiffusion3Pipeline:
    torch.manual_seed(0)
    tokenizer, tokenizer_3 = clip_tokenizer(), t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,  # that of T5, up to which both CLIPs side by side are padded
        caption_projection_dim=32,  # heads times their width
        pooled_projection_dim=16 + 16,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=flow_autoencoder(),
        text_encoder=clip(tokenizer, CLIPTextModelWithProjection),
        tokenizer=tokenizer,
        text_encoder_2=clip(tokenizer, CLIPTextModelWithProjection),
        tokenizer_2=tokenizer,
        text_encoder_3=t5(tokenizer_3),
        tokenizer_3=tokenizer_3,
    )
    return ready(pipeline)
