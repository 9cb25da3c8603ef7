"""What ends a run early: one exception for each exit code, and one sentence for people."""

import signal


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
    """Return a message in one line, `?` for each letter that a terminal does not print: it may quote any name."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(message.split()))


def describe_error(error: BaseException) -> str:
    """Return what an error says, in one line, with its kind where that is needed to understand it."""
    line = next(iter(str(error).strip().splitlines()), "")
    return line if line and isinstance(error, OSError | ValueError) else f"{type(error).__name__} {line}".strip()
