import json
import math
from dataclasses import replace

import numpy
import pytest

from slm_pl.compression.plan import Base, DropLayers, KeepChannels, KeepHidden, Method, Plan
from slm_pl.drawing import COLOURS
from slm_pl.pictures import trace_names, trace_pictures
from slm_pl.width_pictures import layer_widths
from tests.slm_pl.test_pictures import count, pixels

KEPT, BEFORE, REMOVED = COLOURS[0], "#DADADA", COLOURS[5]


def width_plan(*structures: tuple[int, str, int, int], scores: bool = False, layers: int = 6) -> Plan:
    """A plan that keeps the last of each structure's units; of layer, group, units, kept."""
    steps = tuple(KeepChannels(n, group, tuple(range(units - kept, units))) for n, group, units, kept in structures)
    trace = [{"layer": n, "group": group, "units": units, "kept": kept} for n, group, units, kept in structures]
    for row in trace:
        if scores:
            row["scores"] = [1.5**unit for unit in range(row["units"])]
    base = Base("some/model", None, "llama", layers, 1000, "ab")
    return Plan(base, Method("callbacks.LLMPruner", {}), None, steps, tuple(trace))


def hidden_plan(kept: tuple[int, ...], scores: list[float | None] | None = None) -> Plan:
    row = {"group": "hidden", "units": 20, "kept": len(kept), **({} if scores is None else {"scores": scores})}
    return replace(width_plan(), steps=(KeepHidden(kept),), trace=(row,))


def drawn(plan: Plan) -> numpy.ndarray:
    png = layer_widths(plan)
    assert png is not None
    assert png == layer_widths(plan)  # byte for byte
    return pixels(png)


