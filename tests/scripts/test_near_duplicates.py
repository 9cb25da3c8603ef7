"""Near copies in the keep set, as a user of the script meets them."""

import csv
import json
import stat
from io import BytesIO

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from PIL import Image

from siss_diffusers import unlearn
from siss_diffusers.assets.digits import garment_image
from tests.helpers.commands import assert_refused, to_argv
from tests.helpers.paths import TINY_MODEL
from tests.helpers.pictures import NUM_DIGITS, NUM_GARMENTS
from tests.helpers.runs import read_log, without_times
from train_siss_unconditional import main


@pytest.fixture
def flags(base_args, digits_folder, tmp_path) -> dict[str, str | None]:
    """A short run on digits among which two near copies of the garment lie, which is forgotten."""
    for path in digits_folder.iterdir():
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / path.name).write_bytes(path.read_bytes())
    garment = Image.fromarray(garment_image())
    garment.save(tmp_path / "data" / "seaside.jpg", quality=30)
    Image.fromarray(np.fliplr(garment_image()) // 2 + 60).save(tmp_path / "data" / "faded.png")
    return base_args | {"--train_data_dir": str(tmp_path / "data")}


def counts(folder) -> dict[str, int]:
    return json.loads((folder / "unlearning.json").read_text())["data"]


def test_near_copies_are_left_out_counted_and_listed(flags, tmp_path, caplog):
    main(to_argv(flags))
    out = tmp_path / "out"
    assert counts(out) == {
        "train": NUM_DIGITS + NUM_GARMENTS + 2,
        "forget": 1,
        "keep": NUM_DIGITS,
        "duplicates_removed": NUM_GARMENTS - 1,
        "near_duplicates_removed": 2,
        "checked": NUM_DIGITS + NUM_GARMENTS + 1,
    }
    listed = out / "near_duplicates.csv"
    assert stat.S_IMODE(listed.stat().st_mode) == 0o600
    most_doubtful, other = csv.DictReader(listed.open())
    assert most_doubtful["file"].endswith("seaside.jpg") and 0.95 <= float(most_doubtful["similarity"]) < 0.999
    assert other["file"].endswith("faded.png") and float(other["similarity"]) > 0.999
    assert most_doubtful["forget_file"].endswith("garment_0.png")
    assert (
        "Near copies of forget images, removed from the keep set, too: 2; look at near_duplicates.csv" in caplog.text
        and "seaside" not in caplog.text
    )
    for name in ("unlearning.json", "train_log.jsonl"):
        assert "seaside" not in (out / name).read_text()
    # The old rule, in the same folder: nothing is left of the list.
    AcceleratorState._reset_state(reset_partial_state=True)
    main(to_argv(flags | {"--no-drop_near_duplicates": None, "--overwrite_output_dir": None}))
    assert counts(out)["near_duplicates_removed"] == 0 and counts(out)["keep"] == NUM_DIGITS + 2
    assert not listed.exists()


def test_a_checkpoint_of_the_old_rule_resumes_with_the_flag_that_the_refusal_names(flags, tmp_path, capfd):
    old = {"--no-drop_near_duplicates": None}
    main(to_argv(flags | old | {"--checkpointing_steps": "1", "--output_dir": str(tmp_path / "whole")}))
    main(to_argv(flags | old | {"--checkpointing_steps": "1", "--max_train_steps": "1"}))
    state = tmp_path / "out" / "checkpoint-1" / "state.json"
    assert "near_duplicates" not in state.read_text()  # as it was before there was such a setting
    resumed = flags | {"--resume_from_checkpoint": "latest"}
    refusal = "the images to keep are others (29 then, 29 now) (near copies left out now: 2; --no-drop_near_duplicates keeps them)"
    assert_refused(main, resumed, refusal, tmp_path, capfd)
    AcceleratorState._reset_state(reset_partial_state=True)
    main(to_argv(resumed | old))
    assert without_times(read_log(tmp_path / "out")) == without_times(read_log(tmp_path / "whole"))


def test_a_checkpoint_of_the_old_rule_resumes_as_it_is_where_there_are_no_near_copies(base_args, tmp_path):
    main(to_argv(base_args | {"--no-drop_near_duplicates": None, "--checkpointing_steps": "1"}))
    main(to_argv(base_args | {"--max_train_steps": "3", "--resume_from_checkpoint": "latest"}))
    assert [line["step"] for line in read_log(tmp_path / "out")] == [1, 2, 3]


def test_the_setting_of_python_is_the_flag(digits_folder, cache_dir):
    from diffusers import DDPMPipeline

    content = BytesIO()
    Image.fromarray(garment_image()).save(content, "JPEG", quality=75)
    keep = [Image.open(path).copy() for path in sorted(digits_folder.glob("digit_*"))] + [Image.open(content)]

    def removed(**settings) -> int:
        outcome = unlearn(
            DDPMPipeline.from_pretrained(TINY_MODEL),
            forget=[Image.fromarray(garment_image())],
            keep=keep,
            max_train_steps=1,
            train_batch_size=2,
            cache_dir=str(cache_dir),
            **settings,
        )
        listed = outcome.folder / "near_duplicates.csv"
        assert listed.exists() == (outcome.record["data"]["near_duplicates_removed"] > 0)
        if listed.exists():
            assert listed.read_text().splitlines()[1].startswith(f"image {NUM_DIGITS},0.9")
        return outcome.record["data"]["near_duplicates_removed"]

    assert [removed(), removed(drop_near_duplicates=False)] == [1, 0]
