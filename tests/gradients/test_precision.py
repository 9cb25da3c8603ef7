"""The gradient engine on the device at hand, a GPU where there is one, against the same sums in float64 on the host."""

from contextlib import nullcontext

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

from siss_diffusers import METHODS, PairedGradients, scaling_rule
from tests.helpers.tiny_problem import draw_query, flatten, gradient, micro_batches, relative_error, trainable


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SCALINGS = {"relative": 0.3, "norm": 5.0, "fixed": 0.2}
# Relative error of the combined gradient. TF32 keeps 10 bits, bfloat16 7, float16 10.
TOLERANCES = {"float32": 2e-5, "tf32": 1e-2, "bf16": 6e-2, "fp16": 1e-2}


class Denoiser(nn.Module):
    """A small UNet with attention."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.unet = UNet2DModel(
                sample_size=4,
                in_channels=2,
                out_channels=2,
                layers_per_block=1,
                norm_num_groups=4,
                block_out_channels=(8, 16),
                down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            )

    def forward(self, noisy, timesteps):
        return self.unet(noisy, timesteps).sample


@pytest.fixture
def precision(request):
    """Sets what float32 products may be rounded to, and yields the name."""
    matmul, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, convolutions.allow_tf32
    matmul.allow_tf32 = convolutions.allow_tf32 = request.param == "tf32"
    yield request.param
    matmul.allow_tf32, convolutions.allow_tf32 = before


def expected_gradient(scaling: str, window: list) -> torch.Tensor:
    """The combined gradient by its definition, in float64 on the host."""
    net = Denoiser().double()
    pairs = sum(rows.num_pairs for rows in window)
    sides = [0.0, 0.0]
    for rows in window:
        output = net(rows.noisy.double(), rows.timesteps)
        for side, (target, weight) in enumerate(
            ((rows.keep_target, rows.keep_weight), (rows.forget_target, rows.forget_weight))
        ):
            sides[side] += (weight.double() * (output - target.double()).square().sum((1, 2, 3))).sum() / pairs
    keep = flatten(torch.autograd.grad(sides[0], trainable(net), retain_graph=True))
    forget = flatten(torch.autograd.grad(sides[1], trainable(net)))
    scale = SCALINGS[scaling]
    scale *= {"relative": keep.norm() / forget.norm(), "norm": 1 / forget.norm(), "fixed": 1.0}[scaling]
    return keep - scale * forget


def prepared(precision: str):
    """The network on the device, what casts its forward, and the scaler of fp16."""
    net = Denoiser().to(DEVICE)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    cast = nullcontext() if dtype is None else torch.autocast(DEVICE.type, dtype)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**12) if precision == "fp16" else None

    def predict(rows):
        with cast:
            return net(rows.noisy, rows.timesteps)

    return net, predict, scaler


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("precision", TOLERANCES, indirect=True)
def test_the_combined_gradient_is_that_of_float64(precision, scaling):
    net, predict, scaler = prepared(precision)
    window = [METHODS["siss"]().rows(part) for part in micro_batches(draw_query(), 7, 5)]
    engine = PairedGradients(net.parameters(), scaling_rule(scaling, SCALINGS[scaling]), scaler=scaler)
    stats = engine.compute(window, predict)
    found = gradient(net).cpu() / (1.0 if scaler is None else scaler.get_scale())
    assert not stats.skipped
    assert relative_error(found, expected_gradient(scaling, window)) < TOLERANCES[precision]


@pytest.mark.parametrize("scaled", [False, True])
def test_fused_adam_does_not_move_where_a_gradient_is_infinite(scaled):
    net, predict, scaler = prepared("fp16" if scaled else "float32")
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, fused=True)
    engine = PairedGradients(net.parameters(), scaling_rule("relative", 0.3), scaler=scaler)
    window, before = [METHODS["siss"]().rows(draw_query())], flatten(net.parameters())
    for factor, moves in ((torch.inf, False), (1.0, True)):
        stats = engine.compute(window, lambda rows, factor=factor: predict(rows) * factor, 1.0)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        assert stats.skipped is not moves
        assert flatten(net.parameters()).equal(before) is not moves
    assert flatten(net.parameters()).isfinite().all()
    if scaled:
        assert scaler.get_scale() == 2.0**11
