import io

import matplotlib.image
import numpy
import pytest

from slm_pl import pictures
from slm_pl.compression.plan import Base, DropLayers, MergeLayers, Method, Plan
from slm_pl.pictures import (
    COLOURS,
    block_importance,
    load_figures,
    matrix_names,
    search_trace,
    similarity_matrix,
    trace_names,
    trace_pictures,
)

TRACE = (
    {"low": 4, "high": 5, "similarity": 0.2, "accepted": False, "search": 0},
    {"low": 4, "high": 5, "similarity": 0.9, "accepted": True, "search": 1},
    {"low": 3, "high": 5, "similarity": 0.7, "accepted": False, "search": 1},
)
PLAN = Plan(
    base=Base("some/model", None, "llama", 8, 1000, "ab"),
    method=Method("callbacks.SlidingWindowMerging", {"similarity": "cosine"}),
    calibration=None,
    steps=(MergeLayers(4, 5),),
    trace=TRACE,
    outcome={"threshold": 0.8, "search": 1, "searches": [{}, {}], "cut_to_fit": False},
)


def pixels(png: bytes) -> numpy.ndarray:
    return (matplotlib.image.imread(io.BytesIO(png), format="png")[..., :3] * 255).round().astype(int)


def count(picture: numpy.ndarray, colour: str) -> int:
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((abs(picture - wanted).max(axis=2) <= 1).sum())


def test_trace_shows_the_deciding_search_in_two_colours():
    from dataclasses import replace

    png = search_trace(PLAN)
    assert png is not None
    picture = pixels(png)
    accepted, rejected = count(picture, COLOURS[0]), count(picture, COLOURS[5])
    # Bars below: one accepted try of two layers, one rejected of three. The other search's try is not drawn.
    assert rejected / accepted == pytest.approx(1.5, rel=0.1)
    assert search_trace(PLAN) == png  # byte for byte: nothing in it varies from run to run
    everything = search_trace(replace(PLAN, outcome={"threshold": 0.8}, trace=tuple({**t, "search": 0} for t in TRACE)))
    assert everything is not None
    assert count(pixels(everything), COLOURS[5]) / count(pixels(everything), COLOURS[0]) > 2


def test_plan_without_windows_has_no_trace_picture():
    from dataclasses import replace

    assert search_trace(replace(PLAN, trace=(), steps=(DropLayers((3,)),))) is None
    assert search_trace(replace(PLAN, trace=({"layer": 3, "score": 1.0},), steps=(DropLayers((3,)),))) is None


def test_matrix_outlines_the_windows():
    matrix = [[1.0 if i == j else 0.5 for j in range(6)] for i in range(6)]
    labels = [str(i) for i in range(6)]
    plain = pixels(similarity_matrix(matrix, labels, [], "title"))
    one = pixels(similarity_matrix(matrix, labels, [(1, 3)], "title"))
    assert count(plain, COLOURS[5]) == 0
    changed = numpy.argwhere((plain != one).any(axis=2))
    (top, left), (bottom, right) = changed.min(axis=0), changed.max(axis=0)
    # Three of six layers: a square of half the map, which is about five inches at 150 dpi.
    assert (bottom - top) == pytest.approx(right - left, abs=3)
    outlined = pixels(similarity_matrix(matrix, labels, [(0, 5)], "title"))
    rows = numpy.argwhere((plain != outlined).any(axis=2))
    assert (rows.max(0) - rows.min(0))[0] / (bottom - top) == pytest.approx(2, rel=0.05)


def test_plans_of_strangers_are_drawn_or_passed_over():
    from dataclasses import replace

    # DESIGN's own sample has a trace without searches and no outcome.
    bare = replace(PLAN, outcome={}, trace=({"low": 3, "high": 5, "similarity": 0.88, "accepted": True},))
    assert search_trace(bare) is not None
    for broken in (
        {"low": 3, "high": 5, "similarity": None, "accepted": True},
        {"layer": 3, "similarity": 0.5},
        {"low": 3, "high": 5, "similarity": float("nan"), "accepted": True},
        {"low": "3", "high": 5, "similarity": 0.5, "accepted": True},
    ):
        assert search_trace(replace(PLAN, outcome={}, trace=(broken,))) is None
    formula = replace(PLAN, method=Method("callbacks.SlidingWindowMerging", {"similarity": r"$\\foo$"}))
    assert search_trace(formula) is not None


