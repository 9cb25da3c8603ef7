"""Runs that are killed, interrupted, or out of disk: nothing saved is lost, and the resumed run is the same run."""

import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from siss_diffusers.storage.checkpoints import damage, list_checkpoints
from tests.helpers.commands import to_argv
from tests.helpers.forked import Child, Forker, run_group, start_group
from tests.helpers.runs import LORA, UNET, read_log, without_times


STEPS, LIMIT = 8, 2
EVERY_STEP = {
    "--max_train_steps": str(STEPS),
    "--checkpointing_steps": "1",
    "--checkpoints_total_limit": str(LIMIT),
    "--resume_from_checkpoint": "latest",
}
PROGRAMS = {"unconditional": ("train_siss_unconditional", UNET), "lora": ("train_siss_sd", LORA)}


@pytest.fixture(params=["unconditional", pytest.param("lora", marks=pytest.mark.slow)])
def script(request) -> tuple[str, str, dict]:
    """A script, the weights that it saves, and the flags of a run of 8 steps with a checkpoint at each of them."""
    if request.param == "unconditional":
        flags = request.getfixturevalue("base_args") | {"--use_ema": None, "--lr_scheduler": "cosine"}
    else:
        flags = request.getfixturevalue("lora_args") | {"--lora_dropout": "0.1"}
    return *PROGRAMS[request.param], flags | EVERY_STEP


def assert_same_run(out: Path, reference: Path, weights: str) -> None:
    found, expected = load_file(out / weights), load_file(reference / weights)
    assert found.keys() == expected.keys() and all(found[name].equal(expected[name]) for name in expected)
    assert without_times(read_log(out)) == without_times(read_log(reference))
    assert not list(out.glob("tmp-*"))
    assert len(list_checkpoints(out)) == LIMIT


def assert_only_whole_checkpoints(out: Path) -> None:
    assert [damage(path) for path in list_checkpoints(out)] == [None] * len(list_checkpoints(out))


def assert_latest_was_chosen(child: Child, whole: list[Path]) -> None:
    chosen = re.search(r"Resuming from (checkpoint-\d+)", child.output)
    assert (chosen[1] if chosen else None) == (whole[-1].name if whole else None)


def check_kills(forker: Forker, script: tuple[str, str, dict], num_kills: int, folder: Path, seed: int) -> dict:
    """Kill at moments spread over the run, resume, compare; what was met."""
    program, weights, flags = script
    reference = folder / "reference"
    argv = to_argv(flags | {"--output_dir": str(reference)})
    assert forker.run(program, argv).returncode == 0  # fills the cache of the data set
    shutil.rmtree(reference)
    started = time.monotonic()
    assert forker.run(program, argv).returncode == 0
    duration = time.monotonic() - started

    draw = random.Random(seed)
    met = {"kills": 0, "before any checkpoint": 0, "while writing one": 0, "resumed from": []}
    while met["kills"] < num_kills:
        out = folder / "killed"
        argv = to_argv(flags | {"--output_dir": str(out)})
        child = forker.start(program, argv)
        time.sleep(draw.uniform(0.35, 1) * duration)
        child.kill()
        if forker.wait(child) == -signal.SIGKILL:
            met["kills"] += 1
            assert_only_whole_checkpoints(out)
            whole = list_checkpoints(out)
            assert len(whole) <= LIMIT + 1
            met["before any checkpoint"] += not whole
            met["while writing one"] += bool(list(out.glob("tmp-*")))
            met["resumed from"].append(int(whole[-1].name.split("-")[1]) if whole else 0)
            child = forker.run(program, argv)
            assert child.returncode == 0, child.output
            assert_latest_was_chosen(child, whole)
            assert_same_run(out, reference, weights)
        shutil.rmtree(out, ignore_errors=True)
    return met


def test_killed_and_resumed_is_the_same_run(script, forker, tmp_path):
    check_kills(forker, script, num_kills=1, folder=tmp_path, seed=0)


