import dataclasses

import pytest

from slm_pl.compression.fates import LayerFate, Width, hidden_width, layer_fates
from slm_pl.compression.plan import (
    Base,
    DropLayers,
    KeepChannels,
    KeepHidden,
    MergeLayers,
    Method,
    Plan,
    RefitOutput,
    layer_groups,
)
from slm_pl.errors import UsageError


def plan(layers, *steps, trace=()):
    return Plan(Base("m", None, "llama", layers, 1000, "x"), Method("m", {}), None, steps, tuple(trace))


def test_windows_and_drops_of_several_plans_are_told_by_the_dense_numbers():
    plans = [
        plan(10, MergeLayers(1, 3), DropLayers((5,)), MergeLayers(7, 8, "keep_bottom")),
        plan(6, MergeLayers(2, 3), DropLayers((4,))),  # its layers: 0, 1-3, 4, 6, 7-8, 9
    ]
    fates = layer_fates(plans, before=list(range(100, 110)), after=[10, 20, 30, 40])
    assert [(f.layer, f.fate, f.now, f.window, f.host) for f in fates] == [
        (0, "kept", 0, (0,), 0),
        (1, "merged", 1, (1, 2, 3), 3),
        (2, "merged", 1, (1, 2, 3), 3),
        (3, "merged", 1, (1, 2, 3), 3),
        (4, "merged", 2, (4, 6), 6),
        (5, "removed", None, (5,), 5),
        (6, "merged", 2, (4, 6), 6),
        (7, "removed", None, (7, 8), 7),
        (8, "removed", None, (7, 8), 7),
        (9, "kept", 3, (9,), 9),
    ]
    assert [f.before for f in fates] == list(range(100, 110))
    assert [f.after for f in fates] == [10, 0, 0, 20, 0, 0, 30, 0, 0, 40]
    groups = layer_groups(plans, 10)  # by another way
    assert [tuple(f.layer for f in fates if f.now == now) for now in range(4)] == groups


def test_widths_and_refits_go_with_the_layer_that_stays():
    rows = [{"layer": 2, "group": "mlp", "units": 48, "kept": 30}, {"layer": 3, "group": "mlp", "units": "many"}]
    plans = [
        plan(
            5,
            KeepChannels(2, "mlp", tuple(range(30))),
            KeepChannels(3, "mlp", tuple(range(20))),
            KeepChannels(4, "attention", ()),
            trace=rows,
        ),
        plan(5, MergeLayers(1, 2), DropLayers((0,)), RefitOutput(2, "mlp", "w")),
        plan(3, KeepChannels(0, "mlp", tuple(range(12))), trace=[{"layer": 0, "group": "mlp", "units": 30}]),
    ]
    fates = layer_fates(plans)
    assert [f.widths for f in fates] == [
        {},
        {},
        {"mlp": Width(12, 48)},  # of the dense model's
        {"mlp": Width(20, None)},
        {"attention": Width(0, None)},
    ]
    assert [f.refitted for f in fates] == [(), (), ("mlp",), (), ()]
    assert fates[2].widths["mlp"].share == 0.25
    assert fates[3].widths["mlp"].share is None
    assert [f.after for f in fates] == [0, 0, None, None, None]
    assert dataclasses.asdict(LayerFate(0, "kept", 0, (0,), 0))["before"] is None


def test_hidden_state():
    assert hidden_width([plan(3, DropLayers((1,)))]) is None
    rows = [{"group": "hidden", "units": 32, "kept": 24}]
    assert hidden_width([plan(3, KeepHidden(tuple(range(24))), trace=rows)]) == Width(24, 32)
    assert hidden_width([plan(3, KeepHidden(tuple(range(40))), trace=rows)]) == Width(40, None)


@pytest.mark.parametrize(
    ("plans", "message"),
    [
        ([plan(4, DropLayers((1,))), plan(4)], "Plan 2 .* 4 layers, and the plans before it leave 3"),
        ([plan(4, DropLayers((4,)))], "names layer 4"),
        ([plan(4, DropLayers((1, 1)))], "names layer 1, .* twice"),
        ([plan(4, MergeLayers(-1, 2))], "names layer -1"),
        ([plan(4, MergeLayers(1, 10**12))], "names layer 4"),
        ([plan(4, MergeLayers(2, 2))], "not two layers"),
        ([plan(4, MergeLayers(3, 2))], "not two layers"),
        ([plan(4, MergeLayers(1, 2), RefitOutput(1, "mlp", "w"))], "names layer 1"),
        ([plan(10**9)], "1000000000 layers"),
        ([plan(0)], "0 layers"),
    ],
)
def test_plans_that_cannot_be(plans, message):
    with pytest.raises(UsageError, match=message):
        layer_fates(plans)


def test_figures_of_another_model():
    with pytest.raises(UsageError, match="3 layers' parameters before, and 4 layers"):
        layer_fates([plan(4, DropLayers((0,)))], [1, 1, 1], None)
    with pytest.raises(UsageError, match="4 layers' parameters after, and 3 layers"):
        layer_fates([plan(4, DropLayers((0,)))], None, [1, 1, 1, 1])
