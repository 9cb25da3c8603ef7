"""Unlearn training images from Stable Diffusion, by LoRA or in full; mirrors diffusers' train_text_to_image.py and
train_text_to_image_lora.py."""

import argparse
import gc
import math
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa
import torch
import torch.distributed
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, broadcast_object_list
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import check_min_version
from transformers import CLIPTextModel, PreTrainedTokenizerBase

from siss_diffusers import GaussianPath, PairedGradients, Query, Rows
from siss_diffusers.calibration import DRAWS_PER_BIN, NUM_BINS, measure_thresholds
from siss_diffusers.data.captions import load_captions, same_captions
from siss_diffusers.data.images import ImageTransform
from siss_diffusers.data.latents import MAX_NEIGHBOR_CANDIDATES, Latents, nearest_neighbors
from siss_diffusers.data.pairs import PairDataset, WindowSampler, first_positions, window_loader
from siss_diffusers.data.split import split_data
from siss_diffusers.draws import ADAPTER, MODEL, shuffled_index, torch_seed
from siss_diffusers.errors import UsageError
from siss_diffusers.families.stable_diffusion import check_stable_diffusion, choose_resolution
from siss_diffusers.families.trust import loading
from siss_diffusers.flags import (
    add_training_arguments,
    add_unlearning_arguments,
    check_training_arguments,
    check_unlearning_arguments,
)
from siss_diffusers.metrics.copies import MAX_KEEP_IMAGES, CopyDetectors, copy_statistics, for_detectors
from siss_diffusers.metrics.sampling import sample_prompts
from siss_diffusers.noising import min_snr_weight
from siss_diffusers.parsing import Parser, non_negative_float, positive_float, positive_int, unit_float
from siss_diffusers.process import program_name, run
from siss_diffusers.storage.checkpoints import tidy
from siss_diffusers.storage.sharding import is_sharded, load_model, reshard, save_model, save_pipeline
from siss_diffusers.storage.tensors import load_state
from siss_diffusers.training.adapters import (
    ATTENTION_PROJECTIONS,
    LORA_FILE,
    add_lora,
    check_target_modules,
    load_lora,
    save_lora,
)
from siss_diffusers.training.engines import (
    make_accelerator,
    make_optimizer,
    start_trackers,
    take_step,
    trained_network,
    without_sync,
)
from siss_diffusers.training.log import StepLog
from siss_diffusers.training.output_dir import check_output_dir, clear_output_dir
from siss_diffusers.training.publish import finish, prepare_repository
from siss_diffusers.training.receipt import write_receipt
from siss_diffusers.training.record import write_report
from siss_diffusers.training.resume import DataPart, check_resumed, describe_run, find_resumed, planned_positions
from siss_diffusers.training.schedule import current_forget_range, timestep_ranges
from siss_diffusers.training.signals import StopSignal
from siss_diffusers.training.state import (
    averaged_weights,
    initial_state,
    lagged_forget_scale,
    restore_training_state,
    save_together,
    save_training_state,
    write_checkpoints,
)
from siss_diffusers.training.validation import log_sample_images, log_validation


check_min_version("0.42.0")

logger = get_logger(__name__, log_level="INFO")

