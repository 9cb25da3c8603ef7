"""`siss audit` and `siss curate` on real, tiny pipelines, called as a user would."""

import csv
import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from siss_diffusers.assets.captioned import DIGIT_CAPTIONS, FLOWER_CAPTION, TEMPLE_CAPTION
from siss_diffusers.auditing import self_similarity
from siss_diffusers.commands.audit_prompts import read_captions
from siss_diffusers.commands.audit_table import compare_with_ordinary
from siss_diffusers.families import StableDiffusion
from siss_diffusers.families.sampling import sample_in_batches
from siss_diffusers.metrics.noise_norm import NOT_IN_ONE_BATCH
from tests.helpers.commands import run_siss, siss_error
from tests.helpers.paths import TINY_SD
from tests.helpers.tiny_sd import save_pipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_pipeline(tmp_path_factory.mktemp("model")))


def flags(model, output_dir, *more):
    return [
        *("audit", "--pretrained_model_name_or_path", model, "--output_dir", str(output_dir)),
        *("--num_inference_steps", "3", "--num_samples", "2", "--guidance_scale", "3", *more),
    ]


def test_a_table_a_chart_and_samples_of_every_prompt(model, tmp_path, capsys):
    out = tmp_path / "audit"
    run_siss(*flags(model, out, "--prompts", "a cat", "a dog", "a cat"))
    rows = json.loads((out / "audit.json").read_text())["prompts"]
    assert sorted(row["prompt"] for row in rows) == ["a cat", "a dog"]  # once each
    assert [row["rank"] for row in rows] == [1, 2] and rows[0]["self_similarity"] >= rows[1]["self_similarity"]
    assert not any(row["flagged"] for row in rows)  # nothing says what is ordinary
    table = list(csv.DictReader((out / "audit.csv").open()))
    assert [row["prompt"] for row in table] == [row["prompt"] for row in rows]
    assert float(table[0]["noise_norm"]) == rows[0]["noise_norm"]
    for name in ("audit.png", "samples/1.png", "samples/2.png"):
        assert Image.open(out / name).size[0] > 30
    printed = capsys.readouterr().out
    assert "a cat" not in printed and "a dog" not in printed  # they may be what has to be forgotten
    run_siss(*flags(model, out, "--prompts", "a cat", "a dog", "--show_prompts"))
    assert "a cat" in capsys.readouterr().out


def test_an_interrupted_audit_goes_on_and_an_other_one_is_refused(model, tmp_path, capfd):
    out = tmp_path / "audit"
    run_siss(*flags(model, out, "--prompts", "a cat", "a dog"))
    whole = json.loads((out / "audit.json").read_text())
    (out / "prompts" / "2.json").unlink()
    (out / "samples" / "2.png").unlink()
    before = (out / "prompts" / "1.json").stat().st_mtime_ns
    capfd.readouterr()
    run_siss(*flags(model, out, "--prompts", "a cat", "a dog"))
    assert "Sampling 1 prompt, 2 samples each" in capfd.readouterr().out  # what is left, shared out
    assert json.loads((out / "audit.json").read_text()) == whole and (out / "samples" / "2.png").exists()
    assert (out / "prompts" / "1.json").stat().st_mtime_ns == before
    message = siss_error(capfd, *flags(model, out, "--prompts", "a cat", "--seed", "1"))
    assert "another seed" in message and "--output_dir" in message


def test_the_best_match_is_found_among_training_images(model, tmp_path):
    out, folder = tmp_path / "audit", tmp_path / "images"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / name)
    run_siss(*flags(model, tmp_path / "first", "--prompts", "a cat"))
    grid = Image.open(tmp_path / "first" / "samples" / "1.png")
    grid.crop((2, 2, 18, 18)).save(folder / "copy.png")  # a sample of the model is a training image
    run_siss(
        *flags(model, out, "--prompts", "a cat", "--train_data_dir", str(folder), "--rank_by", "best_match"),
    )
    (row,) = json.loads((out / "audit.json").read_text())["prompts"]
    assert row["best_match_file"] == "copy.png" and row["best_match"] > 0.99


