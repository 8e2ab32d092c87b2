import io
import math
import statistics
import struct

import matplotlib.image
import numpy
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from slm_pl.drawing import COLOURS
from slm_pl.recovery.learning_curves import _figure, learning_curves
from tests.slm_pl.test_pictures import count, pixels

SIZE = (1125, 720)  # 7.5 x 4.8 inches at 150 dots each


def run(steps: int, validated: list[int], warmup: int = 5) -> dict[str, list[tuple[int, float]]]:
    """What a training run leaves: a noisy falling loss, a validation loss that is lowest at 3/4, and a linear decay."""
    noise = numpy.random.default_rng(0).normal(0, 0.1, steps)
    return {
        "train/loss": [(s, 1.1 + 1.8 * math.exp(-8 * s / steps) + float(noise[s - 1])) for s in range(1, steps + 1)],
        "val/loss": [(s, 1.2 + (s / steps - 0.75) ** 2) for s in validated],
        "lr": [(s, 1e-4 * min(s / warmup, (steps - s) / (steps - warmup))) for s in range(1, steps + 1)],
    }


def lines(figure: Figure, panel: int = 0) -> dict[str, numpy.ndarray]:
    """The points of each line of a panel, ``[points, 2]``, by its label."""
    return {str(line.get_label()): line.get_xydata() for line in figure.axes[panel].get_lines()}


def texts(figure: Figure, panel: int) -> list[str]:
    return [text.get_text() for text in figure.axes[panel].texts]


@pytest.mark.parametrize(
    "history",
    [
        run(2400, list(range(200, 2401, 200)), 100),
        run(40, [20, 40]),
        {"train/loss": [(1, 2.3)], "val/loss": [(1, 2.1)], "lr": [(1, 1e-4)]},
        {"val/loss": [(3, 2.0)]},
        {"lr": [(1, 0.0), (2, 0.0)], "train/loss": [(1, math.nan)]},
        {"train/loss": [(5, 0.0), (5, 0.0)], "val/loss": [], "lr": []},
        {},
    ],
)
def test_any_history_is_a_png_and_always_the_same(history):
    png = learning_curves(history)
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", png[16:24]) == SIZE
    assert matplotlib.image.imread(io.BytesIO(png)).shape[:2] == SIZE[::-1]
    assert learning_curves({key: list(points) for key, points in history.items()}) == png


def test_losses_and_rates_are_drawn_where_they_are():
    history = run(300, [100, 200, 300])
    figure = _figure(history)
    drawn = lines(figure)
    numpy.testing.assert_array_equal(drawn["training"], history["train/loss"])
    numpy.testing.assert_array_equal(drawn["validation"], history["val/loss"])
    (rates,) = lines(figure, 1).values()
    numpy.testing.assert_array_equal(rates, history["lr"])
    # The learning rate's axis is labelled in units that the label names.
    figure.canvas.draw()
    axis = figure.axes[1].yaxis
    assert "1e-4" in axis.get_label().get_text()
    assert [float(tick.get_text()) * 1e-4 for tick in axis.get_ticklabels()] == pytest.approx(axis.get_ticklocs())


@pytest.mark.parametrize(("steps", "reach"), [(10, 1), (40, 1), (300, 6), (2401, 49)])
def test_smooth_line_is_a_moving_average(steps, reach):
    history = run(steps, [])
    values = [value for _, value in history["train/loss"]]
    expected = [statistics.fmean(values[max(0, n - reach) : n + reach + 1]) for n in range(steps)]
    smooth = lines(_figure(history))["training, moving average"]
    numpy.testing.assert_array_equal(smooth[:, 0], range(1, steps + 1))
    numpy.testing.assert_allclose(smooth[:, 1], expected)


def test_few_points_are_dots_without_an_average():
    figure = _figure({"train/loss": [(1, 3.0), (2, 2.0), (3, 2.5)], "lr": [(1, 1e-4)]})
    assert list(lines(figure)) == ["training"]
    assert figure.axes[0].get_lines()[0].get_marker() == "o"
    assert figure.axes[1].get_lines()[0].get_marker() == "o"


def test_lowest_validation_loss_is_marked_with_its_value():
    figure = _figure(run(400, [100, 200, 300, 400]))
    assert lines(figure)["lowest"].tolist() == [[300, 1.2]]
    assert texts(figure, 0) == ["1.2"]
    assert figure.get_suptitle() == "Learning curves: lowest validation loss 1.2 at step 300"
    # Of equals the first; what is not finite is not the lowest.
    figure = _figure({"val/loss": [(1, math.nan), (2, 1.56789), (3, 1.56789), (4, -math.inf), (5, 2.0)]})
    assert lines(figure)["lowest"].tolist() == [[2, 1.56789]]
    assert texts(figure, 0) == ["1.568"]


def test_what_is_not_finite_is_passed_over():
    history = run(60, [20, 40, 60])
    broken = {
        "train/loss": [*history["train/loss"], (61, math.nan), (62, math.inf)],
        "val/loss": [(0, math.inf), *history["val/loss"]],
        "lr": [*history["lr"], (61, -math.inf)],
    }
    assert learning_curves(broken) == learning_curves(history)


def test_order_of_the_records_does_not_matter():
    history = run(60, [20, 40, 60])
    backwards = {key: points[::-1] for key, points in history.items()}
    assert learning_curves(backwards) == learning_curves(history)


def test_few_spikes_do_not_flatten_the_curve_and_all_else_is_in_view():
    history = run(2400, [800, 1600, 2400])
    history["train/loss"][0] = (1, 9.0)
    history["train/loss"][1500] = (1501, 5000.0)
    history["val/loss"][0] = (800, 12.0)
    low, high = _figure(history).axes[0].get_ylim()
    values = sorted(value for _, value in history["train/loss"])
    assert low < values[12]
    assert 12.0 < high < 15  # the first loss and every validation loss are in view


def test_missing_data_are_said_to_be_missing():
    figure = _figure({})
    assert texts(figure, 0) == ["no loss was recorded"]
    assert texts(figure, 1) == ["no learning rate was recorded"]
    assert texts(_figure(run(20, [])), 1) == []


def test_text_stays_inside_and_apart():
    # The lowest is the last and the highest point: its value has the least room.
    for history in (
        {"train/loss": [(s, 1.0) for s in range(1, 41)], "val/loss": [(40, 3.0)], "lr": [(40, 1e-4)]},
        run(40, [40]),
        run(2400, [0, 1800]),
    ):
        figure = _figure(history)
        figure.set_dpi(150)
        figure.draw_without_rendering()
        renderer = FigureCanvasAgg(figure).get_renderer()
        value = figure.axes[0].texts[0].get_window_extent(renderer)
        legend = figure.axes[0].get_legend().get_window_extent(renderer)
        assert not value.overlaps(legend)
        for box in (value, legend):
            assert 0 <= box.x0 < box.x1 <= figure.bbox.width
            assert 0 <= box.y0 < box.y1 <= figure.bbox.height


def test_curves_are_in_the_picture():
    history = run(300, [100, 200, 300])
    picture = pixels(learning_curves(history))
    empty = pixels(learning_curves({}))
    for colour in (COLOURS[0], COLOURS[5], COLOURS[2]):
        assert count(picture, colour) > 300
        assert count(empty, colour) == 0
