"""A Z-Image pipeline of random weights."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen3Config, Qwen3Model

from tests.helpers.tiny_parts import flow_autoencoder, language_model_config, qwen_tokenizer, ready


def build_pipeline() -> ZImagePipeline:
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],  # together the width of a head
        axes_lens=[1024, 64, 64],
    )
    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=flow_autoencoder(),
        text_encoder=Qwen3Model(Qwen3Config(**language_model_config(tokenizer, num_layers=2))),
        tokenizer=tokenizer,
        transformer=transformer,
    )
    return ready(pipeline)