MODEL_FILES = (
    *("unet", "vae", "text_encoder", "tokenizer", "scheduler", "safety_checker", "feature_extractor", "image_encoder"),
    *("model_index.json", LORA_FILE),
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog=program_name(), description="Unlearn training images from Stable Diffusion.")
    add_training_arguments(
        parser,
        model=(
            "A Stable Diffusion 1.x or 2.x pipeline: a folder, or a name on the Hub such as"
            " CompVis/stable-diffusion-v1-4."
        ),
        output_dir="siss-sd",
        learning_rate="Of AdamW; default: 1e-5, or 1e-4 with --use_lora.",
        adam_beta1=0.9,
        adam_weight_decay=1e-2,
    )
    parser.add_argument("--max_train_steps", type=positive_int, default=None, help="Optimizer steps; default: 35.")
    parser.add_argument(
        "--num_train_epochs",
        type=positive_int,
        default=None,
        help="Passes over the keep set, instead of --max_train_steps.",
    )
    parser.add_argument("--caption_column", type=str, default="text", help="The column of the prompts.")
    parser.add_argument(
        "--max_train_samples", type=positive_int, default=None, help="Use so many images of the keep set, at random."
    )
    parser.add_argument(
        "--image_interpolation_mode",
        type=str,
        default="lanczos",
        choices=["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"],
        help="How images are resized.",
    )
    parser.add_argument(
        "--cache_latents",
        action=argparse.BooleanOptionalAction,
        default=None,
        help=(
            "Encode images once, before training. Default: unless augmentation is random, by --random_flip, or by"
            " random crops of images that are not square."
        ),
    )
    parser.add_argument("--scale_lr", action="store_true", help="Multiply the learning rate by the pairs of a step.")
    parser.add_argument(
        "--snr_gamma", type=positive_float, default=None, help="Weight both losses by min-SNR; the paper says 5.0."
    )
    parser.add_argument("--non_ema_revision", type=str, default=None, help="Revision of the UNet that is trained.")
    parser.add_argument("--offload_ema", action="store_true", help="Keep the average on the CPU between its updates.")
    parser.add_argument("--foreach_ema", action="store_true", help="Update the average by fused operations.")
    parser.add_argument("--tracker_project_name", type=str, default="train_siss_sd", help="For the tracker.")

    lora = parser.add_argument_group("LoRA")
    lora.add_argument("--use_lora", action="store_true", help="Train an adapter and leave the model as it is.")
    lora.add_argument("--rank", type=positive_int, default=4, help="Rank of the adapter.")
    lora.add_argument(
        "--lora_alpha", type=positive_float, default=None, help="The adapter is scaled by alpha / rank; default: rank."
    )
    lora.add_argument("--lora_dropout", type=unit_float, default=0.0, help="Dropout before the adapter.")
    lora.add_argument(
        "--lora_target_modules",
        type=str,
        nargs="+",
        default=list(ATTENTION_PROJECTIONS),
        help=f"Layers that get an adapter; default: {' '.join(ATTENTION_PROJECTIONS)}.",
    )

    add_unlearning_arguments(parser, calibrate_by_default=True)
    validation = parser.add_argument_group("validation")
    validation.add_argument(
        "--validation_epochs", type=positive_int, default=None, help="Validate every so many passes over the keep set."
    )
    validation.add_argument(
        "--validation_prompts",
        "--validation_prompt",
        type=str,
        nargs="+",
        default=[],
        help="Samples of these go to the tracker, copies of forget images blanked out. They are public; the prompts of"
        " forget images are sampled too, and only counted.",
    )
    validation.add_argument(
        "--guidance_scale", type=non_negative_float, default=7.5, help="Of samples made in training."
    )
    validation.add_argument(
        "--num_inference_steps", type=positive_int, default=50, help="DDIM steps of samples made in training."
    )
    validation.add_argument("--eval_batch_size", type=positive_int, default=4, help="Batch of samples in training.")
    parser.set_defaults(num_validation_images=16)
    args = parser.parse_args(argv)

    if args.max_train_steps is not None and args.num_train_epochs is not None:
        parser.error("--max_train_steps and --num_train_epochs exclude each other; give one")
    if args.max_train_steps is None and args.num_train_epochs is None:
        args.max_train_steps = 35
    if args.validation_steps is not None and args.validation_epochs is not None:
        parser.error("--validation_steps and --validation_epochs exclude each other; give one")
    if args.validation_prompts and not (args.validation_steps or args.validation_epochs):
        parser.error("--validation_prompts needs --validation_steps, which says how often to look")
    if args.cache_latents and args.random_flip:
        parser.error("--cache_latents and --random_flip exclude each other: a cached latent cannot be flipped")
    if args.lora_dropout == 1:
        parser.error("--lora_dropout must be below 1, or nothing is left to train")
    if not args.use_lora:
        for flag in ("rank", "lora_alpha", "lora_dropout", "lora_target_modules"):
            if getattr(args, flag) != parser.get_default(flag):
                parser.error(f"--{flag} needs --use_lora")
    if args.offload_ema and not args.use_ema:
        parser.error("--offload_ema needs --use_ema")
    if args.lora_alpha is None:
        args.lora_alpha = args.rank
    if args.learning_rate is None:
        args.learning_rate = 1e-4 if args.use_lora else 1e-5
    return args


