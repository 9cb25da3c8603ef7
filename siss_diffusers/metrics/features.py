"""Features of images: by a TorchScript network that the user brings (SSCD, an Inception, ...), or the pixels."""

import warnings
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from siss_diffusers.errors import UsageError


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_torchscript(path: str | Path, flag: str) -> torch.jit.ScriptModule:
    """The network in a TorchScript file, on the CPU, in evaluation mode and without gradients.

    Such a file is a program, though of tensors and not of Python; a file of `torch.save` is refused and not unpickled.

    Args:
        flag: the option that named the file, for the message.

    Raises:
        UsageError: where there is no such file, or it is not a TorchScript file.
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
    """Features `(N, D)`, float32 on the CPU.

    Args:
        model: `(B, 3, H, W) -> (B, D)`.
        images: `(N, 3, H, W)` or `(N, 1, H, W)` in [0, 1]; grey becomes three equal channels.
        size: of the square that the network is shown; None: the images as they are.
        flag: the option that named the network, for the message.
        normalize: by mean and standard deviation of ImageNet, as SSCD and most backbones want it.

    Raises:
        UsageError: where the network cannot take such images, or gives something else than one finite row for each.
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
            found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise UsageError(f"{flag}: the network must give one row of features an image, not {found}")
        if not output.isfinite().all():
            raise UsageError(f"{flag}: the network gives features that are not finite")
        features.append(output.float().cpu())
    return torch.cat(features)


def pixel_features(images: Tensor) -> Tensor:
    """The pixels themselves as features, `(N, C, H, W)` to `(N, C H W)` float32."""
    return images.flatten(1).float()


def copy_similarity(samples: Tensor, references: Tensor) -> Tensor:
    """Highest cosine with any reference, `(N,)` in [-1, 1]: the score of SSCD (Pizzi et al., arXiv 2202.10261).

    Args:
        samples: features `(N, D)`.
        references: features `(K, D)`.
    """
    return (F.normalize(samples) @ F.normalize(references).T).amax(1)
