"""The benchmark runs and says what it promises; nothing here depends on how fast the machine is."""

import importlib.util
import json
import sys
from io import BytesIO

import datasets
import numpy as np
import pytest
from PIL import Image

from tests.helpers.paths import ROOT
from tests.helpers.scripts import imported_script


SCRIPT = ROOT / "benchmarks" / "scaling.py"


@pytest.fixture(scope="module")
def scaling():
    with imported_script(SCRIPT) as module:
        yield module


def test_pictures_are_read_back_and_no_two_are_alike(scaling):
    decoded = [np.asarray(Image.open(BytesIO(picture))) for picture in scaling.pictures(0, 3_000)]
    digits = scaling.digit_images()[0]
    assert all(
        (image.reshape(-1)[4:] == digits[i % len(digits)].reshape(-1)[4:]).all() for i, image in enumerate(decoded)
    )
    assert len({image.tobytes() for image in decoded}) == 3_000


def test_the_data_set_is_one_of_images(scaling, tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "PARQUET_ROWS", 10)
    scaling.write_data_set(tmp_path / "data", 25)
    rows = datasets.load_dataset(str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"), split="train")
    assert len(rows) == 25 and isinstance(rows.features["image"], datasets.Image)
    assert rows[24]["image"].size == (8, 8)


@pytest.mark.slow
def test_one_axis(scaling, tmp_path, capsys):
    """A first run and a second, each a real process."""
    report, plot = tmp_path / "report.json", tmp_path / "plot.png"
    flags = f"--axis images --images 30 --steps 2 --repeats 1 --json {report} --plot {plot}"
    if importlib.util.find_spec("matplotlib") is None:
        flags = flags.partition(" --plot")[0]
    scaling.main(flags.split())
    (row,) = json.loads(report.read_text())["results"]["images"]
    assert row["images"] == 30 and row["above_smallest_seconds"] == 0
    assert row["first_start_seconds"] > 0 and row["start_seconds"] > 0
    assert row["pairs_per_second"] == pytest.approx(4 * row["steps_per_second"])
    if sys.platform == "linux":
        assert row["peak_anonymous_bytes"] > 50e6  # the libraries alone take more
        assert row["start_processor_seconds"] > 0 and row["first_start_processor_seconds"] > 0
    assert "conversion" in capsys.readouterr().out
    assert not plot.exists() or Image.open(plot).width > 300


@pytest.mark.parametrize("flags", ["--axis colours", "--images 0", "--repeats 0", "--steps 0"])
def test_bad_usage(scaling, flags, capsys):
    with pytest.raises(SystemExit) as exit_info:
        scaling.main(flags.split())
    assert exit_info.value.code == 2 and "error:" in capsys.readouterr().err
