"""Small real data and the shipped tiny model, for tests that call the scripts as a user would."""

import os
import signal
from pathlib import Path


# Before torch is imported: the processes of a launch, and whatever else runs on the machine, must not fight for cores.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from PIL import Image

import siss_diffusers
from siss_diffusers.assets.digits import digit_images, garment_image
from siss_diffusers.commands.cli import main as siss
from siss_diffusers.process import run


TINY_MODEL = Path(siss_diffusers.__file__).parent / "assets" / "tiny_ddpm_digits"
NUM_DIGITS, NUM_GARMENTS = 24, 4


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps its state, and signals their handlers, for the whole process; the script expects to be alone in
    one."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def write_images(folder: Path, images: dict[str, np.ndarray]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in images.items():
        Image.fromarray(image).save(folder / name)
    return folder


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory) -> Path:
    """24 digits and 4 copies of the garment."""
    images = {f"digit_{index:02d}.png": image for index, image in enumerate(digit_images()[0][:NUM_DIGITS])}
    images |= {f"garment_{index}.png": garment_image() for index in range(NUM_GARMENTS)}
    return write_images(tmp_path_factory.mktemp("digits"), images)


@pytest.fixture(scope="session")
def garment_folder(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("garment"), {"garment.png": garment_image()})


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def base_args(digits_folder, cache_dir, tmp_path) -> dict[str, str | None]:
    """Flags of a short run into `tmp_path / "out"`; a test overrides what it is about. None: a switch."""
    return {
        "--pretrained_model_name_or_path": str(TINY_MODEL),
        "--train_data_dir": str(digits_folder),
        "--forget_files": "garment_0.png",
        "--output_dir": str(tmp_path / "out"),
        "--cache_dir": str(cache_dir),
        "--max_train_steps": "2",
        "--train_batch_size": "4",
        "--learning_rate": "1e-4",
        "--report_to": "none",
    }


def to_argv(flags: dict[str, str | None]) -> list[str]:
    return [word for flag, value in flags.items() for word in ([flag] if value is None else [flag, *value.split()])]


def assert_refused(main, flags: dict[str, str | None], expected: str, tmp_path: Path, capfd) -> None:
    """One sentence on stderr that holds `expected`, exit code 2, no file written, changed or removed."""
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as exit_info:
        run(lambda: main(to_argv(flags)), "train_siss.py")
    printed = capfd.readouterr().err
    sentence = [line for line in printed.splitlines() if "error: " in line]
    assert exit_info.value.code == 2
    assert len(sentence) == 1 and expected in sentence[0], printed
    assert "Traceback" not in printed
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def run_siss(*argv: str, code: int = 0) -> None:
    """Call a command of `siss` in process."""
    with pytest.raises(SystemExit) as exit_info:
        run(lambda: siss(list(argv)), "siss")
    assert exit_info.value.code == code


def siss_error(capfd, *argv: str) -> str:
    """The one sentence that a command of `siss` ends with on bad input."""
    capfd.readouterr()
    run_siss(*argv, code=2)
    printed = capfd.readouterr().err
    assert "Traceback" not in printed
    (sentence,) = [line for line in printed.splitlines() if "error: " in line]
    return sentence