def load_configs(args: argparse.Namespace) -> tuple[dict, dict]:
    """The configurations of the UNet and the VAE, before any weights are read.

    Raises:
        UsageError: for anything but a Stable Diffusion 1.x or 2.x text-to-image pipeline.
    """
    flag, name = "--pretrained_model_name_or_path", args.pretrained_model_name_or_path
    if any(os.path.exists(os.path.join(name, file)) for file in (LORA_FILE, "adapter_config.json")):
        if not os.path.exists(os.path.join(name, "model_index.json")):
            raise UsageError(f"{flag}: {name} is an adapter; name the pipeline that it was trained on")
    where = {"revision": args.revision, "cache_dir": args.cache_dir}
    check_stable_diffusion(name, flag, **where)
    with loading(name, flag):
        unet_config = UNet2DConditionModel.load_config(name, subfolder="unet", **where)
        vae_config = AutoencoderKL.load_config(name, subfolder="vae", **where)
        channels, latent_channels = unet_config["in_channels"], vae_config["latent_channels"]
        choose_resolution(args.resolution, unet_config, vae_config)
    if channels != latent_channels:
        raise UsageError(
            f"{flag}: the UNet takes {channels} channels and the VAE makes {latent_channels}; inpainting and other"
            " conditioned models are not supported yet"
        )
    return unet_config, vae_config