@torch.no_grad()
def sample_in_two_calls(family, pipeline, conditions, unconditional, sampling, progress=None):
    """Sample as many newer pipelines do: each step calls the network once with the prompt and once without."""
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)

    def draw(rows, generators):
        scheduler.set_timesteps(sampling.num_inference_steps)
        latents = torch.cat([torch.randn(1, 4, 8, 8, generator=generator) for generator in generators])
        tables = [unconditional[[0] * len(generators)], conditions[rows]]
        for timestep in scheduler.timesteps:
            without, prompted = (family.predict(pipeline.unet, latents, timestep, table) for table in tables)
            guided = without + sampling.guidance_scale * (prompted - without)
            latents = scheduler.step(guided, timestep, latents).prev_sample
        return family.decode(pipeline, latents)

    return sample_in_batches(draw, len(conditions), sampling, pipeline.unet, progress)


def test_a_labelled_list_says_how_well_each_measure_finds(model, tmp_path, capsys):
    out, images = tmp_path / "audit", tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (16, 16), (200, 30, 90)).save(images / "a.png")
    lines = ["prompt;kind;file", "a cat;VM;images/a.png", "a dog;;", 'a "bird", or two;TM;', "a tree;none;"]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    columns = ["--label_column", "kind", "--reference_column", "file"]
    run_siss(*flags(model, out, "--prompts_file", str(tmp_path / "list.csv"), *columns))
    audit = json.loads((out / "audit.json").read_text())
    assert {row["prompt"] for row in audit["prompts"]} == {"a cat", "a dog", 'a "bird", or two', "a tree"}
    # What is not memorized says what is ordinary.
    assert {row["prompt"] for row in audit["ordinary"]} == {"a dog", "a tree"}
    assert all(row["flagged"] is not None for row in audit["prompts"])
    assert not any(row["flagged"] for row in audit["prompts"] if row["prompt"] in ("a dog", "a tree"))
    with_match = [row["prompt"] for row in audit["prompts"] if row.get("best_match") is not None]
    assert with_match == ["a cat"]
    # None that is not memorized has a reference, so nothing is said of that measure.
    assert set(audit["separation"]) == {"self_similarity", "noise_norm", "noise_norm_first"}
    by_prompt = {row["prompt"]: row["noise_norm"] for row in audit["prompts"]}
    memorized, others = [by_prompt["a cat"], by_prompt['a "bird", or two']], [by_prompt["a dog"], by_prompt["a tree"]]
    wins = sum(high > low for high in memorized for low in others)
    assert audit["separation"]["noise_norm"]["auc"] == wins / 4
    printed = capsys.readouterr().out
    assert "found at 1 % false alarms" in printed and "2 memorized, 2 not" in printed and "bird" not in printed


def test_without_a_joint_batch_there_is_no_noise_norm_and_the_reason_is_said(model, tmp_path, monkeypatch, capsys):
    joint, out = tmp_path / "joint", tmp_path / "audit"
    run_siss(*flags(model, joint, "--prompts", "a cat"))
    monkeypatch.setattr(StableDiffusion, "sample", sample_in_two_calls)
    run_siss(*flags(model, out, "--prompts", "a cat", "a dog", "--ordinary_prompts", "a cat"))
    rows = json.loads((out / "audit.json").read_text())["prompts"]
    assert [row["noise_norm"] for row in rows] == [row["noise_norm_first"] for row in rows] == [None, None]
    assert all(row["no_noise_norm"] == NOT_IN_ONE_BATCH and row["self_similarity"] is not None for row in rows)
    assert capsys.readouterr().out.count(f"There is no noise norm: {NOT_IN_ONE_BATCH}.") == 1
    grids = [np.asarray(Image.open(folder / "samples" / "1.png"), dtype=float) for folder in (joint, out)]
    np.testing.assert_allclose(*grids, rtol=0, atol=1)  # only the calls differ


