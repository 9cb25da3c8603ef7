"""Features of images: by a TorchScript network that the user brings (SSCD, an Inception, ...), or the pixels."""

import warnings
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from siss_diffusers.errors import UsageError
from siss_diffusers.metrics.base import ALL_BROKEN, Metric, Skip
from siss_diffusers.metrics.broken import finite


if TYPE_CHECKING:
    from siss_diffusers.evaluation.model import MeasuredModel

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_torchscript(path: str | Path, flag: str) -> torch.jit.ScriptModule:
    """Load the network in a TorchScript file onto the CPU, in evaluation mode and without gradients.

    Such a file is a program, but of tensors and not of Python. A file of `torch.save` is refused and not unpickled.

    Args:
        flag: the option that named the file, for messages.

    Raises:
        UsageError: if there is no such file, or it is not a TorchScript file.
    """
    if not Path(path).is_file():
        raise UsageError(f"{flag}: there is no file {path}")
    try:
        with warnings.catch_warnings():
            # Deprecated in favour of torch.export, but TorchScript is what SSCD and others are published in.
            warnings.simplefilter("ignore", FutureWarning)
            model = torch.jit.load(str(path), map_location="cpu")
    except Exception as error:
        raise UsageError(
            f"{flag}: {path} is not a TorchScript file, as torch.jit.script(model).save(...) writes it"
        ) from error
    for parameter in model.parameters():  # a ScriptModule has no requires_grad_ of its own
        parameter.requires_grad_(False)
    return model.eval()


@torch.no_grad()
def extract(
    model: torch.nn.Module,
    images: Tensor,
    *,
    size: int | None,
    batch_size: int,
    flag: str,
    normalize: bool = True,
) -> Tensor:
    """Return features `(N, D)`, float32 on the CPU.

    Args:
        model: `(B, 3, H, W) -> (B, D)`.
        images: `(N, 3, H, W)` or `(N, 1, H, W)` in [0, 1]; grey becomes three equal channels.
        size: side of the square that the network is shown; None shows the images as they are.
        flag: the option that named the network, for messages.
        normalize: by mean and standard deviation of ImageNet, as SSCD and most backbones want it.

    Raises:
        UsageError: if the network cannot take such images, or gives anything but one finite row for each.
    """
    device = next(chain(model.parameters(), model.buffers()), images).device
    mean, std = (torch.tensor(values, device=device).reshape(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    features = []
    for batch in images.split(batch_size):
        batch = batch.to(device, torch.float32).expand(-1, 3, -1, -1).contiguous()
        if size is not None:
            batch = F.interpolate(batch, size=(size, size), mode="bilinear", antialias=True)
        if normalize:
            batch = (batch - mean) / std
        try:
            output = model(batch)
        except RuntimeError as error:  # that of TorchScript has the traceback in its text, the cause in the last line
            cause = str(error).strip().splitlines()[-1]
            raise UsageError(f"{flag}: the network fails on images of {tuple(batch.shape[1:])}: {cause}") from error
        if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != len(batch):
            actual = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise UsageError(f"{flag}: the network must give one row of features an image, not {actual}")
        if not output.isfinite().all():
            raise UsageError(f"{flag}: the network gives features that are not finite")
        features.append(output.float().cpu())
    return torch.cat(features)


def tell_apart(features: Tensor) -> bool:
    """Tell whether the features `(N, D)` of different pictures differ by more than rounding: a network that was saved broken
    gives the same for all, and then every distance is 0."""
    return bool((features - features[:1]).abs().max() > 1e-6 * features.abs().max())


def pixel_features(images: Tensor) -> Tensor:
    """Return the pixels themselves as features, `(N, C, H, W)` to `(N, C H W)` float32."""
    return images.flatten(1).float()


def copy_similarity(samples: Tensor, references: Tensor) -> Tensor:
    """Return the highest cosine with any reference, `(N,)` in [-1, 1]: the score of SSCD (Pizzi et al., 2202.10261).

    Args:
        samples: features `(N, D)`.
        references: features `(K, D)`.
    """
    return (F.normalize(samples) @ F.normalize(references).T).amax(1)


def _sscd_forget(model: "MeasuredModel") -> dict[str, float]:
    measured = model.samples[finite(model.samples)]
    if len(measured) == 0:
        raise Skip(ALL_BROKEN)
    if "network" in model.detectors.blind:
        raise Skip(model.detectors.blind["network"])
    similarity = model.detectors.similarity(measured)
    if similarity is None:
        raise Skip("needs --copy_detector, a TorchScript file such as SSCD's")
    return {"sscd_forget": similarity.mean().item()}


SSCD_FORGET = Metric(
    key="sscd_forget",
    label="Similarity to forgotten images",
    explanation=(
        "Mean over the samples of the highest cosine with a forgotten image, in the features of a copy detector. Lower"
        " is better."
    ),
    measure=_sscd_forget,
    better="lower",
    chapter="memory",
)