class Prompts:
    """Numbers prompts by their token ids, so that two spellings of the same tokens are the same condition."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.numbers: dict[tuple[int, ...], int] = {}
        self.truncated = 0

    def number(self, captions: list[str]) -> list[int]:
        distinct = list(dict.fromkeys(captions))
        if not distinct:
            return []
        length = self.tokenizer.model_max_length
        ids = self.tokenizer(distinct, max_length=length, padding="max_length", truncation=True).input_ids
        whole = self.tokenizer(distinct, truncation=False, verbose=False).input_ids
        too_long = {caption for caption, tokens in zip(distinct, whole) if len(tokens) > length}
        self.truncated += sum(caption in too_long for caption in captions)
        found = {
            caption: self.numbers.setdefault(tuple(tokens), len(self.numbers))
            for caption, tokens in zip(distinct, ids)
        }
        return [found[caption] for caption in captions]

    def embed(
        self, text_encoder: CLIPTextModel, numbers: set[int], dtype: torch.dtype
    ) -> tuple[torch.Tensor, dict[int, int]]:
        """The table of hidden states `(U, L, D)` of the given prompts, and the row of each in it."""
        ids = {number: ids for ids, number in self.numbers.items() if number in numbers}
        batches = torch.tensor(list(ids.values()), device=text_encoder.device).split(32)
        with torch.no_grad():
            table = torch.cat([text_encoder(batch)[0].to(dtype) for batch in batches])
        return table, {number: row for row, number in enumerate(ids)}


def vae_encoder(vae: AutoencoderKL):
    """Maps pixels `(C, H, W)` in [-1, 1] to mean and standard deviation of the posterior, on the host."""

    def encode(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            posterior = vae.encode(pixels[None].to(vae.device)).latent_dist
        return posterior.mean[0].cpu(), posterior.std[0].cpu()

    return encode


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_training_arguments(args)
    method, rule = check_unlearning_arguments(args, calibrate_by_default=True)
    output_dir = Path(args.output_dir)
    check_output_dir(args)
    unet_config, vae_config = load_configs(args)
    resolution = choose_resolution(args.resolution, unet_config, vae_config)
    if args.use_lora:
        check_target_modules(unet_config, args.lora_target_modules)

    accelerator = make_accelerator(args)
    repo_id = prepare_repository(args, accelerator)
    device = accelerator.device

    # The data: what to keep, what to forget. Everything that can be wrong with it is found here.
    transform = ImageTransform(
        channels=3,
        resolution=resolution,
        center_crop=args.center_crop,
        random_flip=args.random_flip,
        interpolation=args.image_interpolation_mode,
    )
    checkpoint = find_resumed(args, accelerator)
    num_positions = planned_positions(args, accelerator, checkpoint)
    train_images, forget_images, keep_order, forget_digests = split_data(
        args, transform, accelerator, num_positions, args.max_train_samples
    )
    train_captions = load_captions(train_images, args.caption_column, keep_order.candidates)
    forget_captions = load_captions(forget_images, args.caption_column).to_pylist()

    def captions_of(rows: Sequence[int]) -> list[str]:
        return train_captions.take(pa.array(rows, pa.int64())).to_pylist()

    data = {
        "images to keep": DataPart(len(keep_order.candidates), keep_order.digests[keep_order.drawn]),
        "images to forget": DataPart(len(forget_images), forget_digests),
    }
    prompts_used = [caption.encode() for caption in forget_captions + captions_of(keep_order.drawn)]
    data["prompts"] = DataPart(len(forget_captions) + len(keep_order.candidates), prompts_used)
    description = describe_run(args, method, accelerator, checkpoint, data)
    if checkpoint is not None:
        check_resumed(args, checkpoint, description, data)

    # Ordinary images to compare with: of the prompts of the forget images, where there are any.
    alike = same_captions(train_captions, forget_captions)

    def first_alike(count: int) -> list[int]:
        return keep_order.first(count, alike) or keep_order.first(count)

    calibration_rows = [] if args.calibrate_forgetting is None else first_alike(NUM_BINS * DRAWS_PER_BIN)
    detector_rows = first_alike(MAX_KEEP_IMAGES) if args.validation_steps or args.validation_epochs else []
    candidates = keep_order.first(MAX_NEIGHBOR_CANDIDATES, alike) if hasattr(method, "num_neighbors") else []
    counts = {"train": len(train_images), "forget": len(forget_images), **keep_order.counts()}
    encoded = {*keep_order.drawn.tolist(), *calibration_rows, *candidates}
    random_crops = not args.center_crop and not (train_images.all_square(encoded) and forget_images.all_square())
    if args.cache_latents and random_crops:
        raise UsageError(
            "--cache_latents: some images are not square, and a cached latent cannot be cropped; add --center_crop"
        )
    cache_latents = args.cache_latents is not False and not (args.random_flip or random_crops)
    logger.info(
        f"Keep {counts['keep']}, forget {counts['forget']} images; removed {counts['duplicates_removed']} exact"
        f" duplicates of forget images from the keep set, among the {counts['checked']} images that may be used"
    )

    # The models
    where = {"variant": args.variant, "cache_dir": args.cache_dir, "use_safetensors": True}
    load_pipeline = partial(
        StableDiffusionPipeline.from_pretrained,
        args.pretrained_model_name_or_path,
        revision=args.revision,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        dtype=torch.float32,
        **where,
    )
    with loading(args.pretrained_model_name_or_path, "--pretrained_model_name_or_path"):
        pipeline = load_pipeline()
        if args.non_ema_revision is not None:
            pipeline.unet = UNet2DConditionModel.from_pretrained(
                args.pretrained_model_name_or_path, subfolder="unet", revision=args.non_ema_revision, **where
            )
    vae, text_encoder, unet = pipeline.vae, pipeline.text_encoder, pipeline.unet
    vae.requires_grad_(False).to(device)
    text_encoder.requires_grad_(False).to(device)
    overrides = {} if args.prediction_type is None else {"prediction_type": args.prediction_type}
    noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, **overrides)
    path = GaussianPath.from_scheduler(noise_scheduler)
    timestep_range, forget_timestep_ranges, forget_span = timestep_ranges(args, len(path))

    # With an adapter the frozen weights can be in half precision; what is trained is always in float32.
    weight_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(args.mixed_precision, torch.float32)
    if args.use_lora:
        torch.manual_seed(torch_seed(args.seed, ADAPTER))
        add_lora(unet, args.rank, args.lora_alpha, args.lora_dropout, args.lora_target_modules, dtype=weight_dtype)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.enable_xformers_memory_efficient_attention:
        unet.enable_xformers_memory_efficient_attention()
    unet.train()
    trainable = [parameter for parameter in unet.parameters() if parameter.requires_grad]

    pairs_per_step = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    steps_per_epoch = math.ceil(counts["keep"] / pairs_per_step)
    if args.max_train_steps is None:
        args.max_train_steps = args.num_train_epochs * steps_per_epoch
    validation_steps = args.validation_steps
    if args.validation_epochs is not None:
        validation_steps = args.validation_epochs * steps_per_epoch
    if args.scale_lr:
        args.learning_rate *= pairs_per_step
    optimizer = make_optimizer(args, trainable)
    # Not prepared: accelerate would step a prepared one once for every process.
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )

    # What the seeded order will draw is known now: latents and text embeddings are computed for that, once.
    state, saved = initial_state(), None
    if checkpoint is not None:
        accelerator.print(f"Resuming from {checkpoint.name}")
        saved = load_state(checkpoint)
        state |= saved["progress"]
    sampler = WindowSampler(
        batch_size=args.train_batch_size,
        accumulation_steps=args.gradient_accumulation_steps,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        first_window=state["window"],
    )
    planned_windows = args.max_train_steps + args.max_skipped_steps
    positions = first_positions(sampler, planned_windows)
    # Of the images to keep also those to compare with; ReTrack compares all forget images.
    keep_rows = sorted({*(keep_order[position] for position in positions), *calibration_rows, *candidates})
    forget_rows = {shuffled_index(args.seed, 1, position, len(forget_images)) for position in positions}
    if hasattr(method, "num_neighbors"):
        forget_rows = set(range(len(forget_images)))
    prompts = Prompts(pipeline.tokenizer)
    forget_conditions = prompts.number(forget_captions)
    keep_conditions = dict(zip(keep_rows, prompts.number(captions_of(keep_rows))))
    (empty_prompt,), validation_conditions = prompts.number([""]), prompts.number(args.validation_prompts)
    if prompts.truncated:
        logger.warning(
            f"{prompts.truncated} prompts are longer than the {pipeline.tokenizer.model_max_length} tokens that the"
            " text encoder takes; what is beyond is not seen"
        )
    forget_prompts = sorted(set(forget_conditions))

    encode, scaling_factor = vae_encoder(vae), vae.config.scaling_factor
    keep, forget = (Latents(images, encode, scaling_factor) for images in (train_images, forget_images))
    if cache_latents:
        started = time.perf_counter()
        keep.cache(keep_rows, progress=accelerator.is_local_main_process)
        forget.cache(forget_rows)
        logger.info(
            f"Encoded {len(keep_rows) + len(forget_rows)} images in {time.perf_counter() - started:.1f} s; their"
            f" latents take {(keep.cached_bytes + forget.cached_bytes) / 1e6:.0f} MB of memory"
        )
    used = {*keep_conditions.values(), *forget_prompts, *validation_conditions, empty_prompt}
    prompt_table, row_of = prompts.embed(text_encoder, used, weight_dtype)
    keep_conditions = {row: row_of[number] for row, number in keep_conditions.items()}
    forget_conditions = [row_of[number] for number in forget_conditions]
    neighbors = None
    if hasattr(method, "num_neighbors"):
        logger.info(f"Searching the neighbours of the forget images among {len(candidates)} keep images")
        neighbors = nearest_neighbors(
            keep, forget, method.num_neighbors, candidates, keep_conditions, forget_conditions
        )

    # Free what has done its work.
    pipeline.text_encoder = text_encoder = None
    if cache_latents and not validation_steps:
        pipeline.vae = vae = encode = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

    model, optimizer = accelerator.prepare(unet, optimizer)
    unet = accelerator.unwrap_model(model, keep_torch_compile=False)
    network = trained_network(accelerator, model)
    trainable = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    sharded = is_sharded(unet)
    path_on_device = path.to(device)
    ema_model = EMAModel(trainable, foreach=args.foreach_ema) if args.use_ema else None
    if args.offload_ema:
        ema_model.to("cpu")

    if accelerator.is_main_process:
        if args.overwrite_output_dir and args.resume_from_checkpoint is None:
            clear_output_dir(output_dir, MODEL_FILES)
        output_dir.mkdir(parents=True, exist_ok=True)
        tidy(output_dir, checkpoint)
    accelerator.wait_for_everyone()

    def predict(rows: Rows) -> torch.Tensor:
        hidden_states = prompt_table[rows.condition]
        return network(rows.noisy, path_on_device.model_timesteps[rows.timesteps], hidden_states).sample

    # Resume: everything that the next step depends on.
    thresholds = None
    if saved is not None:
        thresholds = None if saved["thresholds"] is None else saved["thresholds"][...]
        if args.use_lora:
            load_lora(unet, checkpoint)
        else:
            load_model(unet, checkpoint / "unet")
        restore_training_state(saved, accelerator, optimizer, lr_scheduler, ema_model)
    elif args.calibrate_forgetting is not None:
        started = time.perf_counter()

        def predict_on_host(noisy: torch.Tensor, timesteps: torch.Tensor, images: list[int]) -> torch.Tensor:
            hidden_states = prompt_table[[keep_conditions[calibration_rows[image]] for image in images]]
            model_timesteps = path_on_device.model_timesteps[timesteps.to(device)]
            return network(noisy.to(device), model_timesteps, hidden_states).sample.float().cpu()

        thresholds = measure_thresholds(
            lambda image, generator: keep.load(calibration_rows[image], generator),
            len(calibration_rows),
            path,
            predict_on_host,
            forget_span,
            args.calibrate_forgetting,
            args.seed,
            args.eval_batch_size,
        )
        reshard(unet)
        logger.info(
            f"Measured the losses to forget up to: {NUM_BINS * DRAWS_PER_BIN} network calls,"
            f" {time.perf_counter() - started:.1f} s"
        )

    gradients = PairedGradients(
        trainable,
        rule,
        thresholds=thresholds,
        reduce=torch.distributed.all_reduce if accelerator.num_processes > 1 else None,
        scaler=accelerator.scaler,
        owns_grad=accelerator.distributed_type != DistributedType.DEEPSPEED,
    )

    # With no folder these two hand over the shards of a process that does not write.
    def write_checkpoint(folder: Path | None) -> None:
        if args.use_lora:
            save_lora(unet, folder)
        else:
            save_model(unet, None if folder is None else folder / "unet")
        save_training_state(folder, accelerator, description, state, thresholds, optimizer, lr_scheduler, ema_model)

    def write_result(folder: Path | None) -> None:
        with averaged_weights(ema_model, trainable):
            if args.use_lora:
                save_lora(unet, folder)
            else:
                save_pipeline(lambda network: load_pipeline(unet=network), unet, folder)
        if folder is not None:
            lora = {"rank": args.rank, "alpha": args.lora_alpha} if args.use_lora else None
            write_report(
                folder, args, accelerator, method, counts, timestep_range, forget_timestep_ranges, state, lora=lora
            )
            write_receipt(folder / "receipt.json", forget_digests)

    detectors = None
    if accelerator.is_main_process and validation_steps:
        shown = torch.stack([train_images.load(index) for index in detector_rows])
        references = torch.stack([forget_images.load(index) for index in range(len(forget_images))])
        detectors = CopyDetectors.calibrated(for_detectors(references / 2 + 0.5), for_detectors(shown / 2 + 0.5))

    def sample(numbers: list[int]) -> torch.Tensor | None:
        """Samples on the main process; for sharded weights on all of them, which have to take part."""
        if not (accelerator.is_main_process or sharded):
            return None
        rows = torch.tensor([row_of[number] for number in numbers for _ in range(args.num_validation_images)])
        with averaged_weights(ema_model, trainable), accelerator.autocast():
            images = sample_prompts(
                pipeline,
                prompt_table[rows.to(device)],
                prompt_table[None, row_of[empty_prompt]],
                seed=args.seed,
                num_inference_steps=args.num_inference_steps,
                guidance_scale=args.guidance_scale,
                batch_size=args.eval_batch_size,
                resolution=resolution,
            )
            reshard(unet)
        return images

    def validate() -> bool:
        """Count the copies among samples of the forget images' prompts; whether none is left."""
        forgotten = [False]
        images = sample(forget_prompts)
        if accelerator.is_main_process:
            found = copy_statistics(detectors.flags(for_detectors(images)))
            log_validation(args, accelerator, state["global_step"], found)
            logger.info(f"Step {state['global_step']}: {100 * found['copy_share']:.1f} % of the samples are copies")
            forgotten = [found["copy_share"] == 0]
        for index, number in enumerate(validation_conditions):
            images = sample([number])
            if accelerator.is_main_process:
                images[detectors.flags(for_detectors(images))["any"]] = 0.5
                log_sample_images(accelerator, f"validation_{index}", images, state["global_step"])
        return broadcast_object_list(forgotten)[0]

    start_trackers(args, accelerator, args.tracker_project_name)
    logger.info("***** Running unlearning *****")
    logger.info(f"  Method = {method}")
    logger.info(f"  Trainable parameters = {sum(parameter.numel() for parameter in trainable)}")
    logger.info(f"  Pairs per device = {args.train_batch_size}, per optimizer step = {pairs_per_step}")
    logger.info(f"  Gradient Accumulation steps = {args.gradient_accumulation_steps}")
    logger.info(f"  Total optimization steps = {args.max_train_steps}")

    pairs = PairDataset(
        keep,
        forget,
        keep_order,
        method,
        sampler.num_pairs,
        timestep_range,
        args.seed,
        neighbors,
        keep_conditions,
        forget_conditions,
    )
    # Without a cache the VAE is needed to load a pair, and that cannot be done in a subprocess.
    batches = iter(window_loader(pairs, sampler, args.dataloader_num_workers if cache_latents else 0))
    step_log = StepLog(args, accelerator, state)
    stop_signal = StopSignal()

    # Train!
    while state["global_step"] < args.max_train_steps:
        step_started = time.perf_counter()
        if state["window"] == planned_windows:
            raise RuntimeError(
                f"{state['skipped_steps']} steps were skipped, their gradients were not finite; lower --learning_rate"
                " or --forget_scale, use bf16 instead of fp16, or allow more by --max_skipped_steps"
            )
        window = []
        forget_timestep_range = current_forget_range(args, forget_timestep_ranges, state)
        for _ in range(args.gradient_accumulation_steps):
            rows = method.rows_within(Query(path=path, **next(batches)), forget_timestep_range)
            if args.snr_gamma is not None:
                alpha, sigma = path.alphas[rows.timesteps], path.sigmas[rows.timesteps]
                rows = rows.reweighted(min_snr_weight(path.prediction_type, alpha, sigma, args.snr_gamma))
            window.append(rows)

        # Dropout in the adapter draws from torch's own generator.
        torch.manual_seed(torch_seed(args.seed, MODEL, state["window"], accelerator.process_index))
        with without_sync(accelerator, model):
            stats = gradients.compute(
                window,
                predict,
                args.max_grad_norm,
                stop=stop_signal.received is not None,
                forget_scale=lagged_forget_scale(args, state),
            )
        take_step(accelerator, optimizer, gradients, stats)
        state["window"] += 1

        if stats.skipped:
            step_log.skip(stats)
        else:
            learning_rate = lr_scheduler.get_last_lr()[0]
            lr_scheduler.step()
            if ema_model is not None:
                if args.offload_ema:
                    ema_model.to(device, non_blocking=True)
                ema_model.step(trainable)
                if args.offload_ema:
                    ema_model.to("cpu")
            step_log.write(stats, learning_rate, time.perf_counter() - step_started)
        global_step = state["global_step"]

        # With calibration the share of the forget weight still pushed says, for free, when looking is worth it.
        nearly_done = thresholds is None or stats.forget_active < 0.05 or not args.stop_when_forgotten
        if not stats.skipped and nearly_done and validation_steps and global_step % validation_steps == 0:
            # Before the checkpoint: a run that is resumed from it must not miss this reason to end.
            if validate() and args.stop_when_forgotten:
                logger.info(f"Nothing left to forget after {global_step} steps")
                break

        stopping = stop_signal.stops(stats, accelerator) and global_step < args.max_train_steps
        if stopping or (not stats.skipped and global_step % args.checkpointing_steps == 0):
            limit = args.checkpoints_total_limit
            write_checkpoints(accelerator, unet, output_dir, global_step, write_checkpoint, limit)
        if stopping:
            stop_signal.end(accelerator, global_step)
    step_log.progress_bar.close()

    # Save the adapter or the pipeline, and what was done.
    last = LORA_FILE if args.use_lora else "model_index.json"
    save_together(accelerator, unet, output_dir, write_result, last)
    logger.info(f"Saved the {'adapter' if args.use_lora else 'unlearned pipeline'} to {output_dir}")
    finish(args, accelerator, stop_signal, repo_id)


def cli() -> None:
    run(main, program_name())


if __name__ == "__main__":
    cli()
