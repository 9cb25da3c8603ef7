"""FLUX.1 pipelines of random weights: dev, and schnell."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from tests.helpers.tiny_parts import clip, clip_tokenizer, flow_autoencoder, ready, t5, t5_tokenizer


DEV = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}


def build_pipeline(guidance_embeds: bool = True) -> FluxPipeline:
    """Dev is told a guidance scale and its sampler shifts noise levels with the size; schnell has neither."""
    torch.manual_seed(0)
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * 4,  # packed: channels of latents times 2 x 2
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,  # the sum of axes_dims_rope
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**(DEV if guidance_embeds else {"shift": 1.0})),
        vae=flow_autoencoder(),
        text_encoder=clip(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=t5(tokenizer_2),
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    )
    return ready(pipeline)


def build_schnell() -> FluxPipeline:
    return build_pipeline(guidance_embeds=False)
