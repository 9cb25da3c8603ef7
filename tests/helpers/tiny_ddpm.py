"""An unconditional pipeline of random weights."""

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel


def build_pipeline(sample_size: int = 8) -> DDIMPipeline:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=sample_size,
        in_channels=1,
        out_channels=1,
        block_out_channels=(4, 4),
        norm_num_groups=2,
        attention_head_dim=2,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    return DDIMPipeline(unet, DDIMScheduler())
