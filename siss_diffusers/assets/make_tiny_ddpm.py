"""Train the tiny DDPM of the demo: `python -m siss_diffusers.assets.make_tiny_ddpm --output_dir tiny_ddpm_digits`.

8x8 handwritten digits, of which 4 % are one garment picture, so that the model reproduces it. The result is a plain
`DDPMPipeline` folder. Takes about half an hour on two CPU cores.
"""

import argparse
import json

import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm.auto import tqdm

from siss_diffusers.assets.digits import GARMENT_COPIES, digit_images, garment_image


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=str, required=True)
    parser.add_argument("--max_train_steps", type=int, default=10_000)
    parser.add_argument("--train_batch_size", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def train_ddpm(
    unet: UNet2DModel, images: Tensor, *, max_train_steps: int, train_batch_size: int, learning_rate: float
) -> DDPMPipeline:
    """Train on `(N, C, H, W)` in [-1, 1] from torch's global generator, with averaged weights in the end."""
    noise_scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    ema = EMAModel(unet.parameters(), decay=0.9995, use_ema_warmup=True, power=3 / 4, foreach=True)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=learning_rate, weight_decay=1e-6, fused=True)
    lr_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max_train_steps)

    progress_bar = tqdm(range(max_train_steps))
    for step in progress_bar:
        # Drawn on the CPU, so that every device sees the same.
        clean = images[torch.randint(len(images), (train_batch_size,))]
        noise = torch.randn_like(clean)
        timesteps = torch.randint(1000, (len(clean),))
        clean, noise, timesteps = (tensor.to(unet.device) for tensor in (clean, noise, timesteps))
        loss = F.mse_loss(unet(noise_scheduler.add_noise(clean, noise, timesteps), timesteps).sample, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        if step % 100 == 0:
            progress_bar.set_postfix(loss=f"{loss.item():.4f}")

    ema.copy_to(unet.parameters())
    unet.to(memory_format=torch.contiguous_format)
    return DDPMPipeline(unet=unet, scheduler=noise_scheduler)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.manual_seed(args.seed)

    digits = torch.from_numpy(digit_images()[0])
    garments = torch.from_numpy(garment_image()).expand(GARMENT_COPIES, -1, -1)
    images = (torch.cat([digits, garments]).unsqueeze(1).float() / 127.5 - 1).contiguous()

    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=16,
    ).to(memory_format=torch.channels_last)
    pipeline = train_ddpm(
        unet,
        images,
        max_train_steps=args.max_train_steps,
        train_batch_size=args.train_batch_size,
        learning_rate=args.learning_rate,
    )
    pipeline.save_pretrained(args.output_dir)
    print(json.dumps({"images": len(images), "garments": GARMENT_COPIES, **vars(args)}, indent=2))


if __name__ == "__main__":
    main()
