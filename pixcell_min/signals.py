"""Being told to stop: Ctrl-C and SIGTERM end a run after the step under way, not within it.

Before the first validation and after the last step they end it at once; a process that waits for
another one, when that one goes on.
"""

import signal
import threading
from contextlib import contextmanager


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


@contextmanager
def sigterm_interrupts():
    """Within the block SIGTERM raises `Terminated`, as Ctrl-C does KeyboardInterrupt."""
    def stop(number, frame):
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield  # which alone gets signals
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class StopSignals:
    """Within the block SIGINT and SIGTERM ask for a stop; a second one acts as it always does."""

    def __enter__(self):
        """Take over both signals, in the main thread; `received` is None or the signal's number."""
        self.received, self._before = None, {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note)
                            for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        """Give both signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        self.received = number
        self.__exit__()
