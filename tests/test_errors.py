import os
import signal
import time

import pytest

from siss_diffusers.process import run


class SignalledAtItsEnd:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)


def in_a_finalizer():
    SignalledAtItsEnd()


def where_everything_is_caught():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
    except:  # noqa: E722 (as libraries do)
        pass


@pytest.mark.parametrize("lose_a_signal", [in_a_finalizer, where_everything_is_caught])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_whose_exception_is_lost_is_sent_again(lose_a_signal):
    def main():
        lose_a_signal()
        time.sleep(5)

    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)]
    with pytest.raises(SystemExit) as exit_info:
        run(main, "program")
    assert exit_info.value.code == 143
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)] == handlers
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
