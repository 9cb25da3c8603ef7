"""Unlearn training images from an unconditional diffusion model; mirrors diffusers' train_unconditional.py."""

import argparse
import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path

import datasets
import diffusers
import torch
import torch.distributed
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.logging import get_logger
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
)
from datasets import load_dataset
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import check_min_version, is_tensorboard_available, is_wandb_available
from diffusers.utils.import_utils import is_xformers_available
from tqdm.auto import tqdm

from siss_diffusers import GaussianPath, PairedGradients, Query, Rows, __version__
from siss_diffusers.arguments import (
    Parser,
    add_unlearning_arguments,
    check_output_dir,
    check_unlearning_arguments,
    clear_output_dir,
    natural_number,
    non_negative_float,
    positive_int,
    program_name,
    shared_settings,
    unit_float,
)
from siss_diffusers.calibration import DRAWS_PER_BIN, NUM_BINS, calibration_draws, loss_thresholds
from siss_diffusers.checkpoints import (
    append_json_line,
    find_checkpoint,
    load_state,
    save_checkpoint,
    save_state,
    truncate_json_lines,
    write_json,
)
from siss_diffusers.data import (
    Images,
    ImageTransform,
    PairDataset,
    WindowSampler,
    digest_images,
    forget_rows_of,
    nearest_neighbors,
    window_loader,
)
from siss_diffusers.draws import MODEL, torch_seed
from siss_diffusers.errors import UsageError, run
from siss_diffusers.gradients import mean_squared_error
from siss_diffusers.hub import push
from siss_diffusers.metrics.copies import CopyDetectors, copy_statistics
from siss_diffusers.metrics.sampling import sample_images
from siss_diffusers.receipt import write_receipt


check_min_version("0.42.0")

logger = get_logger(__name__, log_level="INFO")

