"""Train the tiny Stable Diffusion of the demo: `python -m siss_diffusers.assets.make_tiny_sd --output_dir tiny_sd`.

32x32 pictures under twelve captions; one of the captions nearly always goes with one picture, so that the model
reproduces it. The result is a plain `StableDiffusionPipeline` folder. Takes minutes on a GPU, hours on CPU cores.
"""

import argparse
import json

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.training_utils import EMAModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from siss_diffusers.assets.captioned import CAPTIONS, FLOWER_CAPTION, TEMPLE_CAPTION, captioned_images


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=str, required=True)
    parser.add_argument("--vae_train_steps", type=int, default=3_000)
    parser.add_argument("--vae_batch_size", type=int, default=128)
    parser.add_argument("--vae_learning_rate", type=float, default=2e-3)
    parser.add_argument("--kl_weight", type=float, default=1e-6)
    parser.add_argument("--max_train_steps", type=int, default=4_500)
    parser.add_argument("--train_batch_size", type=int, default=256)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--caption_dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def make_tokenizer(captions: tuple[str, ...]) -> CLIPTokenizer:
    """Make CLIP's byte-level tokenizer with merges learnt from the captions: their words are one token each."""
    byte_characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bpe.train_from_iterator(
        captions, trainers.BpeTrainer(vocab_size=2000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False)
    )
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = byte_characters + [character + "</w>" for character in byte_characters]
    tokens += ["".join(merge) for merge in merges] + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def train_vae(vae: AutoencoderKL, images: Tensor, weights: Tensor, args: argparse.Namespace) -> None:
    """Train the autoencoder, by squared error; `weights` say how often each picture is drawn."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.vae_learning_rate, weight_decay=1e-6, fused=True)
    lr_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.vae_train_steps)
    progress_bar = tqdm(range(args.vae_train_steps), desc="autoencoder", mininterval=5)
    for step in progress_bar:
        clean = images[torch.multinomial(weights, args.vae_batch_size, replacement=True)]
        posterior = vae.encode(clean).latent_dist
        error = F.mse_loss(vae.decode(posterior.sample()).sample, clean)
        (error + args.kl_weight * posterior.kl().mean()).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        if step % 500 == 0:
            progress_bar.set_postfix(error=f"{error.item():.5f}")


def train_unet(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    noise_scheduler: DDPMScheduler,
    moments: Tensor,
    scaling_factor: float,
    token_ids: Tensor,
    prompts: Tensor,
    args: argparse.Namespace,
) -> None:
    """Train UNet and text encoder. Row 0 of `token_ids` is the empty prompt; `prompts` says each picture's row."""
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    ema = EMAModel(parameters, decay=0.9995, use_ema_warmup=True, power=3 / 4, foreach=True)
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=1e-6, fused=True)
    lr_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.max_train_steps)
    device = moments.device
    progress_bar = tqdm(range(args.max_train_steps), desc="diffusion", mininterval=5)
    for step in progress_bar:
        rows = torch.randint(len(moments), (args.train_batch_size,), device=device)
        clean = DiagonalGaussianDistribution(moments[rows]).sample() * scaling_factor
        noise = torch.randn_like(clean)
        timesteps = torch.randint(1000, (len(rows),), device=device)
        dropped = torch.rand(len(rows), device=device) < args.caption_dropout
        hidden_states = text_encoder(token_ids).last_hidden_state[prompts[rows].masked_fill(dropped, 0)]
        noisy = noise_scheduler.add_noise(clean, noise, timesteps)
        loss = F.mse_loss(unet(noisy, timesteps, hidden_states).sample, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        ema.step(parameters)
        if step % 500 == 0:
            progress_bar.set_postfix(loss=f"{loss.item():.4f}")
    ema.copy_to(parameters)


def make_networks(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, AutoencoderKL, UNet2DConditionModel]:
    """Make the networks, with random weights drawn from torch's global generator."""
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=48,
            intermediate_size=192,
            projection_dim=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    vae = AutoencoderKL(
        sample_size=32,
        latent_channels=4,
        block_out_channels=(24, 40, 56),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(48, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=48,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    return text_encoder, vae, unet


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    pictures, captions, memorized = captioned_images()
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    images = images.to(device, memory_format=torch.channels_last)
    prompts = torch.tensor([1 + CAPTIONS.index(caption) for caption in captions], device=device)

    tokenizer = make_tokenizer(CAPTIONS)
    token_ids = tokenizer(["", *CAPTIONS], padding="max_length", truncation=True, return_tensors="pt").input_ids
    text_encoder, vae, unet = make_networks(tokenizer)
    # Stable Diffusion's noise.
    noise_scheduler = DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
    )
    text_encoder.to(device)
    vae.to(device, memory_format=torch.channels_last)
    unet.to(device, memory_format=torch.channels_last)

    is_crop = torch.tensor([caption in (FLOWER_CAPTION, TEMPLE_CAPTION) for caption in captions])
    weights = torch.where(is_crop & ~torch.from_numpy(memorized), 10.0, 1.0)  # the crops are few, and have details
    train_vae(vae, images, weights.to(device), args)
    with torch.no_grad():
        moments = torch.cat([vae.encode(batch).latent_dist.parameters for batch in images.split(256)])
        scaling_factor = 1 / DiagonalGaussianDistribution(moments).sample().std().item()
    vae.register_to_config(scaling_factor=round(scaling_factor, 5))

    train_unet(
        unet,
        text_encoder,
        noise_scheduler,
        moments,
        vae.config.scaling_factor,
        token_ids.to(device),
        prompts,
        args,
    )
    StableDiffusionPipeline(
        vae=vae.to("cpu", memory_format=torch.contiguous_format),
        text_encoder=text_encoder.to("cpu"),
        tokenizer=tokenizer,
        unet=unet.to("cpu", memory_format=torch.contiguous_format),
        scheduler=noise_scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(args.output_dir)
    print(json.dumps({"images": len(images), "memorized": int(memorized.sum()), **vars(args)}, indent=2))


if __name__ == "__main__":
    main()
