"""Bad input: one exception, one sentence, exit code 2."""

import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn


class UsageError(ValueError):
    """What the user gave cannot be used; the message names the flag and the fix, in one sentence."""


def run(main: Callable[[], None], program: str) -> NoReturn:
    """Call `main` and exit: 0 done, 2 bad usage or bad input (one sentence on stderr), 130 interrupted, 1 else."""
    try:
        main()
    except UsageError as error:
        if os.environ.get("RANK", "0") == "0":  # every process finds the same fault; one says so
            print(f"{program}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    sys.exit(0)
