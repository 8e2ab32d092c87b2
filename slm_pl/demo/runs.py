"""What people ask of the models: one run each."""

import contextlib
import itertools
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

from slm_pl.demo.line import MOST_WAITING, Line
from slm_pl.errors import UsageError

MOST_MODELS = 4
"""Beside each other."""
MOST_AT_ONCE = MOST_MODELS * (MOST_WAITING + 1)
"""What all models' lines hold: requests that are served or wait."""
MOST_REMEMBERED = 200
"""People whose last run is kept after its end."""
MOST_CHARACTERS = 200_000
"""Of a prompt: more is refused before it costs a tokenizer's time and memory."""
MOST_NEW_TOKENS = 1024


@dataclass(frozen=True)
class Settings:
    """How to complete.

    Args:
        new_tokens: Longest completion; an end-of-sequence token ends it earlier.
        temperature: 0 takes the most likely token each time.
        seed: Of the draws, where the temperature is above 0; the same one gives the same text.
        in_turn: One model at a time, among all requests that ask for it, so that they do not take each other's
            processors.
    """

    new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0
    in_turn: bool = False


@dataclass
class Run:
    """One prompt for all models.

    Args:
        prompt: What to continue.
        settings: How.
        turns: Where those wait who work in turn.
        stop: Set once nobody wants it any more.
        superseded: Whether that is because the person asked for something else, so that nothing is to be shown.
        number: Tells it from other runs; 0 is none.
        claimed: The columns that do it, or did.
        working: How many of them still do.
    """

    prompt: str
    settings: Settings
    turns: Line
    stop: threading.Event = field(default_factory=threading.Event)
    superseded: bool = False
    number: int = field(default_factory=itertools.count(1).__next__)
    claimed: set[int] = field(default_factory=set)
    working: int = 0


class Runs:
    """The newest run of each person."""

    def __init__(self) -> None:
        self._runs: dict[str, Run] = {}
        self._lock = threading.Lock()
        # Of all people: two who each take their models in turn would still take each other's processors.
        self._turns = Line("The line of those who run one model at a time", MOST_AT_ONCE - 1)

    def begin(self, person: str, prompt: str, settings: Settings) -> Run:
        """Begins a run; one that the person began before is stopped.

        Args:
            person: Who, such as the session of a browser's page.
            prompt: What to continue.
            settings: How.

        Raises:
            UsageError: If there is nothing to continue, too much, or a setting that is out of bounds; what ran before
                goes on.
        """
        if not prompt.strip():
            raise UsageError("The prompt is empty. Type some text for the models to continue.")
        if len(prompt) > MOST_CHARACTERS:
            raise UsageError(f"The prompt has {len(prompt):,} characters; at most {MOST_CHARACTERS:,} are read.")
        if not 1 <= settings.new_tokens <= MOST_NEW_TOKENS:
            raise UsageError(f"New tokens are {settings.new_tokens}; give a number from 1 to {MOST_NEW_TOKENS:,}.")
        if not 0 <= settings.temperature <= 5:
            raise UsageError(f"The temperature is {settings.temperature}; give one from 0 (greedy) to 5.")
        if not 0 <= settings.seed < 2**63:
            raise UsageError(f"The seed is {settings.seed}; give a whole number from 0.")
        run = Run(prompt, settings, self._turns)
        with self._lock:
            before = self._runs.pop(person, None)
            if before is not None:
                before.superseded = True
                before.stop.set()
            self._runs[person] = run
            # A prompt may be long, and a browser that dies does not say that it leaves.
            idle = [one for one, run in self._runs.items() if not run.working]
            for one in idle[: max(0, len(self._runs) - MOST_REMEMBERED)]:
                del self._runs[one]
        return run

    @contextlib.contextmanager
    def claim(self, person: str, number: int, column: int) -> Iterator[Run | None]:
        """Gives a run to the column that asks first: a double click has two begin what only the second asked for.

        Args:
            person: Who.
            number: Of the run.
            column: Which one asks.

        Yields:
            The run; None if the person's newest is another one, or the column has it already.
        """
        with self._lock:
            run = self._runs.get(person)
            if run is None or run.number != number or column in run.claimed:
                run = None
            else:
                run.claimed.add(column)
                run.working += 1
        try:
            yield run
        finally:
            if run is not None:
                with self._lock:
                    run.working -= 1

    def current(self, person: str) -> Run | None:
        """The person's newest run."""
        with self._lock:
            return self._runs.get(person)

    def stop(self, person: str) -> None:
        """Stops what a person's newest run does, and takes it out of all lines."""
        run = self.current(person)
        if run is not None:
            run.stop.set()

    def leave(self, person: str) -> None:
        """Stops and forgets a person's run."""
        with self._lock:
            run = self._runs.pop(person, None)
        if run is not None:
            run.superseded = True
            run.stop.set()