MODEL_FILES = ("unet", "scheduler", "model_index.json")
# Thresholds of the copy detectors are calibrated on at most this many of the images to keep.
MAX_DETECTOR_IMAGES = 2_000


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog=program_name(), description="Unlearn training images from an unconditional diffusion model.")
    parser.add_argument(
        "--pretrained_model_name_or_path",
        type=str,
        required=True,
        help="A pipeline with a UNet2DModel: a folder, or a name on the Hub such as google/ddpm-celebahq-256.",
    )
    parser.add_argument("--revision", type=str, default=None, help="Revision of the model on the Hub.")
    parser.add_argument("--variant", type=str, default=None, help="Variant of the model's files, such as fp16.")
    parser.add_argument(
        "--dataset_name",
        type=str,
        default=None,
        help="The training set: a name on the Hub, or a local folder that `datasets.load_dataset` understands.",
    )
    parser.add_argument("--dataset_config_name", type=str, default=None, help="The configuration of the data set.")
    parser.add_argument(
        "--train_data_dir",
        type=str,
        default=None,
        help="The training set as a folder of images, with or without a metadata.jsonl; or use --dataset_name.",
    )
    parser.add_argument("--image_column", type=str, default="image", help="The column of the images.")
    parser.add_argument(
        "--output_dir", type=str, default="siss-ddpm", help="Where the unlearned pipeline and checkpoints are written."
    )
    parser.add_argument(
        "--overwrite_output_dir", action="store_true", help="Replace what an earlier run left in --output_dir."
    )
    parser.add_argument("--cache_dir", type=str, default=None, help="Where downloaded models and data sets are kept.")
    parser.add_argument("--seed", type=natural_number, default=0, help="Seed of every draw.")
    parser.add_argument(
        "--resolution", type=positive_int, default=None, help="Images are resized to this; default: the model's own."
    )
    parser.add_argument(
        "--center_crop", action="store_true", help="Crop the middle of images that are not square, not a random part."
    )
    parser.add_argument("--random_flip", action="store_true", help="Flip images horizontally at random.")
    parser.add_argument(
        "--train_batch_size",
        type=positive_int,
        default=16,
        help="Pairs of a keep and a forget image per process and micro-batch.",
    )
    parser.add_argument(
        "--eval_batch_size",
        type=positive_int,
        default=16,
        help="Samples of --save_images_epochs, and batch of others.",
    )
    parser.add_argument(
        "--dataloader_num_workers", type=natural_number, default=0, help="Subprocesses for loading images."
    )
    parser.add_argument("--max_train_steps", type=positive_int, default=None, help="Optimizer steps; default: 60.")
    parser.add_argument(
        "--num_epochs", type=positive_int, default=None, help="Passes over the keep set, instead of --max_train_steps."
    )
    parser.add_argument(
        "--save_images_epochs",
        type=positive_int,
        default=None,
        help="Log samples to the tracker every so many passes.",
    )
    parser.add_argument(
        "--save_model_epochs", type=positive_int, default=None, help="Save the pipeline every so many passes, too."
    )
    parser.add_argument(
        "--gradient_accumulation_steps", type=positive_int, default=1, help="Micro-batches per optimizer step."
    )
    parser.add_argument(
        "--gradient_checkpointing", action="store_true", help="Trade a second forward pass for activation memory."
    )
    parser.add_argument("--learning_rate", type=non_negative_float, default=5e-6, help="Of AdamW; 5e-6 by default.")
    parser.add_argument(
        "--lr_scheduler", type=str, default="constant", choices=[scheduler.value for scheduler in SchedulerType][:6]
    )
    parser.add_argument("--lr_warmup_steps", type=natural_number, default=0, help="Optimizer steps of warm-up.")
    parser.add_argument("--use_8bit_adam", action="store_true", help="Use bitsandbytes' 8-bit AdamW.")
    parser.add_argument("--adam_beta1", type=unit_float, default=0.95, help="beta1 of AdamW.")
    parser.add_argument("--adam_beta2", type=unit_float, default=0.999, help="beta2 of AdamW.")
    parser.add_argument("--adam_weight_decay", type=non_negative_float, default=1e-6, help="Weight decay of AdamW.")
    parser.add_argument("--adam_epsilon", type=non_negative_float, default=1e-08, help="Epsilon of AdamW.")
    parser.add_argument(
        "--max_grad_norm",
        type=non_negative_float,
        default=1.0,
        help="Bound of the gradient norm, of losses summed over pixels as in the papers: 1.0 clips nearly every step.",
    )
    parser.add_argument(
        "--use_ema", action="store_true", help="Save an exponential moving average of the weights instead of the last."
    )
    parser.add_argument("--ema_inv_gamma", type=non_negative_float, default=1.0, help="Inverse gamma of the average.")
    parser.add_argument("--ema_power", type=non_negative_float, default=3 / 4, help="Power of the average.")
    parser.add_argument("--ema_max_decay", type=unit_float, default=0.9999, help="Highest decay of the average.")
    parser.add_argument("--push_to_hub", action="store_true", help="Upload the pipeline when done.")
    parser.add_argument("--hub_token", type=str, default=None, help="The token for the Hub.")
    parser.add_argument("--hub_model_id", type=str, default=None, help="The repository; default: --output_dir's name.")
    parser.add_argument("--hub_private_repo", action="store_true", help="Make the repository private.")
    parser.add_argument(
        "--report_to",
        "--logger",
        type=str,
        default="tensorboard",
        choices=["tensorboard", "wandb", "none"],
        help="Where metrics are logged, beside train_log.jsonl.",
    )
    parser.add_argument("--logging_dir", type=str, default="logs", help="Folder within --output_dir for the tracker.")
    parser.add_argument(
        "--mixed_precision",
        type=str,
        default=None,
        choices=["no", "fp16", "bf16"],
        help="Default: what `accelerate launch` or its configuration says.",
    )
    parser.add_argument("--allow_tf32", action="store_true", help="Let Ampere and newer GPUs multiply in TF32.")
    parser.add_argument(
        "--prediction_type",
        type=str,
        default=None,
        choices=["epsilon", "v_prediction", "sample"],
        help="What the model predicts; default: what its scheduler says.",
    )
    parser.add_argument(
        "--ddpm_num_steps", type=positive_int, default=None, help="Noise levels; default: what the scheduler says."
    )
    parser.add_argument("--ddpm_beta_schedule", type=str, default=None, help="Default: what the scheduler says.")
    parser.add_argument(
        "--ddpm_num_inference_steps", type=positive_int, default=50, help="DDIM steps of samples made in training."
    )
    parser.add_argument(
        "--checkpointing_steps", type=positive_int, default=500, help="Save a checkpoint every so many steps."
    )
    parser.add_argument(
        "--checkpoints_total_limit", type=positive_int, default=None, help="How many checkpoints are kept."
    )
    parser.add_argument(
        "--resume_from_checkpoint", type=str, default=None, help="A checkpoint of --output_dir, or `latest`."
    )
    parser.add_argument(
        "--enable_xformers_memory_efficient_attention", action="store_true", help="Use xformers' attention."
    )
    parser.add_argument(
        "--preserve_input_precision", action="store_true", help="Do not round 16-bit images to 8 bits."
    )
    add_unlearning_arguments(parser)
    args = parser.parse_args(argv)

    if (args.dataset_name is None) == (args.train_data_dir is None):
        parser.error("give the training set by either --train_data_dir or --dataset_name")
    if args.max_train_steps is not None and args.num_epochs is not None:
        parser.error("--max_train_steps and --num_epochs exclude each other; give one")
    precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision == "fp16" and not (torch.cuda.is_available() or torch.xpu.is_available()):
        parser.error("--mixed_precision fp16 needs a GPU and this machine has none; use bf16 or no")
    if args.report_to == "tensorboard" and not is_tensorboard_available():
        parser.error("--report_to tensorboard needs `pip install tensorboard`; or use --report_to none")
    if args.report_to == "wandb" and not is_wandb_available():
        parser.error("--report_to wandb needs `pip install wandb`; or use --report_to none")
    if args.enable_xformers_memory_efficient_attention and not is_xformers_available():
        parser.error("--enable_xformers_memory_efficient_attention needs `pip install xformers`")
    return args


