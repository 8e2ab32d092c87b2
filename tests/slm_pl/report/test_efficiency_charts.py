import dataclasses
import math

import pytest
from matplotlib.colors import to_hex

from slm_pl.drawing import COLOURS
from slm_pl.report import compare
from slm_pl.report.efficiency_charts import efficiency_figure, efficiency_plot
from tests.helpers.records import lost_point, record_of, rich_point, save, spread

SPEED, LATENCY, MEMORY = "Output tokens/s", "Latency", "Memory at its peak"


def _panels(*models):
    figure = efficiency_figure([*models])
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def _grid(seconds, lost=(), batches=(1, 2, 4, 8), **setting):
    return [
        lost_point(batch_size=batch, **setting)
        if batch in lost
        else rich_point(seconds + batch / 4, batch, gpu=True, **setting)
        for batch in batches
    ]


def _bars(axes):
    """Of each row, the colour, the beginning and the length of each bar that can be seen."""
    rows = {}
    for bar in axes.patches:
        if bar.get_width():
            row = round(bar.get_y() + bar.get_height() / 2)
            rows.setdefault(row, []).append((to_hex(bar.get_facecolor()), bar.get_x(), bar.get_width()))
    return rows


def _texts(axes):
    return [text.get_text() for text in axes.texts]


def _legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def _lines(axes, marker=None):
    return [line for line in axes.lines if (line.get_marker() == "x") == (marker == "x")]


# ------------------------------------------------------------------------------------------------- what is drawn


@pytest.mark.parametrize(
    ("points", "titles"),
    [
        ([rich_point()], [LATENCY, MEMORY]),
        ([rich_point(memory=None)], [LATENCY]),
        (_grid(4.0), [SPEED, LATENCY, MEMORY]),
        ([rich_point(0.5, batch, 64, 0) for batch in (1, 2)], ["Latency of the prefill", MEMORY]),
        ([rich_point(), lost_point(batch_size=2)], [SPEED, LATENCY, MEMORY]),
        (record_of("old").efficiency, [LATENCY]),
    ],
)
def test_panels_without_data_are_left_out(points, titles):
    assert list(_panels(("a", points))) == titles
    assert efficiency_plot([("a", points)]).startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize("models", [[], [("a", [])], [("a", [lost_point()]), ("b", [])]])
def test_there_may_be_nothing_to_draw(models):
    assert efficiency_plot(models) is None


def test_the_same_records_give_the_same_picture_and_labels_may_be_anything():
    label = "$x_{2} <b> \ud800 " + "long " * 30
    picture = efficiency_plot([(label, _grid(4.0)), ("b", _grid(3.0))])
    assert efficiency_plot([(label, _grid(4.0)), ("b", _grid(3.0))]) == picture
    assert efficiency_plot([(label, _grid(4.0)), ("b", _grid(3.1))]) != picture


# ------------------------------------------------------------------------------------------------------ throughput


def test_lines_are_the_throughput_over_the_batch():
    axes = _panels(("dense", _grid(4.0, lost=(4, 8))), ("pruned", _grid(3.0, lost=(8,))))[SPEED]
    dense, pruned = _lines(axes)
    assert (list(dense.get_xdata()), list(pruned.get_xdata())) == ([1, 2], [1, 2, 4])
    assert list(dense.get_ydata()) == pytest.approx([128 / 4.25, 256 / 4.5])
    assert list(pruned.get_ydata()) == pytest.approx([128 / 3.25, 256 / 3.5, 512 / 4.0])
    assert (dense.get_color(), pruned.get_color()) == COLOURS[:2]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "2", "4", "8"]
    # What did not fit is a cross at the foot, each in its own place.
    crosses = [(line.get_color(), *line.get_xdata(), *line.get_ydata()) for line in _lines(axes, "x")]
    assert [(colour, x) for colour, x, _ in crosses] == [(COLOURS[0], 4), (COLOURS[0], 8), (COLOURS[1], 8)]
    assert crosses[1][2] < crosses[2][2] < min(dense.get_ydata())
    assert axes.get_ylim()[0] < crosses[1][2]
    assert _texts(axes) == ["out of memory", "12 + 128 tokens"]


def test_few_settings_are_all_drawn_and_of_many_the_one_of_the_most_batches():
    def grids(count):
        return [*_grid(4.0, batches=(1, 2, 4)), *_grid(9.0, new_tokens=512), *_grid(5.0, prompt_tokens=64)[:count]]

    axes = _panels(("dense", grids(4)), ("pruned", grids(4)))[SPEED]
    assert len(_lines(axes)) == 6
    assert _legend(axes) == ["12 + 128 tokens", "12 + 512 tokens", "64 + 128 tokens"]
    assert len({line.get_linestyle() for line in axes.lines}) == 3
    axes = _panels(("dense", grids(2)), ("pruned", grids(2)), ("other", grids(2)))[SPEED]
    assert len(_lines(axes)) == 3
    assert _texts(axes) == ["12 + 512 tokens; of all settings, that of the most batch sizes"]


# --------------------------------------------------------------------------------------------------------- latency


