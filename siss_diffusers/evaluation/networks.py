"""The networks that look at pictures: copy detector, feature extractor, classifier, CLIP."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from siss_diffusers.errors import UsageError
from siss_diffusers.evaluation.settings import EvaluationSettings
from siss_diffusers.metrics.clip import Clip
from siss_diffusers.metrics.features import extract, load_torchscript, pixel_features, tell_apart


@dataclass(frozen=True)
class Networks:
    """Functions of pictures `(N, C, H, W)` in [0, 1], with results on the CPU. None: there is no such network.

    Args:
        copy_features: features `(N, D)` in which copies are close, by cosine.
        features: features `(N, D)` for distances between distributions.
        class_probabilities: `(N, K)`.
        clip: embeds pictures and texts.
    """

    copy_features: Callable[[Tensor], Tensor] | None = None
    features: Callable[[Tensor], Tensor] | None = None
    class_probabilities: Callable[[Tensor], Tensor] | None = None
    clip: Clip | None = None


def refuse_dead_networks(networks: Networks, pictures: Tensor) -> None:
    """Refuse networks that give the same features for all of some pictures: by them every model would look perfect.

    Raises:
        UsageError: naming the flag.
    """
    if not tell_apart(pixel_features(pictures)):
        return
    named = {"--copy_detector": networks.copy_features, "--feature_extractor": networks.features}
    for flag, features in named.items():
        if features is not None and not tell_apart(features(pictures)):
            raise UsageError(
                f"{flag}: the network gives the same features for {len(pictures)} different pictures, so it cannot compare"
                " any; save it again, or name another"
            )


def load_networks(settings: EvaluationSettings, device: torch.device | str) -> Networks:
    """Load the networks that the settings name.

    Raises:
        UsageError: for a file that cannot be loaded.
    """

    def load(file: str | None, flag: str, size: int | None, normalize: bool = True) -> Callable | None:
        if file is None:
            return None
        network = load_torchscript(file, flag).to(device)
        return partial(extract, network, size=size, batch_size=settings.batch_size, flag=flag, normalize=normalize)

    logits = load(settings.classifier, "--classifier", settings.classifier_size, normalize=False)
    return Networks(
        copy_features=load(settings.copy_detector, "--copy_detector", settings.copy_detector_size),
        features=load(settings.feature_extractor, "--feature_extractor", settings.feature_size),
        class_probabilities=None if logits is None else lambda images: logits(images).softmax(1),
        clip=None
        if settings.clip_model is None
        else Clip(settings.clip_model, torch.device(device), "--clip_model", settings.cache_dir),
    )
