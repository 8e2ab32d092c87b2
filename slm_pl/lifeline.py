"""A process that ends with the one that started it, however that one ended: a SIGKILL cannot be passed on.

The first holds one end of a pipe, which the system closes with it; the other waits at the other end.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass

_NAME = "SLM_PL_LIFELINE"


@dataclass(frozen=True)
class Lifeline:
    """What the process that is started needs.

    Args:
        descriptor: To be inherited by it.
        environment: To be added to its environment.
    """

    descriptor: int
    environment: dict[str, str]


@contextlib.contextmanager
def lifeline() -> Iterator[Lifeline]:
    """Ties processes that are started within to this one."""
    waiting, held = os.pipe()
    try:
        yield Lifeline(waiting, {_NAME: str(waiting)})
    finally:
        os.close(waiting)
        os.close(held)


def hold_on() -> None:
    """Ends this process, and all of its group, when the one ends that it is tied to; does nothing if there is none."""
    text = os.environ.pop(_NAME, None)  # ranks that are started from here end with this process's group
    if text is None:
        return
    descriptor = int(text)

    def wait() -> None:
        with contextlib.suppress(OSError):
            os.read(descriptor, 1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait, name="lifeline", daemon=True).start()