def test_latency_is_prefill_and_decode_with_its_limit_and_percentile():
    models = ("dense", [rich_point(4.0)]), ("pruned", [rich_point(3.0)]), ("old", record_of("old").efficiency)
    axes = _panels(*models)[LATENCY]
    bars = _bars(axes)
    assert [[bar[1:] for bar in bars[row]] for row in range(3)] == [
        [(0, pytest.approx(0.4)), (pytest.approx(0.4), pytest.approx(3.6))],
        [(0, pytest.approx(0.3)), (pytest.approx(0.3), pytest.approx(2.7))],
        [(0, pytest.approx(0.2)), (pytest.approx(0.2), pytest.approx(3.8))],
    ]
    assert [bars[row][0][0].upper() for row in range(3)] == [*COLOURS[:3]]
    limits = [line.get_xdata() for line in axes.lines if len(line.get_xdata()) == 2 and line.get_marker() == "None"]
    assert [list(one) for one in limits] == [[2.0, 2.0], [1.5, 1.5]]
    whiskers = [path.vertices[:, 0] for one in axes.collections for path in one.get_paths()]
    assert [list(one) for one in whiskers] == [pytest.approx([4.0, 4.8]), pytest.approx([3.0, 3.6])]
    assert _legend(axes) == ["prefill", "decode", "least time for this work on this machine", "to the 95th percentile"]
    assert _texts(axes) == [
        "4.00 s  32.0 tokens/s", "3.00 s  42.7 tokens/s", "4.00 s  32.0 tokens/s", "batch 1, 12 + 128 tokens, median",
    ]  # fmt: skip
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["dense", "pruned", "old"]


def test_latency_is_at_the_smallest_batch_and_the_most_new_tokens_that_most_models_have():
    dense = [*_grid(4.0, batches=(2, 8)), *_grid(9.0, batches=(2,), new_tokens=512), rich_point(0.1, 2, 64, 0)]
    axes = _panels(("dense", dense), ("pruned", dense), ("other", [rich_point(1.0), lost_point(batch_size=2)]))[LATENCY]
    assert _texts(axes)[-1] == "batch 2, 12 + 512 tokens, median"
    assert _texts(axes)[2] == "– not measured"
    axes = _panels(("dense", [rich_point()]), ("pruned", [lost_point()]))[LATENCY]
    assert _texts(axes)[1] == "– out of memory"


def test_latency_of_a_forward_pass():
    axes = _panels(("dense", [rich_point(0.8, 1, 2048, 0)]))["Latency of the prefill"]
    assert _bars(axes) == {0: [(COLOURS[0].lower(), 0, pytest.approx(800.0))]}
    assert axes.get_xlabel() == "milliseconds"
    assert _texts(axes) == ["800.0 ms", "batch 1, 2,048 tokens, median"]


# ---------------------------------------------------------------------------------------------------------- memory


def test_memory_is_its_parts():
    small = rich_point(memory=dataclasses.replace(rich_point().memory, weights=100 * 2**20, kv_cache=None))
    axes = _panels(("dense", [rich_point()]), ("pruned", [small]), ("old", record_of("old").efficiency))[MEMORY]
    bars = _bars(axes)
    assert [bar[1:] for bar in bars[0]] == [(0, 512), (512, 128), (640, 64), (704, 256)]
    assert [bar[1:] for bar in bars[1]] == [(0, 100), (100, 64), (164, 256)]
    assert bars[0][2][0] == bars[1][1][0]  # activations
    assert 2 not in bars
    assert _legend(axes) == ["weights", "key/value cache", "activations", "other: libraries and the interpreter"]
    assert _texts(axes) == ["960 MiB", "420 MiB", "– not broken down", "batch 1, 12 + 128 tokens"]
    assert axes.get_xlabel() == "MiB"


def test_memory_is_at_the_fullest_point_that_all_have():
    models = ("dense", _grid(4.0, lost=(8,))), ("pruned", _grid(3.0))
    axes = _panels(*models)[MEMORY]
    assert _texts(axes) == ["1,344 MiB", "1,344 MiB", "batch 4, 12 + 128 tokens"]
    assert _legend(axes)[-1] == "other: workspaces"
    # On both kinds of machines it is both.
    axes = _panels(("dense", [rich_point(gpu=True)]), ("pruned", [rich_point()]))[MEMORY]
    assert _legend(axes)[-1] == "other"


# ------------------------------------------------------------------------------------------------ many, and strange


def test_sixteen_models_have_a_row_each():
    axes = _panels(*((f"model {n} of a long name", _grid(4.0 - n / 10, lost=(8,))) for n in range(16)))
    assert len(_bars(axes[LATENCY])) == 16
    assert len({(line.get_color(), line.get_marker()) for line in _lines(axes[SPEED])}) == 16
    assert len({line.get_ydata()[0] for line in _lines(axes[SPEED], "x")}) == 16
    low, high = axes[LATENCY].get_ylim()
    assert (low > 16, high < 0) == (True, True)


def test_numbers_that_cannot_be_drawn_are_left_out():
    endless = rich_point(latency_s=spread(math.inf), output_tokens_per_s=spread(0.0))
    assert efficiency_plot([("a", [dataclasses.replace(endless, memory=None)])]) is None
    odd = rich_point(latency_s=dataclasses.replace(spread(4.0), p95=math.inf))
    odd = dataclasses.replace(odd, limit=dataclasses.replace(odd.limit, latency_s=math.inf))
    axes = _panels(("a", [odd]), ("b", [endless]))[LATENCY]
    assert axes.get_xlim()[1] < 10
    assert _legend(axes) == ["prefill", "decode"]


# ------------------------------------------------------------------------------------------------- in a comparison


def test_it_is_part_of_the_comparison_and_an_old_one_does_not_stay(tmp_path):
    compare(save(tmp_path, dense=record_of("dense"), pruned=record_of("pruned", "ab")))
    picture = (tmp_path / "comparison_efficiency.png").read_bytes()
    assert picture == efficiency_plot([(name, record_of(name).efficiency) for name in ("dense", "pruned")])
    assert "![Speed and memory](comparison_efficiency.png)" in (tmp_path / "comparison.md").read_text()
    unmeasured = record_of("dense")
    unmeasured.efficiency = []
    compare(save(tmp_path, dense=unmeasured))
    assert not (tmp_path / "comparison_efficiency.png").exists()
    assert "comparison_efficiency.png" not in (tmp_path / "comparison.md").read_text()