@pytest.mark.slow
def test_killed_many_times(script, forker, tmp_path, capsys):
    met = check_kills(forker, script, num_kills=50, folder=tmp_path, seed=1)
    with capsys.disabled():
        print(f"\n{script[0]}: {met['kills']} kills, {met['before any checkpoint']} before any checkpoint,", end=" ")
        print(f"{met['while writing one']} while writing one; resumed from steps {sorted(met['resumed from'])}")


def check_kills_of_one_of_two(
    forker: Forker, script: tuple[str, str, dict], num_kills: int, folder: Path, seed: int
) -> int:
    program, weights, flags = script
    flags = flags | {"--train_batch_size": "2"}
    reference = folder / "reference"
    argv = to_argv(flags | {"--output_dir": str(reference)})
    run_group(forker, 2, program, argv)
    shutil.rmtree(reference)
    started = time.monotonic()
    run_group(forker, 2, program, argv)
    duration = time.monotonic() - started

    draw, kills = random.Random(seed), 0
    while kills < num_kills:
        out = folder / "killed"
        argv = to_argv(flags | {"--output_dir": str(out)})
        children = start_group(forker, 2, program, argv)
        victim = draw.randrange(2)
        time.sleep(draw.uniform(0.35, 1) * duration)
        children[victim].kill()
        if forker.wait(children[victim]) == -signal.SIGKILL:
            kills += 1
            # As a launcher does: what is left of the run is ended.
            if forker.wait(children[1 - victim], timeout=1) is None:
                children[1 - victim].kill()
                forker.wait(children[1 - victim])
            assert_only_whole_checkpoints(out)
            whole = list_checkpoints(out)
            assert_latest_was_chosen(run_group(forker, 2, program, argv)[0], whole)
            assert_same_run(out, reference, weights)
        else:
            forker.wait(children[1 - victim], timeout=60)
        shutil.rmtree(out, ignore_errors=True)
    return kills


@pytest.mark.slow
@pytest.mark.parametrize("script", ["unconditional"], indirect=True)
def test_one_of_two_processes_killed_and_resumed(script, forker, tmp_path):
    check_kills_of_one_of_two(forker, script, num_kills=1, folder=tmp_path, seed=0)


@pytest.mark.slow
def test_one_of_two_processes_killed_many_times(script, forker, tmp_path):
    check_kills_of_one_of_two(forker, script, num_kills=10, folder=tmp_path, seed=1)


