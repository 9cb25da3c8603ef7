"""Unlearn training images from an unconditional diffusion model; mirrors diffusers' train_unconditional.py."""

import argparse
import math
import time
from pathlib import Path

import torch
import torch.distributed
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, broadcast_object_list
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import check_min_version

from siss_diffusers import GaussianPath, PairedGradients, Query, Rows
from siss_diffusers.calibration import DRAWS_PER_BIN, NUM_BINS, measure_thresholds
from siss_diffusers.data.images import ImageTransform
from siss_diffusers.data.latents import MAX_NEIGHBOR_CANDIDATES, nearest_neighbors
from siss_diffusers.data.pairs import PairDataset, WindowSampler, window_loader
from siss_diffusers.data.split import split_data
from siss_diffusers.draws import MODEL, torch_seed
from siss_diffusers.errors import UsageError
from siss_diffusers.families.trust import load_pipeline_class, loading
from siss_diffusers.flags import (
    add_training_arguments,
    add_unlearning_arguments,
    check_training_arguments,
    check_unlearning_arguments,
)
from siss_diffusers.metrics.copies import CopyDetectors, copy_statistics
from siss_diffusers.metrics.sampling import sample_images
from siss_diffusers.parsing import Parser, non_negative_float, positive_int, unit_float
from siss_diffusers.process import program_name, run
from siss_diffusers.storage.checkpoints import tidy
from siss_diffusers.storage.sharding import is_sharded, load_model, reshard, save_model, save_pipeline
from siss_diffusers.storage.tensors import load_state
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

