"""The end of a run from outside: Ctrl-C, a scheduler that takes the machine back, a terminal that closes."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again, and it goes on


class Stopped(SystemExit):
    """A run that was stopped from outside, with nothing lost; it ends the program with `EXIT_CODE`.

    Attributes:
        message: which signal came, and how to go on.
    """

    def __init__(self, message: str) -> None:
        super().__init__(EXIT_CODE)
        self.message = message


class StopSignals:
    """The signals that stop a run, while its context lasts. The second of them ends the program at once, as always.

    One that the program was started to ignore, as SIGHUP under `nohup`, stays ignored.
    Between steps the run asks `name`; in `at_once`, where there is nothing to save, a signal raises `Stopped` itself.
    Outside of the main thread, where Python handles no signals, nothing is caught.

    Attributes:
        name: of the signal that came, such as "SIGTERM"; empty until then.
    """

    def __init__(self, how_to_go_on: str) -> None:
        self.name = ""
        self._how_to_go_on = how_to_go_on
        self._at_once = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in _numbers():
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Stop as soon as a signal comes, or now if one came: all that the run needs to go on is on disk."""
        self._at_once = True
        try:
            if self.name:
                raise self.stopped()
            yield
        finally:
            self._at_once = False

    def stopped(self, name: str = "") -> Stopped:
        """Return the exception that ends the run; `name` says which signal came where another process got it."""
        return Stopped(f"stopped by {self.name or name or 'another process'} | {self._how_to_go_on}")

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        self.__exit__()
        if self._at_once:
            raise self.stopped()


def ignore_stop_signals(_: int = 0) -> None:
    """Leave stopping to the process that trains: the `worker_init_fn` of a DataLoader.

    Ctrl-C and many schedulers signal every process. A worker that ended with it would take the step with it that its
    batch was for. SIGTERM is obeyed where it comes from the process that trains, which ends its workers so.
    """
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # which tells who sent a signal; macOS has none
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_the_parent, daemon=True).start()


def _obey_the_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _numbers() -> list[int]:
    return [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