def test_of_endless_tries_the_first_are_drawn_and_the_picture_says_so(monkeypatch):
    from dataclasses import replace

    monkeypatch.setattr(pictures, "_MOST_TRIES", 3)
    titles: list[str] = []
    monkeypatch.setattr(pictures, "set_title", lambda figure, title: titles.append(title))
    rows = tuple({"low": 2, "high": 3, "similarity": 0.5, "accepted": n < 3} for n in range(1200))
    picture = search_trace(replace(PLAN, trace=rows, outcome={}))
    assert titles == ["8 → 7 layers: the first 3 of 1,200 tries"]
    assert picture is not None
    assert count(pixels(picture), COLOURS[5]) == 0  # all that were rejected came later


def test_threshold_far_below_does_not_flatten_the_values():
    from dataclasses import replace

    rows = tuple({"low": 5 - n, "high": 6, "similarity": 0.95 - n / 100, "accepted": True} for n in range(4))
    pictures = [search_trace(replace(PLAN, outcome={"threshold": threshold}, trace=rows)) for threshold in (0.9, -0.5)]
    heights = []
    for picture in pictures:
        assert picture is not None
        upper = pixels(picture)[:430]  # the upper half, above its legend
        wanted = [int(COLOURS[0][i : i + 2], 16) for i in (1, 3, 5)]
        rows_found = numpy.argwhere(abs(upper - wanted).max(axis=2) <= 1)[:, 0]
        heights.append(rows_found[rows_found < 370].max() - rows_found.min())
    assert heights[1] > 0.7 * heights[0]


def test_names_are_of_the_models_own_plans(tmp_path):
    names = [*matrix_names(1), *matrix_names(2)]
    for name in (*names, "representation_similarity.json", "search_trace.png", "x.json"):
        (tmp_path / name).write_bytes(b"{}" if name.endswith("json") else b"\x89PNG\r\n\x1a\n")
    assert sorted(load_figures(tmp_path, plans=1)) == sorted(matrix_names(1))
    assert sorted(load_figures(tmp_path, plans=2)) == sorted(names)
    (tmp_path / matrix_names(1)[0]).write_bytes(b"{" + b" " * 9_000_000)
    assert list(load_figures(tmp_path, plans=1)) == [matrix_names(1)[1]]


def scores(values: list[float], removed: int, phase: int = 0, protected: tuple[int, ...] = ()) -> list[dict]:
    return [
        {"phase": phase, "layer": n, "score": v, "removed": n == removed, "protected": n in protected}
        for n, v in enumerate(values)
    ]


def importance_plan(trace: list[dict], gone: tuple[int, ...], **outcome: object) -> Plan:
    base = Base("some/model", None, "llama", 8, 1000, "ab")
    return Plan(base, Method("callbacks.SLEB", {}), None, (DropLayers(gone),), tuple(trace), outcome)


def test_bars_are_as_high_as_the_scores_and_coloured_by_fate():
    plan = importance_plan(scores([4.0, 8.0, 1.0, 8.0, 3.0, 8.0, 2.0, 8.0], 2, protected=(0, 7)), (2,))
    png = block_importance(plan)
    assert png is not None
    assert png == block_importance(plan)
    picture = pixels(png)
    # Areas: removed 1; protected 4 + 8; kept 8 + 3 + 8 + 2 + 8. The legend's patches add a little.
    removed, kept = count(picture, COLOURS[5]), count(picture, COLOURS[0])
    protected = count(picture, "#BBBBBB")
    assert kept / protected == pytest.approx(29 / 12, rel=0.06)
    assert 8 < protected / removed < 12.5
    assert list(trace_pictures(plan, 1)) == ["block_importance.png"]
    assert list(trace_pictures(plan, 3)) == ["block_importance.3.png"]
    assert set(trace_pictures(plan, 2)) < set(trace_names(2))
    assert trace_pictures(importance_plan([], (2,)), 1) == {}


def test_of_two_ways_to_merge_the_one_taken_or_the_better_is_drawn():
    both = [
        {"phase": 0, "layer": 0, "high": 1, "consolidation": "keep_bottom", "score": 6.0, "removed": False},
        {"phase": 0, "layer": 0, "high": 1, "consolidation": "keep_top", "score": 2.0, "removed": False},
        {"phase": 0, "layer": 1, "high": 2, "consolidation": "keep_bottom", "score": 1.0, "removed": True},
        {"phase": 0, "layer": 1, "high": 2, "consolidation": "keep_top", "score": 1.0, "removed": False},
    ]
    drawn = block_importance(importance_plan(both, ()))
    assert drawn == block_importance(importance_plan([both[1], both[2]], ()))
    assert drawn != block_importance(importance_plan([both[0], both[2]], ()))


