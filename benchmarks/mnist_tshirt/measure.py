"""What an unlearned network is asked: does it still paint the garment, does it still know it, is the rest as before."""

import torch
from diffusers import DDPMPipeline
from problem import Classifier, Problem
from torch import Tensor

from siss_diffusers import GaussianPath
from siss_diffusers.families import Conditions, Sampling, Unconditional
from siss_diffusers.metrics.copies import CopyDetectors, copy_statistics
from siss_diffusers.metrics.distribution import frechet_distance, kernel_distance
from siss_diffusers.metrics.inception_score import inception_score
from siss_diffusers.metrics.injection import denoised_injections
from siss_diffusers.metrics.likelihood import bits_per_dimension
from siss_diffusers.noising import mean_squared_error


BATCH_SIZE = 128
INJECTION_TIME, INJECTIONS = 0.6, 256  # as a share of the schedule
LIKELIHOOD_STEPS, GARMENT_PROBES, UNSEEN_DIGITS = 50, 16, 32
MEMBERSHIP_TIMESTEPS, MEMBERSHIP_DRAWS, MEMBERSHIP_DIGITS = 50, 8, 32
KID_IMAGES = 5_000


class Measurement:
    """Everything that does not depend on the network, made once.

    Args:
        num_inference_steps: of DDIM.
    """

    def __init__(self, problem: Problem, classifier: Classifier, num_inference_steps: int) -> None:
        self.problem, self.classifier, self.num_inference_steps = problem, classifier, num_inference_steps
        self.detectors = CopyDetectors.calibrated(problem.garment, problem.digits)
        self.features = classifier.read(problem.digits)[0]
        # As foreign to digits as the garment, and never seen.
        self.strangers = torch.cat([problem.garment.rot90(turns, dims=(2, 3)) for turns in (1, 2, 3)])

    def __call__(self, pipeline: DDPMPipeline, num_samples: int, seed: int) -> dict:
        images = self.samples(pipeline, num_samples, seed)
        return self.of_samples(images) | self.of_network(pipeline)

    def samples(self, pipeline: DDPMPipeline, num_samples: int, seed: int) -> Tensor:
        family = Unconditional(pipeline.unet.config.in_channels, pipeline.unet.config.sample_size)
        sampling = Sampling(self.num_inference_steps, batch_size=BATCH_SIZE, seed=1_000_000 * (1 + seed))
        return family.sample(pipeline, Conditions({}, num_samples), None, sampling)

    def of_samples(self, images: Tensor) -> dict:
        """Copies, and what the others are like."""
        flags = self.detectors.flags(images)
        found = copy_statistics(flags) | {"inception_score": None, "fid": None, "kid": None}
        others = images[~flags["any"]]
        if len(others) >= 100:
            features, probabilities = self.classifier.read(others)
            found["inception_score"] = inception_score(probabilities)[0]
            found["fid"] = frechet_distance(self.features, features)
            found["kid"] = kernel_distance(self.features[:KID_IMAGES], features[:KID_IMAGES])
        return found

    def of_network(self, pipeline: DDPMPipeline) -> dict:
        """What the network knows of the garment, without a sample."""
        path = GaussianPath.from_scheduler(pipeline.scheduler)
        unet = pipeline.unet.eval()

        def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
            return unet(noisy.to(unet.device), timesteps.to(unet.device)).sample.cpu()

        garment, unseen = self.problem.garment, self.problem.unseen[:UNSEEN_DIGITS]
        likelihood = {"num_steps": LIKELIHOOD_STEPS, "batch_size": BATCH_SIZE}
        # One likelihood for each dequantisation of the garment.
        garments = garment.expand(GARMENT_PROBES, -1, -1, -1)
        return {
            "nll_forget_bpd": bits_per_dimension(garments, path, predict, num_probes=1, **likelihood).mean().item(),
            "nll_keep_bpd": bits_per_dimension(unseen, path, predict, num_probes=1, **likelihood).mean().item(),
            "injected_copy_share": self.injected_copy_share(path, predict),
            **self.membership(path, predict),
        }

    def injected_copy_share(self, path: GaussianPath, predict) -> float:
        """How often the garment comes back when it is noised to 60 % of the schedule and denoised."""
        index = int(INJECTION_TIME * len(path))
        denoised = denoised_injections(
            self.problem.garment * 2 - 1,
            path,
            predict,
            index=index,
            sampling_indices=range(0, len(path), len(path) // self.num_inference_steps),
            num_draws=INJECTIONS,
            batch_size=BATCH_SIZE,
        )
        images = denoised.flatten(0, 1).clamp(-1, 1) / 2 + 0.5
        return self.detectors.flags(images)["any"].float().mean().item()

    @torch.no_grad()
    def membership(self, path: GaussianPath, predict) -> dict[str, float]:
        """A loss-threshold membership test: how well does "the loss is low" tell the garment from a picture that was
        never seen? Its AUC, the mean over timesteps: 1, it is recognised; 0.5, it is not; 0, it stands out as worse.

        Against unseen digits, and against the garment turned by 90, 180 and 270 degrees, as foreign as the garment is.
        """
        generator = torch.Generator().manual_seed(0)
        groups = {
            "garment": self.problem.garment.repeat(MEMBERSHIP_DRAWS, 1, 1, 1),
            "digits": self.problem.unseen[-MEMBERSHIP_DIGITS:],
            "strangers": self.strangers.repeat(MEMBERSHIP_DRAWS, 1, 1, 1),
        }
        clean = torch.cat(list(groups.values())) * 2 - 1
        sizes = [len(group) for group in groups.values()]
        wins: dict[str, list[float]] = {"digits": [], "strangers": []}
        for index in torch.linspace(0, len(path) - 1, MEMBERSHIP_TIMESTEPS).long().tolist():
            indices = torch.full((len(clean),), index)
            noise = torch.randn(clean.shape, generator=generator)
            output = predict(path.add_noise(clean, noise, indices), path.model_timesteps[indices])
            garment, *others = mean_squared_error(output, path.target(clean, noise, indices)).split(sizes)
            for name, losses in zip(wins, others):
                wins[name].append((garment[:, None] < losses[None, :]).float().mean().item())
        means = {name: sum(shares) / len(shares) for name, shares in wins.items()}
        return {"membership_auc_digits": means["digits"], "membership_auc_strangers": means["strangers"]}
