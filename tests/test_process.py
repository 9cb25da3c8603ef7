"""Launches that are not what they seem, and who says what went wrong."""

import pytest

from siss_diffusers import process
from siss_diffusers.distributed import SIZES, check_launch
from siss_diffusers.errors import Interrupted, UsageError


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in (*SIZES, "RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", SIZES)
def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch, name):
    check_launch(1)
    monkeypatch.setenv(name, "2")
    check_launch(2)
    for value in ("2", " 2", "2\n"):
        monkeypatch.setenv(name, value)
        with pytest.raises(UsageError, match=rf"started 2 processes \({name}\), but num_processes is 1: .*--cpu"):
            check_launch(1)


def test_the_scripts_and_the_commands_ask(monkeypatch, base_args, tmp_path, capfd):
    import train_siss_unconditional
    from tests.helpers.commands import assert_refused, siss_error

    monkeypatch.setenv("WORLD_SIZE", "2")
    assert_refused(train_siss_unconditional.main, base_args, "num_processes is 1", tmp_path, capfd)
    assert not (tmp_path / "out").exists()
    assert "num_processes is 1" in siss_error(capfd, "audit", "--pretrained_model_name_or_path", "x", "--prompts", "a")


def test_every_process_can_speak(monkeypatch, capfd):
    waited = []
    monkeypatch.setattr(process.time, "sleep", waited.append)
    process.report("siss", UsageError("of the first"))
    monkeypatch.setenv("RANK", "1")
    process.report("siss", UsageError("of its own"))
    assert capfd.readouterr().err.splitlines() == ["siss: error: of the first", "siss: error (process 1): of its own"]
    assert waited == [process.SECONDS_FOR_THE_FIRST]


def test_one_that_is_ended_meanwhile_is_silent(monkeypatch, capfd):
    def end(_):
        raise Interrupted(15)

    monkeypatch.setattr(process.time, "sleep", end)
    monkeypatch.setenv("RANK", "1")
    process.report("siss", UsageError("that all have"))
    assert capfd.readouterr().err == ""
