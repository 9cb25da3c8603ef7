"""The text-conditional noise norm (Wen et al., arXiv 2407.21720): how hard a prompt pulls, large where it recalls."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from siss_diffusers.metrics.base import NO_PROMPTS, Metric, Skip
from siss_diffusers.metrics.likelihood import noise_prediction
from siss_diffusers.noising import GaussianPath


if TYPE_CHECKING:
    from siss_diffusers.evaluation.model import MeasuredModel

NOT_IN_ONE_BATCH = "this pipeline does not predict with and without the prompt in one batch"


class TextNoiseNorms:
    """Records `||eps(x_t, c) - eps(x_t, empty)||_2` while a pipeline samples under classifier-free guidance.

        with TextNoiseNorms(pipeline.unet, path) as norms:
            pipeline(prompts, generator=...)
        norms.per_step()

    It costs no network call: the sampler's own batch is [unconditional | conditional], both halves of the same x_t. A
    call whose halves differ has no guidance and is not recorded. One pass down the noise levels is one batch of rows. The
    batches of several passes are put side by side.

    Of a flow-matching model it is the norm of the difference of the velocities. The noise is `x_t + alpha v`, and alpha is
    0 where sampling begins, so the first norm of the noise would be 0 for every prompt.

    Args:
        unet: the network that is called, with the noisy batch and the timestep as its first arguments, or by keywords:
            `sample` or `hidden_states`, and `timestep`.
        path: the noise levels; they turn a difference of other predictions, such as v, into one of noise.
    """

    def __init__(self, unet: torch.nn.Module, path: GaussianPath) -> None:
        self.unet, self.path = unet, path
        self.passes: list[list[Tensor]] = []
        self.first_index = -1

    def __enter__(self) -> "TextNoiseNorms":
        self.handle = self.unet.register_forward_hook(self._record, with_kwargs=True)
        return self

    def __exit__(self, *_) -> None:
        self.handle.remove()

    def _record(self, unet: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output) -> None:
        # A UNet calls the batch `sample`, a transformer `hidden_states`.
        noisy = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        timestep = args[1] if len(args) > 1 else kwargs.get("timestep")
        if noisy is None or timestep is None:
            return
        noisy, timestep = as_batch(noisy).float(), float(torch.as_tensor(timestep).flatten()[0])  # equal for all rows
        if len(noisy) % 2 or not torch.equal(*noisy.chunk(2)):
            return
        answer = as_batch(output[0]).detach().float()  # of a tuple or of a `UNet2DConditionOutput`
        index = int((self.path.model_timesteps - timestep).abs().argmin())
        is_flow = self.path.prediction_type == "flow_prediction"
        compared = answer if is_flow else noise_prediction(self.path, lambda *_: answer)(noisy, index)
        unconditional, conditional = compared.chunk(2)
        # Some samplers visit a noise level twice, but none the first.
        if not self.passes or index >= self.first_index:
            self.passes.append([])
            self.first_index = index
        self.passes[-1].append((conditional - unconditional).flatten(1).norm(dim=1).cpu())

    def per_step(self) -> Tensor:
        """Return the norms `(steps, rows)`, the first sampling step first, the rows in the order of sampling.

        Raises:
            ValueError: if nothing was sampled under guidance.
        """
        if not self.passes:
            raise ValueError(
                "no call under classifier-free guidance was seen: the norm needs a guidance scale above 1"
            )
        return torch.cat([torch.stack(steps) for steps in self.passes], dim=1)


def as_batch(pictures: Tensor | Sequence[Tensor]) -> Tensor:
    """Return pictures `(B, ...)`, which some networks take and answer one by one."""
    return pictures if isinstance(pictures, Tensor) else torch.stack(list(pictures))


def mean_noise_norm(per_step: Tensor) -> Tensor:
    """Return the detection score of the paper, the mean over the steps; `(steps, rows)` to `(rows,)`."""
    return per_step.mean(0)


def first_noise_norm(per_step: Tensor) -> Tensor:
    """Return the score after a single step, nearly as telling in the paper; `(steps, rows)` to `(rows,)`."""
    return per_step[0]


def _text_noise_norm(model: "MeasuredModel") -> dict[str, Any]:
    if not model.family.has_prompts:
        raise Skip(NO_PROMPTS)
    if model.settings.guidance_scale <= 1:
        raise Skip("needs guidance, a --guidance_scale above 1")
    per_step = model.noise_norms
    if per_step is None:
        raise Skip(NOT_IN_ONE_BATCH)
    return {"text_noise_norm": per_step.mean().item(), "text_noise_norm_by_step": per_step.mean(1).tolist()}


TEXT_NOISE_NORM = Metric(
    key="text_noise_norm",
    label="Text-conditional noise norm",
    explanation="How hard the memorized prompt pulls; large where a model recalls an image. Lower is better.",
    measure=_text_noise_norm,
    better="lower",
    chapter="memory",
)
