"""Which batches, prompts and lengths are timed: published protocols by name, and grids of one's own."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from slm_pl.errors import UsageError

ProtocolName = Literal["shortened_llama", "sleb", "llm_pruner", "serving"]
Sampling = Literal["sampled", "greedy"]

PISA = "The Leaning Tower of Pisa is known for"
"""Shortened LLaMA's prompt: 12 tokens of a Llama."""


@dataclass(frozen=True)
class Point:
    """One point of a grid.

    Args:
        batch_size: Prompts at once.
        prompt_tokens: Tokens of each; None for as many as the protocol's own text has.
        new_tokens: Tokens to generate for each; 0 for one forward pass over the prompts, without a cache.
        repeats: Counted runs.
        own_text: Whether the prompts are the texts that were given, and not prose of a length.
    """

    batch_size: int
    prompt_tokens: int | None
    new_tokens: int
    repeats: int
    own_text: bool = False

    def __str__(self) -> str:
        tokens = "" if self.prompt_tokens is None else f"{self.prompt_tokens:,}"
        return f"batch {self.batch_size}, {f'{tokens} + ' if tokens else ''}{self.new_tokens} tokens"


@dataclass(frozen=True)
class Protocol:
    """A published way to time generation.

    Args:
        name: As it stands in results.
        points: Its grid.
        warmup: Runs before counting.
        sampling: How the next token is chosen.
        prompt: Its own text; None for prose of the length asked for.
    """

    name: ProtocolName
    points: tuple[Point, ...]
    warmup: int
    sampling: Sampling
    prompt: str | None = None


PROTOCOLS: dict[ProtocolName, Protocol] = {
    # gen_batch_eval_time.py: 30 runs, 10 of them warm-up; top-k 50, top-p 0.95, temperature 1.
    "shortened_llama": Protocol(
        "shortened_llama",
        tuple(Point(batch, None, new, 20) for new in (128, 512) for batch in (1, 8, 16, 32, 64, 128, 256)),
        warmup=10,
        sampling="sampled",
        prompt=PISA,
    ),
    # utils/latency_utils.py: 50 passes over a prompt, 10 generations; one run before each.
    "sleb": Protocol("sleb", (Point(1, 2048, 0, 50), Point(64, 64, 128, 10)), warmup=1, sampling="greedy"),
    # test_speedup.py: it counts the operations of one pass over 64 tokens; here that pass is timed, too.
    "llm_pruner": Protocol("llm_pruner", (Point(1, 64, 0, 20),), warmup=3, sampling="greedy"),
    # Nobody's publication: what a server's operator asks, from one user to a full batch.
    "serving": Protocol(
        "serving",
        tuple(Point(batch, 512, 128, 10) for batch in (1, 2, 4, 8, 16, 32, 64, 128)),
        warmup=2,
        sampling="greedy",
    ),
}
_SINGLE = (Point(1, None, 128, 20),)


def grid(
    protocol: ProtocolName | None = None,
    batch_size: Sequence[int] | None = None,
    prompt_tokens: Sequence[int] | None = None,
    new_tokens: Sequence[int] | None = None,
    repeats: int | None = None,
    own_prompt: bool = False,
) -> tuple[Protocol, list[Point]]:
    """The points to measure: a protocol's, with the dimensions that are given in place of its own.

    Args:
        protocol: Null for the figure that is quoted most: Shortened LLaMA's rules, batch 1, its prompt, 128 new tokens.
        batch_size: In place of the protocol's batch sizes.
        prompt_tokens: In place of its prompt lengths.
        new_tokens: In place of its numbers of new tokens.
        repeats: In place of its counted runs.
        own_prompt: Whether the user brings prompts, whose length counts then.

    Returns:
        The protocol and the points, each once.

    Raises:
        UsageError: If a number is out of range.
    """
    for name, values, least in (
        ("batch_size", batch_size, 1),
        ("prompt_tokens", prompt_tokens, 1),
        ("new_tokens", new_tokens, 0),
        ("repeats", None if repeats is None else [repeats], 2),
    ):
        if values is not None and not values:
            raise UsageError(f"Efficiency got an empty list for {name}. Give one or more numbers, or leave it out.")
        for value in values or ():
            if value < least:
                raise UsageError(f"Efficiency got {name} {value}; allowed is {least} or more.")
    rules = PROTOCOLS[protocol or "shortened_llama"]
    points: dict[tuple[int, int | None, int], Point] = {}
    for point in _SINGLE if protocol is None else rules.points:
        own_length = None if own_prompt else point.prompt_tokens
        for new in new_tokens or (point.new_tokens,):
            for length in prompt_tokens or (own_length,):
                for batch in batch_size or (point.batch_size,):
                    found = Point(batch, length, new, repeats or point.repeats)
                    points.setdefault((batch, length, new), found)
    return rules, list(points.values())


def with_lengths(points: Sequence[Point], text_tokens: Callable[[int], int]) -> list[Point]:
    """The points with the length of the texts where they name none.

    Args:
        points: Of a grid.
        text_tokens: Gives the length of the texts for a batch size; only a tokenizer knows it.
    """
    return [
        dataclasses.replace(point, prompt_tokens=text_tokens(point.batch_size), own_text=True)
        if point.prompt_tokens is None
        else point
        for point in points
    ]
