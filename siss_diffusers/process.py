"""How a program of this project ends: exit codes, and signals."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from siss_diffusers.errors import Interrupted, RunError, UsageError, one_line
from siss_diffusers.quiet import quiet_imports


# An exception out of a signal's handler is lost where some object is just being finalized, or where a library catches all
# of them: after so many seconds the signal is sent once more.
SEND_AGAIN_SECONDS = 1.0

# Where all processes find the same fault, the first one says it, and its launcher ends the others in this time.
SECONDS_FOR_THE_FIRST = 5.0


def _terminate(number: int, _: object) -> NoReturn:
    signal.setitimer(signal.ITIMER_REAL, SEND_AGAIN_SECONDS)
    raise Interrupted(number)


def _send_again(*_: object) -> None:
    # To whoever handles it by now: in training it is asked to stop after the step.
    os.kill(os.getpid(), signal.SIGTERM)


def run(main: Callable[[], None], program: str) -> NoReturn:
    """Call `main` and exit: 0 done; 2 bad usage or bad input; 130 and 143 after SIGINT and SIGTERM; 1 anything else."""
    handlers = {signal.SIGTERM: _terminate, signal.SIGALRM: _send_again}
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        with quiet_imports():
            main()
    except (UsageError, RunError) as error:
        report(program, error)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except Interrupted as error:
        sys.exit(128 + error.signal_number)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in previous.items():
            signal.signal(number, handler)
    sys.exit(0)


def report(program: str, error: Exception) -> None:
    """Print what went wrong, in one line. All processes of a launch can: one whose fault is its own is heard, too.

    Processes after the first wait before they speak, and are silent where the launcher ends them meanwhile: then the
    fault was that of all of them.
    """
    rank, where = os.environ.get("RANK", "0"), ""
    if rank != "0":
        try:
            time.sleep(SECONDS_FOR_THE_FIRST)
        except (Interrupted, KeyboardInterrupt):
            return
        where = f" (process {rank})"
    print(f"{program}: error{where}: {one_line(str(error))}", file=sys.stderr, flush=True)


def program_name() -> str:
    """Return the name of the file that is run."""
    return Path(sys.argv[0]).name
