"""What settings ask of the noise levels is checked against the scheduler."""

import shutil

import pytest
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

import train_siss_unconditional
from siss_diffusers.errors import UsageError
from siss_diffusers.families import Unconditional
from siss_diffusers.noising import GaussianPath
from siss_diffusers.settings import UnconditionalSettings
from siss_diffusers.training.schedule import check_noise_levels
from tests.helpers.commands import assert_refused
from tests.helpers.paths import TINY_MODEL
from tests.helpers.runs import UNET


REFUSED = {"snr_gamma": 5.0, "prediction_type": "v_prediction", "ddpm_beta_schedule": "linear"}


def check(scheduler, **settings) -> None:
    check_noise_levels(UnconditionalSettings(**settings), scheduler, GaussianPath.from_scheduler(scheduler))


@pytest.mark.parametrize("name", REFUSED)
def test_what_flow_matching_has_not_is_refused(name):
    with pytest.raises(UsageError, match=f"^--{name} cannot be used: .*leave it out$"):
        check(FlowMatchEulerDiscreteScheduler(shift=3.0), **{name: REFUSED[name]})


def test_what_a_scheduler_has_is_accepted():
    check(FlowMatchEulerDiscreteScheduler(), ddpm_num_steps=500)
    for scheduler in (DDPMScheduler(), DDIMScheduler()):
        check(scheduler, ddpm_num_steps=500, **REFUSED)


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_before_the_network_is_read(name, base_args, tmp_path, monkeypatch, capfd):
    model = shutil.copytree(TINY_MODEL, tmp_path / "model")
    (model / UNET).write_bytes(b"torn")
    flow = FlowMatchEulerDiscreteScheduler()
    monkeypatch.setattr(Unconditional, "training_scheduler", lambda *_: flow)
    flow.save_pretrained(model / "scheduler")
    index = (model / "model_index.json").read_text()
    (model / "model_index.json").write_text(index.replace("DDPMScheduler", "FlowMatchEulerDiscreteScheduler"))
    flags = {"--pretrained_model_name_or_path": str(model), f"--{name}": str(REFUSED[name])}
    assert_refused(train_siss_unconditional.main, base_args | flags, f"--{name} cannot be used", tmp_path, capfd)
