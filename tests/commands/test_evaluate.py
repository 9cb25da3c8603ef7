"""`siss evaluate` on real pipelines and adapters, called as a user would."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from siss_diffusers.assets.captioned import (
    DIGIT_CAPTIONS,
    FLOWER_CAPTION,
    digit_images,
    flower_images,
    memorized_image,
)
from siss_diffusers.families import StableDiffusion
from siss_diffusers.metrics.copies import wilson_interval
from siss_diffusers.settings import AdapterSettings
from siss_diffusers.training.adapters import add_lora, save_lora
from tests.helpers.commands import run_siss, siss_error
from tests.helpers.paths import TINY_MODEL, TINY_SD
from tests.helpers.pictures import write_images
from tests.helpers.runs import launch


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """The memorized flower twice, other flowers and digits, with captions."""
    folder, lines = tmp_path_factory.mktemp("captioned"), []
    pictures = [(memorized_image(), FLOWER_CAPTION, True)] * 2
    pictures += [(image, FLOWER_CAPTION, False) for image in flower_images()[:20]]
    digits, classes = digit_images()
    pictures += [(digits[i], DIGIT_CAPTIONS[classes[i]], False) for i in range(20)]
    for index, (image, text, forget) in enumerate(pictures):
        write_images(folder, {f"{index:02d}.png": image})
        lines.append(json.dumps({"file_name": f"{index:02d}.png", "text": text, "forget": forget}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """Of random weights: it wrecks the model."""
    unet = StableDiffusionPipeline.from_pretrained(TINY_SD).unet
    torch.manual_seed(0)
    add_lora(unet, AdapterSettings(4, 4, 0.0, StableDiffusion.lora_targets), torch.float32)
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    folder = tmp_path_factory.mktemp("adapter")
    save_lora(unet, folder, StableDiffusionPipeline, "unet")
    return folder


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """TorchScript files: features that are pixels, a classifier, and one with the wrong output."""

    class Flat(torch.nn.Module):
        def forward(self, x):
            return x.mean(1).flatten(1)

    class Whole(torch.nn.Module):
        def forward(self, x):
            return x

    folder = tmp_path_factory.mktemp("networks")
    torch.jit.script(Flat()).save(folder / "flat.pt")
    torch.jit.script(Whole()).save(folder / "whole.pt")
    (folder / "no.pt").write_text("not a network")
    return folder


def sd_flags(out, captioned, unlearned, cache_dir, *more):
    return [
        *("evaluate", "--base", str(TINY_SD), "--unlearned", str(unlearned), "--train_data_dir", str(captioned)),
        *("--output_dir", str(out), "--cache_dir", str(cache_dir), "--num_samples", "12", "--guidance_scale", "3"),
        *("--num_ordinary_samples", "10", "--num_inference_steps", "12"),
        *("--num_likelihood_images", "2", *more),
    ]


def test_stable_diffusion_before_and_after(captioned, adapter, networks, cache_dir, tmp_path, capfd):
    out, wordings = tmp_path / "out", tmp_path / "wordings.txt"
    never_seen = write_images(tmp_path / "never_seen", {"one.png": flower_images()[30, ::-1].copy()})
    wordings.write_text("a flower\nflower photograph of a\n")
    run_siss(
        *sd_flags(out, captioned, adapter, cache_dir, "--also", f"same={TINY_SD}"),
        *("--copy_detector", str(networks / "flat.pt"), "--copy_detector_size", "16"),
        *("--feature_extractor", str(networks / "flat.pt"), "--feature_size", "8"),
        *("--paraphrases_file", str(wordings), "--prompt_noise", "0.5"),
        *("--relearning_steps", "4", "--num_relearning_samples", "4"),
        *("--embedding_attack", "--attack_steps", "2", "--attack_starts", "gauss", "--num_attack_samples", "2"),
        *("--attack_controls", "2", "--never_seen_dir", str(never_seen)),
    )
    content = json.loads((out / "evaluation.json").read_text())
    base, unlearned, same, settings = (content[name] for name in ("base", "unlearned", "same", "settings"))
    assert settings["forget_images"] == 1 and settings["data"]["forget"] == 2
    # A model beside itself, on the same seeds: every figure is the same.
    bits = {"memorized_bits", "memorized_bits_se", "memorized_bits_by_condition"}
    assert set(same) - set(base) == {"relearning", "drift"} | bits and {name: same[name] for name in base} == base
    assert same["drift"] == 0 and unlearned["drift"] > 0.5
    assert same["memorized_bits"] == 0 and unlearned["memorized_bits"] > 10 * unlearned["memorized_bits_se"] > 0
    shares, shares_after = base["copy_share_by_detector"], unlearned["copy_share_by_detector"]
    assert min(shares.values()) > 0.4 and shares.keys() == {"pixel_l2", "correlation", "cluster", "network"}
    # Pixels as features are a poor detector: what the ruined model makes is like anything to them.
    assert max(share for name, share in shares_after.items() if name != "network") == 0
    assert (base["copy_share_low"], base["copy_share_high"]) == wilson_interval(round(12 * base["copy_share"]), 12)
    assert unlearned["others"] > 6 and unlearned["others_distance_to_keep"] > 0
    assert base["sscd_forget"] > unlearned["sscd_forget"]
    assert unlearned["fid"] > base["fid"] > 0 and base["precision"] >= unlearned["precision"]
    assert base["text_noise_norm"] > 0 and len(base["text_noise_norm_by_step"]) == 12
    assert list(base["injection"]) == ["199", "399", "599", "799"] and base["injection"]["199"] > 0.9
    assert [row["prompt_number"] for row in base["paraphrases"]] == [0, 1] and base["prompt_noise"][0]["samples"] == 4
    assert [point["step"] for point in unlearned["relearning"]] == [0, 1, 2, 3, 4]
    assert [row["controls"] for row in unlearned["embedding_attack"]["gauss"]] == [2, 2]
    assert "attacked_copy_share" in base and "attacked_control_share" in base
    for metric in ("nll_forget_bpd", "clip_score", "clip_iqa", "inception_score"):
        assert base[metric] is None and settings["skipped"][metric]
    assert settings["damage_table"]["any"]["none"] == 1 and set(settings["keep_flagged"].values()) == {0.0}
    report = (out / "report.html").read_text()
    assert report.count("data:image/png") == 6 and "12" in report
    printed = capfd.readouterr().out
    for text in (report, printed, json.dumps(content)):
        assert (
            FLOWER_CAPTION not in text
            and str(captioned) not in text
            and str(tmp_path) not in text.replace(str(out), "")
        )


def test_an_unconditional_model(digits_folder, cache_dir, networks, tmp_path):
    out = tmp_path / "out"
    # The same model in another folder, with noise on its weights.
    damaged = tmp_path / "damaged"
    shutil.copytree(TINY_MODEL, damaged)
    from diffusers import DDPMPipeline

    pipeline = DDPMPipeline.from_pretrained(damaged)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in pipeline.unet.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    pipeline.save_pretrained(damaged)
    run_siss(
        *("evaluate", "--base", str(TINY_MODEL), "--unlearned", str(damaged), "--train_data_dir", str(digits_folder)),
        *("--forget_files", "garment_0.png", "--cache_dir", str(cache_dir), "--output_dir", str(out)),
        *("--num_samples", "64", "--batch_size", "64", "--num_inference_steps", "10", "--num_likelihood_images", "3"),
        *("--relearning_steps", "2", "--num_relearning_samples", "4"),
        *("--classifier", str(networks / "flat.pt")),
    )
    content = json.loads((out / "evaluation.json").read_text())
    base, unlearned = content["base"], content["unlearned"]
    assert base["nll_keep_bpd"] < unlearned["nll_keep_bpd"] and base["nll_forget_bpd"] < unlearned["nll_forget_bpd"]
    assert base["injection"]["199"] > 0.9 and base["inception_score"] >= 1
    assert [point["step"] for point in unlearned["relearning"]] == [0, 1, 2] and "relearning" not in base
    assert (
        unlearned["drift"] > 0
        and base["text_noise_norm"] is None
        and "no text" in content["settings"]["skipped"]["text_noise_norm"]
    )


def test_results_do_not_depend_on_the_batch_size_beyond_rounding(captioned, adapter, cache_dir, tmp_path):
    found = []
    for batch in ("12", "5"):
        out = tmp_path / batch
        run_siss(*sd_flags(out, captioned, adapter, cache_dir, "--batch_size", batch, "--num_ordinary_samples", "0"))
        found.append(json.loads((out / "evaluation.json").read_text()))
    for name in ("base", "unlearned"):
        first, second = (content[name] for content in found)
        assert first["copy_share"] == second["copy_share"]
        assert first["text_noise_norm"] == pytest.approx(second["text_noise_norm"], rel=1e-4)
        assert first["others_distance_to_keep"] == pytest.approx(second["others_distance_to_keep"], rel=1e-3)


@pytest.mark.slow
def test_the_number_of_processes_changes_nothing(captioned, adapter, cache_dir, tmp_path):
    """All three commands, as `accelerate launch -m siss_diffusers` runs them."""
    found = {}
    for processes, port in ((1, "29573"), (2, "29574")):
        folder = tmp_path / str(processes)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        torchrun += ["--master_port", port, "-m", "siss_diffusers"]
        sampling = ("--num_inference_steps", "8", "--guidance_scale", "3", "--batch_size", "8")
        model = ("--pretrained_model_name_or_path", str(TINY_SD))
        prompts = ("--prompts", FLOWER_CAPTION)
        more = [str(argument) for argument in (*DIGIT_CAPTIONS[:2], "--num_samples", 3)]
        audit = ("audit", *model, *prompts, *more, "--output_dir", str(folder / "audit"), *sampling)
        launch([*torchrun, *audit], ACCELERATE_USE_CPU="true")
        curate = ("curate", *model, *prompts, "--num_images", "20", "--output_dir", str(folder / "curate"), *sampling)
        launch([*torchrun, *curate], ACCELERATE_USE_CPU="true")
        evaluate = sd_flags(folder / "evaluate", captioned, adapter, cache_dir, "--batch_size", "4")
        launch([*torchrun, *evaluate, "--relearning_steps", "1"], ACCELERATE_USE_CPU="true")
        evaluation = json.loads((folder / "evaluate" / "evaluation.json").read_text())
        del evaluation["settings"]["seconds"]
        pictures = sorted((folder / "curate" / "images").glob("*.png"))
        found[processes] = (
            json.loads((folder / "audit" / "audit.json").read_text()),
            (folder / "curate" / "images" / "metadata.jsonl").read_text(),
            [file.read_bytes() for file in pictures],
            evaluation,
        )
    assert len(found[1][2]) == 20 and found[1] == found[2]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--base", "missing"], "--base"),
        (["--unlearned", "missing"], "--unlearned"),
        (["--also", "x"], "--also"),
        (["--also", "base=x"], "--also"),
        (["--also", "a/b=x"], "--also"),
        (["--resolution", "20"], "--resolution 20"),
        (["--output_dir", "{networks}/no.pt"], "is a file"),
        (["--unlearned", str(TINY_MODEL)], "--unlearned"),
        (["--copy_detector", "{networks}/no.pt"], "--copy_detector"),
        (["--copy_detector", "{networks}/missing.pt"], "--copy_detector"),
        (["--copy_detector", "{networks}/whole.pt"], "--copy_detector"),
        (["--feature_extractor", "{networks}/no.pt"], "--feature_extractor"),
        (["--forget_column", "missing"], "--forget_column"),
        (["--caption_column", "missing"], "--caption_column"),
        (["--clip_model", "{networks}"], "--clip_model"),
        (["--paraphrases_file", "missing.txt"], "--paraphrases_file"),
        (["--attack_steps", "10"], "--attack_steps needs --embedding_attack"),
        (["--embedding_attack", "--attack_steps", "0"], "--attack_steps"),
        (["--embedding_attack", "--attack_restarts", "0"], "--attack_restarts"),
        (["--embedding_attack", "--attack_starts", "elsewhere"], "--attack_starts"),
        (["--embedding_attack", "--attack_controls", "-1"], "--attack_controls"),
        (["--embedding_attack", "--num_attack_samples", "0"], "--num_attack_samples"),
        (["--embedding_attack", "--never_seen_dir", "missing"], "--never_seen_dir"),
        (["--embedding_attack", "--never_seen_dir", "{networks}"], "--never_seen_dir"),
        (["--output_dir", "{data}", "--overwrite_output_dir"], "lies in --train_data_dir"),
        (["--output_dir", "{data}/report"], "lies in --train_data_dir"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    captioned, adapter, networks, cache_dir, tmp_path, capfd, more, says
):
    more = [value.format(networks=networks, data=captioned) for value in more]
    assert says in siss_error(capfd, *sd_flags(tmp_path / "out", captioned, adapter, cache_dir, *more))
    assert not (tmp_path / "out").exists()


def test_an_unconditional_model_has_no_text_to_search(digits_folder, cache_dir, tmp_path, capfd):
    base = (
        "evaluate",
        "--base",
        str(TINY_MODEL),
        "--unlearned",
        str(TINY_MODEL),
        "--train_data_dir",
        str(digits_folder),
    )
    flags = (
        *base,
        "--forget_files",
        "garment_0.png",
        "--cache_dir",
        str(cache_dir),
        "--output_dir",
        str(tmp_path / "out"),
    )
    assert "the injection, which is always measured" in siss_error(capfd, *flags, "--embedding_attack")


def test_a_folder_that_holds_something_is_left_alone(captioned, adapter, cache_dir, tmp_path, capfd):
    (tmp_path / "mine.txt").write_text("mine")
    assert "--overwrite_output_dir" in siss_error(capfd, *sd_flags(tmp_path, captioned, adapter, cache_dir))
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "--unlearned" in siss_error(capfd, *sd_flags(tmp_path / "out", captioned, empty, cache_dir))
    unreadable = np.zeros(3, dtype=np.uint8).tobytes()
    broken = tmp_path / "broken"
    shutil.copytree(captioned, broken)
    (broken / "03.png").write_bytes(unreadable)
    assert "03.png" in siss_error(capfd, *sd_flags(tmp_path / "out", broken, adapter, cache_dir))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_several_prompts_in_half_precision(dtype, captioned, adapter, cache_dir, tmp_path):
    """Two memorized prompts, one of them without images to keep; the fine-tuning of the attack is in float32 anyway."""
    folder = tmp_path / "data"
    shutil.copytree(captioned, folder)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    lines[1]["text"], lines[-1]["forget"] = "a photograph", True
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    run_siss(
        *sd_flags(tmp_path / "out", folder, adapter, cache_dir, "--dtype", dtype, "--batch_size", "5"),
        *("--relearning_steps", "2", "--num_relearning_samples", "4"),
    )
    content = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert content["settings"]["forget_images"] == 2
    assert [point["step"] for point in content["unlearned"]["relearning"]] == [0, 1, 2]
    assert content["base"]["injection"]["199"] > 0.8


def test_where_nothing_can_be_compared_every_metric_has_its_reason(captioned, adapter, cache_dir, networks, tmp_path):
    """A curated folder: all its captions are memorized prompts."""
    folder = tmp_path / "data"
    shutil.copytree(captioned, folder)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for line in lines:
        line["text"] = FLOWER_CAPTION
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    run_siss(
        *sd_flags(tmp_path / "out", folder, adapter, cache_dir, "--num_samples", "4"),
        *("--feature_extractor", str(networks / "flat.pt"), "--classifier", str(networks / "flat.pt")),
    )
    content = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    for name in ("fid", "kid", "precision", "coverage", "inception_score", "drift", "ordinary_copy_share"):
        assert content["unlearned"][name] is None and "prompts" in content["settings"]["skipped"][name]


def test_flags_of_stable_diffusion_are_refused_for_an_unconditional_model(digits_folder, tmp_path, capfd):
    flags = (
        "evaluate",
        "--base",
        str(TINY_MODEL),
        "--unlearned",
        str(TINY_MODEL),
        "--output_dir",
        str(tmp_path / "o"),
    )
    more = ("--train_data_dir", str(digits_folder), "--forget_files", "garment_0.png", "--guidance_scale", "3")
    assert "--guidance_scale" in siss_error(capfd, *flags, *more)