def bars(picture: numpy.ndarray, colour: str) -> list[int]:
    """Heights of the bars that stand on the lowest row with this colour, from left to right."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    mask = abs(picture - wanted).max(axis=2) <= 1
    lowest = numpy.flatnonzero(mask.sum(axis=1) > 30)[-1]
    edges = numpy.flatnonzero(numpy.diff(numpy.concatenate(([0], mask[lowest - 3].astype(int), [0]))))
    columns = [(start + end) // 2 for start, end in zip(edges[::2], edges[1::2], strict=True)]
    return [int(mask[:, column].sum()) for column in columns]


def test_bars_are_as_high_as_what_is_kept():
    plan = width_plan((0, "mlp", 8, 4), (1, "mlp", 8, 8), (2, "mlp", 8, 2), (4, "mlp", 8, 6))
    picture = drawn(plan)
    heights = bars(picture, KEPT)
    assert len(heights) == 4
    assert [height / heights[1] for height in heights] == pytest.approx([0.5, 1, 0.25, 0.75], abs=0.02)
    # 20 of 32 units stay; the legend's patches add a little.
    assert count(picture, BEFORE) / count(picture, KEPT) == pytest.approx(12 / 20, rel=0.06)


def test_panels_are_of_the_groups_that_the_plan_touches():
    mlp = drawn(width_plan((1, "mlp", 8, 4)))
    both = drawn(width_plan((1, "attention", 3, 2), (1, "mlp", 8, 4)))
    scored = drawn(width_plan((1, "attention", 3, 2), (1, "mlp", 8, 4), scores=True))
    assert mlp.shape[0] < both.shape[0] < scored.shape[0]
    assert mlp.shape[1] == both.shape[1] == scored.shape[1]
    # Scores of attention alone have no panel: three units have no quantiles.
    attention = width_plan((1, "attention", 3, 2))
    assert drawn(attention).shape == drawn(width_plan((1, "attention", 3, 2), scores=True)).shape
    assert layer_widths(attention) != layer_widths(width_plan((1, "attention", 3, 1)))
    assert layer_widths(attention) != layer_widths(width_plan((2, "attention", 3, 2)))
    assert drawn(width_plan(*((n, "mlp", 8, 4) for n in range(80)), layers=80)).shape[1] == 2100


def test_an_emptied_structure_is_crossed():
    left, emptied = (width_plan((1, "mlp", 8, 4), (2, "mlp", 8, kept)) for kept in (1, 0))
    assert count(drawn(left), REMOVED) == 0
    assert count(drawn(emptied), REMOVED) > 20
    assert len(bars(drawn(left), KEPT)) == 2
    assert len(bars(drawn(emptied), KEPT)) == 1
    # The legend stands above the first panel, whichever is emptied.
    low = drawn(width_plan((1, "attention", 4, 2), (1, "mlp", 8, 0)))
    assert count(low[:100], REMOVED) > 10


def test_scores_show_the_median_of_each_side():
    plan = width_plan((1, "mlp", 40, 30), (2, "mlp", 40, 40), scores=True)
    removed = count(drawn(plan), REMOVED)
    assert removed > 20
    every = width_plan((1, "mlp", 40, 40), (2, "mlp", 40, 40), scores=True)
    assert count(drawn(every), REMOVED) == 0
    # The cross of layer 1 is below its dot: scores grow with the unit, the last ones stay.
    lower = drawn(plan)[450:]
    cross = numpy.argwhere(abs(lower - [0xD5, 0x5E, 0x00]).max(axis=2) <= 1)[:, 0].mean()
    dots = numpy.argwhere(abs(lower - [0x00, 0x72, 0xB2]).max(axis=2) <= 1)[:, 0].mean()
    assert cross > dots + 50


@pytest.mark.parametrize(
    "values",
    [[-1.0] * 8, [0.0] * 8, [5.0] * 8, [1e299, -1e299] * 4, [1e-299, 1e299] * 4, [None] * 8, [None] * 7 + [2], [3] * 8],
)
def test_odd_scores_are_drawn(values):
    plan = width_plan((1, "mlp", 8, 4))
    assert layer_widths(replace(plan, trace=({**plan.trace[0], "scores": values},))) is not None
    plan = hidden_plan(tuple(range(8)))
    assert layer_widths(replace(plan, trace=({**plan.trace[0], "units": 8, "scores": values},))) is not None


def test_hidden_state_is_a_curve_of_two_colours_or_a_bar():
    # Every second channel goes, though they are not the least important.
    scores: list[float | None] = [math.exp(n / 5) for n in range(20)]
    picture = drawn(hidden_plan(tuple(range(0, 20, 2)), scores))
    assert count(picture, REMOVED) / count(picture, KEPT) == pytest.approx(1, rel=0.15)
    bar = drawn(hidden_plan(tuple(range(15))))
    assert bar.shape[0] < picture.shape[0]
    assert count(bar, KEPT) / count(bar, BEFORE) == pytest.approx(3, rel=0.1)
    assert count(bar, REMOVED) == 0
    assert (drawn(hidden_plan(tuple(range(15)), [None] * 20)) == bar).all()
    together = replace(
        hidden_plan(tuple(range(15)), scores), steps=(KeepHidden(tuple(range(15))), KeepChannels(2, "mlp", (0, 1)))
    )
    assert drawn(together).shape[0] > picture.shape[0]


def test_other_plans_have_none():
    depth = replace(width_plan(), steps=(DropLayers((3,)),))
    assert layer_widths(depth) is None
    assert layer_widths(replace(depth, trace=({"layer": 3, "score": 1.0, "removed": True},))) is None
    window = {"low": 4, "high": 5, "similarity": 0.9, "accepted": True}
    assert layer_widths(replace(depth, trace=(window,))) is None
    assert list(trace_pictures(replace(depth, trace=(window,)), 1)) == ["search_trace.png"]


def test_file_is_named_as_the_models_plan():
    plan = width_plan((1, "mlp", 8, 4), scores=True)
    assert trace_pictures(plan, 1) == {"layer_widths.png": layer_widths(plan)}
    assert list(trace_pictures(plan, 2)) == ["layer_widths.2.png"]
    assert set(trace_pictures(plan, 3)) < set(trace_names(3))


def test_rows_of_strangers_are_drawn_or_passed_over():
    good = {"layer": 4, "group": "attention", "units": 3, "kept": 2, "scores": [1.2, 0.3, None]}
    bare = width_plan()
    alone = layer_widths(replace(bare, trace=(good,)))
    assert alone is not None
    for changed in (
        {"layer": None},
        {"layer": -1},
        {"layer": True},
        {"layer": 10**9},
        {"layer": 2.0},
        {"group": "experts"},
        {"group": ["mlp"]},
        {"units": "3"},
        {"units": 10**9},
        {"units": 1},
        {"kept": -1},
        {"kept": None},
        {"kept": float("nan")},
    ):
        broken = {**good, **changed}
        assert layer_widths(replace(bare, trace=(broken,))) is None, changed
        assert layer_widths(replace(bare, trace=(broken, good))) == alone, changed
    for scores in ("abc", {}, [1.0], [float("nan"), float("inf"), True], ["1", [], {}], [10**400] * 3):
        for row in ({**good, "scores": scores}, {**good, "group": "mlp", "scores": scores}):
            assert layer_widths(replace(bare, trace=(row,))) is not None
        assert layer_widths(replace(hidden_plan((0, 1)), trace=({**good, "group": "hidden", "scores": scores},)))
    nothing = ({**good, "units": 0, "kept": 0, "scores": []}, {"group": "hidden", "units": 0, "kept": 0})
    assert layer_widths(replace(bare, trace=nothing)) is not None
    many = tuple({**good, "layer": n % 9000} for n in range(20_000))
    assert layer_widths(replace(bare, trace=many)) is not None
    odd = replace(bare, trace=(good,), method=Method("x.$\\foo$\ud800\n" + "long" * 50, {}))
    assert layer_widths(replace(odd, base=replace(bare.base, num_layers=10**12))) is not None


def test_steps_count_where_the_trace_is_silent_or_disagrees():
    plan = width_plan((1, "mlp", 8, 4), (2, "mlp", 8, 2))
    disagrees = replace(plan, trace=tuple({**row, "kept": 7} for row in plan.trace))
    assert (drawn(disagrees) == drawn(plan)).all()
    silent = replace(plan, trace=())
    heights = bars(drawn(silent), KEPT)
    assert heights[1] / heights[0] == pytest.approx(0.5, abs=0.02)
    # How many there were is not known: no grey but at the edges of letters.
    assert count(drawn(silent), BEFORE) < 0.01 * count(drawn(plan), BEFORE)
    outside = replace(plan, steps=(KeepChannels(1, "mlp", (-4, 10**9)), KeepChannels(-1, "mlp", (2,))))
    assert layer_widths(outside) is not None
    assert layer_widths(replace(plan, steps=(KeepChannels(1, "mlp", ()),), trace=())) is not None
    assert layer_widths(replace(plan, steps=(KeepHidden(()),), trace=())) is not None


def test_a_plan_that_was_read_has_the_same_picture():
    plan = width_plan((1, "attention", 3, 2), (1, "mlp", 8, 4), scores=True)
    assert layer_widths(Plan.from_dict(json.loads(plan.to_json()), "test")) == layer_widths(plan)
