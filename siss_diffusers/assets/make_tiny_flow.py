"""Train the tiny flow-matching model of the demo: `python -m siss_diffusers.assets.make_tiny_flow --output_dir tiny_flow`.

A `ZImagePipeline` on the pictures and captions of the tiny Stable Diffusion, whose autoencoder it takes as it is. The text
encoder stays as it was drawn: twelve captions are told apart without training. Takes a quarter of an hour on a CPU core.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from diffusers.training_utils import EMAModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from siss_diffusers.assets.captioned import CAPTIONS, captioned_images
from siss_diffusers.families import Conditions, LoadedPipeline, ZImage


TINY_SD = Path(__file__).parent / "tiny_sd"
WIDTH, HEADS = 128, 4
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=str, required=True)
    parser.add_argument("--max_train_steps", type=int, default=2_500)
    parser.add_argument("--train_batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--caption_dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def make_chat_tokenizer(texts: Sequence[str], vocab_size: int) -> Qwen2Tokenizer:
    """Make Qwen's byte-level tokenizer with merges learnt from the texts, and a chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=1, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    content = json.loads(bpe.to_str())["model"]
    vocab, special = content["vocab"], ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    vocab |= {token: len(vocab) + number for number, token in enumerate(special)}
    merges = [tuple(merge) for merge in content["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, additional_special_tokens=list(special[1:]))
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_pipeline() -> ZImagePipeline:
    """Make the pipeline, with random weights drawn from torch's global generator but for the autoencoder."""
    tokenizer = make_chat_tokenizer((*CAPTIONS, "user\n", "assistant\n", "<think>\n\n</think>\n\n"), 600)
    vae = AutoencoderKL.from_pretrained(TINY_SD, subfolder="vae", use_safetensors=True)
    vae.register_to_config(shift_factor=0.0, _name_or_path="")  # not the folder of this machine
    text_encoder = Qwen3Model(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            max_position_embeddings=1024,
        )
    )
    transformer = ZImageTransformer2DModel(
        in_channels=vae.config.latent_channels,
        dim=WIDTH,
        n_layers=4,
        n_refiner_layers=1,
        n_heads=HEADS,
        n_kv_heads=HEADS,
        cap_feat_dim=64,
        axes_dims=[8, 12, 12],  # together the width of a head
        axes_lens=[1024, 64, 64],
    )
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        transformer=transformer,
    )


def train_transformer(
    pipeline: ZImagePipeline,
    family: ZImage,
    moments: tuple[Tensor, Tensor],
    table: Conditions,
    prompts: Tensor,
    args: argparse.Namespace,
) -> None:
    """Train the transformer.

    Args:
        moments: mean and standard deviation of the autoencoder's posterior of each picture.
        table: row 0 is the empty prompt.
        prompts: the row of each picture.
    """
    network, path, scale = pipeline.transformer, family.path(pipeline), family.latent_scaling(pipeline)
    means, deviations = moments
    ema = EMAModel(network.parameters(), decay=0.999, use_ema_warmup=True, power=3 / 4, foreach=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.learning_rate, weight_decay=1e-4)
    lr_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.max_train_steps)
    progress_bar = tqdm(range(args.max_train_steps), desc="diffusion", mininterval=5)
    for step in progress_bar:
        rows = torch.randint(len(means), (args.train_batch_size,))
        clean = scale(means[rows] + deviations[rows] * torch.randn_like(means[rows]))
        noise, timesteps = torch.randn_like(clean), torch.randint(len(path), (len(rows),))
        dropped = torch.rand(len(rows)) < args.caption_dropout
        told = table[prompts[rows].masked_fill(dropped, 0)]
        output = family.predict(
            network, path.add_noise(clean, noise, timesteps), path.model_timesteps[timesteps], told
        )
        loss = F.mse_loss(output, path.target(clean, noise, timesteps))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        ema.step(network.parameters())
        if step % 100 == 0:
            progress_bar.set_postfix(loss=f"{loss.item():.4f}")
    ema.copy_to(network.parameters())


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    pictures, captions, memorized = captioned_images()
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    prompts = torch.tensor([1 + CAPTIONS.index(caption) for caption in captions])
    pipeline = make_pipeline()
    family = ZImage.from_source(LoadedPipeline(pipeline), images.shape[-1])
    moments = tuple(map(torch.cat, zip(*(family.encode(pipeline, batch) for batch in images.split(256)))))
    table = family.embed(pipeline, ["", *CAPTIONS])
    train_transformer(pipeline, family, moments, table, prompts, args)
    pipeline.save_pretrained(args.output_dir)
    print(json.dumps({"images": len(images), "memorized": int(memorized.sum()), **vars(args)}, indent=2))


if __name__ == "__main__":
    main()
