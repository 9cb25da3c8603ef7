"""What ends a run early: one exception for each exit code, and one sentence on stderr."""

import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn


class UsageError(ValueError):
    """What the user gave cannot be used; the message names the flag and the fix, in one sentence."""


class RunError(RuntimeError):
    """What went wrong in the middle, and what to do: a disk that is full, an upload that failed."""


class Interrupted(BaseException):
    """A signal came, and the run has stopped cleanly. No Exception, or whoever catches all of them would go on.

    Args:
        signal_number: SIGINT or SIGTERM.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number


def one_line(message: str) -> str:
    """Whatever is in a name that a message quotes: no second line, nothing that a terminal obeys."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(message.split()))


# An exception out of a signal's handler is lost where some object is just being finalized, or where a library catches all
# of them: after so many seconds the signal is sent once more.
SEND_AGAIN_SECONDS = 1.0


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
        main()
    except (UsageError, RunError) as error:
        if os.environ.get("RANK", "0") == "0":  # every process finds the same fault; one says so
            print(f"{program}: error: {one_line(str(error))}", file=sys.stderr)
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
