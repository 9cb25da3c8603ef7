"""A model that was ruined has not forgotten, and copies that cannot be told are not absent."""

import json
import math
from dataclasses import replace

import pytest
import torch

import train_siss_unconditional
from siss_diffusers.families import Unconditional
from siss_diffusers.gradients import PairedGradients
from siss_diffusers.metrics.copies import CopyDetectors
from tests.helpers.commands import to_argv
from tests.helpers.runs import read_log


FLAGS = {
    "--validation_steps": "1",
    "--stop_when_forgotten": None,
    "--num_validation_images": "4",
    "--ddpm_num_inference_steps": "1",
    "--max_train_steps": "3",
}


def looks(tmp_path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "out/validation_log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("value", [math.nan, 0.5, 0.0, None])
def test_broken_samples_never_end_a_run(base_args, tmp_path, monkeypatch, value):
    samples = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    if value is not None:
        samples[3] = value
    monkeypatch.setattr(Unconditional, "sample", lambda *_: samples.clone())
    train_siss_unconditional.main(to_argv(base_args | FLAGS))
    assert len(read_log(tmp_path / "out")) == (1 if value is None else 3)
    assert {look["broken_share"] for look in looks(tmp_path)} == {0.0 if value is None else 0.25}
    assert {look["copy_share"] for look in looks(tmp_path)} == {0.0}


def test_blind_detectors_never_end_a_run(base_args, tmp_path, monkeypatch, caplog):
    calibrated = CopyDetectors.calibrated.__func__

    def blind(cls, references, keep):
        return calibrated(cls, references, torch.cat([keep, references]))

    monkeypatch.setattr(CopyDetectors, "calibrated", classmethod(blind))
    monkeypatch.setattr(Unconditional, "sample", lambda *_: torch.rand(4, 1, 8, 8))
    train_siss_unconditional.main(to_argv(base_args | FLAGS))
    assert len(read_log(tmp_path / "out")) == 3
    assert {look["copy_share"] for look in looks(tmp_path)} == {None}
    assert caplog.text.count("Copies cannot be counted") == 1


@pytest.mark.parametrize("active, steps_looked_at", [(0.9, [4]), (0.2, [2, 4]), (None, [2, 4])])
def test_a_run_that_may_stop_looks_when_little_is_pushed_and_at_the_end(
    base_args, tmp_path, monkeypatch, active, steps_looked_at
):
    """8 rows of a step say little, and a run must not end without a look."""
    compute = PairedGradients.compute

    def pushed(self, *args):
        return replace(compute(self, *args), forget_active=active)

    monkeypatch.setattr(PairedGradients, "compute", pushed)
    monkeypatch.setattr(Unconditional, "sample", lambda *_: torch.zeros(4, 1, 8, 8))  # which never end a run
    flags = FLAGS | {"--validation_steps": "2", "--max_train_steps": "4"}
    train_siss_unconditional.main(to_argv(base_args | flags))
    assert [look["step"] for look in looks(tmp_path)] == steps_looked_at
