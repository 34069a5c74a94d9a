"""Ctrl-C as a wish to stop after the current step, not in the middle of it."""

import os
import signal
import threading
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_NOTICE = b"\nstopping: the current step is finished and a checkpoint saved; once more stops at once, without it\n"


class TrainingInterrupted(KeyboardInterrupt):
    """Training was stopped by Ctrl-C or SIGTERM after a checkpoint had been saved.

    Attributes:
        checkpoint: folder of the checkpoint, for `resume_from_checkpoint`.
        step: optimizer steps done.
    """

    def __init__(self, checkpoint: str, step: int):
        self.checkpoint = checkpoint
        self.step = step
        super().__init__(
            f"training was interrupted after step {step}; go on with "
            f"trainer.train(resume_from_checkpoint={checkpoint!r})"
        )


class InterruptRequest:
    """While entered, the first SIGINT or SIGTERM sets `requested`; the next one acts as usual.

    Signals reach the main thread only: entered in another thread this does nothing. A signal that the process
    ignores (as under nohup) stays ignored.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "InterruptRequest":
        self.requested = False
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                previous = signal.getsignal(number)
                # None: a handler that was not installed from Python and could not be put back.
                if previous not in (signal.SIG_IGN, None):
                    self._previous[number] = previous
                    signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()
        os.write(2, _NOTICE)  # not print: a handler may run in the middle of another print

    def _restore(self) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._previous = {}
