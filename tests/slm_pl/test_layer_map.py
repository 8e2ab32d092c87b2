import json
import re

import pytest

from slm_pl.compression import surgery
from slm_pl.compression.plan import Base, DropLayers, KeepChannels, MergeLayers, Method, Plan, load_plans
from slm_pl.export import save_compressed
from slm_pl.layer_map import layer_map, layer_parameters, load_dense_layers, load_sizes
from tests.helpers.pico import pico_model
from tests.helpers.tokenizer import pico_tokenizer

ATTENTION, CHANNEL, NORMS = 2 * 32 * 32 + 2 * 16 * 32, 3 * 32, 2 * 32  # of a pico Llama's layer
LAYER = ATTENTION + 48 * CHANNEL + NORMS


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Two plans in sequence: a merge and a drop, then a narrower layer 1, the dense model's 3."""
    model = pico_model()
    dense = layer_parameters(model)
    steps = (MergeLayers(1, 3), DropLayers((4,)))
    plans = [Plan(Base.of(model), Method("x", {}), None, steps)]
    surgery.apply(model, plans[0])
    row = {"layer": 1, "group": "mlp", "units": 48, "kept": 12}
    plans.append(Plan(Base.of(model), Method("x", {}), None, (KeepChannels(1, "mlp", tuple(range(12))),), (row,)))
    surgery.apply(model, plans[1])
    directory = tmp_path_factory.mktemp("map") / "export"
    save_compressed(model, pico_tokenizer(), directory, plans, False, dense_layers=dense)
    return directory, plans


def texts(svg: bytes) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg.decode())


def test_the_table_says_what_each_layer_had_and_has(exported):
    directory, plans = exported
    table = json.loads((directory / "layer_map.json").read_text())
    assert [(one["before"], one["after"]) for one in table["layers"]] == [
        (LAYER, LAYER),
        (LAYER, 0),
        (LAYER, 0),
        (LAYER, LAYER - 36 * CHANNEL),
        (LAYER, 0),
        (LAYER, LAYER),
    ]
    assert [one["now"] for one in table["layers"]] == [0, 1, 1, 1, None, 2]
    assert load_sizes(directory, plans) == ([LAYER] * 6, [LAYER, LAYER - 36 * CHANNEL, LAYER])
    assert load_dense_layers(directory, plans) == [LAYER] * 6
    assert load_dense_layers(directory, plans[:1]) is None


def test_the_picture_says_it_in_text(exported):
    directory, _ = exported
    svg = (directory / "layer_map.svg").read_bytes()
    found = texts(svg)
    before, after = (f"{count:,}" if count < 10_000 else f"{count / 1000:.4g} K" for count in (LAYER, LAYER - 3456))
    assert found.count("merged into 3") == 2
    assert found.count("removed") == 1
    assert "layer 1, of 1–3" in found
    assert "25%" in found
    assert found.count(f"{before} → 0") == 3
    assert f"{before} → {after}" in found
    assert any(text.startswith("6 → 3 layers") for text in found)
    assert b"<date>" not in svg
    assert b"dc:date" not in svg
    assert (directory / "layer_map.png").read_bytes().startswith(b"\x89PNG")
    sums = (directory / "slm_pl.sha256").read_text()
    assert "layer_map.json" in sums
    assert "layer_map.svg" not in sums
    assert "layer_map.png" not in sums


def test_the_same_bytes_again(exported):
    _, plans = exported
    assert layer_map(plans) == layer_map(plans)
    assert layer_map([]) == {}
    assert "How many parameters the dense model's layers had was not recorded." in texts(
        layer_map(plans)["layer_map.svg"]
    )


@pytest.mark.parametrize(
    "change",
    [
        b"not JSON",
        b"[]",
        {"schema_version": 2},
        {"plan_sha256": ["0" * 64]},
        {"parameters_before": [1, 2]},
        {"parameters_after": [10] * 7},
    ],
)
def test_a_damaged_table_only_costs_the_figures(exported, change, tmp_path):
    directory, plans = exported
    data = json.loads((directory / "layer_map.json").read_text())
    content = change if isinstance(change, bytes) else json.dumps({**data, **change}).encode()
    (tmp_path / "layer_map.json").write_bytes(content)
    assert load_sizes(tmp_path, plans) == (None, None)


@pytest.mark.parametrize("value", [[LAYER * 10**6] * 6, [-1] * 6, ["1"] * 6, 3, None])
def test_figures_that_cannot_be_are_not_known(exported, value, tmp_path):
    directory, plans = exported
    data = json.loads((directory / "layer_map.json").read_text())
    (tmp_path / "layer_map.json").write_text(json.dumps({**data, "parameters_before": value}))
    assert load_sizes(tmp_path, plans) == (None, data["parameters_after"])


def test_map_of_a_directory(exported, tmp_path):
    directory, plans = exported
    assert layer_map([], *load_sizes(tmp_path, [])) == {}
    drawn = layer_map(load_plans(directory, tensors=False), *load_sizes(directory, plans))
    assert set(drawn) == {"layer_map.svg", "layer_map.png"}
    assert "25%" in texts(drawn["layer_map.svg"])
