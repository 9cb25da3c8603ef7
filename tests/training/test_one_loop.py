"""Both families run one loop: what had drifted apart between the scripts is the same in both."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import train_siss_sd
import train_siss_unconditional
from siss_diffusers.errors import RunError
from siss_diffusers.metrics.copies import CopyDetectors
from siss_diffusers.noising import GaussianPath, loss_weights, min_snr_weight
from siss_diffusers.settings import UnconditionalSettings
from siss_diffusers.similarity import DETECTOR_SIZE
from siss_diffusers.training.network import TrainedNetwork
from siss_diffusers.training.problem import Problem
from siss_diffusers.training.state import Progress
from tests.helpers.commands import assert_refused, to_argv
from tests.helpers.runs import UNET, read_log
from tests.helpers.tiny_ddpm import build_pipeline


VALIDATION = {"--num_validation_images": "2", "--eval_batch_size": "2"}


def test_copies_are_judged_at_one_size(base_args, tmp_path, monkeypatch):
    """That of `siss evaluate`, whatever the resolution of the model; full size once, in one script."""
    build_pipeline(sample_size=96).save_pretrained(tmp_path / "large")
    sizes, calibrated = [], CopyDetectors.calibrated.__func__

    def spy(cls, references, keep):
        detectors = calibrated(cls, references, keep)
        # What is handed over, too: 2,000 pictures of 512 pixels would take 6 GB, and four times as much on the way.
        sizes.extend(pictures.shape[-1] for pictures in (references, keep, detectors.references))
        return detectors

    monkeypatch.setattr(CopyDetectors, "calibrated", classmethod(spy))
    flags = {"--pretrained_model_name_or_path": str(tmp_path / "large"), "--validation_steps": "1"}
    flags |= {"--ddpm_num_inference_steps": "1", "--max_train_steps": "1", "--train_batch_size": "2"}
    train_siss_unconditional.main(to_argv(base_args | flags | VALIDATION))
    assert sizes == [DETECTOR_SIZE] * 3


def test_samples_are_compared_at_the_resolution_of_the_run(base_args, tmp_path):
    """Not at that of the network, where pictures of another size could not be compared."""
    flags = {"--resolution": "16", "--validation_steps": "1", "--max_train_steps": "1"}
    build_pipeline(sample_size=8).save_pretrained(tmp_path / "small")
    flags |= {"--pretrained_model_name_or_path": str(tmp_path / "small"), "--ddpm_num_inference_steps": "1"}
    train_siss_unconditional.main(to_argv(base_args | flags | VALIDATION))
    assert (tmp_path / "out" / "validation_log.jsonl").exists()


@pytest.mark.parametrize("more", ["full", "EMA", "LoRA", "unconditional"])
def test_weights_that_are_not_finite_are_not_saved(more, base_args, full_args, tmp_path):
    """The last step ruins them, so no gradient after it tells."""
    flags = {"--learning_rate": "1e38", "--max_train_steps": "1"}
    flags |= {"full": {}, "EMA": {"--use_ema": None}, "LoRA": {"--use_lora": None}, "unconditional": {}}[more]
    main = train_siss_unconditional.main if more == "unconditional" else train_siss_sd.main
    with pytest.raises(RunError, match="not finite.* after 1 steps.*lower --learning_rate.*start again"):
        main(to_argv((base_args if more == "unconditional" else full_args) | flags))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"train_log.jsonl"}


def test_checkpoints_before_weights_were_ruined_stay(base_args, tmp_path, monkeypatch):
    step = TrainedNetwork.step

    def ruin(network, gradients, stats):
        figures = step(network, gradients, stats)
        if network.lr_scheduler.last_epoch == 2:
            network.parameters[-1].data[0] = torch.nan
        return figures

    monkeypatch.setattr(TrainedNetwork, "step", ruin)
    flags = {"--max_train_steps": "3", "--checkpointing_steps": "1"}
    with pytest.raises(RunError, match="after 2 steps, and are not saved.*checkpoint-1 is as it was"):
        train_siss_unconditional.main(to_argv(base_args | flags))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"train_log.jsonl", "checkpoint-1"}
    monkeypatch.setattr(TrainedNetwork, "step", step)
    train_siss_unconditional.main(to_argv(base_args | flags | {"--resume_from_checkpoint": "latest"}))
    assert (tmp_path / "out" / UNET).is_file()


@pytest.mark.parametrize("script", ["sd", "unconditional"])
def test_epochs_of_validation_may_end_a_run(script, base_args, lora_args, tmp_path):
    """No copy is among these samples, so the first look ends the run: after a pass over the keep set."""
    steps = "--ddpm_num_inference_steps" if script == "unconditional" else "--num_inference_steps"
    flags = {"--validation_epochs": "1", "--stop_when_forgotten": None, "--max_train_steps": "9", steps: "1"}
    if script == "unconditional":
        train_siss_unconditional.main(to_argv(base_args | {"--train_batch_size": "12"} | flags | VALIDATION))
    else:
        train_siss_sd.main(to_argv(lora_args | {"--train_batch_size": "10"} | flags | VALIDATION))
    (look,) = [json.loads(line) for line in (tmp_path / "out" / "validation_log.jsonl").read_text().splitlines()]
    assert look["step"] == 2 and look["copy_share"] == 0
    assert len(read_log(tmp_path / "out")) == 2


def test_losses_are_weighted_by_one_rule():
    alphas = torch.tensor([0.9, 0.5, 0.1])
    sigmas, timesteps = (1 - alphas**2).sqrt(), torch.tensor([2, 0])
    paths = {name: GaussianPath(alphas, sigmas, torch.arange(3), name) for name in ("epsilon", "sample")}
    assert loss_weights(paths["epsilon"], timesteps, None) is None
    snr = (alphas / sigmas)[timesteps] ** 2
    torch.testing.assert_close(loss_weights(paths["sample"], timesteps, None), snr)
    for name, path in paths.items():
        expected = min_snr_weight(name, alphas[timesteps], sigmas[timesteps], 5.0)
        torch.testing.assert_close(loss_weights(path, timesteps, 5.0), expected)


@pytest.mark.parametrize("script", ["sd", "unconditional"])
@pytest.mark.parametrize(
    "flags", [{"--prediction_type": "sample"}, {"--snr_gamma": "0.01"}], ids=["sample", "snr_gamma"]
)
def test_both_scripts_weight_their_losses(script, flags, base_args, full_args, tmp_path):
    args, main = (
        (base_args, train_siss_unconditional.main) if script == "unconditional" else (full_args, train_siss_sd.main)
    )
    args |= {"--max_train_steps": "1", "--learning_rate": "0", "--train_batch_size": "8"}
    for name, more in (("plain", {}), ("out", flags)):
        main(to_argv(args | more | {"--output_dir": str(tmp_path / name)}))
    plain, weighted = (read_log(tmp_path / name)[0] for name in ("plain", "out"))
    assert weighted["grad_norm_keep"] != pytest.approx(plain["grad_norm_keep"], rel=1e-3)


def test_neighbors_are_searched_before_the_network_is_read(full_args, pipeline_folder, tmp_path, capfd):
    """Too few of them are refused without its weights: those of this model cannot be read."""
    model = shutil.copytree(pipeline_folder, tmp_path / "model")
    (model / UNET).write_bytes(b"torn")
    flags = {
        "--pretrained_model_name_or_path": str(model),
        "--method": "retrack",
        "--method_args": "num_neighbors=500",
    }
    assert_refused(train_siss_sd.main, full_args | flags, "num_neighbors=500: there are only", tmp_path, capfd)


@pytest.mark.parametrize("script", ["sd", "unconditional"])
def test_a_replaced_prediction_type_is_saved_with_the_pipeline(script, base_args, full_args, tmp_path):
    """Sampled as it was trained: a result with the base's prediction type would draw noise."""
    args, main = (
        (base_args, train_siss_unconditional.main) if script == "unconditional" else (full_args, train_siss_sd.main)
    )
    main(to_argv(args | {"--prediction_type": "v_prediction"}))
    saved = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert saved["prediction_type"] == "v_prediction"


def test_too_many_skipped_steps_end_the_run_with_a_sentence():
    problem = object.__new__(Problem)
    problem.planned_windows = 7
    with pytest.raises(RunError, match="5 steps were skipped"):
        problem.next_window(UnconditionalSettings(), Progress(window=7, skipped_steps=5))


def test_both_logs_tell_the_decay_of_the_average(base_args, full_args, tmp_path):
    train_siss_unconditional.main(to_argv(base_args | {"--use_ema": None, "--output_dir": str(tmp_path / "ddpm")}))
    train_siss_sd.main(to_argv(full_args | {"--use_ema": None}))
    for folder in ("ddpm", "out"):
        assert "ema_decay" in read_log(tmp_path / folder)[-1]
        assert load_file(tmp_path / folder / UNET)