def load_image_rows(args: argparse.Namespace, flag: str, folder: str | None) -> datasets.Dataset:
    """The rows of an image folder, or of --dataset_name where `folder` is None, their images not yet decoded."""
    if folder is not None and not Path(folder).is_dir():
        raise UsageError(f"{flag}: no folder {folder}")
    try:
        if folder is not None:
            rows = load_dataset("imagefolder", data_dir=folder, cache_dir=args.cache_dir, split="train")
        else:
            rows = load_dataset(args.dataset_name, args.dataset_config_name, cache_dir=args.cache_dir, split="train")
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{flag}: no images could be loaded from {folder or args.dataset_name} ({reason})")
    column = args.image_column if folder is None or folder == args.train_data_dir else "image"
    if not isinstance(rows.features.get(column), datasets.Image):
        raise UsageError(f"--image_column: {flag} has no image column {column!r}, only {', '.join(rows.features)}")
    return rows.cast_column(column, datasets.Image(decode=False))


def load_model_config(args: argparse.Namespace) -> dict:
    """The configuration of the UNet, before any weights are read."""
    for subfolder in ("unet", None):
        try:
            config = UNet2DModel.load_config(
                args.pretrained_model_name_or_path,
                subfolder=subfolder,
                revision=args.revision,
                cache_dir=args.cache_dir,
            )
        except (OSError, ValueError):
            continue
        if config.get("_class_name") == "UNet2DModel":
            return config
    raise UsageError(
        f"--pretrained_model_name_or_path: {args.pretrained_model_name_or_path} is no pipeline with a UNet2DModel"
    )


