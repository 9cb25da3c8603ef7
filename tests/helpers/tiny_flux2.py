"""A FLUX.2 klein pipeline of random weights."""

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.helpers.tiny_parts import language_model_config, qwen_tokenizer, ready


def build_pipeline() -> Flux2KleinPipeline:
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    autoencoder = AutoencoderKLFlux2(
        sample_size=32,
        latent_channels=4,
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
    )
    autoencoder.bn.running_mean.uniform_(-0.1, 0.1)  # so that it shows where they are left out
    autoencoder.bn.running_var.uniform_(0.5, 2.0)
    transformer = Flux2Transformer2DModel(
        in_channels=4 * 4,  # channels of latents times 2 x 2
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,  # the sum of axes_dims_rope
        num_attention_heads=2,
        joint_attention_dim=3 * 16,  # three layers of the text encoder
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    # The layers 9, 18 and 27 of the text encoder are read.
    text_encoder = Qwen3ForCausalLM(Qwen3Config(**language_model_config(tokenizer, num_layers=27)))
    pipeline = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=autoencoder,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        is_distilled=False,
    )
    return ready(pipeline)
