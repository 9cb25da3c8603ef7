"""Run the scripts again and again as real processes that can be killed, without paying for the imports each time.

`python forked.py` imports the scripts, runs nothing, and forks a child for each line of JSON on its standard input.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path


@dataclass
class Child:
    """A forked process.

    Attributes:
        returncode: as `subprocess` has it: negative for the signal that killed it.
        output: its standard output and error together.
    """

    pid: int
    log: Path
    returncode: int | None = None

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def kill_group(self, number: int) -> None:
        """It and what it started, as a terminal does on Ctrl-C."""
        os.killpg(self.pid, number)

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")


class Forker:
    """
    Args:
        environment: of the parent, read by what is imported, such as HF_ENDPOINT.
    """

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder = folder
        self.count = 0
        self.parent = subprocess.Popen(
            [sys.executable, __file__],
            env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"} | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "Forker":
        return self

    def __exit__(self, *_: object) -> None:
        self.parent.kill()
        self.parent.wait()

    def _ask(self, **request: object) -> dict:
        self.parent.stdin.write(json.dumps(request) + "\n")
        self.parent.stdin.flush()
        answer = self.parent.stdout.readline()
        assert answer, "the parent of the forks has died"
        return json.loads(answer)

    def start(self, program: str, argv: list[str], file_size_limit: int | None = None, **environment: str) -> Child:
        """
        Args:
            program: `train_siss_sd`, `train_siss_unconditional`, `siss`, or `python` with the path of a script and its
                arguments.
            file_size_limit: of RLIMIT_FSIZE in bytes: a disk that is full for every file longer than that.
        """
        self.count += 1
        log = self.folder / f"{self.count}.log"
        request = {"program": program, "argv": argv, "log": str(log), "limit": file_size_limit, "env": environment}
        return Child(self._ask(**request)["pid"], log)

    def wait(self, child: Child, timeout: float | None = None) -> int | None:
        """Its return code; None where it is still running after `timeout` seconds."""
        child.returncode = self._ask(wait=child.pid, timeout=timeout)["returncode"]
        return child.returncode

    def run(self, program: str, argv: list[str], **options: object) -> Child:
        child = self.start(program, argv, **options)
        self.wait(child)
        return child


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_group(forker: Forker, num_processes: int, program: str, argv: list[str], **environment: str) -> list[Child]:
    """Processes that find each other, as those of a launcher do, on the CPU."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "ACCELERATE_USE_CPU": "true"}
    shared |= {"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes)} | environment
    ranks = range(num_processes)
    return [forker.start(program, argv, **shared, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in ranks]


def run_group(forker: Forker, num_processes: int, program: str, argv: list[str], **environment: str) -> list[Child]:
    """
    Raises:
        AssertionError: with what it printed, where one of them fails.
    """
    children = start_group(forker, num_processes, program, argv, **environment)
    for child in children:
        assert forker.wait(child, timeout=120) == 0, child.output
    return children


def serve() -> None:
    """The parent: answers each request by a line."""
    import resource
    import runpy
    import time

    import train_siss_sd
    import train_siss_unconditional
    from siss_diffusers.commands import cli
    from siss_diffusers.process import run

    def run_script(argv: list[str]) -> None:
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")

    mains = {
        "python": run_script,
        "siss": cli.main,
        "train_siss_sd": train_siss_sd.main,
        "train_siss_unconditional": train_siss_unconditional.main,
    }
    ended: dict[int, int] = {}

    def wait(pid: int, timeout: float | None) -> int | None:
        deadline = time.monotonic() + (600 if timeout is None else timeout)
        while pid not in ended and time.monotonic() < deadline:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                ended[pid] = os.waitstatus_to_exitcode(status)
            else:
                time.sleep(0.005)
        return ended.get(pid)

    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answers.write(json.dumps({"returncode": wait(request["wait"], request["timeout"])}) + "\n")
            answers.flush()
            continue
        pid = os.fork()
        if pid == 0:
            os.setsid()
            log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for descriptor in (1, 2):
                os.dup2(log, descriptor)
            os.environ.update(request["env"])
            sys.argv = [request["program"] + ".py"]
            if request["limit"] is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"], request["limit"]))
            try:
                run(partial(mains[request["program"]], request["argv"]), request["program"])
            except SystemExit as exit:
                code = exit.code
            except BaseException:
                import traceback

                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        answers.write(json.dumps({"pid": pid}) + "\n")
        answers.flush()


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    serve()