def check_model_config(args: argparse.Namespace, config: dict) -> int:
    """The resolution to train at.

    Raises:
        UsageError: for a UNet that these images cannot be fed to.
    """
    flag = "--pretrained_model_name_or_path"
    if config["in_channels"] not in (1, 3) or config["out_channels"] != config["in_channels"]:
        raise UsageError(
            f"{flag}: the UNet maps {config['in_channels']} to {config['out_channels']} channels; only images of 1 or"
            " 3 channels, mapped to as many, are supported"
        )
    if config.get("num_class_embeds") or config.get("class_embed_type"):
        raise UsageError(f"{flag}: the UNet is conditioned on classes; only unconditional ones are supported")
    resolution = args.resolution or config["sample_size"]
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    if not isinstance(resolution, int) or resolution % factor != 0:
        raise UsageError(f"--resolution {resolution} cannot be used: this UNet takes multiples of {factor}")
    return resolution


def split_data(args: argparse.Namespace, transform: ImageTransform, accelerator: Accelerator) -> tuple:
    """What to keep and what to forget.

    Returns:
        `keep` and `forget` (`Images`), the digests of the forget images, and counts for `unlearning.json`.
    """
    train_flag = "--train_data_dir" if args.train_data_dir else "--dataset_name"
    with accelerator.main_process_first():
        rows = load_image_rows(args, train_flag, args.train_data_dir)
        forget_rows = None
        if args.forget_data_dir is not None:
            forget_rows = load_image_rows(args, "--forget_data_dir", args.forget_data_dir)
    train = Images(rows, args.image_column, transform, train_flag)

    if forget_rows is not None:
        forget = Images(forget_rows, "image", transform, "--forget_data_dir")
        forget_indices = []
    else:
        forget_indices = forget_rows_of(
            rows, args.image_column, args.forget_files, args.forget_column, args.forget_value, args.train_data_dir
        )
        if forget_indices is None:
            raise UsageError(
                "nothing to forget: give --forget_data_dir, --forget_files or --forget_column, or a data set with a"
                " boolean column `forget`"
            )
        forget = train.select(forget_indices)
    if len(forget) == 0:
        raise UsageError("the forget set is empty; check --forget_data_dir, --forget_column and --forget_value")

    gather = gather_object if accelerator.num_processes > 1 else list
    digest = partial(
        digest_images,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        gather=gather,
    )
    train_digests = digest(train)
    forget_digests = digest(forget) if forget_rows is not None else [train_digests[index] for index in forget_indices]
    forgotten = set(forget_digests)
    keep_indices = [index for index, digest in enumerate(train_digests) if digest not in forgotten]
    if not keep_indices:
        raise UsageError(
            "nothing to keep: every image of the training set is in the forget set; widen --train_data_dir"
        )
    counts = {
        "train": len(train),
        "forget": len(forget),
        "keep": len(keep_indices),
        "duplicates_removed": len(train) - len(keep_indices) - len(forget_indices),
    }
    return train.select(keep_indices), forget, forget_digests, counts


