"""What the commands of `siss` share."""

import argparse
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from diffusers import StableDiffusionPipeline
from torch import Tensor
from tqdm.auto import tqdm

from siss_diffusers.errors import UsageError, describe_error
from siss_diffusers.families.stable_diffusion import check_stable_diffusion, choose_resolution
from siss_diffusers.families.trust import check_safetensors, loading
from siss_diffusers.flags import non_negative_float, positive_int, seed_number
from siss_diffusers.metrics.sampling import sample_prompts
from siss_diffusers.storage.files import read_json


logger = logging.getLogger(__name__)


def add_sampling_arguments(parser: argparse.ArgumentParser, batch_size: int) -> None:
    """How samples are made, under the names that the training script uses."""
    parser.add_argument("--seed", type=seed_number, default=0, help="Seed of the first sample; default: 0.")
    parser.add_argument("--num_inference_steps", type=positive_int, default=50, help="DDIM steps; default: 50.")
    parser.add_argument(
        "--guidance_scale", type=non_negative_float, default=7.5, help="Classifier-free guidance; default: 7.5."
    )
    parser.add_argument("--resolution", type=positive_int, help="Side of the pictures; default: the model's own.")
    parser.add_argument(
        "--batch_size", type=positive_int, default=batch_size, help=f"Samples at a time; default: {batch_size}."
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        default="float32",
        help="Precision of the model; default: float32.",
    )


def load_resolution(args: argparse.Namespace, name: str, flag: str) -> int:
    """`choose_resolution` of a pipeline, from its configurations."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    with loading(name, flag):
        unet_config, vae_config = (
            model.load_config(name, subfolder=subfolder, cache_dir=args.cache_dir)
            for model, subfolder in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae"))
        )
        return choose_resolution(args.resolution, unet_config, vae_config)


def load_stable_diffusion(
    args: argparse.Namespace, name: str, flag: str, adapter: str | None = None, adapter_flag: str = "--adapter"
) -> "StableDiffusionPipeline":
    """The pipeline on this process's device, with an adapter in it where one is named.

    Args:
        flag, adapter_flag: where the names come from, for messages.

    Raises:
        UsageError: for what is no Stable Diffusion pipeline, or no adapter for it.
    """
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    check_stable_diffusion(name, flag, cache_dir=args.cache_dir)
    if adapter is not None:
        check_safetensors(adapter, adapter_flag)
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
        # A warning about a long prompt would print it.
        library.set_verbosity_error()
    device = PartialState().device
    # No safety checker: a picture that it blacks out could not be compared.
    with loading(name, flag):
        pipeline = StableDiffusionPipeline.from_pretrained(
            name,
            dtype=getattr(torch, args.dtype),
            cache_dir=args.cache_dir,
            safety_checker=None,
            requires_safety_checker=False,
            use_safetensors=True,
        )
    if adapter is not None:
        with loading(adapter, adapter_flag):
            pipeline.load_lora_weights(adapter, cache_dir=args.cache_dir, use_safetensors=True)
    pipeline.to(device)
    if device.type == "cpu":
        pipeline.unet.to(memory_format=torch.channels_last)  # faster there
    return pipeline


def warn_of_long_prompts(pipeline: "StableDiffusionPipeline", prompts: Sequence[str]) -> None:
    """By number only: a prompt may be what has to be forgotten."""
    limit = pipeline.tokenizer.model_max_length
    tokens = pipeline.tokenizer(list(prompts), truncation=False, verbose=False).input_ids if prompts else []
    too_long = sum(len(ids) > limit for ids in tokens)
    if too_long and PartialState().is_main_process:
        logger.warning(f"{too_long} prompts are longer than the {limit} tokens that are seen of each")


def encode(pipeline: "StableDiffusionPipeline", prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Hidden states of the prompts `(N, L, D)` and of the empty one `(1, L, D)`."""
    with torch.no_grad():
        embeds, negative = pipeline.encode_prompt(list(prompts), pipeline.device, 1, True)
    return embeds, negative[:1]


def sample_batch(pipeline: "StableDiffusionPipeline", prompts: Sequence[str], args: argparse.Namespace, seed: int):
    """Samples `(N, 3, H, W)` in [0, 1] of a prompt each; sample i is of seed `seed + i`."""
    return sample_prompts(
        pipeline,
        *encode(pipeline, prompts),
        seed=seed,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        batch_size=args.batch_size,
        resolution=args.resolution,
    )


def on_all_processes(function: Callable, items: Sequence, progress: str | None = None) -> list:
    """`[function(item) for item in items]` on every process, each having done a part of it. What an item is must not
    depend on how many processes there are: a batch, then, not a sample."""
    state = PartialState()
    hidden = progress is None or not state.is_main_process
    indices = range(state.process_index, len(items), state.num_processes)
    found = [(index, function(items[index])) for index in tqdm(indices, desc=progress, disable=hidden)]
    if state.num_processes > 1:
        found = sorted(gather_object(found), key=lambda pair: pair[0])
    return [result for _, result in found]


def read_state(flag: str, file: Path) -> dict:
    """A JSON file that an earlier command left.

    Raises:
        UsageError: where it cannot be read.
    """
    try:
        found = read_json(file)
        if not isinstance(found, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{flag}: cannot read {file} ({describe_error(error)}); remove it")
    return found


def read_prompts(flag: str, prompts: Sequence[str] | None, file: str | None) -> list[str]:
    """Prompts from the command line and from a file of one a line, each once, in their order.

    Raises:
        UsageError: where the file cannot be read or there is none.
    """
    found = list(prompts or [])
    if file is not None:
        try:
            found += [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{flag}_file: cannot read {file} ({error})")
    return list(dict.fromkeys(found))