MODEL_FILES = ("unet", "scheduler", "model_index.json")
# Thresholds of the copy detectors are calibrated on at most this many of the images to keep.
MAX_DETECTOR_IMAGES = 2_000


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog=program_name(), description="Unlearn training images from an unconditional diffusion model.")
    add_training_arguments(
        parser,
        model="A pipeline with a UNet2DModel: a folder, or a name on the Hub such as google/ddpm-celebahq-256.",
        output_dir="siss-ddpm",
        learning_rate="Of AdamW; default: 5e-6.",
        adam_beta1=0.95,
        adam_weight_decay=1e-6,
    )
    parser.add_argument("--max_train_steps", type=positive_int, default=None, help="Optimizer steps; default: 60.")
    parser.add_argument(
        "--num_epochs", type=positive_int, default=None, help="Passes over the keep set, instead of --max_train_steps."
    )
    parser.add_argument(
        "--eval_batch_size",
        type=positive_int,
        default=16,
        help="Samples of --save_images_epochs, and batch of others.",
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
    parser.add_argument("--ema_inv_gamma", type=non_negative_float, default=1.0, help="Inverse gamma of the average.")
    parser.add_argument("--ema_power", type=non_negative_float, default=3 / 4, help="Power of the average.")
    parser.add_argument("--ema_max_decay", type=unit_float, default=0.9999, help="Highest decay of the average.")
    parser.add_argument(
        "--ddpm_num_steps", type=positive_int, default=None, help="Noise levels; default: what the scheduler says."
    )
    parser.add_argument("--ddpm_beta_schedule", type=str, default=None, help="Default: what the scheduler says.")
    parser.add_argument(
        "--ddpm_num_inference_steps", type=positive_int, default=50, help="DDIM steps of samples made in training."
    )
    parser.add_argument(
        "--preserve_input_precision", action="store_true", help="Do not round 16-bit images to 8 bits."
    )
    add_unlearning_arguments(parser, calibrate_by_default=False)
    args = parser.parse_args(argv)

    if args.max_train_steps is not None and args.num_epochs is not None:
        parser.error("--max_train_steps and --num_epochs exclude each other; give one")
    if args.max_train_steps is None and args.num_epochs is None:
        args.max_train_steps = 60
    if args.learning_rate is None:
        args.learning_rate = 5e-6
    return args


def load_model_config(args: argparse.Namespace) -> dict:
    """The configuration of the UNet, before any weights are read."""
    where = {"revision": args.revision, "cache_dir": args.cache_dir}
    load_pipeline_class(args.pretrained_model_name_or_path, "--pretrained_model_name_or_path", **where)
    for subfolder in ("unet", None):
        try:
            config = UNet2DModel.load_config(
                args.pretrained_model_name_or_path,
                subfolder=subfolder,
                **where,
            )
        except (OSError, ValueError):
            continue
        if isinstance(config, dict) and config.get("_class_name") == "UNet2DModel":
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


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_training_arguments(args)
    method, rule = check_unlearning_arguments(args, calibrate_by_default=False)
    output_dir = Path(args.output_dir)
    check_output_dir(args)
    model_config = load_model_config(args)
    with loading(args.pretrained_model_name_or_path, "--pretrained_model_name_or_path"):
        resolution = check_model_config(args, model_config)

    accelerator = make_accelerator(args)
    repo_id = prepare_repository(args, accelerator)

    # The data: what to keep, what to forget. Everything that can be wrong with it is found here.
    transform = ImageTransform(
        channels=model_config["in_channels"],
        resolution=resolution,
        center_crop=args.center_crop,
        random_flip=args.random_flip,
        preserve_input_precision=args.preserve_input_precision,
    )
    checkpoint = find_resumed(args, accelerator)
    num_positions = planned_positions(args, accelerator, checkpoint)
    train, forget, keep_order, forget_digests = split_data(args, transform, accelerator, num_positions)
    data = {
        "images to keep": DataPart(len(keep_order.candidates), keep_order.digests[keep_order.drawn]),
        "images to forget": DataPart(len(forget), forget_digests),
    }
    description = describe_run(args, method, accelerator, checkpoint, data)
    if checkpoint is not None:
        check_resumed(args, checkpoint, description, data)
    # Ordinary images to compare with.
    calibration_rows = [] if args.calibrate_forgetting is None else keep_order.first(NUM_BINS * DRAWS_PER_BIN)
    detector_rows = keep_order.first(MAX_DETECTOR_IMAGES) if args.validation_steps or args.save_images_epochs else []
    candidates = keep_order.first(MAX_NEIGHBOR_CANDIDATES) if hasattr(method, "num_neighbors") else []
    counts = {"train": len(train), "forget": len(forget), **keep_order.counts()}
    logger.info(
        f"Keep {counts['keep']}, forget {counts['forget']} images; removed {counts['duplicates_removed']} exact"
        f" duplicates of forget images from the keep set, among the {counts['checked']} images that may be used"
    )
    neighbors = None
    if hasattr(method, "num_neighbors"):
        logger.info(f"Searching the neighbours of the forget images among {len(candidates)} keep images")
        neighbors = nearest_neighbors(train, forget, method.num_neighbors, candidates)

    # The model
    with loading(args.pretrained_model_name_or_path, "--pretrained_model_name_or_path"):
        pipeline = DiffusionPipeline.from_pretrained(
            args.pretrained_model_name_or_path,
            revision=args.revision,
            variant=args.variant,
            cache_dir=args.cache_dir,
            use_safetensors=True,
        )
    model = pipeline.unet.float()
    overrides = {
        "prediction_type": args.prediction_type,
        "num_train_timesteps": args.ddpm_num_steps,
        "beta_schedule": args.ddpm_beta_schedule,
    }
    overrides = {name: value for name, value in overrides.items() if value is not None}
    noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, **overrides)
    path = GaussianPath.from_scheduler(noise_scheduler)
    timestep_range, forget_timestep_ranges, forget_span = timestep_ranges(args, len(path))
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if args.enable_xformers_memory_efficient_attention:
        model.enable_xformers_memory_efficient_attention()
    model.train()

    optimizer = make_optimizer(args, model.parameters())
    pairs_per_step = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    steps_per_epoch = math.ceil(counts["keep"] / pairs_per_step)
    if args.max_train_steps is None:
        args.max_train_steps = args.num_epochs * steps_per_epoch
    # Not prepared: accelerate would step a prepared one once for every process.
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    unet = accelerator.unwrap_model(model, keep_torch_compile=False)
    network = trained_network(accelerator, model)
    parameters, sharded = list(unet.parameters()), is_sharded(unet)
    path_on_device = path.to(accelerator.device)
    ema_model = None
    if args.use_ema:
        ema_model = EMAModel(
            parameters,
            decay=args.ema_max_decay,
            use_ema_warmup=True,
            inv_gamma=args.ema_inv_gamma,
            power=args.ema_power,
            foreach=True,
        )

    if accelerator.is_main_process:
        if args.overwrite_output_dir and args.resume_from_checkpoint is None:
            clear_output_dir(output_dir, MODEL_FILES)
        output_dir.mkdir(parents=True, exist_ok=True)
        tidy(output_dir, checkpoint)
    accelerator.wait_for_everyone()

    # Resume: everything that the next step depends on.
    state = initial_state()
    thresholds = None
    if checkpoint is not None:
        accelerator.print(f"Resuming from {checkpoint.name}")
        saved = load_state(checkpoint)
        state |= saved["progress"]
        thresholds = None if saved["thresholds"] is None else saved["thresholds"][...]
        load_model(unet, checkpoint / "unet")
        restore_training_state(saved, accelerator, optimizer, lr_scheduler, ema_model)
    elif args.calibrate_forgetting is not None:
        started = time.perf_counter()

        def predict_on_host(noisy: torch.Tensor, timesteps: torch.Tensor, _: list[int]) -> torch.Tensor:
            model_timesteps = path.model_timesteps[timesteps].to(accelerator.device)
            return network(noisy.to(accelerator.device), model_timesteps).sample.float().cpu()

        thresholds = measure_thresholds(
            lambda image, generator: train.load(calibration_rows[image], generator),
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
        parameters,
        rule,
        thresholds=thresholds,
        reduce=torch.distributed.all_reduce if accelerator.num_processes > 1 else None,
        scaler=accelerator.scaler,
        owns_grad=accelerator.distributed_type != DistributedType.DEEPSPEED,
    )

    def predict(rows: Rows) -> torch.Tensor:
        return network(rows.noisy, path_on_device.model_timesteps[rows.timesteps]).sample

    # With no folder these two hand over the shards of a process that does not write.
    def write_checkpoint(folder: Path | None) -> None:
        save_model(unet, None if folder is None else folder / "unet")
        save_training_state(folder, accelerator, description, state, thresholds, optimizer, lr_scheduler, ema_model)

    def write_pipeline(folder: Path | None) -> None:
        with averaged_weights(ema_model, parameters):
            save_pipeline(lambda network: DDPMPipeline(network, noise_scheduler), unet, folder)

    detectors = None
    if accelerator.is_main_process and (args.validation_steps or args.save_images_epochs):
        shown = torch.stack([train.load(index) for index in detector_rows])
        references = torch.stack([forget.load(index) for index in range(len(forget))])
        detectors = CopyDetectors.calibrated(references / 2 + 0.5, shown / 2 + 0.5)

    def sample(num_samples: int) -> torch.Tensor | None:
        """Samples on the main process; for sharded weights on all of them, which have to take part."""
        if not (accelerator.is_main_process or sharded):
            return None
        with averaged_weights(ema_model, parameters):
            images = sample_images(
                unet,
                noise_scheduler,
                num_samples,
                seed=args.seed,
                num_inference_steps=args.ddpm_num_inference_steps,
                batch_size=args.eval_batch_size,
            )
            reshard(unet)
        return images

    def validate() -> bool:
        """Count the copies among fresh samples; whether none is left."""
        forgotten = [False]
        images = sample(args.num_validation_images)
        if accelerator.is_main_process:
            found = copy_statistics(detectors.flags(images))
            log_validation(args, accelerator, state["global_step"], found)
            logger.info(f"Step {state['global_step']}: {100 * found['copy_share']:.2f} % of the samples are copies")
            forgotten = [found["copy_share"] == 0]
        return broadcast_object_list(forgotten)[0]

    def log_samples() -> None:
        """Samples to the tracker, copies blanked out: what must be forgotten is not logged."""
        images = sample(args.eval_batch_size)
        if accelerator.is_main_process:
            images[detectors.flags(images)["any"]] = 0.5
            log_sample_images(accelerator, "samples", images, state["global_step"])

    start_trackers(args, accelerator, "train_siss_unconditional")
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
    pairs = PairDataset(train, forget, keep_order, method, sampler.num_pairs, timestep_range, args.seed, neighbors)
    batches = iter(window_loader(pairs, sampler, args.dataloader_num_workers))
    step_log = StepLog(args, accelerator, state)
    stop_signal = StopSignal()

    # Train!
    while state["global_step"] < args.max_train_steps:
        step_started = time.perf_counter()
        window = []
        forget_timestep_range = current_forget_range(args, forget_timestep_ranges, state)
        for _ in range(args.gradient_accumulation_steps):
            rows = method.rows_within(Query(path=path, **next(batches)), forget_timestep_range)
            if path.prediction_type == "sample":
                # The weighting of the official script: the loss in x0 times the signal-to-noise ratio.
                rows = rows.reweighted((path.alphas[rows.timesteps] / path.sigmas[rows.timesteps]) ** 2)
            window.append(rows)

        # Dropout in the network, if any, draws from torch's own generator.
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
            more = {}
            if ema_model is not None:
                ema_model.step(parameters)
                more["ema_decay"] = ema_model.cur_decay_value
            step_log.write(stats, learning_rate, time.perf_counter() - step_started, **more)
        global_step = state["global_step"]

        # With calibration the share of the forget weight still pushed says, for free, when looking is worth it.
        nearly_done = thresholds is None or stats.forget_active < 0.05 or not args.stop_when_forgotten
        if not stats.skipped and nearly_done and args.validation_steps and global_step % args.validation_steps == 0:
            # Before the checkpoint: a run that is resumed from it must not miss this reason to end.
            if validate() and args.stop_when_forgotten:
                logger.info(f"Nothing left to forget after {global_step} steps")
                break

        stopping = stop_signal.stops(stats, accelerator) and global_step < args.max_train_steps
        if stopping or (not stats.skipped and global_step % args.checkpointing_steps == 0):
            limit = args.checkpoints_total_limit
            write_checkpoints(accelerator, unet, output_dir, global_step, write_checkpoint, limit)
        if not stats.skipped and args.save_images_epochs:
            if global_step % (args.save_images_epochs * steps_per_epoch) == 0:
                log_samples()
        if not stats.skipped and args.save_model_epochs:
            if global_step % (args.save_model_epochs * steps_per_epoch) == 0:
                save_together(accelerator, unet, output_dir, write_pipeline, last="model_index.json")
        if stopping:
            stop_signal.end(accelerator, global_step)
    step_log.progress_bar.close()

    # Save the pipeline and what was done.
    def write_result(folder: Path | None) -> None:
        write_pipeline(folder)
        if folder is not None:
            write_report(folder, args, accelerator, method, counts, timestep_range, forget_timestep_ranges, state)
            write_receipt(folder / "receipt.json", forget_digests)

    save_together(accelerator, unet, output_dir, write_result, last="model_index.json")
    logger.info(f"Saved the unlearned pipeline to {output_dir}")
    finish(args, accelerator, stop_signal, repo_id)


def cli() -> None:
    run(main, program_name())


if __name__ == "__main__":
    cli()
