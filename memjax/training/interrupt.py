"""SIGTERM and Ctrl-C as a wish that the loop grants at the end of a step."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from memjax.memory.parallel import TOKENS


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


def shared_wish(interrupt: Interrupt, mesh: Mesh) -> Callable[[], jax.Array]:
    """A function that tells, on the device, whether somebody wants to stop any of the processes.

    All processes call it at the same points of the run and get the same answers. Reading one waits for it.
    """
    reduce = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, P()))
    sharding = NamedSharding(mesh, TOKENS)

    def ask() -> jax.Array:
        here = np.full(mesh.size, interrupt.name is not None)
        return reduce(jax.make_array_from_callback(here.shape, sharding, here.__getitem__))

    return ask
