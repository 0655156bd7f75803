"""SIGTERM and Ctrl-C as a wish that the loop grants at the end of a step."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupt:
    """Whether somebody wants the run to stop."""

    def __init__(self) -> None:
        self.name: str | None = None
        """The signal that came, None so far."""

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        again = self.name is not None
        self.name = signal.Signals(number).name
        print(f"\n{self.name}: " + ("saving already, please wait" if again else "saving after this step"), flush=True)


@contextmanager
def catch_interrupts() -> Iterator[Interrupt]:
    """Turns SIGTERM and SIGINT into a flag while the block runs."""
    interrupt = Interrupt()
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
