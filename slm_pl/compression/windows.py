"""The search of Sliding-Window Merging: which runs of consecutive layers to merge (arXiv 2502.19159, algorithm 1)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

Window = tuple[int, int]
"""Decoder layers ``low..high``, both included, numbered as in the dense model."""
Score = Callable[[tuple[Window, ...], int, int], float]
"""Similarity of the dense model and the one with these windows merged and ``low..high`` merged, too."""


@dataclass(frozen=True)
class Try:
    """One candidate window, compared with the threshold."""

    low: int
    high: int
    similarity: float
    accepted: bool


@dataclass(frozen=True)
class Search:
    """What one threshold leads to.

    Attributes:
        windows: The windows to merge, in the order they were found (from the top down).
        tries: Every comparison.
        lower: Largest similarity that was rejected: down to this threshold the search goes the same way.
        upper: Smallest similarity that was accepted: below this threshold the search goes the same way.
        stopped: It was given up when it was clear that more (``"above"``) or fewer (``"below"``) layers than wanted
            would go.
    """

    windows: tuple[Window, ...]
    tries: tuple[Try, ...]
    lower: float
    upper: float
    stopped: str | None = None

    @property
    def removed(self) -> int:
        """Layers that merging the windows removes."""
        return sum(high - low for low, high in self.windows)


def search_windows(
    score: Score, num_layers: int, threshold: float, skip_last: int = 1, wanted: int | None = None
) -> Search:
    """Grows windows downward from the top while the merged model stays similar to the dense one.

    Algorithm 1 of arXiv 2502.19159 as the authors' program runs it: a window is anchored at ``high`` and grows by one
    layer while the similarity is > ``threshold``; when it fails, the window before is kept and the next one starts at
    the layer that failed; a window of one layer moves down by one. Unlike the program, a window that is still open at
    layer 0 is kept, and a committed model is not tried a second time.

    Args:
        score: Similarity of a candidate.
        num_layers: Decoder layers of the dense model.
        threshold: A candidate is accepted if its similarity is greater.
        skip_last: So many layers at the top are never merged.
        wanted: Give up as soon as it is certain that not exactly so many layers are removed.
    """
    windows: tuple[Window, ...] = ()
    tries: list[Try] = []
    removed = 0
    high = num_layers - 1 - skip_last
    low = high - 1
    stopped = None
    while low >= 0:
        similarity = score(windows, low, high)
        accepted = similarity > threshold
        tries.append(Try(low, high, similarity, accepted))
        if accepted:
            low -= 1
        else:
            if low + 1 < high:
                windows += ((low + 1, high),)
                removed += high - low - 1
            high = low
            low = high - 1
        if wanted is not None:
            at_least, at_most = removed + high - low - 1, removed + high
            if at_least > wanted or at_most < wanted:
                stopped = "above" if at_least > wanted else "below"
                break
    if low + 1 < high:
        windows += ((low + 1, high),)
    return Search(
        windows,
        tuple(tries),
        lower=max((t.similarity for t in tries if not t.accepted), default=-1.0),
        upper=min((t.similarity for t in tries if t.accepted), default=1.0),
        stopped=stopped,
    )


def search_threshold(
    score: Score, num_layers: int, wanted: int, skip_last: int = 1
) -> tuple[Search, float, list[tuple[float, Search]]]:
    """Finds a threshold at which exactly ``wanted`` layers are removed, if there is one.

    A search goes the same way for every threshold in its ``[lower, upper)``, so one run settles a whole interval. The
    number removed falls with the threshold, but not strictly so: bisection finds the step that crosses ``wanted``, and
    if that step jumps over it, all other intervals are tried, from the step outward. Only if none is exact, the search
    at the greatest threshold that removes more is taken, to be ended by :func:`cut_windows`.

    Returns:
        The search, its threshold, and all searches in order. If no threshold is exact, the ``removed`` of the search
        is greater than ``wanted``.
    """
    runs: list[tuple[float, Search]] = []

    def run(threshold: float) -> Search:
        for _, known in runs:
            if known.lower <= threshold < known.upper:
                return known
        runs.append((threshold, search_windows(score, num_layers, threshold, skip_last, wanted)))
        return runs[-1][1]

    low, high = -2.0, 1.0  # below -1 every window is accepted, so the side that removes more is always met
    while low < high:
        threshold = (low + high) / 2
        search = run(threshold)
        if search.stopped is None:
            return search, threshold, runs
        if search.stopped == "above":
            low = search.upper
        else:
            high = search.lower
    down, up = math.nextafter(low, -2.0), high
    while -1 <= down < 1 or -1 <= up < 1:
        for threshold in (up, down):
            if -1 <= threshold < 1:
                search = run(threshold)
                if search.stopped is None:
                    return search, threshold, runs
                up = search.upper if threshold == up else up
                down = math.nextafter(search.lower, -2.0) if threshold == down else down
    threshold, search = max((tried for tried in runs if tried[1].stopped == "above"), key=lambda tried: tried[0])
    return search, threshold, runs


def cut_windows(windows: tuple[Window, ...], wanted: int) -> tuple[Window, ...]:
    """Shrinks the last windows from below until exactly ``wanted`` layers are removed."""
    kept: list[Window] = []
    for low, high in windows:
        room = wanted - sum(top - bottom for bottom, top in kept)
        if room > 0:
            kept.append((max(low, high - room), high))
    return tuple(kept)
