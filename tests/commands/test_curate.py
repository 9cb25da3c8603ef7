"""`siss curate` on real pipelines, called as a user would."""

import json

import datasets
import numpy as np
import pytest
from PIL import Image

from siss_diffusers.assets.captioned import DIGIT_CAPTIONS, FLOWER_CAPTION, memorized_image
from tests.helpers.commands import run_siss, siss_error
from tests.helpers.paths import TINY_SD
from tests.helpers.tiny_sd import save_pipeline


def flags(out, *more):
    return [
        *("curate", "--pretrained_model_name_or_path", str(TINY_SD), "--output_dir", str(out)),
        *("--num_images", "24", "--num_inference_steps", "20", "--guidance_scale", "3", *more),
    ]


def metadata(out):
    return [json.loads(line) for line in (out / "images" / "metadata.jsonl").read_text().splitlines()]


def is_copy(file):
    """By the pixels of the picture that was memorized: the truth, where the command saw only clusters."""
    picture = np.asarray(Image.open(file).convert("RGB"), dtype=float) / 255
    return np.linalg.norm(picture - memorized_image() / 255) < 3


@pytest.fixture(scope="module")
def curated(tmp_path_factory):
    out = tmp_path_factory.mktemp("curated") / "out"
    run_siss(*flags(out, "--prompts", FLOWER_CAPTION))
    return out


def test_the_memorized_cluster_is_isolated(curated):
    rows = metadata(curated)
    assert len(rows) == 24 and {row["text"] for row in rows} == {FLOWER_CAPTION}
    truth = [is_copy(curated / "images" / row["file_name"]) for row in rows]
    assert [row["forget"] for row in rows] == truth and 0 < sum(truth) < 24
    report = json.loads((curated / "curation.json").read_text())["prompts"][0]
    assert report["separated"] and report["forget"] == sum(truth) and report["silhouette"] > 0.5
    assert Image.open(curated / "contact_sheet_prompt000.png").size[0] > 12 * 96


def test_the_folder_is_read_as_training_data(curated, tmp_path):
    rows = datasets.load_dataset(
        "imagefolder", data_dir=str(curated / "images"), cache_dir=str(tmp_path), split="train"
    )
    assert set(rows.column_names) == {"image", "text", "forget"} and len(rows) == 24
    assert rows["forget"][:] == [row["forget"] for row in metadata(curated)]


def test_labels_are_corrected_by_hand(curated, capfd):
    rows = metadata(curated)
    first, second, third = (row["file_name"] for row in rows[:3])
    run_siss("curate", "--output_dir", str(curated), "--flip", first, "--move", "keep", second, third)
    changed = metadata(curated)
    assert changed[0]["forget"] is not rows[0]["forget"] and not changed[1]["forget"] and not changed[2]["forget"]
    assert changed[3:] == rows[3:]
    run_siss("curate", "--output_dir", str(curated), "--flip", first)
    run_siss(
        "curate", "--output_dir", str(curated), "--move", "forget", *[r["file_name"] for r in rows if r["forget"]]
    )
    assert metadata(curated) == rows
    before = (curated / "images" / "metadata.jsonl").read_bytes()
    for more, says in (
        (("--flip", "no.png"), "no.png"),
        (("--move", "elsewhere", first), "--move"),
        (("--move", "keep"), "--move"),
        (("--flip", first, "--move", "keep", first), "name it once"),
    ):
        assert says in siss_error(capfd, "curate", "--output_dir", str(curated), *more)
    assert (curated / "images" / "metadata.jsonl").read_bytes() == before


def test_an_interrupted_curation_makes_only_what_is_missing(curated, tmp_path):
    out = tmp_path / "out"
    (out / "samples").mkdir(parents=True)
    settings = json.loads((curated / "curation.json").read_text())["settings"]
    (out / "curation.json").write_text(json.dumps({"settings": settings}))
    for file in sorted((curated / "samples").glob("*.png"))[:16]:  # a whole batch
        (out / "samples" / file.name).write_bytes(file.read_bytes())
    made = {file.name: file.stat().st_mtime_ns for file in (out / "samples").glob("*.png")}
    run_siss(*flags(out, "--prompts", FLOWER_CAPTION))
    for file in (curated / "samples").glob("*.png"):
        assert (out / "samples" / file.name).read_bytes() == file.read_bytes()
    assert all((out / "samples" / name).stat().st_mtime_ns == time for name, time in made.items())
    assert metadata(out) == metadata(curated)


def test_a_reference_names_the_cluster(curated, tmp_path):
    """Of a picture that is not the memorized one, the other cluster is marked."""
    rows, out = metadata(curated), tmp_path / "out"
    other = next(row["file_name"] for row in rows if not row["forget"])
    (out / "samples").mkdir(parents=True)
    for name in ("curation.json", *(f"samples/{row['file_name']}" for row in rows)):
        (out / name).write_bytes((curated / name).read_bytes())
    run_siss(*flags(out, "--prompts", FLOWER_CAPTION, "--reference", str(curated / "images" / other)))
    assert [row["forget"] for row in metadata(out)] == [not row["forget"] for row in rows]


def test_a_prompt_without_clusters_is_refused_with_the_figure(tmp_path, capfd):
    out = tmp_path / "out"
    sentence = siss_error(capfd, *flags(out, "--prompts", DIGIT_CAPTIONS[3], "--num_inference_steps", "10"))
    assert "no prompt could be curated" in sentence and DIGIT_CAPTIONS[3] not in sentence
    assert not (out / "images" / "metadata.jsonl").exists() and len(list((out / "samples").glob("*.png"))) == 24
    report = json.loads((out / "curation.json").read_text())["prompts"][0]
    assert not report["separated"] and report["silhouette"] < 0.25


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ([], "nothing to curate"),
        (["--audit", "missing"], "--audit"),
        (["--prompts", "x", "--num_clusters", "1"], "--num_clusters"),
        (["--prompts", "x", "--num_images", "2"], "--num_images"),
        (["--prompts", "x", "y", "--reference", "z.png"], "--reference"),
        (["--prompts", "x", "--reference", "missing.png"], "--reference"),
        (["--prompts", "x", "--feature_extractor", "missing.pt"], "--feature_extractor"),
        (["--prompts_file", "missing.txt"], "--prompts_file"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(tmp_path, capfd, more, says):
    assert says in siss_error(capfd, *flags(tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_else_is_left_alone(curated, tmp_path, capfd):
    (tmp_path / "mine.txt").write_text("mine")
    assert "not empty" in siss_error(capfd, *flags(tmp_path, "--prompts", "x"))
    assert "curated already" in siss_error(capfd, *flags(curated, "--prompts", FLOWER_CAPTION))
    assert "another seed" in siss_error(capfd, *flags(curated, "--prompts", FLOWER_CAPTION, "--seed", "1"))
    (model,) = [save_pipeline(tmp_path / "model")]
    sentence = siss_error(capfd, *flags(curated, "--prompts", "x", "--pretrained_model_name_or_path", str(model)))
    assert "another" in sentence and "model" in sentence and "prompts" in sentence
