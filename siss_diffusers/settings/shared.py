"""The settings that all families share, under the names of the official diffusers scripts."""

import dataclasses
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from siss_diffusers.calibration import DEFAULT_QUANTILE, THRESHOLD_SOURCES
from siss_diffusers.combine import FORGET_SCALINGS
from siss_diffusers.errors import UsageError
from siss_diffusers.methods import METHODS
from siss_diffusers.parsing import (
    FORGET_SET_HELP,
    natural_number,
    non_negative_float,
    path,
    positive_float,
    positive_int,
    quantile_or_off,
    seed_number,
    unit_float,
)
from siss_diffusers.settings.fields import check_value, flag_name, setting, switch


UNLEARNING, VALIDATION = "unlearning", "validation"
SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
DEFAULT_REDIRECT_IMAGES = 1_000
METHODS_HELP = "; ".join(
    f"{name}: {method.summary}" + "".join(f", {key}={value}" for key, value in method.hyperparameters().items())
    for name, method in METHODS.items()
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run is told. `resolve` of `siss_diffusers.settings` fills in the defaults that depend on others."""

    # The default learning rate is that of the paper's models, `reference_width` channels wide.
    reference_width: ClassVar[int] = 512
    default_steps: ClassVar[int] = 60
    calibrates_by_default: ClassVar[bool] = False
    # Settings of some families only, and so no fields here.
    save_images_epochs = None
    preserve_input_precision = False
    guidance_scale = 1.0
    validation_prompts = ()
    keep_target = "noise"
    weighting_scheme = "none"
    logit_mean, logit_std, mode_scale = 0.0, 1.0, 1.29
    non_ema_revision = None

    # fmt: off
    pretrained_model_name_or_path: str = setting("", "The pipeline: a folder, or a name on the Hub.", parse=path)
    revision: str | None = setting(None, "Revision of the model on the Hub.")
    variant: str | None = setting(None, "Variant of the model's files, such as fp16.")
    dataset_name: str | None = setting(None, "The training set: a name on the Hub, or a local folder that"
        " `datasets.load_dataset` understands.", resume="free", parse=path)
    dataset_config_name: str | None = setting(None, "The configuration of the data set.", resume="free")
    train_data_dir: str | None = setting(None, "The training set as a folder of images, with or without a"
        " metadata.jsonl; or use --dataset_name.", resume="free", parse=path)
    image_column: str = setting("image", "The column of the images.", resume="free")
    max_train_samples: int | None = setting(None, "Use so many images of the keep set, at random.",
        parse=positive_int, public=True)
    output_dir: str = setting("siss", "Where the result and the checkpoints are written.", resume="free", parse=path)
    overwrite_output_dir: bool = switch("Replace what an earlier run left in --output_dir.", resume="free", public=True)
    cache_dir: str | None = setting(None, "Where downloaded models and data sets are kept.", resume="free", parse=path)
    seed: int = setting(0, "Seed of every draw.", parse=seed_number, public=True)
    resolution: int | None = setting(None, "Side in pixels that images are resized to; default: the model's own.",
        parse=positive_int, public=True)
    center_crop: bool = switch("Crop the middle of images that are not square, not a random part.", public=True)
    random_flip: bool = switch("Flip images horizontally at random.", public=True)
    image_interpolation_mode: str = setting("bilinear", "How images are resized.", choices=INTERPOLATIONS)
    train_batch_size: int = setting(16, "Pairs of a keep and a forget image per process and micro-batch.",
        parse=positive_int, resume="free", public=True)
    dataloader_num_workers: int = setting(0, "Subprocesses for loading images.", parse=natural_number,
        resume="free", public=True)
    max_train_steps: int | None = setting(None, "Optimizer steps.", parse=positive_int, resume="length", public=True)
    num_train_epochs: int | None = setting(None, "Passes over the keep set, instead of --max_train_steps.",
        parse=positive_int, resume="length", public=True)
    gradient_accumulation_steps: int = setting(1, "Micro-batches per optimizer step.", parse=positive_int,
        resume="free", public=True)
    gradient_checkpointing: bool = switch("Trade a second forward pass for activation memory.", resume="free",
        public=True)
    learning_rate: float | None = setting(None, "Learning rate of AdamW.", parse=non_negative_float, public=True)
    scale_lr: bool = switch("Multiply the learning rate by the pairs of a step.", public=True)
    lr_scheduler: str = setting("constant", "Schedule of the learning rate; constant by default.", choices=SCHEDULES,
        public=True)
    lr_warmup_steps: int = setting(0, "Optimizer steps of warm-up.", parse=natural_number, public=True)
    snr_gamma: float | None = setting(None, "Weight both losses by min-SNR; the paper says 5.0.",
        parse=positive_float, public=True)
    use_8bit_adam: bool = switch("Use bitsandbytes' 8-bit AdamW.", resume="fixed", public=True)
    adam_beta1: float = setting(0.9, "beta1 of AdamW.", parse=unit_float, public=True)
    adam_beta2: float = setting(0.999, "beta2 of AdamW.", parse=unit_float, public=True)
    adam_weight_decay: float = setting(1e-2, "Weight decay of AdamW.", parse=non_negative_float, public=True)
    adam_epsilon: float = setting(1e-8, "Epsilon of AdamW.", parse=non_negative_float, public=True)
    max_grad_norm: float = setting(1.0, "Bound of the gradient norm, of losses summed over pixels as in the papers: 1.0"
        " clips nearly every step.", parse=non_negative_float, public=True)
    use_ema: bool = switch("Save an exponential moving average of the weights instead of the last.", resume="fixed",
        public=True)
    offload_ema: bool = switch("Keep the average on the CPU between its updates.", resume="free", public=True)
    foreach_ema: bool = switch("Update the average by fused operations.", resume="free", public=True)
    push_to_hub: bool = switch("Upload the result when done.", resume="free", public=True)
    hub_token: str | None = setting(None, "The token for the Hub; default: that of `hf auth login`, or HF_TOKEN.",
        resume="free")
    hub_model_id: str | None = setting(None, "The repository; default: --output_dir's name.", resume="free")
    hub_private_repo: bool = switch("Make the repository private.", resume="free", public=True)
    report_to: str = setting("tensorboard", "Where metrics are logged, beside train_log.jsonl.",
        choices=("tensorboard", "wandb", "none"), aliases=("logger",), resume="free")
    logging_dir: str = setting("logs", "Folder within --output_dir for the tracker.", resume="free", parse=path)
    tracker_project_name: str = setting("siss", "Name of the project for the tracker.", resume="free")
    mixed_precision: str | None = setting(None, "Precision of the network calls; default: what `accelerate"
        " launch` or its configuration says.",
        choices=("no", "fp16", "bf16"), public=True)
    allow_tf32: bool = switch("Let Ampere and newer GPUs multiply in TF32.", public=True)
    deterministic: bool = switch("Use only GPU kernels that give the same bits every time; slower.", resume="free",
        public=True)
    prediction_type: str | None = setting(None, "What the model predicts; default: what its scheduler says.",
        choices=("epsilon", "v_prediction", "sample"), public=True)
    checkpointing_steps: int = setting(500, "Save a checkpoint every so many steps.", parse=positive_int,
        resume="free", public=True)
    checkpoints_total_limit: int | None = setting(None, "How many checkpoints are kept; default: all.",
        parse=positive_int, resume="free", public=True)
    resume_from_checkpoint: str | None = setting(None, "A checkpoint of --output_dir, or `latest`.", resume="free",
        parse=path)
    allow_changes: bool = switch("Resume with other settings or data than the checkpoint was made with.",
        resume="free", public=True)
    enable_xformers_memory_efficient_attention: bool = switch("Use xformers' attention.", resume="free", public=True)

    method: str = setting("redirect", f"One of: {METHODS_HELP}.", choices=METHODS.keys(), metavar="METHOD",
        group=UNLEARNING, public=True)
    method_args: Any = setting((), "Hyperparameters of the method, such as lam=0.5; their defaults stand beside the"
        " methods.", nargs="*", metavar="KEY=VALUE", group=UNLEARNING, resume="free")
    forget_scaling: str | None = setting(None, "How much of the forget gradient g_f is subtracted from the keep gradient"
        " g_k. relative (default): F |g_k| / |g_f|; norm: F / |g_f|, the papers' scaling_norm; fixed: F; nash: the"
        " bargaining solution of MUNBa; project: as relative, less what of g_f acts against g_k.", choices=FORGET_SCALINGS, group=UNLEARNING, public=True)
    forget_scale: float | None = setting(None, "F of --forget_scaling. Default: 0.1 for fixed, for relative and project 1 with"
        " --calibrate_forgetting and 0.1 without; required for norm.", parse=non_negative_float, metavar="F",
        group=UNLEARNING, public=True)
    forget_scale_every: int = setting(1, "Take the norms of --forget_scaling relative or norm every K steps only. A step"
        " in between subtracts as much as the last of them, and costs a single gradient. Default: 1, every step.",
        parse=positive_int, metavar="K", group=UNLEARNING, public=True)
    calibrate_forgetting: Any = setting(None, f"Push a forget image only until its loss reaches this quantile"
        f" ({DEFAULT_QUANTILE} if not given) of the losses that the starting model has on images to keep, at the same"
        " noise level; or `off`. Default: on for redirect, and for text-to-image models under --forget_scaling relative;"
        " otherwise off.", parse=quantile_or_off, nargs="?", const=DEFAULT_QUANTILE, metavar="QUANTILE",
        group=UNLEARNING, resume="fixed", public=True)
    threshold_source: str | None = setting(None, "Whose losses --calibrate_forgetting goes by: `keep`, the quantile on"
        " images to keep; `strangers`, the mean on the images to forget turned by 90, 180 and 270 degrees, which the"
        " model never saw; `both`, the higher of the two. Default: both for redirect, otherwise keep.",
        choices=THRESHOLD_SOURCES, group=UNLEARNING, resume="fixed", public=True)
    num_redirect_images: int = setting(DEFAULT_REDIRECT_IMAGES, "Redirect a forget image to the mean of at most so many"
        " images to keep of its prompt (of any prompt where it has none), which are held on the device. Default:"
        f" {DEFAULT_REDIRECT_IMAGES}.", parse=positive_int, metavar="N", group=UNLEARNING, public=True)
    forget_data_dir: str | None = setting(None, FORGET_SET_HELP["forget_data_dir"], group=UNLEARNING, resume="free",
        parse=path)
    forget_files: Any = setting(None, FORGET_SET_HELP["forget_files"], nargs="+", group=UNLEARNING, resume="free",
        parse=path)
    forget_column: str | None = setting(None, FORGET_SET_HELP["forget_column"], group=UNLEARNING, resume="free")
    forget_value: str | None = setting(None, FORGET_SET_HELP["forget_value"], group=UNLEARNING, resume="free")
    drop_near_duplicates: bool = setting(True, "Leave near copies of forget images out of the keep set, too: encoded again,"
        " resized, cropped a little, brightened or mirrored. --no-drop_near_duplicates leaves out exact duplicates only.",
        group=UNLEARNING, resume="free", public=True)
    timestep_range: Any = setting(None, "Train on timesteps LO <= t < HI only; all by default.", parse=natural_number,
        nargs=2, metavar=("LO", "HI"), group=UNLEARNING)
    forget_timestep_ranges: Any = setting(None, "Forget at timesteps LO <= t < HI only, while the images to keep are"
        " learned at all of --timestep_range, which is the default. Several ranges are trained in steps of their own,"
        " so that the scaling rule weighs each by itself: 300 1000 0 300.", parse=natural_number, nargs="+",
        metavar="LO HI", group=UNLEARNING)
    forget_timestep_schedule: str = setting("alternate", "When several --forget_timestep_ranges are trained:"
        " `alternate`, in turns, a step each; `sequential`, one after the other, an equal share of the steps each (a"
        " range named twice has two). Default: alternate.", choices=("alternate", "sequential"), group=UNLEARNING,
        public=True)
    max_skipped_steps: int = setting(20, "Give up after so many steps in a row whose gradients were not finite.",
        parse=positive_int, group=UNLEARNING, resume="free", public=True)

    validation_steps: int | None = setting(None, "Count the copies among fresh samples every so many steps; never by"
        " default.", parse=positive_int, group=VALIDATION, resume="free", public=True)
    validation_epochs: int | None = setting(None, "Count the copies every so many passes over the keep set,"
        " instead of --validation_steps.", parse=positive_int, group=VALIDATION, resume="free", public=True)
    num_validation_images: int = setting(256, "Samples of each validation.", parse=positive_int,
        group=VALIDATION, resume="free", public=True)
    stop_when_forgotten: bool = switch("Stop at the first validation that finds no copy.", group=VALIDATION,
        resume="free", public=True)
    num_inference_steps: int = setting(50, "DDIM steps of samples made in training.", parse=positive_int,
        group=VALIDATION, resume="free", public=True)
    eval_batch_size: int = setting(16, "Batch of samples made in training.", parse=positive_int, group=VALIDATION,
        resume="free", public=True)
    save_model_epochs: int | None = setting(None, "Save the result every so many passes over the keep set, too.",
        parse=positive_int, group=VALIDATION, resume="free", public=True)
    # fmt: on

    @property
    def reference_learning_rate(self) -> float:
        """Return the learning rate of a network of `reference_width` channels."""
        return 5e-6

    def default_learning_rate(self, width: int) -> float:
        """Return the learning rate of a network whose widest block has `width` channels: with Adam the best one falls as
        1 / width (Tensor Programs V, arXiv 2203.03466)."""
        return float(f"{self.reference_learning_rate * self.reference_width / width:.3g}")

    @property
    def adapter(self) -> "AdapterSettings | None":
        """Return what an adapter is made of; None where the whole network is trained."""
        return None

    @property
    def scheduler_overrides(self) -> dict[str, Any]:
        """Return the entries of the scheduler's configuration that the user replaced."""
        return {} if self.prediction_type is None else {"prediction_type": self.prediction_type}

    @property
    def ema_arguments(self) -> dict[str, Any]:
        """Return the arguments of diffusers' `EMAModel`."""
        return {"foreach": self.foreach_ema}

    def check_own(self) -> "Settings":
        """Check what only these settings have, and fill in their defaults that depend on others.

        Raises:
            UsageError: naming the flag.
        """
        return self

    def public(self) -> dict[str, int | float | bool | str]:
        """Return what may be published: numbers, switches and names of ours, never a path, a file name or a prompt."""
        values = {flag_name(field): getattr(self, field.name) for field in fields(self) if field.metadata["public"]}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> "Settings":
        """Build settings from values by their names, such as the keyword arguments of `unlearn(...)`.

        Raises:
            UsageError: for an unknown name or a value that is not allowed.
        """
        known = {field.name: field for field in fields(cls)}
        unknown = [name for name in values if name not in known]
        if unknown:
            raise UsageError(f"there is no setting {unknown[0]!r} for this model; the settings are {', '.join(known)}")
        if isinstance(values.get("method_args"), dict):
            values = values | {"method_args": [f"{key}={value}" for key, value in values["method_args"].items()]}
        return cls(**{name: check_value(known[name], value) for name, value in values.items()})

    def replace(self, **values: Any) -> "Settings":
        """Return a copy with other values."""
        return dataclasses.replace(self, **values)


@dataclass(frozen=True)
class AdapterSettings:
    """A LoRA adapter: rank, alpha, dropout, and the layers that get one."""

    rank: int
    alpha: float
    dropout: float
    target_modules: tuple[str, ...]
