import dataclasses
import io

import pytest

from slm_pl.drawing import COLOURS
from slm_pl.evaluation import PerplexityResult
from slm_pl.report import compare
from slm_pl.report.comparison import line_up
from slm_pl.report.pareto import _apart, _Box, panels_of, pareto_plot
from tests.helpers.records import record_of, rich_point, save


def _records(**of):
    records = {"dense": record_of("dense")}
    for name, (perplexity, accuracy, latency, parameters) in of.items():
        record = record_of(name, name, perplexity=perplexity, accuracy=accuracy, latency=latency)
        record.model = dataclasses.replace(record.model, num_parameters=parameters)
        records[name] = record
    return records


def _grid(folder, records):
    return panels_of(line_up(save(folder, **records)))


def _frontier(panel):
    return [point.model for point in panel.frontier]


def test_qualities_are_lines_and_costs_columns(tmp_path):
    grid = _grid(tmp_path, _records(a=(30.0, 0.55, 2.0, 80), b=(60.0, 0.5, 3.0, 70)))
    names = [[(panel.quality.quantity, panel.cost.quantity) for panel in line] for line in grid]
    # All have the same peak memory, which shows nothing.
    assert names == [
        [("perplexity", "seconds"), ("perplexity", "parameters")],
        [("accuracy", "seconds"), ("accuracy", "parameters")],
    ]
    assert [(point.x, point.y) for point in grid[0][0].points] == [(4.0, 20.0), (2.0, 30.0), (3.0, 60.0)]
    assert [(point.x, point.y) for point in grid[1][1].points] == [(100, 0.6), (80, 0.55), (70, 0.5)]
    # b is slower than a and worse, but smaller.
    assert _frontier(grid[0][0]) == [1, 0]
    assert _frontier(grid[0][1]) == [2, 1, 0]
    assert _frontier(grid[1][0]) == [1, 0]


def test_a_spread_counts_as_equal(tmp_path):
    # The spread of each is 0.1: 3.0 and 3.1 are equally fast, so the better one is alone; 3.2 is slower.
    assert _frontier(_grid(tmp_path / "1", _records(a=(50.0, 0.5, 3.0, 80), b=(40.0, 0.5, 3.1, 80)))[0][0]) == [2, 0]
    assert _frontier(_grid(tmp_path / "2", _records(a=(50.0, 0.5, 3.0, 80), b=(40.0, 0.5, 3.2, 80)))[0][0]) == [1, 2, 0]


def test_what_only_one_model_has_keeps_nobody_out(tmp_path):
    records = _records(a=(30.0, 0.55, 2.0, 80), b=(60.0, 0.5, 3.0, 70))
    records["dense"].perplexity.insert(0, PerplexityResult("other", 128, "none", 4064, 9.0, 0.5))
    grid = _grid(tmp_path / "text", records)
    assert [point.y for point in grid[0][0].points] == [20.0, 30.0, 60.0]
    records["a"].zero_shot, records["b"].zero_shot = None, None
    records["a"].missing["zero_shot"] = records["b"].missing["zero_shot"] = "not measured"
    assert [panel.quality.quantity for line in _grid(tmp_path / "tasks", records) for panel in line] == [
        "perplexity",
        "perplexity",
    ]


def test_an_old_picture_does_not_stay(tmp_path):
    compare(save(tmp_path, **_records(a=(30.0, 0.55, 2.0, 80))))
    assert (tmp_path / "pareto.png").is_file()
    assert "![Quality against cost](pareto.png)" in (tmp_path / "comparison.md").read_text()
    compare(save(tmp_path, dense=record_of("dense")))
    assert not (tmp_path / "pareto.png").exists()  # one point shows nothing, and the old picture is not of these
    assert "pareto" not in (tmp_path / "comparison.md").read_text()


def _centre(picture, colour):
    """Centre of a colour's pixels that have nothing but it around them."""
    from numpy import argwhere

    wanted = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    same = abs(picture - wanted).max(axis=2) < 0.02
    inside = same[3:-3, 3:-3]
    for dy, dx in ((0, 3), (6, 3), (3, 0), (3, 6)):
        inside = inside & same[dy : dy + inside.shape[0], dx : dx + inside.shape[1]]
    return argwhere(inside).mean(axis=0)


def test_points_are_where_their_figures_are(tmp_path):
    from matplotlib.image import imread

    records = _records(a=(30.0, 0.6, 2.0, 100), b=(40.0, 0.6, 3.0, 100))
    for record in records.values():
        record.zero_shot = None
        record.missing["zero_shot"] = "not measured"
    png = pareto_plot(line_up(save(tmp_path, **records)))
    picture = imread(io.BytesIO(png))[..., :3]
    picture = picture[: int(0.8 * picture.shape[0])]  # without the legend
    (dense_y, dense_x), (a_y, a_x), (b_y, b_x) = (_centre(picture, colour) for colour in COLOURS[:3])
    # Latency 4, 2 and 3 to the right; perplexity 20, 30 and 40 upwards, and lines of a picture count downwards.
    assert (b_x - a_x) / (dense_x - a_x) == pytest.approx(1 / 2, abs=0.03)
    assert (dense_y - a_y) / (dense_y - b_y) == pytest.approx(1 / 2, abs=0.03)
    assert b_y < a_y < dense_y


