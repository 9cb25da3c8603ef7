import torch
from diffusers import DDPMPipeline

from siss_diffusers import GaussianPath
from siss_diffusers.assets.digits import digit_images, garment_image
from siss_diffusers.noising import mean_squared_error
from tests.helpers.paths import ROOT, TINY_MODEL
from tests.helpers.scripts import imported_script


EXAMPLE = ROOT / "examples" / "minimal.py"


@torch.no_grad()
def loss(pipeline, images: torch.Tensor) -> float:
    """The loss on 64 rows made from these images, with the same noise and timesteps for every pipeline."""
    generator = torch.Generator().manual_seed(7)
    path = GaussianPath.from_scheduler(pipeline.scheduler)
    images = images[torch.arange(64) % len(images)]
    noise = torch.randn(images.shape, generator=generator)
    timesteps = torch.randint(len(path), (64,), generator=generator)
    output = pipeline.unet(path.add_noise(images, noise, timesteps), timesteps).sample
    return mean_squared_error(output, path.target(images, noise, timesteps)).mean().item()


def test_the_loop_forgets_the_garment_and_keeps_the_digits():
    base = DDPMPipeline.from_pretrained(TINY_MODEL)
    with imported_script(EXAMPLE) as example:
        unlearned = example.main(steps=30)
        garment, digits = example.to_model(garment_image()[None]), example.to_model(digit_images()[0][:64])
    assert loss(unlearned, garment) > 2 * loss(base, garment)
    assert loss(unlearned, digits) < 1.2 * loss(base, digits)


def test_the_example_is_short():
    assert len(EXAMPLE.read_text().splitlines()) <= 80
