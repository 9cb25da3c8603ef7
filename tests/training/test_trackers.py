"""A tracker that fails in the middle does not cost the run."""

import pytest
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker

import train_siss_unconditional
from tests.helpers.commands import assert_refused, to_argv
from tests.helpers.runs import UNET, read_log


def fail(*_, **__):
    raise ConnectionError("the tracker is gone")


@pytest.mark.parametrize("method", ["log", "finish", "log_images"])
def test_the_run_goes_on_and_saves(base_args, tmp_path, monkeypatch, caplog, method):
    monkeypatch.setattr(TensorBoardTracker, method, fail)
    flags = {"--report_to": "tensorboard", "--save_images_epochs": "1", "--max_train_steps": "7"}
    flags |= {"--ddpm_num_inference_steps": "1", "--eval_batch_size": "2"}
    train_siss_unconditional.main(to_argv(base_args | flags))
    assert len(read_log(tmp_path / "out")) == 7 and (tmp_path / "out" / UNET).exists()
    assert caplog.text.count("The tracker failed (the tracker is gone)") == 1


def test_one_that_does_not_start_is_refused(base_args, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(Accelerator, "init_trackers", fail)
    flags = base_args | {"--report_to": "tensorboard"}
    flags |= {"--cache_dir": base_args["--cache_dir"]}
    assert_refused(train_siss_unconditional.main, flags, "--report_to tensorboard does not start", tmp_path, capfd)
    assert not (tmp_path / "out").exists()
