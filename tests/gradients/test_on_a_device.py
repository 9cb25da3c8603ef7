"""A step whose network is not on the host. `meta` stands for a GPU: an operation with a tensor of the host fails, and so does
whatever would wait for a result."""

import pytest
import torch

from siss_diffusers import METHODS, PairedGradients, scaling_rule
from siss_diffusers.gradients.engine import STATS
from tests.helpers.tiny_problem import TinyNet, draw_query, predictor, trainable


SCALINGS = {"relative": 0.3, "norm": 5.0, "fixed": 0.2}


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("name", METHODS)
def test_a_step_waits_for_the_device_once_and_mixes_it_with_nothing(name, scaling, calibrated, monkeypatch):
    """Twice in the mode *forget first*, whose second pass needs the norm of the first."""
    waits = []

    def read(self, window, squares):
        assert squares.device.type == "meta"
        waits.append(len(squares))
        return dict.fromkeys((*STATS, "scale"), 1.0), 1.0, [1.0] * len(squares)

    monkeypatch.setattr(PairedGradients, "_read", read)
    method, net = METHODS[name](), TinyNet().to("meta")
    thresholds = torch.full((1000,), 1.0) if calibrated and method.subtracts_forget else None
    engine = PairedGradients(
        net.parameters(), method.rule(scaling_rule(scaling, SCALINGS[scaling])), thresholds=thresholds
    )
    stats = engine.compute([method.rows(draw_query(seed=seed)) for seed in range(2)], predictor(net), 1.0)
    assert len(waits) == (2 if engine.mode == "forget_first" else 1)
    assert not stats.skipped and all(parameter.grad.device.type == "meta" for parameter in trainable(net))
