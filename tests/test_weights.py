import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from siss_diffusers.weights import importance_weights, log_density_ratio


def draw(batch=64, dims=6, dtype=torch.float64, seed=0, distance=1.0):
    generator = torch.Generator().manual_seed(seed)
    keep, noise = (torch.randn(batch, dims, generator=generator, dtype=dtype) for _ in range(2))
    forget = keep + distance * torch.randn(batch, dims, generator=generator, dtype=dtype)
    sigma = torch.rand(batch, generator=generator, dtype=dtype) * 0.98 + 0.01
    from_forget = torch.rand(batch, generator=generator) < 0.5
    return keep, forget, noise, (1 - sigma**2).sqrt(), sigma, from_forget


def reference_log_ratio(keep, forget, noise, alpha, sigma, from_forget):
    """From the densities themselves, in float64."""
    alpha, sigma = alpha.double()[:, None], sigma.double()[:, None]
    m = torch.where(from_forget[:, None], alpha * forget, alpha * keep) + sigma * noise
    log_q = [torch.distributions.Normal(alpha * mean, sigma).log_prob(m).sum(1) for mean in (keep, forget)]
    return log_q[1] - log_q[0]


@pytest.mark.parametrize("distance", [0.01, 1.0, 30.0])
def test_log_ratio_is_that_of_the_densities(distance):
    query = draw(distance=distance)
    torch.testing.assert_close(log_density_ratio(*query).double(), reference_log_ratio(*query), rtol=1e-4, atol=1e-4)


def test_bf16_inputs_are_computed_in_float32():
    query = draw(dtype=torch.bfloat16)
    expected = reference_log_ratio(*(value.double() if value.is_floating_point() else value for value in query))
    found = log_density_ratio(*query)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_no_noise_is_honestly_infinite_and_equal_images_are_indifferent():
    keep, forget, noise, alpha, sigma, _ = draw(batch=4)
    forget[:2] = keep[:2]
    sigma[[0, 2, 3]] = 0
    found = log_density_ratio(keep, forget, noise, alpha, sigma, torch.tensor([True, False, True, False]))
    assert found.tolist() == [0.0, 0.0, float("inf"), float("-inf")]


@given(st.floats(-1e6, 1e6), st.floats(0, 1))
def test_identity_bounds_and_reference(log_ratio, lam):
    w_keep, w_forget = (weight.double().item() for weight in importance_weights(torch.tensor([log_ratio]), lam))
    assert w_keep == w_keep and w_forget == w_forget  # never NaN
    if 1e-6 < lam < 1 - 1e-6:
        assert 0 <= w_keep <= (1 + 1e-5) / (1 - lam) and 0 <= w_forget <= (1 + 1e-5) / lam
        assert (1 - lam) * w_keep + lam * w_forget == pytest.approx(1, abs=1e-5)
        exact = torch.tensor(float(torch.tensor(log_ratio)), dtype=torch.float64)
        ratio = exact.clamp(-700, 700).exp()
        assert w_keep == pytest.approx(1 / (1 - lam + lam * ratio).item(), rel=1e-4, abs=1e-30)
        assert w_forget == pytest.approx(1 / ((1 - lam) / ratio + lam).item(), rel=1e-4, abs=1e-30)


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_the_extremes_are_never_nan(lam):
    log_ratio = torch.tensor([-torch.inf, -1e6, -1.0, 0.0, 1.0, 1e6, torch.inf])
    w_keep, w_forget = importance_weights(log_ratio, lam)
    assert not w_keep.isnan().any() and not w_forget.isnan().any()
    if lam == 0:
        assert (w_keep == 1).all()
        torch.testing.assert_close(w_forget, log_ratio.exp())
    if lam == 1:
        assert (w_forget == 1).all()
        torch.testing.assert_close(w_keep, (-log_ratio).exp())


@pytest.mark.parametrize("lam", [-0.1, 1.1, float("nan")])
def test_lambda_outside_the_unit_interval_is_refused(lam):
    with pytest.raises(ValueError, match="lam must lie in"):
        importance_weights(torch.zeros(1), lam)


def test_the_mathematics_needs_torch_alone():
    code = (
        "import siss_diffusers.weights, sys; print(sorted({'diffusers', 'accelerate', 'datasets'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
