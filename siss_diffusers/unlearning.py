"""The loop, what it needs prepared, and the entry point of the scripts."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from siss_diffusers.combine import Rule
from siss_diffusers.data.pairs import WindowSampler
from siss_diffusers.data.split import DataSource, GivenRows
from siss_diffusers.draws import MODEL, torch_seed
from siss_diffusers.errors import RunError, UsageError
from siss_diffusers.families import Family, NamedPipeline, PipelineSource, find_family
from siss_diffusers.gradients.engine import PairedGradients
from siss_diffusers.outcome import Outcome
from siss_diffusers.settings import Settings, resolve
from siss_diffusers.storage.checkpoints import list_checkpoints
from siss_diffusers.storage.files import LORA_FILE
from siss_diffusers.storage.folders import made_folder
from siss_diffusers.training.adapters import check_target_modules
from siss_diffusers.training.near_duplicates import write_near_duplicates
from siss_diffusers.training.network import TrainedNetwork
from siss_diffusers.training.output_dir import check_output_dir
from siss_diffusers.training.problem import Problem
from siss_diffusers.training.receipt import write_receipt
from siss_diffusers.training.record import write_record
from siss_diffusers.training.run import Run
from siss_diffusers.training.samples import drawn_images, free_encoders, pair_batches, prepare_samples
from siss_diffusers.training.schedule import check_noise_levels, lagged_forget_scale, timestep_ranges
from siss_diffusers.training.state import restore_training_state, save_training_state
from siss_diffusers.training.training_set import TrainingSet, log_counts, read_training_set
from siss_diffusers.training.validation import Validation


logger = logging.getLogger(__name__)

Writer = Callable[[Path | None], None]


def train(
    run: Run,
    problem: Problem,
    gradients: PairedGradients,
    validation: Validation,
    write_checkpoint: Writer,
    write_result: Writer,
) -> None:
    """Take steps until the run ends, is stopped, or finds nothing left to forget."""
    settings, progress, network = run.settings, run.progress, problem.network
    while progress.global_step < settings.max_train_steps:
        started = time.perf_counter()
        window = problem.next_window(settings, progress)

        # Two gradients, one collective, one combined step. Dropout draws from torch's own generator.
        torch.manual_seed(torch_seed(settings.seed, MODEL, progress.window, run.accelerator.process_index))
        scale = lagged_forget_scale(settings, progress)
        stats = gradients.compute(window, problem.predict, settings.max_grad_norm, run.stop_requested, scale)
        figures = network.step(gradients, stats)
        progress.window += 1
        if stats.skipped:
            run.log.skip(stats)
        else:
            run.log.write(stats, time.perf_counter() - started, **figures)

        # Look before saving: a run that is resumed from the checkpoint must not miss this reason to end.
        if validation.is_due(stats) and validation.finds_no_copy() and settings.stop_when_forgotten:
            logger.info(f"Nothing left to forget after {progress.global_step} steps")
            break
        stopping = run.stops(stats)
        if stopping or (not stats.skipped and run.saves_at(settings.checkpointing_steps)):
            check_weights(run, network)
            run.save_checkpoint(write_checkpoint, network.sharded)
        if not stats.skipped and run.is_epoch(settings.save_images_epochs):
            validation.log_samples()
        if not stats.skipped and run.is_epoch(settings.save_model_epochs):
            check_weights(run, network)
            run.save_result(network.save_result, network.sharded, network.last_file)
        if stopping:
            run.stop()
    run.log.close()
    check_weights(run, network)
    run.save_result(write_result, network.sharded, network.last_file)


def check_weights(run: Run, network: TrainedNetwork) -> None:
    """Refuse to save a network that can draw nothing; no step after the last one would find it.

    Raises:
        RunError: on all processes, naming what is still there.
    """
    if network.is_finite():
        return
    saved = list_checkpoints(run.output_dir)
    kept = f"{saved[-1].name} is as it was" if saved else "start again"
    raise RunError(
        f"the trained weights are not finite, or too large to be used, after {run.progress.global_step} steps, and are not"
        f" saved; lower --learning_rate or --forget_scale; {kept}"
    )


def unlearn_from_settings(settings: Settings, *, with_prompts: bool) -> Outcome:
    """Run the training that settings describe; the entry point of the scripts.

    Args:
        with_prompts: whether the script is for text-to-image models.

    Raises:
        UsageError: naming the flag and the cure, before any weights are read.
        RunError, Interrupted: as the run ends early.
    """
    data = DataSource.of(settings)
    data.check()
    settings, method, rule = resolve(settings)
    check_output_dir(settings)
    with made_folder("--output_dir", settings.output_dir):
        source = NamedPipeline(
            settings.pretrained_model_name_or_path,
            revision=settings.revision,
            variant=settings.variant,
            cache_dir=settings.cache_dir,
            network_revision=settings.non_ema_revision,
        )
        family = find_family(source, with_prompts=with_prompts).from_source(source, settings.resolution)
        settings = with_family_defaults(settings, family, source)
        run = Run(settings, method, Path(settings.output_dir), is_program=True)
        return fit(run, rule, family, source, data.load())


def with_family_defaults(settings: Settings, family: Family, source: PipelineSource) -> Settings:
    """Fill in the defaults that depend on the model, and check the targets of an adapter.

    Raises:
        UsageError: for a setting that is not for this family, or a layer that the network does not have.
    """
    if settings.learning_rate is None:
        settings = settings.replace(learning_rate=settings.default_learning_rate(family.width(source)))
    if settings.guidance_scale is None:
        settings = settings.replace(guidance_scale=family.default_guidance_scale)
    if settings.enable_xformers_memory_efficient_attention and family.network_name != "unet":
        raise UsageError(
            f"--enable_xformers_memory_efficient_attention is for UNets, and {family.title} has none; leave it out: PyTorch's"
            " own attention saves memory, too"
        )
    if not family.lora_targets:
        if family.has_prompts and settings.use_lora:
            raise UsageError(f"--use_lora: diffusers loads no adapters into {family.title}; leave it out")
        return settings
    settings = settings.replace(lora_target_modules=list(settings.lora_target_modules or family.lora_targets))
    if settings.adapter is not None:
        check_target_modules(source.network_skeleton(family), settings.adapter.target_modules, family.lora_targets)
    return settings


def fit(run: Run, rule: Rule, family: Family, source: PipelineSource, given: GivenRows) -> Outcome:
    """Prepare a run, train, and save the result in the run's folder."""
    method = run.method
    training_set = read_training_set(run.settings, family, method, given, run.num_positions)
    counts = training_set.split.counts()
    run.set_data(training_set.parts(), counts["keep"])
    log_counts(training_set)

    if run.settings.adapter is None and run.saves_model:
        source.check_rest(family)
    pipeline = source.load_without_network(family)
    problem = prepare_problem(run, family, source, pipeline, training_set)
    network = problem.network
    model_files = [name for name, value in source.pipeline_config.items() if isinstance(value, list)]
    run.start([*model_files, "model_index.json", LORA_FILE])
    if run.accelerator.is_main_process:
        write_near_duplicates(run.output_dir, training_set.split)
    if run.saved is not None:
        network.load_weights(run.checkpoint)
        restore_training_state(run.saved, run.accelerator, network.optimizer, network.lr_scheduler, network.ema)
        problem.thresholds = None if run.saved["thresholds"] is None else run.saved["thresholds"][...]
    elif run.settings.calibrate_forgetting is not None:
        problem.measure_thresholds(run.settings, training_set)
    gradients = problem.make_gradients(run, rule)
    validation = Validation(run, family, pipeline, network, problem.samples, training_set)

    def write_checkpoint(folder: Path | None) -> None:
        network.save_weights(folder)
        state = (problem.thresholds, network.optimizer, network.lr_scheduler, network.ema)
        save_training_state(folder, run.accelerator, run.description, run.progress, *state)

    def write_result(folder: Path | None) -> None:
        if run.saves_model:
            network.save_result(folder)
        if folder is not None:
            write_run_record(folder, run, problem, counts)
            write_receipt(folder / "receipt.json", training_set.split.forget_digests)
            write_near_duplicates(folder, training_set.split)

    log_start(run, network)
    train(run, problem, gradients, validation, write_checkpoint, write_result)
    if run.saves_model:
        logger.info(f"Saved the {'adapter' if run.settings.adapter else 'unlearned pipeline'} to {run.output_dir}")
    run.finish()
    return Outcome(network.hand_back(), run.output_dir, family, run.settings, given, run.saves_model)


