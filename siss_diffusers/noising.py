"""Gaussian paths: how a clean sample is mixed with noise, and what the network is asked to predict."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor


def mean_squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean over pixels for each row, `(R,)`. The mean, not the sum, goes backward: a sum would overflow fp16."""
    return (output - target).square().flatten(1).mean(1)


PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")


def broadcast_to(coefficient: Tensor, like: Tensor) -> Tensor:
    """Append axes to a per-sample coefficient `(B,)` until it multiplies `like` `(B, ...)`."""
    return coefficient.reshape(-1, *[1] * (like.ndim - 1))


def add_noise(sample: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The forward process `m_t = alpha_t x + sigma_t eps`.

    Args:
        sample, noise: `(B, ...)`.
        alpha, sigma: `(B,)`.
    """
    return broadcast_to(alpha, sample) * sample + broadcast_to(sigma, sample) * noise


def prediction_target(prediction_type: str, sample: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return what the network should output at `alpha x + sigma eps`, in its own parametrisation.

    Args:
        prediction_type: `epsilon`: eps; `sample`: x; `v_prediction`: alpha eps - sigma x (Salimans & Ho, arXiv
            2202.00512); `flow_prediction`: the velocity eps - x of rectified flow (Esser et al., arXiv
            2403.03206).
        sample, noise: `(B, ...)`.
        alpha, sigma: `(B,)`.

    Raises:
        ValueError: for an unknown `prediction_type`.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return sample
    if prediction_type == "v_prediction":
        return broadcast_to(alpha, sample) * noise - broadcast_to(sigma, sample) * sample
    if prediction_type == "flow_prediction":
        return noise - sample
    raise ValueError(f"unknown prediction type {prediction_type!r}: one of {', '.join(PREDICTION_TYPES)}")


def min_snr_weight(prediction_type: str, alpha: Tensor, sigma: Tensor, gamma: float) -> Tensor:
    """Weight of a row's loss under min-SNR weighting (Hang et al., arXiv 2303.09556), `(B,)`, in [0, 1] for epsilon.

    Raises:
        ValueError: for flow matching, where it is not defined.
    """
    snr = (alpha / sigma) ** 2
    if prediction_type == "epsilon":
        return torch.where(snr <= gamma, 1.0, gamma / snr)  # also right at an SNR of 0
    if prediction_type == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    if prediction_type == "sample":
        return snr.clamp(max=gamma)
    raise ValueError(f"min-SNR weighting is not defined for {prediction_type}")


@dataclass(frozen=True)
class GaussianPath:
    """The noise levels of a scheduler, from the least noisy (index 0) to the most.

    Args:
        alphas, sigmas: `(T,)` float32, the coefficients of the sample and of the noise.
        model_timesteps: `(T,)`, what the network is told at each index.
        prediction_type: one of `PREDICTION_TYPES`.
    """

    alphas: Tensor
    sigmas: Tensor
    model_timesteps: Tensor
    prediction_type: str

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"unknown prediction type {self.prediction_type!r}: one of {', '.join(PREDICTION_TYPES)}")

    def __len__(self) -> int:
        return len(self.alphas)

    @classmethod
    def from_scheduler(cls, scheduler) -> "GaussianPath":
        """Read the path of a diffusers scheduler: any with `alphas_cumprod`, or a `FlowMatch...` one.

        Raises:
            ValueError: for a scheduler of another kind (Karras sigmas, score-based SDEs, flow-sigma solvers).
        """
        if hasattr(scheduler, "alphas_cumprod"):
            if scheduler.config.prediction_type == "flow_prediction":
                # Its `alphas_cumprod` are there, but not those of the path that the model was trained on.
                raise ValueError(
                    f"{type(scheduler).__name__} samples a flow-matching model; train it with"
                    " FlowMatchEulerDiscreteScheduler"
                )
            alphas_cumprod = scheduler.alphas_cumprod.float()
            return cls(
                alphas=alphas_cumprod.sqrt(),
                sigmas=(1 - alphas_cumprod).sqrt(),
                model_timesteps=torch.arange(len(alphas_cumprod)),
                prediction_type=scheduler.config.prediction_type,
            )
        if type(scheduler).__name__.startswith("FlowMatch"):
            # A fresh one: `set_timesteps` replaces the training sigmas by those of inference.
            scheduler = type(scheduler).from_config(scheduler.config)
            sigmas = scheduler.sigmas[: scheduler.config.num_train_timesteps].float().flip(0)
            return cls(
                alphas=1 - sigmas,
                sigmas=sigmas,
                model_timesteps=sigmas * scheduler.config.num_train_timesteps,
                prediction_type="flow_prediction",
            )
        raise ValueError(f"{type(scheduler).__name__} has neither `alphas_cumprod` nor a flow-matching path")

    def to(self, device: torch.device | str) -> "GaussianPath":
        return replace(
            self,
            alphas=self.alphas.to(device),
            sigmas=self.sigmas.to(device),
            model_timesteps=self.model_timesteps.to(device),
        )

    def add_noise(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`m_t` for indices `timesteps` `(B,)` into the path."""
        return add_noise(sample, noise, self.alphas[timesteps], self.sigmas[timesteps])

    def target(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return what the network should output at `add_noise(sample, noise, timesteps)`."""
        return prediction_target(self.prediction_type, sample, noise, self.alphas[timesteps], self.sigmas[timesteps])


def flow_loss_weight(scheme: str, sigma: Tensor) -> Tensor | None:
    """Return the weights `(B,)` of losses of flow matching, as `compute_loss_weighting_for_sd3` of diffusers; None where all
    are 1.

    Args:
        scheme: `sigma_sqrt`: 1 / sigma^2; `cosmap` (Esser et al., arXiv 2403.03206, 3.1); any other has none.
        sigma: `(B,)`.
    """
    if scheme == "sigma_sqrt":
        return sigma**-2
    if scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    return None


def timestep_density(scheme: str, num_timesteps: int, mean: float, std: float, mode_scale: float) -> Tensor | None:
    """Return how often the official scripts of flow matching draw each index of a path, `(T,)` float64 with the sum 1, from the
    least noisy one; None where all are drawn alike.

    They draw u, by `compute_density_for_timestep_sampling` of diffusers, and take `timesteps[int(u T)]`, of which the first
    is the noisiest. So index T - 1 - i has the probability of `i <= u T < i + 1`.

    Args:
        scheme: `logit_normal`: u is the sigmoid of a normal number; `mode`: heavy tails (Esser et al., arXiv 2403.03206,
            3.1); any other is uniform.
        mean, std: of the normal number.
        mode_scale: s of the heavy tails.
    """
    edges = torch.linspace(0, 1, num_timesteps + 1, dtype=torch.float64)
    if scheme == "logit_normal":
        cumulative = torch.special.ndtr((torch.logit(edges) - mean) / std)
    elif scheme == "mode":
        # u falls from 1 to 0 with a uniform number r, so P(u <= edge) is 1 - r where u = edge.
        r = torch.linspace(0, 1, 1_000_001, dtype=torch.float64)
        u = 1 - r - mode_scale * ((math.pi * r / 2).cos() ** 2 - 1 + r)
        cumulative = 1 - r.flip(0)[torch.searchsorted(u.flip(0), edges).clamp(max=len(r) - 1)]
    else:
        return None
    return cumulative.diff().flip(0)


def loss_weights(
    path: GaussianPath, timesteps: Tensor, snr_gamma: float | None, weighting_scheme: str = "none"
) -> Tensor | None:
    """Return the weight of each row's loss beside the method's own, `(B,)`; None where all are 1.

    A network that predicts the sample is trained on its loss times the signal-to-noise ratio, as in diffusers'
    `train_unconditional.py`: that is its loss in the noise.

    Args:
        timesteps: `(B,)` indices into the path.
        snr_gamma: of min-SNR weighting, which then takes the place of that; None for none.
        weighting_scheme: of flow matching, as in `flow_loss_weight`.
    """
    alpha, sigma = path.alphas[timesteps], path.sigmas[timesteps]
    if snr_gamma is not None:
        return min_snr_weight(path.prediction_type, alpha, sigma, snr_gamma)
    if path.prediction_type == "flow_prediction":
        return flow_loss_weight(weighting_scheme, sigma)
    return (alpha / sigma) ** 2 if path.prediction_type == "sample" else None
