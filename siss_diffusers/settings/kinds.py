"""The settings of unconditional and of text-to-image models: those of their own, and other defaults."""

from dataclasses import dataclass
from typing import Any, ClassVar

from siss_diffusers.errors import UsageError
from siss_diffusers.parsing import (
    condition_shares,
    finite_float,
    non_negative_float,
    path,
    positive_float,
    positive_int,
    unit_float,
)
from siss_diffusers.settings.fields import setting, switch
from siss_diffusers.settings.shared import INTERPOLATIONS, UNLEARNING, VALIDATION, AdapterSettings, Settings


LORA = "LoRA"
WEIGHTING_SCHEMES = ("none", "sigma_sqrt", "logit_normal", "mode", "cosmap")
# The scheme that each of these belongs to.
SCHEME_OF = {"logit_mean": "logit_normal", "logit_std": "logit_normal", "mode_scale": "mode"}
MAX_MODE_SCALE = 1.75  # 2 / (pi - 2), up to which the draws of `mode` are monotonic (arXiv 2403.03206, 3.1)
LORA_FLAGS = ("rank", "lora_alpha", "lora_dropout", "lora_target_modules")


@dataclass(frozen=True, kw_only=True)
class UnconditionalSettings(Settings):
    """The settings of `train_siss_unconditional.py`, which mirrors diffusers' `train_unconditional.py`."""

    # fmt: off
    pretrained_model_name_or_path: str = setting("", "A pipeline with a UNet2DModel: a folder, or a name on the Hub such"
        " as google/ddpm-celebahq-256.", parse=path)
    output_dir: str = setting("siss-ddpm", "Where the result and the checkpoints are written.", resume="free",
        parse=path)
    learning_rate: float | None = setting(None, "Learning rate of AdamW; default: 5e-6 for a network 512 channels wide, and"
        " in inverse proportion for others.", parse=non_negative_float, public=True)
    max_train_steps: int | None = setting(None, "Optimizer steps; default: 60.", parse=positive_int, resume="length",
        public=True)
    num_train_epochs: int | None = setting(None, "Passes over the keep set, instead of --max_train_steps.",
        parse=positive_int, flag="num_epochs", resume="length", public=True)
    adam_beta1: float = setting(0.95, "beta1 of AdamW.", parse=unit_float, public=True)
    adam_weight_decay: float = setting(1e-6, "Weight decay of AdamW.", parse=non_negative_float, public=True)
    foreach_ema: bool = setting(True, "Update the average by fused operations.",
        resume="free", public=True)
    ema_inv_gamma: float = setting(1.0, "Inverse gamma of the average.", parse=non_negative_float, public=True)
    ema_power: float = setting(3 / 4, "Power of the average.", parse=non_negative_float, public=True)
    ema_max_decay: float = setting(0.9999, "Highest decay of the average.", parse=unit_float, public=True)
    ddpm_num_steps: int | None = setting(None, "Noise levels; default: what the scheduler says.", parse=positive_int,
        public=True)
    ddpm_beta_schedule: str | None = setting(None, "Schedule of the noise; default: what the scheduler says.",
        choices=("linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid"), public=True)
    num_inference_steps: int = setting(50, "DDIM steps of samples made in training.", parse=positive_int,
        flag="ddpm_num_inference_steps", group=VALIDATION, resume="free", public=True)
    save_images_epochs: int | None = setting(None, "Log samples to the tracker every so many passes over the keep set,"
        " copies of forget images blanked out.", parse=positive_int, group=VALIDATION, resume="free", public=True)
    preserve_input_precision: bool = switch("Do not round 16-bit images to 8 bits.", public=True)
    tracker_project_name: str = setting("train_siss_unconditional", "Name of the project for the tracker.",
        resume="free")
    # fmt: on

    @property
    def scheduler_overrides(self) -> dict[str, Any]:
        overrides = {"num_train_timesteps": self.ddpm_num_steps, "beta_schedule": self.ddpm_beta_schedule}
        return super().scheduler_overrides | {key: value for key, value in overrides.items() if value is not None}

    @property
    def ema_arguments(self) -> dict[str, Any]:
        return super().ema_arguments | {
            "decay": self.ema_max_decay,
            "use_ema_warmup": True,
            "inv_gamma": self.ema_inv_gamma,
            "power": self.ema_power,
        }


