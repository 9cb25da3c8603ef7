"""Stop after the current step when a signal asks for it."""

import os
import signal
import time

from accelerate import Accelerator

from siss_diffusers.errors import Interrupted
from siss_diffusers.gradients.engine import StepStats
from siss_diffusers.storage.checkpoints import PREFIX
from siss_diffusers.training.state import saves_checkpoints


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

    def close(self) -> None:
        """Signals mean again what they meant before."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: object) -> None:
        if self.received is None:
            self.received, self.received_at = number, time.monotonic()
            note = f"\n{signal.Signals(number).name}: stopping after this step; once more to stop at once\n"
            os.write(2, note.encode())  # print is not safe within a handler
        elif time.monotonic() - self.received_at > SECOND_SIGNAL_SECONDS:
            os._exit(128 + number)

    def stops(self, stats: StepStats, accelerator: Accelerator) -> bool:
        """Whether to stop now; the same on all processes. Several of them learn of it with the next step's gradients."""
        return stats.stop or (accelerator.num_processes == 1 and self.received is not None)

    def end(self, accelerator: Accelerator, step: int) -> None:
        """
        Raises:
            Interrupted: always, once the main process has saved the checkpoint of this step.
        """
        accelerator.wait_for_everyone()
        if saves_checkpoints(accelerator):
            accelerator.print(f"Stopped at {PREFIX}{step}; go on with --resume_from_checkpoint latest")
        else:
            accelerator.print(
                f"Stopped at step {step}, and nothing is saved: under DeepSpeed there are no checkpoints"
            )
        accelerator.end_training()
        self.close()
        raise Interrupted(self.received or signal.SIGTERM)
