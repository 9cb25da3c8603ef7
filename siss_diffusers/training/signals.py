"""Stop after the current step when a signal asks for it."""

import os
import signal
import time


# A launcher sends on what the terminal has already sent to all processes: no second signal before so many seconds.
SECOND_SIGNAL_SECONDS = 1.0


class StopSignal:
    """From now on the first SIGINT or SIGTERM asks the run to stop after its current step, and a second one ends it at
    once.

    Attributes:
        received: the number of the signal; None so far.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.previous = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}

    @property
    def number(self) -> int:
        """The signal to report; SIGTERM on a process that learned of it from another one."""
        return self.received or signal.SIGTERM

    def close(self) -> None:
        """Give signals the meaning back that they had before."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: object) -> None:
        if self.received is None:
            self.received, self.received_at = number, time.monotonic()
            note = f"\n{signal.Signals(number).name}: stopping after this step; once more to stop at once\n"
            os.write(2, note.encode())  # print is not safe within a handler
        elif time.monotonic() - self.received_at > SECOND_SIGNAL_SECONDS:
            os._exit(128 + number)
