"""From a model to a published adapter, and full training, for every family by the same commands."""

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from tests.helpers.commands import run_siss, to_argv
from tests.helpers.runs import LORA, assert_resuming_changes_nothing
from tests.helpers.tiny_families import ONE_OF_EACH, TINY
from train_siss_sd import main


pytestmark = pytest.mark.slow

of_every_family = pytest.mark.parametrize("tiny", ONE_OF_EACH, indirect=True)
with_adapters = pytest.mark.parametrize(
    "tiny", [name for name in ONE_OF_EACH if TINY[name].family.lora_targets], indirect=True
)


def drawn(tiny, pipeline) -> np.ndarray:
    options = {"height": tiny.resolution, "width": tiny.resolution, "num_inference_steps": 2} | tiny.called
    generator = torch.Generator().manual_seed(0)
    return pipeline(prompt="a word", generator=generator, output_type="np", **options).images


@with_adapters
def test_an_adapter_is_trained_resumed_measured_and_packed(tiny, folder, lora_args, captioned_folder, tmp_path):
    flags = lora_args | {
        "--pretrained_model_name_or_path": str(folder),
        "--resolution": str(tiny.resolution),
        "--mixed_precision": "bf16",
        "--validation_steps": "2",
        "--num_validation_images": "2",
        "--num_inference_steps": "2",
        "--eval_batch_size": "64",
    }
    del flags["--method"], flags["--calibrate_forgetting"]  # the defaults
    assert_resuming_changes_nothing(main, flags, LORA, tmp_path)
    out = tmp_path / "out"
    log = [json.loads(line) for line in (out / "validation_log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [2, 4] and all(line["broken_share"] < 1 for line in log)

    few = ("--resolution", str(tiny.resolution), "--num_inference_steps", "2", "--num_samples", "2")
    named = ("--pretrained_model_name_or_path", str(folder))
    run_siss("audit", *named, "--prompts", "a word", "another", "--output_dir", str(tmp_path / "audit"), *few)
    measured = ("--base", str(folder), "--unlearned", str(out), "--train_data_dir", str(captioned_folder))
    fewer = ("--num_ordinary_samples", "2", "--relearning_steps", "2", "--num_relearning_samples", "2")
    run_siss("evaluate", *measured, "--output_dir", str(tmp_path / "report"), *few, *fewer)
    figures = json.loads((tmp_path / "report/evaluation.json").read_text())
    assert figures["settings"]["guidance_scale"] == tiny.family.default_guidance_scale
    assert figures["unlearned"]["copy_share"] is not None and figures["unlearned"]["injection"]
    assert (tmp_path / "report/report.html").exists()
    run_siss("push", str(out), "--evaluation", str(tmp_path / "report"), "--hub_model_id", "me/model", "--dry_run")

    pipeline = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    base = drawn(tiny, pipeline)
    pipeline.load_lora_weights(out, adapter_name="forget")
    assert np.isfinite(drawn(tiny, pipeline)).all() and not np.array_equal(drawn(tiny, pipeline), base)
    pipeline.set_adapters("forget", 0.0)
    assert np.array_equal(drawn(tiny, pipeline), base)


@of_every_family
def test_a_network_is_trained_in_full_and_the_pipeline_loads(tiny, folder, full_args, tmp_path):
    more = {"--gradient_checkpointing": None, "--use_ema": None, "--gradient_accumulation_steps": "2"}
    named = {"--pretrained_model_name_or_path": str(folder), "--resolution": str(tiny.resolution)}
    main(to_argv(full_args | named | more))
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out", use_safetensors=True)
    assert np.isfinite(drawn(tiny, pipeline)).all()
    run_siss("push", str(tmp_path / "out"), "--hub_model_id", "me/model", "--dry_run")


@of_every_family
def test_images_to_keep_are_sampled(tiny, folder, tmp_path):
    """The tightest half of the samples of a prompt counts as copies; here only the way to a folder is tested."""
    named = ("--pretrained_model_name_or_path", str(folder), "--prompts", "a word")
    few = (
        "--resolution",
        str(tiny.resolution),
        "--num_images",
        "8",
        "--num_inference_steps",
        "2",
        "--min_silhouette",
        "0",
    )
    run_siss("curate", *named, *few, "--output_dir", str(tmp_path / "curated"))
    files = [json.loads(line) for line in (tmp_path / "curated/images/metadata.jsonl").read_text().splitlines()]
    assert files and all(
        Image.open(tmp_path / "curated/images" / row["file_name"]).size == (tiny.resolution,) * 2 for row in files
    )
