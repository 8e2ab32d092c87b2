import hashlib
import json

import pytest

from slm_pl.compression.plan import (
    Base,
    Calibration,
    DropLayers,
    MergeLayers,
    Method,
    Plan,
    config_fingerprint,
    count_parameters,
    layer_groups,
    load_plans,
    save_plans,
)
from slm_pl.errors import UsageError
from tests.helpers.pico import pico_model

PLAN = Plan(
    base=Base("some/model", None, "llama", 6, 1000, "ab"),
    method=Method("callbacks.SlidingWindowMerging", {"threshold": 0.72, "skip_last": 1, "ratio": None}),
    calibration=Calibration("embedded", 10, 128, 1234, "cd"),
    steps=(MergeLayers(1, 3), DropLayers((5,))),
    trace=({"low": 1, "high": 3, "similarity": 0.9, "accepted": True},),
    outcome={"threshold": 0.72},
)


def test_the_seal_is_that_of_the_text_or_of_what_it_says(tmp_path):
    path = tmp_path / "plan.json"
    PLAN.save(path)
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data))  # in another form
    assert Plan.load(path) == PLAN
    # As a later version may write it, with an entry that this one does not know.
    later = PLAN.to_json().replace('  "base"', '  "note": 1,\n  "base"')
    sha256 = hashlib.sha256(later.encode()).hexdigest()
    path.write_text(later.removesuffix("\n}\n") + f',\n  "sha256": "{sha256}"\n}}\n')
    assert Plan.load(path) == PLAN
    path.write_text(path.read_text().replace('"note": 1', '"note": 2'))
    with pytest.raises(UsageError, match="plan.json is not as it was written"):
        Plan.load(path)


def test_round_trip_is_byte_for_byte(tmp_path):
    PLAN.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == PLAN
    assert again.file_text.encode() == (tmp_path / "plan.json").read_bytes()
    assert again.sha256 == PLAN.sha256


def test_json_has_the_names_other_programs_read():
    data = json.loads(PLAN.to_json())
    assert data["schema_version"] == 1
    assert data["base"]["num_layers"] == 6
    assert data["method"]["init_args"]["threshold"] == 0.72
    assert data["steps"][0] == {
        "low": 1,
        "high": 3,
        "consolidation": "keep_top",
        "other_parameters": "top",
        "kind": "merge_layers",
    }
    assert data["steps"][1] == {"layers": [5], "kind": "drop_layers"}
    assert data["trace"] == [{"low": 1, "high": 3, "similarity": 0.9, "accepted": True}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema_version=2), "schema_version 2; this slm_pl reads plans of schema_version 1"),
        (lambda d: d.pop("base"), "KeyError: 'base'"),
        (lambda d: d["steps"][0].update(kind="shuffle"), "step of kind 'shuffle', known are"),
        (lambda d: d["steps"][0].update(low="1"), "low is '1', not an integer"),
        (lambda d: d["steps"][0].update(consolidation="magic"), "consolidation is 'magic', allowed are"),
        (lambda d: d["steps"][1].update(layers=[1.5]), "not a list of integers"),
        (lambda d: d["method"].update(init_args=None), "Method.init_args is None, not an object"),
        (lambda d: d["method"].update(init_args=["threshold"]), "not an object"),
        (lambda d: d["base"].pop("num_layers"), "lacks the field 'num_layers'"),
    ],
)
def test_broken_plan_says_what_is_wrong(tmp_path, change, message):
    data = json.loads(PLAN.to_json())
    change(data)
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(UsageError, match=message):
        Plan.load(tmp_path / "plan.json")


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(UsageError, match="There is no plan at"):
        Plan.load(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"schema_version": 1, ')
    with pytest.raises(UsageError, match="cannot be read as a plan"):
        Plan.load(tmp_path / "half.json")


def test_several_plans_keep_their_order(tmp_path):
    from dataclasses import replace

    second = replace(PLAN, outcome={"threshold": 0.5})
    save_plans([PLAN, second], tmp_path)
    assert load_plans(tmp_path) == [PLAN, second]
    assert load_plans(tmp_path / "nowhere") == []


def test_base_describes_the_model():
    model = pico_model(tie_word_embeddings=True)
    base = Base.of(model)
    assert (base.model_type, base.num_layers) == ("llama", 6)
    # Independent count from the shapes: embedding (tied, once) + 6 layers + final norm.
    layer = 32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 32 * 48 + 2 * 32
    assert base.num_parameters == count_parameters(model) == 512 * 32 + 6 * layer + 32


def test_fingerprint_ignores_what_loading_sets_and_sees_the_rest():
    config = pico_model().config.to_dict()
    same = {**config, "_name_or_path": "elsewhere", "dtype": "bfloat16", "transformers_version": "9"}
    assert config_fingerprint(same) == config_fingerprint(config)
    assert config_fingerprint({**config, "hidden_size": 33}) != config_fingerprint(config)


def test_layer_groups_follow_several_plans():
    from dataclasses import replace

    first = replace(PLAN, steps=(MergeLayers(1, 3), DropLayers((5,))))  # 0, 1-3, 4, 6, 7
    second = replace(PLAN, steps=(MergeLayers(0, 1, "keep_bottom"), DropLayers((4,))))
    assert layer_groups([], 3) == [(0,), (1,), (2,)]
    assert layer_groups([first], 8) == [(0,), (1, 2, 3), (4,), (6,), (7,)]
    assert layer_groups([first, second], 8) == [(0, 1, 2, 3), (4,), (6,)]
    endless = replace(PLAN, steps=(MergeLayers(2, 10**15, "keep_bottom"),))
    assert layer_groups([endless], 4) == [(0,), (1,), (2, 3)]


def test_host_is_the_layer_whose_projections_are_kept():
    assert [MergeLayers(2, 5, c).host for c in ("keep_top", "keep_bottom", "sum", "mean")] == [5, 2, 5, 5]
