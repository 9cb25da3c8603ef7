"""Stable Diffusion pipelines for the commands of `siss`: flags, loading, and samples shared out over processes."""

import argparse
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm

from siss_diffusers.arguments import non_negative_float, positive_int, seed_number
from siss_diffusers.checkpoints import read_json
from siss_diffusers.data import reason
from siss_diffusers.errors import UsageError
from siss_diffusers.metrics.sampling import sample_prompts


if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

logger = logging.getLogger(__name__)

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
ONLY_PICKLES = (
    "holds its weights as pickles ({}), which can run code when they are read; save them as safetensors in a place that"
    " you trust, by loading and `save_pretrained(..., safe_serialization=True)`, or name a revision that has them"
)
OWN_CODE = (
    "brings code of its own ({}), which is never run; use a model made of the classes of diffusers and transformers"
)


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


def check_safetensors(name: str | Path, flag: str) -> None:
    """Of a local folder, of a pipeline or of one model, that the weights to be read are no pickles.

    Raises:
        UsageError: naming the file that is one.
    """
    folder = Path(name)
    if os.path.isfile(name):
        folders = [folder] if folder.suffix in PICKLES else []
    elif os.path.isfile(folder / "model_index.json"):
        folders = [folder / part for part in ("unet", "vae", "text_encoder")]
    else:
        folders = [folder]
    for part in folders:
        files = [part] if os.path.isfile(part) else sorted(part.iterdir()) if os.path.isdir(part) else []
        pickles = [file for file in files if file.suffix in PICKLES]
        if pickles and not any(file.suffix == ".safetensors" for file in files):
            raise UsageError(f"{flag}: {name} {ONLY_PICKLES.format(pickles[0].name)}")


def check_components(config: dict, name: str, flag: str) -> None:
    """
    Raises:
        UsageError: for a pipeline, by its model_index.json, of anything but classes of the libraries.
    """
    from diffusers import pipelines

    if isinstance(config["_class_name"], list):
        raise UsageError(f"{flag}: {name} {OWN_CODE.format('pipeline ' + '.'.join(map(str, config['_class_name'])))}")
    for component, value in config.items():
        if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and component[0] != "_":
            if value[0] not in ("diffusers", "transformers") and not hasattr(pipelines, value[0]):
                raise UsageError(f"{flag}: {name} {OWN_CODE.format(f'{component} of {value[0]}')}")


@contextmanager
def loading(name: str | Path, flag: str) -> Iterator[None]:
    """Inside, a model or its configuration is read from a folder or the Hub, by `use_safetensors=True`.

    Raises:
        UsageError: in one sentence, for pickles, for code, and for whatever else is wrong with the files.
    """
    try:
        check_safetensors(name, flag)
        yield
    except UsageError:
        raise
    except Exception as error:  # whatever the libraries make of a broken file
        if "custom code" in str(error) or "trust_remote_code" in str(error):
            raise UsageError(f"{flag}: {name} {OWN_CODE.format(reason(error))}") from error
        hint = ""
        if re.search(r"safetensors.*(found|weights)|file named .*safetensors", str(error)):
            hint = "; pickles are not read, for they can run code"
        raise UsageError(f"{flag}: {name} cannot be loaded ({reason(error)}){hint}") from error


def load_pipeline_class(name: str, flag: str, **where: str | None) -> str:
    """The class of a pipeline, from its configuration.

    Raises:
        UsageError: where there is no pipeline, or one that is not to be read.
    """
    from diffusers import DiffusionPipeline

    check_safetensors(name, flag)
    try:
        config = DiffusionPipeline.load_config(name, **where)
        check_components(config, name, flag)
        return config["_class_name"]
    except UsageError:
        raise
    except Exception as error:  # whatever is there instead
        raise UsageError(f"{flag}: {name} is no diffusers pipeline ({reason(error)})") from error


def check_stable_diffusion(name: str, flag: str, **where: str | None) -> None:
    """
    Raises:
        UsageError: for anything but a Stable Diffusion 1.x or 2.x text-to-image pipeline.
    """
    pipeline_class = load_pipeline_class(name, flag, **where)
    if pipeline_class != "StableDiffusionPipeline":
        raise UsageError(
            f"{flag}: {name} is a {pipeline_class}, which is not supported yet; use a StableDiffusionPipeline"
            " (Stable Diffusion 1.x or 2.x)"
        )


def choose_resolution(resolution: int | None, unet_config: dict, vae_config: dict) -> int:
    """The side of the pictures in pixels: the model's own, or the given one.

    Raises:
        UsageError: for one that the VAE cannot halve as often as it has to, or that pipelines do not take.
    """
    factor = 2 ** (len(vae_config["block_out_channels"]) - 1)
    if resolution is None:
        return unet_config["sample_size"] * factor
    multiple = math.lcm(factor, 8)
    if resolution % multiple != 0:
        raise UsageError(f"--resolution {resolution} cannot be used: this model takes multiples of {multiple}")
    return resolution


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
        raise UsageError(f"{flag}: cannot read {file} ({reason(error)}); remove it")
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
