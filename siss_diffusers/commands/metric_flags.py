"""The flags of single metrics of `siss evaluate`."""

import argparse

from siss_diffusers.evaluation.settings import ATTACK_STARTS, EvaluationSettings
from siss_diffusers.parsing import natural_number, non_negative_float, path, positive_float, positive_int


def add_metric_arguments(metrics: argparse._ArgumentGroup) -> None:
    """Add the flags of single metrics."""
    metrics.add_argument("--copy_detector", type=path, help="A TorchScript file of a copy detector, such as SSCD's.")
    metrics.add_argument(
        "--copy_detector_size",
        type=positive_int,
        default=EvaluationSettings.copy_detector_size,
        help="Side in pixels that pictures are resized to for it; default: %(default)s.",
    )
    metrics.add_argument(
        "--feature_extractor",
        type=path,
        help="A TorchScript file of a feature extractor, for FID, KID, precision, recall, density and coverage.",
    )
    metrics.add_argument(
        "--feature_size",
        type=positive_int,
        default=EvaluationSettings.feature_size,
        help="Side in pixels that pictures are resized to for it; default: %(default)s.",
    )
    metrics.add_argument(
        "--classifier",
        type=path,
        help="A TorchScript file that maps pictures to class logits, for the inception score.",
    )
    metrics.add_argument(
        "--classifier_size",
        type=positive_int,
        help="Side in pixels that pictures are resized to for it; default: they are not.",
    )
    metrics.add_argument(
        "--clip_model",
        type=path,
        help="A CLIP of transformers, such as openai/clip-vit-base-patch16, for CLIP score and CLIP-IQA.",
    )
    metrics.add_argument(
        "--num_likelihood_images",
        type=natural_number,
        default=EvaluationSettings.num_likelihood_images,
        help="Images to keep whose likelihood is computed, of unconditional models. Of all models, so many forget images,"
        " and at most 8 images to keep and 8 pictures never seen, have their bits compared with the base's. 0 leaves both"
        " out; default: %(default)s.",
    )
    metrics.add_argument(
        "--paraphrases_file",
        type=path,
        help="Text-to-image models: a text file of other wordings of the memorized prompts.",
    )
    metrics.add_argument(
        "--prompt_noise",
        type=positive_float,
        nargs="*",
        default=[],
        help="Text-to-image models: sample with noise on the prompt's embedding, so many times its standard deviation.",
    )
    add_attack_arguments(metrics)
    add_relearning_arguments(metrics)


def add_attack_arguments(metrics: argparse._ArgumentGroup) -> None:
    """Add the flags of the embedding attack."""
    metrics.add_argument(
        "--embedding_attack",
        action="store_true",
        help="Text-to-image models: search the text-embedding space for what still gives a forget image, and do the same"
        " with pictures that the model never saw.",
    )
    metrics.add_argument(
        "--attack_steps",
        type=positive_int,
        default=EvaluationSettings.attack_steps,
        help="Adam steps of a search; copies are counted after 25, 50, 100, 200 and 400 of them, too; default:"
        " %(default)s.",
    )
    metrics.add_argument(
        "--attack_restarts",
        type=positive_int,
        default=EvaluationSettings.attack_restarts,
        help="Searches from each start; default: %(default)s.",
    )
    metrics.add_argument(
        "--attack_starts",
        nargs="+",
        choices=ATTACK_STARTS,
        default=[],
        help="What a search begins with: the image's prompt, the empty one, another prompt of the training set, Gaussian"
        " noise; default: all.",
    )
    metrics.add_argument(
        "--attack_controls",
        type=natural_number,
        default=EvaluationSettings.attack_controls,
        help="Pictures that the model never saw and that are searched as well, from --never_seen_dir first, then forget"
        " images and images to keep, turned; default: %(default)s.",
    )
    metrics.add_argument(
        "--num_attack_samples",
        type=positive_int,
        default=EvaluationSettings.num_attack_samples,
        help="Samples for each start, guidance scale and number of steps, as many of forget images as of controls, at"
        " least one for each search; default: %(default)s.",
    )
    metrics.add_argument("--never_seen_dir", type=path, help="A folder of images that the model never saw.")


def add_relearning_arguments(metrics: argparse._ArgumentGroup) -> None:
    """Add the flags of the relearning attack."""
    metrics.add_argument(
        "--relearning_steps",
        type=natural_number,
        default=EvaluationSettings.relearning_steps,
        help="Fine-tune each model but the base on neighbours of the forget images for so many steps and watch whether"
        " copies return; 0 skips this; default: %(default)s.",
    )
    metrics.add_argument(
        "--relearning_rate",
        type=non_negative_float,
        default=EvaluationSettings.relearning_rate,
        help="Learning rate of that fine-tuning; default: %(default)s.",
    )
    metrics.add_argument(
        "--num_relearning_samples",
        type=positive_int,
        default=EvaluationSettings.num_relearning_samples,
        help="Samples at each point of the relearning curve, and for each variation of the prompt; default:"
        " %(default)s.",
    )
