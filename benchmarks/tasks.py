"""The results of a study that takes hours: each is a line of a file as soon as it is there, what is there is not done
again, and any number of processes share the work."""

import fcntl
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch


@contextmanager
def lock(file: Path, wait: bool) -> Iterator[bool]:
    """Whether the lock is ours. The system gives it back when a process ends, however it does."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


@dataclass(frozen=True)
class Task:
    """One line of the results.

    Args:
        key: names it; with the number of samples and the budget it says whether a line is this task's.
        about: what the line says beside what was measured.
        do: returns what was measured.
    """

    key: str
    about: dict
    do: Callable[[], dict]


class Results:
    """The lines of a file, of one base: results of another one are not comparable and count as missing."""

    def __init__(self, file: Path, base: str) -> None:
        self.file, self.base = file, base

    def read(self) -> dict[str, dict]:
        if not self.file.exists():
            return {}
        lines = map(json.loads, self.file.read_text().splitlines())
        return {line["key"]: line for line in lines if line["base"] == self.base}

    def has(self, task: Task, found: dict[str, dict]) -> bool:
        line = found.get(task.key)
        return line is not None and all(line.get(name) == value for name, value in task.about.items())

    def add(self, task: Task, measured: dict) -> None:
        line = {"key": task.key, "base": self.base, **task.about, **measured}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with lock(self.file.with_suffix(".lock"), wait=True), open(self.file, "a") as file:
            file.write(json.dumps(line) + "\n")


def work(tasks: list[Task], results: Results, locks: Path) -> None:
    """Do the tasks that no other process does, until all are done."""
    while True:
        found = results.read()
        missing = [task for task in tasks if not results.has(task, found)]
        if not missing:
            return
        worked = False
        for task in missing:
            with lock(locks / hashlib.sha256(task.key.encode()).hexdigest()[:16], wait=False) as ours:
                if not ours or results.has(task, results.read()):
                    continue
                started = time.perf_counter()
                results.add(task, task.do())
                worked = True
                print(f"{time.perf_counter() - started:6.0f} s  {task.key}", flush=True)
        if not worked:
            time.sleep(2)  # the others have the last ones


def spawn(num_workers: int) -> None:
    """Run this command in several processes, each with its share of the cores and a GPU."""
    gpus = torch.cuda.device_count()
    children = []
    for worker in range(num_workers):
        environment = os.environ | {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // num_workers, 1))}
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = str(worker % gpus)
        command = [sys.executable, *sys.argv, "--worker", str(worker)]
        children.append(subprocess.Popen(command, env=environment))
    try:
        codes = [child.wait() for child in children]
    finally:
        for child in children:
            child.terminate()
    if any(codes):
        sys.exit(next(code for code in codes if code))