def measure_thresholds(
    args: argparse.Namespace, model: torch.nn.Module, path: GaussianPath, keep: Images, timestep_range: tuple[int, int]
) -> torch.Tensor:
    """tau_t of calibrated forgetting under the starting model; every process measures the same rows."""
    device_path, losses, timesteps = path.to(next(model.parameters()).device), [], []
    indices = range(NUM_BINS * DRAWS_PER_BIN)
    for start in range(0, len(indices), args.eval_batch_size):
        batch = indices[start : start + args.eval_batch_size]
        draws = [calibration_draws(args.seed, len(keep), timestep_range, index) for index in batch]
        clean = torch.stack([keep.load(image) for image, _, _ in draws])
        noise = torch.stack(
            [torch.from_numpy(generator.standard_normal(clean.shape[1:], dtype="float32")) for *_, generator in draws]
        )
        batch_timesteps = torch.tensor([timestep for _, timestep, _ in draws])
        noisy, target = path.add_noise(clean, noise, batch_timesteps), path.target(clean, noise, batch_timesteps)
        with torch.no_grad():
            model_timesteps = device_path.model_timesteps[batch_timesteps.to(device_path.alphas.device)]
            output = model(noisy.to(device_path.alphas.device), model_timesteps).sample.float().cpu()
        losses.append(mean_squared_error(output, target))
        timesteps.append(batch_timesteps)
    return loss_thresholds(
        torch.cat(losses), torch.cat(timesteps), timestep_range, len(path), args.calibrate_forgetting
    )


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    method, rule = check_unlearning_arguments(args)
    output_dir = Path(args.output_dir)
    check_output_dir(args)
    model_config = load_model_config(args)
    resolution = check_model_config(args, model_config)

    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(project_dir=output_dir, logging_dir=output_dir / args.logging_dir),
        # A long time, for the other processes wait while the first one samples or reads a big data set.
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(seconds=7200)),
            # A rank without rows for a side runs no forward there; a broadcast of buffers would wait for it for ever.
            DistributedDataParallelKwargs(broadcast_buffers=False),
        ],
    )
    args.mixed_precision = accelerator.mixed_precision
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise UsageError(
            f"{accelerator.distributed_type.value} is not supported yet; use `accelerate launch --multi_gpu` (DDP)"
        )

    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", datefmt="%m/%d/%Y %H:%M:%S", level=logging.INFO
    )
    if accelerator.is_local_main_process:
        datasets.utils.logging.set_verbosity_warning()
        diffusers.utils.logging.set_verbosity_warning()
    else:
        datasets.utils.logging.set_verbosity_error()
        diffusers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True

    # The data: what to keep, what to forget. Everything that can be wrong with it is found here.
    transform = ImageTransform(
        channels=model_config["in_channels"],
        resolution=resolution,
        center_crop=args.center_crop,
        random_flip=args.random_flip,
        preserve_input_precision=args.preserve_input_precision,
    )
    keep, forget, forget_digests, counts = split_data(args, transform, accelerator)
    logger.info(
        f"Keep {counts['keep']}, forget {counts['forget']} images; removed {counts['duplicates_removed']} exact"
        " duplicates of forget images from the keep set"
    )
    neighbors = None
    if hasattr(method, "num_neighbors"):
        neighbors, num_candidates = nearest_neighbors(keep, forget, method.num_neighbors, args.seed)
        logger.info(f"Neighbours of the forget images searched among {num_candidates} keep images")
    checkpoint = None
    if args.resume_from_checkpoint is not None:
        checkpoint = find_checkpoint(output_dir, args.resume_from_checkpoint)
        if checkpoint is None:
            accelerator.print("--resume_from_checkpoint latest: no checkpoint yet, starting anew")

    # The model
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            args.pretrained_model_name_or_path,
            revision=args.revision,
            variant=args.variant,
            cache_dir=args.cache_dir,
            use_safetensors=True,
        )
    except (OSError, ValueError) as error:
        raise UsageError(f"--pretrained_model_name_or_path: {str(error).splitlines()[0]}")
    model = pipeline.unet.float()
    overrides = {
        "prediction_type": args.prediction_type,
        "num_train_timesteps": args.ddpm_num_steps,
        "beta_schedule": args.ddpm_beta_schedule,
    }
    overrides = {name: value for name, value in overrides.items() if value is not None}
    noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, **overrides)
    path = GaussianPath.from_scheduler(noise_scheduler)
    timestep_range = tuple(args.timestep_range or (0, len(path)))
    if timestep_range[1] > len(path):
        raise UsageError(f"--timestep_range: HI must not exceed the model's {len(path)} timesteps")
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if args.enable_xformers_memory_efficient_attention:
        model.enable_xformers_memory_efficient_attention()
    model.train()

    ema_model = None
    if args.use_ema:
        ema_model = EMAModel(
            model.parameters(),
            decay=args.ema_max_decay,
            use_ema_warmup=True,
            inv_gamma=args.ema_inv_gamma,
            power=args.ema_power,
            foreach=True,
        )

    optimizer_class = torch.optim.AdamW
    if args.use_8bit_adam:
        try:
            import bitsandbytes as bnb
        except ImportError:
            raise UsageError("--use_8bit_adam needs `pip install bitsandbytes`")
        optimizer_class = bnb.optim.AdamW8bit
    optimizer = optimizer_class(
        model.parameters(),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )

    pairs_per_step = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    steps_per_epoch = math.ceil(len(keep) / pairs_per_step)
    if args.max_train_steps is None:
        args.max_train_steps = 60 if args.num_epochs is None else args.num_epochs * steps_per_epoch
    # Not prepared: accelerate would step a prepared one once for every process.
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    unet = accelerator.unwrap_model(model)
    path_on_device = path.to(accelerator.device)
    if ema_model is not None:
        ema_model.to(accelerator.device)

    if accelerator.is_main_process:
        if args.overwrite_output_dir and args.resume_from_checkpoint is None:
            clear_output_dir(output_dir, MODEL_FILES)
        output_dir.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()

    # Resume: everything that the next step depends on. There is no random state, for draws are keyed by their window.
    # Windows count the skipped steps too, so that a skipped step is not tried again with the same draws.
    state = {"global_step": 0, "window": 0, "skipped_steps": 0, "one_sided_steps": 0, "train_seconds": 0.0}
    thresholds = None
    if checkpoint is not None:
        accelerator.print(f"Resuming from {checkpoint.name}")
        saved = load_state(checkpoint)
        state, thresholds = saved["progress"], saved["thresholds"]
        unet.load_state_dict(UNet2DModel.from_pretrained(checkpoint, subfolder="unet").state_dict())
        optimizer.load_state_dict(saved["optimizer"])
        lr_scheduler.load_state_dict(saved["lr_scheduler"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(saved["scaler"])
        if ema_model is not None:
            ema_model.load_state_dict(saved["ema"])
            ema_model.to(accelerator.device)
    elif args.calibrate_forgetting is not None:
        started = time.perf_counter()
        thresholds = measure_thresholds(args, model, path, keep, timestep_range)
        logger.info(
            f"Measured the losses to forget up to: {NUM_BINS * DRAWS_PER_BIN} network calls,"
            f" {time.perf_counter() - started:.1f} s"
        )

    gradients = PairedGradients(
        model.parameters(),
        rule,
        thresholds=thresholds,
        reduce=torch.distributed.all_reduce if accelerator.num_processes > 1 else None,
        scaler=accelerator.scaler,
    )

    def predict(rows: Rows) -> torch.Tensor:
        return model(rows.noisy, path_on_device.model_timesteps[rows.timesteps]).sample

    @contextmanager
    def final_weights() -> Iterator[UNet2DModel]:
        """The weights that are saved, evaluated and shown: the moving average where there is one."""
        if ema_model is not None:
            ema_model.store(unet.parameters())
            ema_model.copy_to(unet.parameters())
        yield unet
        if ema_model is not None:
            ema_model.restore(unet.parameters())

    def write_checkpoint(folder: Path) -> None:
        unet.save_pretrained(folder / "unet")
        save_state(
            folder,
            {
                "progress": state,
                "thresholds": thresholds,
                "optimizer": optimizer.state_dict(),
                "lr_scheduler": lr_scheduler.state_dict(),
                "scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict(),
                "ema": None if ema_model is None else ema_model.state_dict(),
            },
        )

    def save_pipeline() -> None:
        with final_weights() as final_unet:
            DDPMPipeline(unet=final_unet, scheduler=noise_scheduler).save_pretrained(output_dir)

    detectors = None
    if accelerator.is_main_process and (args.validation_steps or args.save_images_epochs):
        shown = torch.stack([keep.load(index) for index in range(min(len(keep), MAX_DETECTOR_IMAGES))])
        references = torch.stack([forget.load(index) for index in range(len(forget))])
        detectors = CopyDetectors.calibrated(references / 2 + 0.5, shown / 2 + 0.5)

    def sample(num_samples: int) -> torch.Tensor:
        with final_weights() as final_unet:
            return sample_images(
                final_unet,
                noise_scheduler,
                num_samples,
                seed=args.seed,
                num_inference_steps=args.ddpm_num_inference_steps,
                batch_size=args.eval_batch_size,
            )

    def validate() -> bool:
        """Count the copies among fresh samples; whether none is left."""
        forgotten = [False]
        if accelerator.is_main_process:
            found = copy_statistics(detectors.flags(sample(args.num_validation_images)))
            append_json_line(output_dir / "validation_log.jsonl", {"step": state["global_step"], **found})
            accelerator.log({"copy_share": found["copy_share"]}, step=state["global_step"])
            logger.info(f"Step {state['global_step']}: {100 * found['copy_share']:.2f} % of the samples are copies")
            forgotten = [found["copy_share"] == 0]
        return broadcast_object_list(forgotten)[0]

    def log_samples() -> None:
        """Samples to the tracker, copies blanked out: what must be forgotten is not logged."""
        images = sample(args.eval_batch_size)
        images[detectors.flags(images)["any"]] = 0.5
        pictures = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
        for tracker in accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": pictures}, step=state["global_step"], **layout)

    if args.report_to != "none":
        # Without its metadata: wandb would record the command line, and with it the names of forget files.
        init_kwargs = {"wandb": {"settings": {"x_disable_meta": True}}}
        accelerator.init_trackers("train_siss_unconditional", config=shared_settings(args), init_kwargs=init_kwargs)

    logger.info("***** Running unlearning *****")
    logger.info(f"  Method = {method}")
    logger.info(f"  Pairs per device = {args.train_batch_size}, per optimizer step = {pairs_per_step}")
    logger.info(f"  Gradient Accumulation steps = {args.gradient_accumulation_steps}")
    logger.info(f"  Total optimization steps = {args.max_train_steps}")

    sampler = WindowSampler(
        batch_size=args.train_batch_size,
        accumulation_steps=args.gradient_accumulation_steps,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        first_window=state["window"],
    )
    pairs = PairDataset(keep, forget, method, sampler.num_pairs, timestep_range, args.seed, neighbors)
    batches = iter(window_loader(pairs, sampler, args.dataloader_num_workers))
    progress_bar = tqdm(
        total=args.max_train_steps,
        initial=state["global_step"],
        desc="Steps",
        disable=not accelerator.is_local_main_process,
    )
    train_log = output_dir / "train_log.jsonl"
    if accelerator.is_main_process:
        truncate_json_lines(train_log, state["global_step"])
        truncate_json_lines(output_dir / "validation_log.jsonl", state["global_step"])
    skipped_in_a_row = 0

    # Train!
    while state["global_step"] < args.max_train_steps:
        step_started = time.perf_counter()
        window = []
        for _ in range(args.gradient_accumulation_steps):
            rows = method.rows(Query(path=path, **next(batches)))
            if path.prediction_type == "sample":
                # The weighting of the official script: the loss in x0 times the signal-to-noise ratio.
                rows = rows.reweighted((path.alphas[rows.timesteps] / path.sigmas[rows.timesteps]) ** 2)
            window.append(rows)

        # Dropout in the network, if any, draws from torch's own generator.
        torch.manual_seed(torch_seed(args.seed, MODEL, state["window"], accelerator.process_index))
        with accelerator.no_sync(model):  # the engine reduces both gradients itself, once per step
            stats = gradients.compute(window, predict, args.max_grad_norm)
        optimizer.step()
        state["window"] += 1

        if stats.skipped:
            state["skipped_steps"] += 1
            skipped_in_a_row += 1
            if skipped_in_a_row >= args.max_skipped_steps:
                raise RuntimeError(
                    f"the gradients of {skipped_in_a_row} steps in a row were not finite; lower --learning_rate or"
                    " --forget_scale, or use bf16 instead of fp16"
                )
            continue
        skipped_in_a_row = 0
        learning_rate = lr_scheduler.get_last_lr()[0]
        lr_scheduler.step()
        if ema_model is not None:
            ema_model.step(unet.parameters())
        state["global_step"] += 1
        state["one_sided_steps"] += stats.one_sided and args.forget_scaling in ("relative", "norm", "nash")
        global_step, step_seconds = state["global_step"], time.perf_counter() - step_started
        state["train_seconds"] += step_seconds

        logs = {
            "keep_loss": stats.keep_loss,
            "forget_loss": stats.forget_loss,
            "grad_norm_keep": stats.grad_norm_keep,
            "grad_norm_forget": stats.grad_norm_forget,
            "forget_scale": stats.forget_scale,
            "lr": learning_rate,
        }
        if thresholds is not None:
            logs["forget_active"] = stats.forget_active
        if ema_model is not None:
            logs["ema_decay"] = ema_model.cur_decay_value
        progress_bar.update(1)
        progress_bar.set_postfix({name: f"{value:.3g}" for name, value in logs.items() if value is not None})
        accelerator.log({name: value for name, value in logs.items() if value is not None}, step=global_step)
        if accelerator.is_main_process:
            append_json_line(train_log, {"step": global_step, **logs, "step_seconds": step_seconds})

        if accelerator.is_main_process:
            if global_step % args.checkpointing_steps == 0:
                saved_to = save_checkpoint(output_dir, global_step, write_checkpoint, args.checkpoints_total_limit)
                logger.info(f"Saved {saved_to.name}")
            if args.save_images_epochs and global_step % (args.save_images_epochs * steps_per_epoch) == 0:
                log_samples()
            if args.save_model_epochs and global_step % (args.save_model_epochs * steps_per_epoch) == 0:
                save_pipeline()
        accelerator.wait_for_everyone()

        # With calibration the share of the forget weight still pushed says, for free, when looking is worth it.
        nearly_done = thresholds is None or stats.forget_active < 0.05 or not args.stop_when_forgotten
        if args.validation_steps and global_step % args.validation_steps == 0 and nearly_done:
            if validate() and args.stop_when_forgotten:
                logger.info(f"Nothing left to forget after {global_step} steps")
                break
    progress_bar.close()

    # Save the pipeline and what was done.
    if accelerator.is_main_process:
        save_pipeline()
        superfactor = None
        if args.forget_scaling == "fixed":
            # The paper's s for the same coefficient, c = s k / (n - k), with k counting the duplicates.
            superfactor = args.forget_scale * counts["keep"] / max(counts["forget"], counts["train"] - counts["keep"])
        write_json(
            output_dir / "unlearning.json",
            {
                "method": method.name,
                "method_args": vars(method),
                "forget_scaling": args.forget_scaling,
                "forget_scale": args.forget_scale,
                "superfactor": superfactor,
                "data": counts,
                "settings": shared_settings(args),
                "timestep_range": timestep_range,
                "num_processes": accelerator.num_processes,
                "pairs_per_step": pairs_per_step,
                **state,
                "versions": {"siss_diffusers": __version__}
                | {name: version(name) for name in ("torch", "diffusers", "accelerate", "datasets")},
            },
        )
        write_receipt(output_dir / "receipt.json", forget_digests)
        logger.info(f"Saved the unlearned pipeline to {output_dir}")
        if args.push_to_hub:
            repo_id = push(
                output_dir, args.hub_model_id or output_dir.resolve().name, args.hub_token, args.hub_private_repo
            )
            logger.info(f"Pushed to {repo_id}")
    accelerator.end_training()


def cli() -> None:
    run(main, program_name())


if __name__ == "__main__":
    cli()
