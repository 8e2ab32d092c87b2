import numpy
import pytest

from slm_pl.evaluation.efficiency.record import Spread, percentile

VALUES = [0.31, 0.29, 4.0, 0.30, 0.35, 0.28, 0.33]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_spread_is_that_of_a_sample(count):
    values = VALUES[:count]
    spread = Spread.of(values)
    expected = numpy.percentile(values, [0, 50, 90, 95, 99, 100])
    found = [spread.min, spread.median, spread.p90, spread.p95, spread.p99, spread.max]
    assert found == pytest.approx(list(expected))
    assert spread.mean == pytest.approx(numpy.mean(values))
    assert spread.stdev == pytest.approx(numpy.std(values, ddof=1) if count > 1 else 0.0)
    assert spread.n == count


def test_percentile_by_hand():
    ordered = [1.0, 2.0, 4.0, 8.0, 16.0]
    assert percentile(ordered, 0.0) == 1.0
    assert percentile(ordered, 0.25) == 2.0
    assert percentile(ordered, 0.90) == pytest.approx(8 + 0.6 * 8)
    assert percentile(ordered, 1.0) == 16.0
