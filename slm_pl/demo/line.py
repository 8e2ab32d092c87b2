"""A queue of people: first come, first served."""

import threading
from collections import deque
from collections.abc import Iterator

from slm_pl.errors import UsageError

MOST_WAITING = 16


class Line:
    """A queue for one thing, such as a model.

    Args:
        name: What one waits for, in messages.
        most: How many may wait beside the one whose turn it is.
    """

    def __init__(self, name: str, most: int = MOST_WAITING) -> None:
        self._name = name
        self._most = most
        self._places: deque[object] = deque()
        self._changed = threading.Condition()

    def join(self) -> object:
        """Takes the last place.

        Returns:
            The place, to be given to :meth:`wait` and :meth:`leave`.

        Raises:
            UsageError: If too many wait already.
        """
        with self._changed:
            if len(self._places) > self._most:
                raise UsageError(
                    f"{self._name} is busy: {self._most} requests wait for it already. Try again when some are done."
                )
            place = object()
            self._places.append(place)
            return place

    def wait(self, place: object, stop: threading.Event, every: float = 0.1) -> Iterator[int]:
        """Waits for a turn.

        Args:
            place: From :meth:`join`.
            stop: Ends the waiting.
            every: Seconds after which the stop is looked at.

        Yields:
            How many are ahead, whenever that changed; nothing if nobody is.
        """
        told = None
        while not stop.is_set():
            with self._changed:
                ahead = self._places.index(place)
                if ahead and ahead == told:
                    self._changed.wait(every)
                    continue
            if not ahead:
                return
            told = ahead
            yield ahead

    def leave(self, place: object) -> None:
        """Gives a place up, whether its turn came or not."""
        with self._changed:
            self._places.remove(place)
            self._changed.notify_all()