def test_a_ruinous_layer_does_not_flatten_the_others():
    values = [41.0, 45.0, 43.0, 47.0, 42.0, 44.0, 46.0, 43.0]
    high = []
    for first in (41.0, 97239.6):
        png = block_importance(importance_plan(scores([first, *values[1:]], 2), (2,), dense_score=40.0))
        assert png is not None
        rows = numpy.argwhere(abs(pixels(png)[80:] - [0xD5, 0x5E, 0x00]).max(axis=2) <= 1)[:, 0]  # below the legend
        high.append(rows.max() - rows.min())
    # The highest bar rises by 7; with the ruinous one, by 1.6 times the 6 of the third quartile.
    assert high[1] == pytest.approx(high[0] * 7 / (1.6 * 6), rel=0.03)


def test_phases_are_mapped_below_the_first_ones_bars():
    one = scores([4.0, 3.0, 5.0, 6.0], 1)
    two = [row for row in scores([4.5, 0.0, 5.5, 6.5], 0, phase=1) if row["layer"] != 1]
    single, both = (block_importance(importance_plan(trace, (0, 1))) for trace in (one, one + two))
    assert single is not None
    assert both is not None
    assert pixels(both).shape[0] > 1.3 * pixels(single).shape[0]
    assert count(pixels(both), "#440154") > 500  # the least of the map, in viridis


def test_of_layers_that_were_merged_the_bars_in_a_window_are_green_and_each_phase_shows_its_reach():
    pairs = [{"phase": 0, "layer": n, "high": n + 1, "score": 4.0, "removed": n == 3} for n in range(6)]
    then = {"phase": 1, "layer": 2, "score": 4.0, "removed": True}
    base, merge = Base("some/model", None, "llama", 8, 1000, "ab"), MergeLayers(2, 4, "keep_bottom", "bottom")
    short, long = (
        block_importance(
            Plan(base, Method("callbacks.X", {}), None, (merge,), (*pairs, {**then, "high": high}), {"score": "s"})
        )
        for high in (4, 5)
    )
    assert short is not None
    assert long is not None
    merged, apart = count(pixels(short), COLOURS[2]), count(pixels(short), COLOURS[0])
    assert apart / merged == pytest.approx(4 / 2, rel=0.08)  # pairs 2-3 and 3-4 lie in the window
    first, second = (count(pixels(png), COLOURS[5]) for png in (short, long))
    # In phase 1 two layers; in phase 2 three, and then four: as far as the line from the lowest to the highest.
    assert second / first == pytest.approx((1 + 3) / (1 + 2), rel=0.1)


def test_scores_of_strangers_are_drawn_or_passed_over():
    good = {"layer": 3, "score": 41.72}  # the sample of DESIGN, without a fate
    assert block_importance(importance_plan([good], ())) is not None
    assert block_importance(importance_plan([good, {"layer": "x", "score": 1}], (), score="$\\foo$" * 30)) is not None
    for broken in (
        {"layer": 3},
        {"layer": 3, "score": None},
        {"layer": 3, "score": float("nan")},
        {"layer": 3, "score": float("inf")},
        {"layer": -3, "score": 1.0},
        {"layer": 10**9, "score": 1.0},
        {"layer": 3, "score": True},
        {"layer": 3, "high": 2, "score": 1.0},
        {"phase": "first", "layer": 3, "score": 1.0},
    ):
        assert block_importance(importance_plan([broken], ())) is None
    for odd in ([1.0] * 4, [0.0] * 4, [-1.0, -2.0, -3.0], [1e299, -1e299, 5.0]):
        assert block_importance(importance_plan(scores(odd, 1), (1,))) is not None
        assert block_importance(importance_plan(scores(odd, 1), (1,), dense_score=2.0)) is not None
    many = [{**good, "score": 1.0 * n, "layer": n % 7, "phase": n // 7} for n in range(300_000)]
    assert block_importance(importance_plan(many, ())) is not None
    assert block_importance(importance_plan([good] * 300_000, ())) is not None  # one bar, not so many


def test_bars_below_the_dense_score_hang_from_it():
    plan = importance_plan(scores([9.0, 9.5, 9.8, 9.5], 0), (0,), dense_score=10.0)
    png = block_importance(plan)
    assert png is not None
    removed, kept = count(pixels(png), COLOURS[5]), count(pixels(png), COLOURS[0])
    assert kept / removed == pytest.approx((0.5 + 0.2 + 0.5) / 1.0, rel=0.08)


def test_equal_scores_are_bars():
    png = block_importance(importance_plan(scores([5.0] * 4, 1), (1,)))
    assert png is not None
    assert count(pixels(png), COLOURS[0]) > 20_000