def test_ruined_models_stand_at_the_edge_and_labels_may_be_anything(tmp_path):
    records = _records(a=(3e9, 0.2, 2.0, 80), b=(30.0, 0.5, 3.0, 70))
    records["b"].model = dataclasses.replace(records["b"].model, label="$x_{2} <b> " + "long " * 20)
    png = pareto_plot(line_up(save(tmp_path, **records)))
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    records["a"].perplexity[0] = dataclasses.replace(records["a"].perplexity[0], value=1e307)
    again = pareto_plot(line_up(save(tmp_path, **records)))
    assert len(again) > 10_000
    assert again != png  # another value stands beside the triangle


def test_numbers_lie_on_nothing():
    places = [(50.0, 50.0), (52.0, 51.0), (50.0, 53.0), (150.0, 100.0), (199.0, 199.0)]
    room = _Box(0, 0, 200, 200)
    shifts = _apart(places, dict(enumerate(["1", "2", "3", "17", "5 (3.0e9)"])), [], room)
    boxes = [
        _Box.around(x + dx, y + dy, 2.3 * length, 4)
        for (x, y), (dx, dy, _), length in zip(
            places, (shifts[index] for index in range(5)), (1, 1, 1, 2, 9), strict=True
        )
    ]
    points = [_Box.around(x, y, 4, 4) for x, y in places]
    for number, box in enumerate(boxes):
        assert all(box.shared(other) == 0 for other in [*boxes[:number], *boxes[number + 1 :], *points])
        assert box.shared(room) == pytest.approx((box.right - box.left) * (box.high - box.low))
    assert shifts[3][2] is False


def test_of_many_models_the_first_and_the_best_are_named(tmp_path, monkeypatch):
    named = []
    monkeypatch.setattr("slm_pl.report.pareto._add_legend", lambda *arguments: named.append(arguments[1:]))
    # Perplexity grows with the number, and so does the time: but for the last ones, which are best in time.
    figures = {f"m{n:03}": (20.0 + n, 0.6 - n / 1000, 3.0 + (n if n < 90 else (89 - n) / 4), 80) for n in range(100)}
    comparison = line_up(save(tmp_path, **_records(**figures)))
    assert pareto_plot(comparison)
    ((labels, _, _, unnamed),) = named
    best = {point.model for panels in panels_of(comparison) for panel in panels for point in panel.frontier}
    assert set(range(91, 101)) < best < set(range(101))
    assert set(labels) == best | {0}
    assert unnamed == 101 - len(labels) > 80
    assert labels[100].startswith("101  m099")


def test_of_many_models_no_bars_are_drawn(tmp_path, capsys):
    figures = {f"m{n}": (20.0 + n, 0.6, 5.0 - n / 100, 80) for n in range(41)}
    compare(save(tmp_path, **_records(**figures)), str(tmp_path / "made"))
    assert "No bars are drawn of more than 40 models." in capsys.readouterr().out
    made = {path.name for path in (tmp_path / "made").iterdir()}
    assert "pareto.png" in made
    assert not {"comparison.png", "comparison_efficiency.png"} & made
    assert (tmp_path / "made" / "comparison.html").read_text().count("data:image/png") == 1


def test_only_latency_of_generation_is_tokens_per_second(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("slm_pl.report.pareto._tokens_on_top", lambda axes, row: drawn.append(row.name))
    for new_tokens in (128, 0):
        records = _records(a=(30.0, 0.55, 2.0, 80))
        for name, record in records.items():
            record.efficiency = [rich_point(4.0 if name == "dense" else 2.0, 1, 12, new_tokens)]
        pareto_plot(line_up(save(tmp_path / str(new_tokens), **records)))
    assert drawn == ["efficiency.shortened_llama.1.12.128.latency_s"]


def test_memory_of_a_large_grid_is_drawn_though_the_table_has_no_room_for_it(tmp_path):
    records = _records(a=(30.0, 0.55, 2.0, 80))
    for name, record in records.items():
        extra = 0 if name == "dense" else 2**20
        points = [rich_point(4.0, batch) for batch in (1, 2, 4, 8)]
        record.efficiency = [
            dataclasses.replace(
                one, peak_memory_bytes=dataclasses.replace(one.peak_memory_bytes, max=one.peak_memory_bytes.max - extra)
            )
            for one in points
        ]
    grid = _grid(tmp_path, records)
    assert [panel.cost.name.rpartition(".")[2] for panel in grid[0]] == ["num_parameters", "peak_memory_bytes"]
    assert grid[0][1].cost.place == "page"