def wait_for(condition, child: Child, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, child.output
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_saves_a_checkpoint_and_exits(number, code, script, forker, tmp_path):
    program, weights, flags = script
    flags |= {"--checkpointing_steps": "500", "--max_train_steps": "40", "--checkpoints_total_limit": str(LIMIT)}
    reference, out = tmp_path / "reference", tmp_path / "out"
    assert forker.run(program, to_argv(flags | {"--output_dir": str(reference)})).returncode == 0
    child = forker.start(program, to_argv(flags | {"--output_dir": str(out)}))
    wait_for(lambda: (out / "train_log.jsonl").exists() and len(read_log(out)) >= 3, child)
    child.kill(number)
    assert forker.wait(child) == code, child.output
    (checkpoint,) = list_checkpoints(out)
    assert f"Stopped at {checkpoint.name}; go on with --resume_from_checkpoint latest" in child.output
    assert "Traceback" not in child.output
    assert not (out / weights).exists() and 3 <= len(read_log(out)) < 40
    assert forker.run(program, to_argv(flags | {"--output_dir": str(out)})).returncode == 0
    found, expected = load_file(out / weights), load_file(reference / weights)
    assert all(found[name].equal(expected[name]) for name in expected)
    assert without_times(read_log(out)) == without_times(read_log(reference))


@pytest.mark.parametrize("script", ["unconditional"], indirect=True)
class TestSignals:
    def test_on_two_processes_one_signal_stops_both(self, script, forker, tmp_path):
        program, _, flags = script
        out = tmp_path / "out"
        flags |= {"--output_dir": str(out), "--max_train_steps": "400", "--train_batch_size": "2"}
        flags |= {"--checkpointing_steps": "500"}
        children = start_group(forker, 2, program, to_argv(flags))
        wait_for(lambda: (out / "train_log.jsonl").exists() and len(read_log(out)) >= 3, children[0])
        children[1].kill(signal.SIGTERM)
        assert [forker.wait(child, timeout=60) for child in children] == [143, 143], children[0].output
        (checkpoint,) = list_checkpoints(out)
        assert damage(checkpoint) is None

    def test_before_the_first_step_there_is_nothing_to_save(self, script, forker, tmp_path):
        program, _, flags = script
        # So long that it cannot be over when the signal comes, however late that is.
        flags |= {"--output_dir": str(tmp_path / "out"), "--max_train_steps": "20000"}
        child = forker.start(program, to_argv(flags))
        time.sleep(0.15)
        child.kill(signal.SIGTERM)
        assert forker.wait(child) == 143
        assert "Traceback" not in child.output

    def test_the_second_stops_at_once(self, script, forker, tmp_path):
        """While the copies are counted, which is not interrupted by the first."""
        program, _, flags = script
        out = tmp_path / "out"
        flags |= {"--output_dir": str(out), "--validation_steps": "1", "--num_validation_images": "2000"}
        child = forker.start(program, to_argv(flags))
        wait_for(lambda: (out / "train_log.jsonl").exists(), child)
        child.kill(signal.SIGINT)
        time.sleep(1.2)
        assert forker.wait(child, timeout=0) is None, "it must still be sampling"
        child.kill(signal.SIGINT)
        assert forker.wait(child, timeout=5) == 130
        assert not list_checkpoints(out)

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
    def test_with_workers_that_get_the_signal_too(self, number, code, script, forker, tmp_path):
        """Ctrl-C in a terminal, and many a scheduler's signal, goes to every process of the group."""
        program, _, flags = script
        out = tmp_path / "out"
        flags |= {"--output_dir": str(out), "--dataloader_num_workers": "2", "--max_train_steps": "400"}
        flags |= {"--checkpointing_steps": "500"}
        child = forker.start(program, to_argv(flags))
        wait_for(lambda: (out / "train_log.jsonl").exists() and len(read_log(out)) >= 3, child)
        child.kill_group(number)
        assert forker.wait(child, timeout=20) == code, child.output
        assert "Traceback" not in child.output and len(list_checkpoints(out)) == 1


class TestFullDisk:
    """RLIMIT_FSIZE: a write beyond it fails as it does on a full disk."""

    def fill(self, forker: Forker, script: tuple[str, str, dict], out: Path, checkpointing_steps: int) -> str:
        """Run with a disk that takes half of the weights; the one sentence that the run ends with."""
        program, weights, flags = script
        assert forker.run(program, to_argv(flags | {"--output_dir": str(out.with_name("whole"))})).returncode == 0
        limit = (out.with_name("whole") / weights).stat().st_size // 2
        flags = flags | {"--output_dir": str(out), "--checkpointing_steps": str(checkpointing_steps)}
        child = forker.run(program, to_argv(flags), file_size_limit=limit)
        assert child.returncode == 1 and "Traceback" not in child.output, child.output
        (sentence,) = [line for line in child.output.splitlines() if "error: " in line]
        assert not list(out.glob("tmp-*"))
        return sentence

    def test_in_a_checkpoint_leaves_the_earlier_ones(self, script, forker, tmp_path):
        program, weights, flags = script
        flags = {flag: value for flag, value in flags.items() if flag != "--lr_scheduler"}
        out = tmp_path / "out"
        half = flags | {"--output_dir": str(out), "--max_train_steps": "4"}
        assert forker.run(program, to_argv(half)).returncode == 0
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.suffix != ".jsonl"}
        sentence = self.fill(forker, (program, weights, flags), out, checkpointing_steps=1)
        assert "checkpoint-5 could not be written" in sentence and "checkpoint-4 is whole" in sentence
        assert all(path.read_bytes() == content for path, content in before.items())
        assert forker.run(program, to_argv(flags | {"--output_dir": str(out)})).returncode == 0
        assert_same_run(out, tmp_path / "whole", weights)

    def test_in_the_result(self, script, forker, tmp_path):
        out = tmp_path / "out"
        assert "result could not be written" in self.fill(forker, script, out, checkpointing_steps=500)
        assert [path.name for path in out.iterdir()] == ["train_log.jsonl"]
