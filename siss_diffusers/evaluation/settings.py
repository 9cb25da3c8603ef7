"""What is measured, and how. Nothing heavy is imported here: `siss --help` reads the defaults."""

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import ClassVar

from siss_diffusers.errors import UsageError


# What an embedding attack begins with: the prompt of the image, the empty prompt, another prompt, Gaussian noise.
ATTACK_STARTS = ("prompt", "empty", "other", "gauss")


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of an evaluation. Most of them have a flag of the same name in `siss evaluate`.

    Args:
        num_samples: samples of each model; if it has prompts, of the forget images' prompts together.
        num_ordinary_samples: samples of the keep images' other prompts together, if the model has prompts.
        num_inference_steps: steps of the sampler.
        guidance_scale: of classifier-free guidance; 1 is none. Unconditional models ignore it.
        batch_size: samples at a time.
        seed: of the first sample; sample i has a generator of its own, of seed + i.
        copy_detector: a TorchScript file of a copy detector, such as SSCD's.
        copy_detector_size: pictures are resized to this side for it.
        feature_extractor: a TorchScript file of a feature extractor, for FID, KID, precision, recall, density and coverage.
        feature_size: pictures are resized to this side for it.
        classifier: a TorchScript file that maps pictures to class logits, for the inception score.
        classifier_size: pictures are resized to this side for it; None shows them as they are.
        clip_model: a CLIP of transformers, for CLIP score and CLIP-IQA: a folder, or a name on the Hub.
        cache_dir: where downloaded models are kept.
        num_likelihood_images: images to keep whose likelihood is computed; of forget images and, at most 8, of images to
            keep the bits are compared. 0 leaves both out.
        paraphrases: other wordings of the memorized prompts.
        prompt_noise: sample with noise on the prompt's embedding, so many times its standard deviation.
        embedding_attack: search the text conditioning for one that gives a forget image.
        attack_steps: Adam steps of a search.
        attack_restarts: searches from each start.
        attack_starts: what a search begins with, of `ATTACK_STARTS`; empty: all of them.
        attack_controls: pictures that the model never saw and that are searched as well; 0 for none.
        num_attack_samples: samples after the search, for each start and guidance scale.
        never_seen_dir: a folder of pictures that the model never saw.
        relearning_steps: steps of the relearning attack; 0 skips it.
        relearning_rate: learning rate of the relearning attack.
        num_relearning_samples: samples at each point of the relearning attack, and for each variation of the prompt.
        use_clusters: whether k-means on the base's samples serves as a copy detector too.

    Raises:
        UsageError: for a number that is too small.
    """

    # The least value of what counts something, as of the flags.
    LEAST: ClassVar[dict[str, int]] = (
        dict.fromkeys(("num_samples", "num_inference_steps", "batch_size", "num_relearning_samples"), 1)
        | dict.fromkeys(("attack_steps", "attack_restarts", "num_attack_samples"), 1)
        | dict.fromkeys(("copy_detector_size", "feature_size", "classifier_size"), 1)
        | dict.fromkeys(
            ("num_ordinary_samples", "num_likelihood_images", "relearning_steps", "attack_controls", "seed"), 0
        )
    )

    num_samples: int = 256
    num_ordinary_samples: int = 256
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    batch_size: int = 32
    seed: int = 0
    copy_detector: str | None = None
    copy_detector_size: int = 288
    feature_extractor: str | None = None
    feature_size: int = 299
    classifier: str | None = None
    classifier_size: int | None = None
    clip_model: str | None = None
    cache_dir: str | None = None
    num_likelihood_images: int = 32
    paraphrases: tuple[str, ...] = ()
    prompt_noise: tuple[float, ...] = ()
    embedding_attack: bool = False
    attack_steps: int = 50
    attack_restarts: int = 1
    attack_starts: tuple[str, ...] = ()
    attack_controls: int = 5
    num_attack_samples: int = 48
    never_seen_dir: str | None = None
    relearning_steps: int = 0
    relearning_rate: float = 1e-4
    num_relearning_samples: int = 64
    use_clusters: bool = True

    def __post_init__(self) -> None:
        for name, least in self.LEAST.items():
            value = getattr(self, name)
            if value is not None and (not isinstance(value, Integral) or value < least):
                raise UsageError(f"{name} must be a whole number of at least {least}, not {value!r}")
        unknown = [start for start in self.attack_starts if start not in ATTACK_STARTS]
        if unknown:
            raise UsageError(f"attack_starts must be of {', '.join(ATTACK_STARTS)}, not {unknown[0]!r}")
        self._refuse_idle_attack()
        for name in ("guidance_scale", "relearning_rate"):
            value = getattr(self, name)
            if not isinstance(value, Real) or not 0 <= value < math.inf:
                raise UsageError(f"{name} must be a finite number not below 0, not {value!r}")

    def _refuse_idle_attack(self) -> None:
        """Refuse settings of an attack that is not asked for.

        Raises:
            UsageError: naming the setting.
        """
        names = ("attack_steps", "attack_restarts", "attack_starts", "attack_controls", "num_attack_samples")
        for name in (*names, "never_seen_dir"):
            if not self.embedding_attack and getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise UsageError(f"--{name} needs --embedding_attack; add it, or drop this one")
        if self.never_seen_dir is not None and self.attack_controls == 0:
            raise UsageError("--never_seen_dir and --attack_controls 0 exclude each other; drop one")
