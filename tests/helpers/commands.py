"""The scripts and the commands of `siss`, called in process as a user would call them."""

from pathlib import Path

import pytest

from siss_diffusers.commands.cli import main as siss
from siss_diffusers.process import run


def to_argv(flags: dict[str, str | None]) -> list[str]:
    """None: a switch."""
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
