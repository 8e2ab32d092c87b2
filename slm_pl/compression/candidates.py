"""The candidates of a search over windows, scored by replay."""

from collections.abc import Callable, Iterator

from slm_pl.compression.architecture import architecture_of
from slm_pl.compression.calibration import Layer, LayerReplay
from slm_pl.compression.plan import Consolidation, MergeLayers, OtherParameters
from slm_pl.compression.scores import Similarity
from slm_pl.compression.surgery import GrowingWindow, MergedLayer, merge
from slm_pl.compression.windows import Window


class Candidates:
    """Scores candidate models, none of them twice, by replaying the layers from the lowest window up.

    The window that grows is updated in place. Windows above it that are settled are merged again whenever their turn
    comes, a fraction of the work of one layer. So at most two merged layers are in memory, whatever the number of
    windows: the one that grows, and a settled one while it is run.
    """

    def __init__(
        self,
        replay: LayerReplay,
        consolidation: Consolidation,
        other_parameters: OtherParameters,
        similarity: Similarity,
        advance: Callable[[str], None],
    ) -> None:
        self.scores: dict[tuple[tuple[Window, ...], int, int], float] = {}
        self._replay = replay
        self._how = (consolidation, other_parameters, architecture_of(replay.model))
        self._similarity = similarity
        self._advance = advance
        self._growing: GrowingWindow | None = None
        self._grown: Window = (0, 0)

    def score(self, windows: tuple[Window, ...], low: int, high: int) -> float:
        """Similarity of the dense model and the one with ``windows`` and the window ``low..high`` below them merged."""
        key = (windows, low, high)
        if key not in self.scores:
            candidate = self._layers(self._grow(low, high), windows, high)
            self.scores[key] = self._replay.score(candidate, low, self._similarity)
            self._advance(f"layers {low}-{high}: {self.scores[key]:.4f}")
        return self.scores[key]

    def _grow(self, low: int, high: int) -> MergedLayer:
        layers = self._replay.layers
        if self._growing is None or self._grown[1] != high or self._grown[0] < low:
            self._growing, self._grown = GrowingWindow(layers[high], *self._how), (high, high)
        for below in range(self._grown[0] - 1, low - 1, -1):
            self._growing.grow(layers[below])
        self._grown = (low, high)
        return self._growing.layer()

    def _layers(self, lowest: MergedLayer, windows: tuple[Window, ...], high: int) -> Iterator[tuple[int, Layer]]:
        """The candidate's layers from the lowest window up, each made when its turn comes."""
        layers = self._replay.layers

        def origin(low: int, high: int) -> int:
            return MergeLayers(low, high, self._how[0]).host

        yield origin(self._grown[0], high), lowest
        del lowest
        above = high + 1
        for window_low, window_high in reversed(windows):
            for layer in range(above, window_low):
                yield layer, layers[layer]
            yield origin(window_low, window_high), merge(layers[window_low : window_high + 1], *self._how)
            above = window_high + 1
        for layer in range(above, len(layers)):
            yield layer, layers[layer]