def test_rows_without_a_caption_are_counted(tmp_path, capsys):
    captions = {"a.png": "a cat", "b.png": None, "c.png": "a dog", "d.png": None}
    for name in captions:
        Image.new("RGB", (8, 8), (len(name), 3, 4)).save(tmp_path / name)
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in captions.items()]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    assert read_captions(str(tmp_path), "text", None) == ["a cat", "a dog"]
    assert "--dataset_name: 2 rows of 4 without a caption are not audited" in capsys.readouterr().out


def test_flags_are_for_what_exceeds_every_ordinary_prompt():
    ordinary = [{"noise_norm": value, "self_similarity": 0.5} for value in (1.0, 2.0, 3.0)]
    rows = [{"noise_norm": 3.5, "self_similarity": 0.1}, {"noise_norm": 3.0, "self_similarity": 0.5}]
    compare_with_ordinary(rows, ordinary)
    assert [row["flagged"] for row in rows] == [True, False]
    assert rows[0]["p_values"] == {"noise_norm": 1 / 4, "self_similarity": 1.0}
    assert rows[1]["p_values"] == {"noise_norm": 2 / 4, "self_similarity": 1.0}


def test_self_similarity_sees_a_picture_that_half_of_the_samples_are():
    generator = torch.Generator().manual_seed(0)
    picture, others = torch.rand(1, 3, 8, 8, generator=generator), torch.rand(8, 3, 8, 8, generator=generator)
    assert self_similarity(others) == pytest.approx(1 - 2**0.5, abs=0.1)
    assert self_similarity(torch.cat([picture.expand(8, -1, -1, -1), others[:6]])) == pytest.approx(1)
    assert self_similarity(torch.cat([picture.expand(3, -1, -1, -1), others])) < 0.1
    assert self_similarity(others[:1]) is None
    assert self_similarity(torch.zeros(3, 3, 8, 8)) == 1  # flat, all the same


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ([], "nothing to audit"),
        (["--prompts_file", "missing.txt"], "--prompts_file"),
        (["--prompts", "x", "--guidance_scale", "1"], "--guidance_scale"),
        (["--prompts", "x", "--rank_by", "best_match"], "--train_data_dir"),
        (["--prompts", "x", "--label_column", "type"], "--label_column names a column of --prompts_file"),
        (
            ["--prompts", "x", "--train_data_dir", ".", "--prompts_file", "a.csv", "--reference_column", "b"],
            "give one",
        ),
        (["--prompts", "x", "--train_data_dir", "missing"], "--train_data_dir"),
        (
            ["--prompts", "x", "--train_data_dir", "{parent}"],
            "lies in --train_data_dir, and its pictures would be read",
        ),
        (["--prompts", "x", "--adapter", "missing"], "--adapter"),
        (["--prompts", "x", "--num_samples", "1"], "--num_samples"),
        (["--dataset_name", "missing_folder"], "--dataset_name"),
        (["--prompts", "x", "--pretrained_model_name_or_path", "missing"], "--pretrained_model_name_or_path"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(model, tmp_path, capfd, more, says):
    more = [word.format(parent=tmp_path) for word in more]
    assert says in siss_error(capfd, *flags(model, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_the_memorized_prompt_of_the_tiny_stable_diffusion_is_flagged(tmp_path):
    out = tmp_path / "audit"
    ordinary = (TEMPLE_CAPTION, *DIGIT_CAPTIONS[:4])
    run_siss(
        *("audit", "--pretrained_model_name_or_path", str(TINY_SD), "--output_dir", str(out)),
        *("--prompts", FLOWER_CAPTION, *ordinary, "--ordinary_prompts", *ordinary),
        *("--num_inference_steps", "10", "--guidance_scale", "3"),
    )
    rows = json.loads((out / "audit.json").read_text())["prompts"]
    assert [row["prompt"] for row in rows if row["flagged"]] == [FLOWER_CAPTION] == [rows[0]["prompt"]]
    assert rows[0]["self_similarity"] > rows[1]["self_similarity"] + 0.2
