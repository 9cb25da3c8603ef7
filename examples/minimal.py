"""Unlearning in a plain torch loop: a method makes rows, the engine makes a gradient, the optimizer steps.

`python examples/minimal.py` unlearns the garment from the tiny DDPM of digits, on the CPU. The training scripts add
everything that this loop leaves out: data sets, prompts, several processes, checkpoints, validation.
"""

from pathlib import Path

import torch
from diffusers import DDPMPipeline

import siss_diffusers
from siss_diffusers import METHODS, GaussianPath, PairedGradients, Query, scaling_rule
from siss_diffusers.assets.digits import digit_images, garment_image


MODEL = Path(siss_diffusers.__file__).parent / "assets" / "tiny_ddpm_digits"
BATCH_SIZE = 16


def to_model(images) -> torch.Tensor:
    """Return 8-bit pictures `(N, H, W)` as the network sees them, `(N, 1, H, W)` in [-1, 1]."""
    return torch.as_tensor(images)[:, None] / 127.5 - 1


def draw_query(keep: torch.Tensor, forget: torch.Tensor, path: GaussianPath, lam: float) -> Query:
    """Draw a batch of pairs. Both images of a pair share the timestep and the noise."""
    x = keep[torch.randint(len(keep), (BATCH_SIZE,))]
    a = forget[torch.randint(len(forget), (BATCH_SIZE,))]
    return Query(
        keep=x,
        forget=a,
        noise=torch.randn_like(x),
        timesteps=torch.randint(len(path), (BATCH_SIZE,)),
        # A share `lam` of the rows is made from the image to forget, the others from the image to keep.
        from_forget=torch.randperm(BATCH_SIZE) < round(lam * BATCH_SIZE),
        path=path,
    )


def main(steps: int = 60) -> DDPMPipeline:
    """Train, and return the pipeline that has forgotten."""
    torch.manual_seed(0)
    pipeline = DDPMPipeline.from_pretrained(MODEL)
    network, path = pipeline.unet.train(), GaussianPath.from_scheduler(pipeline.scheduler)
    keep, forget = to_model(digit_images()[0]), to_model(garment_image()[None])

    method = METHODS["siss"](lam=0.5)
    gradients = PairedGradients(network.parameters(), method.rule(scaling_rule("relative", 0.3)))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)

    def predict(rows):
        return network(rows.noisy, path.model_timesteps[rows.timesteps]).sample

    for step in range(steps):
        # The rows do not depend on the network: their targets and weights are known before it runs.
        rows = method.rows(draw_query(keep, forget, path, method.mixture))
        stats = gradients.compute([rows], predict, max_grad_norm=1.0)
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step:3d}  keep loss {stats.keep_loss:.3f}  forget loss {stats.forget_loss:.3f}")
    return pipeline


if __name__ == "__main__":
    main()