@dataclass(frozen=True, kw_only=True)
class TextToImageSettings(Settings):
    """The settings of `train_siss_sd.py`, which mirrors diffusers' `train_text_to_image.py` and
    `train_text_to_image_lora.py`."""

    reference_width: ClassVar[int] = 1280  # Stable Diffusion 1.x, 2.x and XL
    default_steps: ClassVar[int] = 35
    calibrates_by_default: ClassVar[bool] = True

    # fmt: off
    pretrained_model_name_or_path: str = setting("", "A text-to-image pipeline, such as one of Stable Diffusion 1.x, 2.x or XL: a"
        " folder, or a name on the Hub such as CompVis/stable-diffusion-v1-4.", parse=path)
    output_dir: str = setting("siss-sd", "Where the result and the checkpoints are written.", resume="free",
        parse=path)
    non_ema_revision: str | None = setting(None, "Revision of the network that is trained; default: --revision.")
    caption_column: str = setting("text", "The column of the prompts.", resume="free")
    image_interpolation_mode: str = setting("lanczos", "How images are resized.", choices=INTERPOLATIONS)
    cache_latents: bool | None = setting(None, "Encode images once, before training. Default: unless augmentation is"
        " random, by --random_flip, or by random crops of images that are not square.", resume="free", public=True)
    max_train_steps: int | None = setting(None, "Optimizer steps; default: 35.", parse=positive_int, resume="length",
        public=True)
    learning_rate: float | None = setting(None, "Learning rate of AdamW; default: 1e-5, or 1e-4 with --use_lora, for a"
        " network 1,280 channels wide, and in inverse proportion for others.",
        parse=non_negative_float, public=True)
    tracker_project_name: str = setting("train_siss_sd", "Name of the project for the tracker.", resume="free")

    keep_target: str = setting("noise", "What the network learns of images to keep that have other prompts than the"
        " forget images: `noise`, the noise that was added, as in training; `base`, what the model answered before"
        " unlearning, at the price of one more forward pass of these rows and, without --use_lora, of a second copy of the"
        " network. Default: noise.", choices=("noise", "base"), group=UNLEARNING, public=True)
    forget_conditions: Any = setting(None, "What the network is told of a forget image, by shares that sum to 1:"
        " `prompt`, its own; `empty`, the empty prompt; `other`, the prompt of the image to keep of the pair; `gauss`,"
        " Gaussian noise as large as a prompt's embedding; `adversarial`, a condition found by a search under the weights as"
        " they are. For deletion requests: prompt:0.4,empty:0.1,other:0.1,gauss:0.1,adversarial:0.3. Default: prompt:1.",
        parse=condition_shares, metavar="KIND:SHARE,...", group=UNLEARNING, public=True)
    adversarial_every: int = setting(5, "Search one of the adversarial conditions anew every so many steps, in turns.",
        parse=positive_int, metavar="K", group=UNLEARNING, public=True)
    adversarial_steps: int = setting(20, "Steps of such a search, of 8 rows each.", parse=positive_int, metavar="N",
        group=UNLEARNING, public=True)
    adversarial_restarts: int = setting(8, "Adversarial conditions that are kept of each forget image, from different"
        " starts.", parse=positive_int, metavar="N", group=UNLEARNING, resume="fixed", public=True)

    weighting_scheme: str = setting("none", "Of models of flow matching, as in the official scripts: how noise levels are"
        " drawn (`logit_normal`, `mode`), or how their losses are weighted (`sigma_sqrt`, `cosmap`). Default: none, uniform"
        " draws and equal weights.", choices=WEIGHTING_SCHEMES, public=True)
    logit_mean: float = setting(0.0, "Mean of --weighting_scheme logit_normal; a positive one draws less noise.",
        parse=finite_float, public=True)
    logit_std: float = setting(1.0, "Standard deviation of --weighting_scheme logit_normal.", parse=positive_float,
        public=True)
    mode_scale: float = setting(1.29, "Scale of --weighting_scheme mode, between -1 and 1.75.", parse=finite_float,
        public=True)

    use_lora: bool = switch("Train an adapter and leave the model as it is.", group=LORA, resume="fixed", public=True)
    rank: int = setting(4, "Rank of the adapter.", parse=positive_int, group=LORA, resume="fixed", public=True)
    lora_alpha: float | None = setting(None, "The adapter is scaled by alpha / rank; default: rank.",
        parse=positive_float, group=LORA, public=True)
    lora_dropout: float = setting(0.0, "Dropout before the adapter.", parse=unit_float, group=LORA, public=True)
    lora_target_modules: Any = setting(None, "Layers that get an adapter; default: the attention projections of the"
        " official script, to_k to_q to_v to_out.0. `all`: every linear and convolutional layer.", nargs="+", group=LORA, resume="fixed")

    num_validation_images: int = setting(16, "Samples of each forget prompt in a validation.", parse=positive_int,
        group=VALIDATION, resume="free", public=True)
    validation_prompts: Any = setting((), "Samples of these go to the tracker, copies of forget images blanked out. They"
        " are public; the prompts of forget images are sampled too, and only counted.", nargs="+",
        aliases=("validation_prompt",), group=VALIDATION, resume="free")
    guidance_scale: float | None = setting(None, "Guidance of samples made in training; default: that of the model's"
        " pipeline, such as 7.5 for Stable Diffusion 1.x.", parse=non_negative_float, group=VALIDATION, resume="free",
        public=True)
    eval_batch_size: int = setting(4, "Batch of samples made in training.", parse=positive_int, group=VALIDATION,
        resume="free", public=True)
    # fmt: on

    @property
    def reference_learning_rate(self) -> float:
        return 1e-4 if self.use_lora else 1e-5

    @property
    def adapter(self) -> AdapterSettings | None:
        if not self.use_lora:
            return None
        return AdapterSettings(self.rank, self.lora_alpha, self.lora_dropout, tuple(self.lora_target_modules))

    @property
    def searches_conditions(self) -> bool:
        return (self.forget_conditions or {}).get("adversarial", 0) > 0

    def check_own(self) -> "TextToImageSettings":
        for name in ("adversarial_every", "adversarial_steps", "adversarial_restarts"):
            if not self.searches_conditions and getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise UsageError(
                    f"--{name} needs --forget_conditions with a share of `adversarial`; add it, or drop this"
                )
        if self.cache_latents and self.random_flip:
            raise UsageError("--cache_latents and --random_flip exclude each other: a cached latent cannot be flipped")
        if self.lora_dropout == 1:
            raise UsageError("--lora_dropout must be below 1, or nothing is left to train")
        for name, scheme in SCHEME_OF.items():
            if (
                getattr(self, name) != type(self).__dataclass_fields__[name].default
                and self.weighting_scheme != scheme
            ):
                raise UsageError(f"--{name} needs --weighting_scheme {scheme}")
        if not -1 <= self.mode_scale <= MAX_MODE_SCALE:
            raise UsageError(
                f"--mode_scale must be between -1 and {MAX_MODE_SCALE}, or noise levels would be drawn twice"
            )
        if not self.use_lora:
            for name in LORA_FLAGS:
                if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                    raise UsageError(f"--{name} needs --use_lora")
        if self.validation_prompts and not (self.validation_steps or self.validation_epochs):
            raise UsageError(
                "--validation_prompts needs --validation_steps or --validation_epochs, which say how often to look"
            )
        return self.replace(lora_alpha=self.rank if self.lora_alpha is None else self.lora_alpha)