def prepare_problem(
    run: Run, family: Family, source: PipelineSource, pipeline: Any, training_set: TrainingSet
) -> Problem:
    """Encode what the run will draw, free the encoders, then load the network."""
    settings, method, accelerator = run.settings, run.method, run.accelerator
    if settings.scheduler_overrides:
        # In the pipeline itself: samples are drawn, and the result is saved, with the scheduler that is trained on.
        scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **settings.scheduler_overrides)
        pipeline.register_modules(scheduler=scheduler)
    path = family.path(pipeline)
    check_noise_levels(settings, pipeline.scheduler, path)
    timestep_range, forget_ranges = timestep_ranges(settings, len(path))
    for name in family.frozen_components:
        getattr(pipeline, name).requires_grad_(False).to(accelerator.device)
    sampler = WindowSampler(
        batch_size=settings.train_batch_size,
        accumulation_steps=settings.gradient_accumulation_steps,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        first_window=run.progress.window,
    )
    plans_ahead = family.has_prompts or family.has_latents
    planned_windows = settings.max_train_steps + settings.max_skipped_steps if plans_ahead else None
    drawn = planned_windows and drawn_images(settings, method, training_set, sampler, planned_windows)
    samples = prepare_samples(
        settings, family, pipeline, method, training_set, drawn, accelerator.device, accelerator.is_local_main_process
    )
    validates = bool(settings.validation_steps or settings.validation_epochs)
    if source.is_ours:
        free_encoders(family, pipeline, keep_vae=validates or not samples.is_cached)
    network = TrainedNetwork(settings, accelerator, family, source, pipeline)
    # The VAE cannot encode in a subprocess.
    in_subprocesses = samples.is_cached or not family.has_latents
    batches = pair_batches(
        settings, method, training_set, samples, sampler, timestep_range, len(path), in_subprocesses
    )
    return Problem(method, path, network, samples, batches, timestep_range, forget_ranges, planned_windows)


def write_run_record(folder: Path, run: Run, problem: Problem, counts: dict[str, int]) -> None:
    """Write `unlearning.json`."""
    adapter = run.settings.adapter
    write_record(
        folder,
        run.settings,
        run.method,
        counts,
        run.accelerator.num_processes,
        run.progress,
        timestep_range=problem.timestep_range,
        forget_timestep_ranges=problem.forget_ranges,
        lora=None if adapter is None else {"rank": adapter.rank, "alpha": adapter.alpha},
    )


def log_start(run: Run, network: TrainedNetwork) -> None:
    """Log what is about to run."""
    settings = run.settings
    logger.info("***** Running unlearning *****")
    logger.info(f"  Method = {run.method}")
    logger.info(f"  Trainable parameters = {sum(parameter.numel() for parameter in network.parameters)}")
    logger.info(f"  Pairs per device = {settings.train_batch_size}, per optimizer step = {run.pairs_per_step}")
    logger.info(f"  Gradient Accumulation steps = {settings.gradient_accumulation_steps}")
    logger.info(f"  Total optimization steps = {settings.max_train_steps}")
