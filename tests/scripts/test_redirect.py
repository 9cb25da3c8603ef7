"""The method `redirect` as a user runs it: thresholds, resumed runs, both doors, bad input."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDPMPipeline, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

import train_siss_sd
import train_siss_unconditional
from siss_diffusers import GaussianPath, unlearn
from siss_diffusers.calibration import DRAWS_PER_BIN, NUM_BINS, calibration_draws, loss_thresholds
from siss_diffusers.data.images import ImageTransform
from siss_diffusers.draws import STRANGERS
from siss_diffusers.storage.tensors import load_state
from tests.helpers.commands import assert_refused, to_argv
from tests.helpers.paths import TINY_MODEL
from tests.helpers.pictures import SECRET, read_metadata
from tests.helpers.runs import LORA, UNET, assert_resuming_changes_nothing, read_log


pytestmark = pytest.mark.slow  # tests/methods and tests/training cover the method and its parts quickly


REDIRECT = {"--method": "redirect"}


def thresholds_of(main, flags: dict[str, str | None], folder: Path) -> torch.Tensor:
    """tau_t and the threshold of images to keep, as the first checkpoint of a run has them."""
    flags = flags | {"--max_train_steps": "1", "--checkpointing_steps": "1", "--output_dir": str(folder)}
    main(to_argv(flags))
    AcceleratorState._reset_state(reset_partial_state=True)
    return load_state(folder / "checkpoint-1")["thresholds"][...]


class TestThresholds:
    def test_they_are_those_of_the_source(self, base_args, tmp_path):
        flags = base_args | REDIRECT | {"--calibrate_forgetting": "1"}  # the highest loss of images to keep
        both = thresholds_of(train_siss_unconditional.main, flags, tmp_path / "both")
        flags |= {"--threshold_source": "strangers"}
        strangers = thresholds_of(train_siss_unconditional.main, flags, tmp_path / "strangers")
        assert both.shape == (2, 1000) and strangers[1].equal(both[1])
        assert both[0].equal(torch.maximum(both[1], strangers[0]))
        assert not both[0].equal(both[1]) and not both[0].equal(strangers[0])

        # The strangers' by another way: the picture itself turned, one at a time.
        pipeline = DDPMPipeline.from_pretrained(TINY_MODEL)
        path = GaussianPath.from_scheduler(pipeline.scheduler)
        folder = Path(base_args["--train_data_dir"])
        with Image.open(folder / "garment_0.png") as picture:
            turned = [picture.rotate(angle, expand=True) for angle in (90, 180, 270)]
        clean = [ImageTransform(1, turned[0].width)(picture) for picture in turned]
        losses, timesteps = [], []
        for index in range(NUM_BINS * DRAWS_PER_BIN):
            image, timestep, generator = calibration_draws(0, 3, (0, 1000), index, STRANGERS)
            noise = torch.from_numpy(generator.standard_normal(clean[0].shape, dtype="float32"))
            noisy = path.alphas[timestep] * clean[image] + path.sigmas[timestep] * noise
            with torch.no_grad():
                output = pipeline.unet(noisy[None], timestep).sample[0]
            losses.append((output - noise).square().mean())
            timesteps.append(timestep)
        expected = loss_thresholds(torch.stack(losses), torch.tensor(timesteps), (0, 1000), 1000, None)
        torch.testing.assert_close(strangers[0], expected, rtol=1e-4, atol=1e-6)

    def test_they_do_not_depend_on_the_batch(self, base_args, tmp_path):
        one = thresholds_of(train_siss_unconditional.main, base_args | REDIRECT, tmp_path / "one")
        again = thresholds_of(train_siss_unconditional.main, base_args | REDIRECT, tmp_path / "again")
        assert one.equal(again)
        split = base_args | REDIRECT | {"--eval_batch_size": "7", "--train_batch_size": "2"}
        torch.testing.assert_close(
            thresholds_of(train_siss_unconditional.main, split, tmp_path / "split"), one, rtol=1e-4, atol=1e-6
        )

    def test_latent_models_encode_turned_pictures_under_the_prompt_of_the_image(
        self, lora_args, tmp_path, monkeypatch
    ):
        from siss_diffusers.training.problem import Problem

        problems = []
        measure = Problem.measure_thresholds

        def spy(self, *args):
            problems.append(self)
            return measure(self, *args)

        monkeypatch.setattr(Problem, "measure_thresholds", spy)
        train_siss_sd.main(
            to_argv(lora_args | REDIRECT | {"--calibrate_forgetting": "0.75", "--max_train_steps": "1"})
        )
        (problem,) = problems
        samples, pipeline = (
            problem.samples,
            StableDiffusionPipeline.from_pretrained(lora_args["--pretrained_model_name_or_path"]),
        )
        folder = Path(lora_args["--train_data_dir"])
        names = [line["file_name"] for line in read_metadata(folder) if line["forget"]]
        # The three to forget are copies of one picture.
        assert len(names) == 3 and len(samples.strangers) == 3 and len(set(samples.stranger_sources)) == 1
        with Image.open(folder / names[0]) as picture:
            pixels = ImageTransform(3, 16, interpolation="lanczos")(picture)

        def encode(pixels):
            with torch.no_grad():
                return pipeline.vae.encode(pixels[None]).latent_dist.mean[0] * pipeline.vae.config.scaling_factor

        for index in range(3):
            turned = encode(torch.tensor(np.rot90(pixels.numpy(), index + 1, axes=(1, 2)).copy()))
            latent = samples.strangers.load(index)
            torch.testing.assert_close(latent, turned, rtol=1e-4, atol=1e-5)
            assert not torch.allclose(latent, torch.rot90(encode(pixels), index + 1, (1, 2)), atol=1e-3)
        # Ten of the images to keep have the prompt of the forget images, and are redirected to.
        assert len(samples.keep_posterior.images) == 10 and len(samples.keep_posterior.members) == 1
        assert list(samples.keep_posterior.members) == list(samples.forget_prompt_rows)

    def test_a_method_that_subtracts_takes_them_too(self, base_args, tmp_path):
        main, calibrated = train_siss_unconditional.main, base_args | {"--calibrate_forgetting": None}
        of_redirect = thresholds_of(main, base_args | REDIRECT, tmp_path / "redirect")
        by_default = thresholds_of(main, calibrated, tmp_path / "default")
        tau = thresholds_of(main, calibrated | {"--threshold_source": "both"}, tmp_path / "siss")
        assert tau.equal(of_redirect[0]) and by_default.equal(of_redirect[1]) and not tau.equal(by_default)
        assert "forget_active" in read_log(tmp_path / "siss")[0]
        assert "forget_active" not in read_log(tmp_path / "redirect")[0]


@pytest.mark.parametrize("kind", ["unconditional", "lora"])
def test_resume_is_the_uninterrupted_run_bit_for_bit(kind, base_args, lora_args, tmp_path):
    """With the thresholds of the checkpoint: those of the weights in it are others."""
    main, flags = train_siss_unconditional.main, base_args | {"--learning_rate": "1e-3"}
    if kind == "lora":
        main, flags = train_siss_sd.main, lora_args | {"--calibrate_forgetting": "0.75"}
    assert_resuming_changes_nothing(main, flags | REDIRECT, LORA if kind == "lora" else UNET, tmp_path)


def test_another_number_of_images_is_another_run(base_args, tmp_path, capfd):
    flags = base_args | REDIRECT | {"--calibrate_forgetting": "off", "--checkpointing_steps": "2"}
    train_siss_unconditional.main(to_argv(flags))
    AcceleratorState._reset_state(reset_partial_state=True)
    changed = {"--num_redirect_images": "3", "--resume_from_checkpoint": "latest", "--max_train_steps": "4"}
    expected = "--num_redirect_images was 1000 and is 3"
    assert_refused(train_siss_unconditional.main, flags | changed, expected, tmp_path, capfd)


def test_python_gets_the_bits_of_the_script(base_args, digits_folder, garment_folder, cache_dir, tmp_path):
    del base_args["--forget_files"]
    base_args |= {"--forget_data_dir": str(garment_folder), "--num_redirect_images": "9"} | REDIRECT
    train_siss_unconditional.main(to_argv(base_args))
    AcceleratorState._reset_state(reset_partial_state=True)
    options = {"max_train_steps": 2, "train_batch_size": 4, "learning_rate": 1e-4, "cache_dir": str(cache_dir)}
    pipeline = DDPMPipeline.from_pretrained(TINY_MODEL)
    outcome = unlearn(pipeline, garment_folder, digits_folder, method="redirect", num_redirect_images=9, **options)
    saved = outcome.save(tmp_path / "saved")
    first, second = load_file(saved / UNET), load_file(tmp_path / "out" / UNET)
    assert all(first[name].equal(second[name]) for name in first)
    record = json.loads((saved / "unlearning.json").read_text())
    assert record["method_args"] == {"lam": 0.5} and record["settings"]["num_redirect_images"] == 9
    assert record["forget_scaling"] is None and record["settings"]["calibrate_forgetting"] == 0.75


def test_a_prompt_without_images_to_keep_is_redirected_to_those_of_others(
    lora_args, captioned_folder, tmp_path, caplog
):
    data = shutil.copytree(captioned_folder, tmp_path / "data")
    lines = read_metadata(data)
    kept = [line for line in lines if line["forget"] or line["text"] != SECRET]
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, kept)))
    for line in lines:
        if line not in kept:
            (data / line["file_name"]).unlink()
    with caplog.at_level("INFO"):
        train_siss_sd.main(to_argv(lora_args | REDIRECT | {"--train_data_dir": str(data)}))
    assert "Redirecting to 10 images to keep" in caplog.text
    assert len(read_log(tmp_path / "out")) == 2


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            {"--num_redirect_images": "5"},
            "--num_redirect_images does not apply to --method siss; drop it, or use redirect",
        ),
        ({"--threshold_source": "both"}, "--threshold_source needs --calibrate_forgetting"),
        (REDIRECT | {"--num_redirect_images": "0"}, "must be a whole number of at least 1"),
        (REDIRECT | {"--threshold_source": "others"}, "invalid choice: 'others'"),
        (REDIRECT | {"--threshold_source": "keep", "--calibrate_forgetting": "off"}, "--threshold_source needs"),
        (REDIRECT | {"--method_args": "num_neighbors=3"}, "its arguments and defaults: lam=0.5"),
        (REDIRECT | {"--forget_scaling": "relative"}, "do not apply to --method redirect"),
        (
            {"--method": "retrack", "--calibrate_forgetting": None},
            "neggrad, siss, siss_no_is, subscore_bernoulli, redirect",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_wrong_arguments_are_refused_in_a_sentence(flags, expected, base_args, tmp_path, capfd):
    assert_refused(train_siss_unconditional.main, base_args | flags, expected, tmp_path, capfd)


@pytest.mark.parametrize("settings_class", ["TextToImageSettings", "UnconditionalSettings"])
def test_help_shows_the_method(settings_class):
    import siss_diffusers.settings as settings
    from siss_diffusers.flags import add_flags
    from siss_diffusers.parsing import Parser

    parser = Parser(prog="train")
    add_flags(parser, getattr(settings, settings_class))
    shown = parser.format_help()
    assert "redirect: redirects noised forget images" in " ".join(shown.split()) and "--num_redirect_images N" in shown
