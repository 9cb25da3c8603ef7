"""Work that is shared out over the processes of a launch."""

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from tqdm.auto import tqdm

from siss_diffusers.errors import UsageError


T = TypeVar("T")
# A long time: the other processes wait while one of them samples, or reads a big data set. NCCL's own is 10 minutes.
PATIENCE = timedelta(hours=2)
# Where launchers say how many processes they started: torchrun and accelerate, those of MPI, and srun.
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


def check_launch(num_processes: int) -> None:
    """Check that the processes of a launch know of each other.

    Without a GPU accelerate does not join the processes of torchrun or `--multi_gpu` unless it is told to use CPUs: each
    would do all of the work by itself, as the first one, in the same folder.

    Args:
        num_processes: those that accelerate knows of.

    Raises:
        UsageError: where the launcher started more.
    """
    # White space around a number is none of it, to Python and so to accelerate.
    given = {name: os.environ.get(name, "").strip() for name in SIZES}
    started = {name: int(value) for name, value in given.items() if value.isdecimal()}
    name = max(started, key=started.__getitem__, default=None)
    if name is not None and started[name] > num_processes:
        raise UsageError(
            f"the launcher started {started[name]} processes ({name}), but num_processes is {num_processes}: they do not"
            " know of each other, and each would write into the same folder; on CPUs use `accelerate launch --cpu"
            f" --num_processes {started[name]}` or set ACCELERATE_USE_CPU=true, else start one process, or unset {name}"
            " where each is a run of its own in a folder of its own"
        )


def on_all_processes(function: Callable, items: Sequence, progress: str | None = None) -> list:
    """Return `[function(item) for item in items]` on every process, each having done a part of it.

    What an item is must not depend on the number of processes: an item is a batch, then, not a sample.

    Args:
        progress: label of a progress bar; None for none.
    """
    state = PartialState()
    hidden = progress is None or not state.is_main_process or len(items) < 2
    indices = range(state.process_index, len(items), state.num_processes)
    results = [(index, function(items[index])) for index in tqdm(indices, desc=progress, disable=hidden)]
    if state.num_processes > 1:
        results = sorted(gather_object(results), key=lambda pair: pair[0])
    return [result for _, result in results]


def on_main_process(function: Callable[[], T]) -> T:
    """Return on every process what `function` returns on the main one.

    Raises:
        UsageError: on every process, where it does on the main one.
    """
    outcome: list = [None, None]
    if PartialState().is_main_process:
        try:
            outcome[0] = function()
        except UsageError as error:
            outcome[1] = str(error)
    result, problem = broadcast_object_list(outcome)
    if problem is not None:
        raise UsageError(problem)
    return result
