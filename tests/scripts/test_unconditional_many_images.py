"""Of many images only what may be drawn is read."""

import json
from collections import Counter
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pytest
from accelerate.state import AcceleratorState
from PIL import Image

from siss_diffusers.assets.digits import digit_images, garment_image
from siss_diffusers.data.images import Images
from siss_diffusers.training import training_set
from tests.helpers.commands import assert_refused, to_argv
from tests.helpers.pictures import write_images
from tests.helpers.runs import assert_same_gradients, read_log, without_times
from train_siss_unconditional import main


@pytest.fixture
def many(base_args, tmp_path) -> dict[str, str | None]:
    """Flags of a run of 2 steps that plans (2 + 1) x 4 of 5,000 images in Parquet, every tenth a copy of the garment."""
    pictures = [png(garment_image()) if row % 10 == 0 else picture for row, picture in enumerate(pictures_of(5_000))]
    write_parquet(tmp_path / "many", pictures)
    del base_args["--train_data_dir"], base_args["--forget_files"]
    forget = write_images(tmp_path / "forget", {"garment.png": garment_image()})
    flags = {"--dataset_name": str(tmp_path / "many"), "--forget_data_dir": str(forget), "--max_skipped_steps": "1"}
    return base_args | flags


def pictures_of(count: int) -> list[bytes]:
    """Digits, each with its number in its first pixels."""
    digits = digit_images()[0]
    numbered = [digits[row % len(digits)].copy() for row in range(count)]
    for row, pixels in enumerate(numbered):
        pixels[0, :2] = divmod(row, 256)
    return [png(pixels) for pixels in numbered]


def png(pixels: np.ndarray) -> bytes:
    content = BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def write_parquet(folder: Path, pictures: list[bytes]) -> None:
    folder.mkdir(exist_ok=True)
    features = datasets.Features(image=datasets.Image(decode=False))
    cells = [{"bytes": picture, "path": None} for picture in pictures]
    rows = datasets.Dataset.from_dict({"image": cells}, features).cast_column("image", datasets.Image())
    rows.to_parquet(folder / "train.parquet")


@pytest.fixture
def opened(monkeypatch) -> list[int]:
    """The rows of --dataset_name whose pictures were decoded in this process."""
    rows, open_whole = [], Images.open

    def counted(images: Images, index: int) -> Image.Image:
        if images.flag == "--dataset_name":
            rows.append(index)
        return open_whole(images, index)

    monkeypatch.setattr(Images, "open", counted)
    return rows


class TestManyImages:
    PLANNED = (2 + 1) * 4

    def counts(self, folder: Path) -> dict:
        return json.loads((folder / "unlearning.json").read_text())["data"]

    def test_only_what_may_be_drawn_is_read(self, many, opened, tmp_path):
        main(to_argv(many))
        counts = self.counts(tmp_path / "out")
        assert len(set(opened)) == counts["checked"] < self.PLANNED + 10
        removed = counts["duplicates_removed"]
        assert counts["checked"] == self.PLANNED + removed and counts["keep"] == 5_000 - removed

    @pytest.mark.parametrize(
        "flags",
        [
            {"--calibrate_forgetting": None},
            {"--validation_steps": "2", "--num_validation_images": "4", "--ddpm_num_inference_steps": "2"},
            {"--method": "retrack", "--method_args": "num_neighbors=3"},
        ],
        ids=["calibration", "detectors", "neighbours"],
    )
    def test_a_copy_is_compared_once_and_used_never(self, flags, many, opened, tmp_path, monkeypatch):
        """Copies are opened once, by the comparison; what is used is loaded once more."""
        monkeypatch.setattr(training_set, "MAX_NEIGHBOR_CANDIDATES", 300)
        monkeypatch.setattr(training_set, "MAX_KEEP_IMAGES", 300)
        main(to_argv(many | flags))
        times = Counter(opened)
        copies = [row for row in times if row % 10 == 0]
        assert len(copies) > 10 and all(times[row] == 1 for row in copies)
        assert sum(count > 1 for count in times.values()) > 100
        counts = self.counts(tmp_path / "out")
        assert counts["checked"] == len(times) < 900 and counts["duplicates_removed"] == len(copies)

    def test_more_steps_resume_the_same_run(self, many, tmp_path):
        """At step 2 the data were compared as far as the first run could go, and the second goes further."""
        main(to_argv(many | {"--max_train_steps": "6", "--output_dir": str(tmp_path / "whole")}))
        main(to_argv(many | {"--checkpointing_steps": "2"}))
        more = {"--max_train_steps": "6", "--resume_from_checkpoint": "latest", "--checkpointing_steps": "4"}
        main(to_argv(many | more))
        assert without_times(read_log(tmp_path / "out")) == without_times(read_log(tmp_path / "whole"))
        # And fewer steps than the checkpoint was made for.
        main(to_argv(many | more | {"--max_train_steps": "5"}))
        assert len(read_log(tmp_path / "out")) == 5

    def test_the_split_into_micro_batches_changes_nothing(self, many, tmp_path):
        main(to_argv(many))
        split = {"--train_batch_size": "1", "--gradient_accumulation_steps": "4"}
        main(to_argv(many | split | {"--output_dir": str(tmp_path / "split")}))
        assert_same_gradients(read_log(tmp_path / "out"), read_log(tmp_path / "split"))
        assert self.counts(tmp_path / "out") == self.counts(tmp_path / "split")

    def test_what_is_not_drawn_may_be_changed_and_unreadable(self, many, opened, tmp_path, capfd):
        main(to_argv(many | {"--checkpointing_steps": "2"}))
        drawn = opened[-1]
        pictures = pictures_of(5_000)
        pictures[::10] = [png(garment_image())] * 500
        unused = next(row for row in range(5_000) if row not in opened)
        pictures[unused] = b"not a picture"
        more = many | {"--max_train_steps": "3", "--resume_from_checkpoint": "latest", "--max_skipped_steps": "1"}
        write_parquet(tmp_path / "many", pictures)
        main(to_argv(more))
        AcceleratorState._reset_state(reset_partial_state=True)
        pictures[drawn] = pictures_of(5_001)[-1]
        write_parquet(tmp_path / "many", pictures)
        assert_refused(main, more, "the images to keep are others (5000 then, 5000 now)", tmp_path, capfd)
        AcceleratorState._reset_state(reset_partial_state=True)
        pictures[drawn] = b"not a picture"
        write_parquet(tmp_path / "many", pictures)
        assert_refused(main, more, f"--dataset_name: cannot read image {drawn} (", tmp_path, capfd)
