import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from slm_pl.compression.plan import (
    Base,
    DropLayers,
    KeepChannels,
    KeepHidden,
    MergeLayers,
    Method,
    Plan,
    layer_groups,
    load_plans,
    save_plans,
)
from slm_pl.errors import UsageError

PLAN = Plan(
    base=Base("some/model", None, "llama", 6, 1000, "ab"),
    method=Method("callbacks.FLAP", {"ratio": 0.2}),
    calibration=None,
    steps=(
        KeepChannels(2, "attention", (0, 3)),
        KeepChannels(2, "mlp", (), bias="layer 2 mlp"),
        KeepHidden((0, 5, 7)),
    ),
    trace=({"layer": 2, "group": "mlp", "units": 4, "kept": 0, "scores": [0.5, 1.0, 2.0, 3.5]},),
)
TENSORS = {
    "layer 2 mlp": torch.arange(8.0) / 3,
    "half": torch.full((2, 3), 0.1, dtype=torch.bfloat16).T,  # not contiguous
}
WITH_TENSORS = PLAN.with_tensors(TENSORS)


def test_width_steps_round_trip_byte_for_byte(tmp_path):
    PLAN.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == PLAN
    assert again.steps == PLAN.steps
    assert again.file_text.encode() == (tmp_path / "plan.json").read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    data = json.loads(PLAN.to_json())
    assert data["steps"] == [
        {"layer": 2, "group": "attention", "indices": [0, 3], "bias": None, "kind": "keep_channels"},
        {"layer": 2, "group": "mlp", "indices": [], "bias": "layer 2 mlp", "kind": "keep_channels"},
        {"indices": [0, 5, 7], "kind": "keep_hidden"},
    ]
    assert "tensors" not in data
    assert "tensors_sha256" not in data


def test_tensors_go_beside_the_plan_and_come_back(tmp_path):
    WITH_TENSORS.save(tmp_path / "plan.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.json", "plan.tensors.safetensors"]
    stored = load_file(tmp_path / "plan.tensors.safetensors")
    again = Plan.load(tmp_path / "plan.json")
    assert again == WITH_TENSORS
    assert again.sha256 == WITH_TENSORS.sha256 != PLAN.sha256
    for found in (stored, again.tensors):
        assert found.keys() == TENSORS.keys()
        for name, value in TENSORS.items():
            assert found[name].dtype == value.dtype
            assert torch.equal(found[name], value)
    data = json.loads((tmp_path / "plan.json").read_text())
    assert "tensors" not in data
    assert len(data["tensors_sha256"]) == 64
    assert PLAN.tensors == {}  # with_tensors made another plan


@pytest.mark.parametrize(
    "change",
    [
        lambda t: {**t, "layer 2 mlp": t["layer 2 mlp"] + torch.tensor([0.0] * 7 + [1e-6])},
        lambda t: {**t, "half": t["half"].T},
        lambda t: {**t, "layer 2 mlp": t["layer 2 mlp"].view(torch.int32)},  # the same bytes
        lambda t: {**t, "more": torch.zeros(1)},
        lambda t: {"half": t["half"]},
        lambda t: {"layer 3 mlp": t["layer 2 mlp"], "half": t["half"]},
    ],
    ids=["value", "shape", "type", "added", "removed", "renamed"],
)
def test_identity_covers_the_tensors_and_changed_ones_are_refused(change, tmp_path):
    changed = change(dict(TENSORS))
    assert PLAN.with_tensors(changed).tensors_sha256 != WITH_TENSORS.tensors_sha256
    assert PLAN.with_tensors(changed).sha256 != WITH_TENSORS.sha256
    WITH_TENSORS.save(tmp_path / "plan.json")
    save_file({name: value.contiguous() for name, value in changed.items()}, tmp_path / "plan.tensors.safetensors")
    with pytest.raises(UsageError, match=r"plan\.tensors\.safetensors are not those that the plan beside it was made"):
        Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize("content", [None, b"", b"no safetensors", b"\x08\0\0\0\0\0\0\0{}      half of it"[:12]])
def test_missing_or_broken_tensors_are_refused(content, tmp_path):
    WITH_TENSORS.save(tmp_path / "plan.json")
    file = tmp_path / "plan.tensors.safetensors"
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(
        UsageError, match=r"plan\.tensors\.safetensors, which cannot be read .*Keep both files together"
    ):
        Plan.load(tmp_path / "plan.json")
    # Whoever only shows the plan does without.
    shown = load_plans(tmp_path, tensors=False)
    assert shown == [WITH_TENSORS]
    assert shown[0].sha256 == WITH_TENSORS.sha256
    assert not shown[0].tensors


def test_a_later_plan_leaves_no_tensors_behind(tmp_path):
    WITH_TENSORS.save(tmp_path / "plan.json")
    PLAN.save(tmp_path / "plan.json")
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    assert Plan.load(tmp_path / "plan.json") == PLAN
    WITH_TENSORS.save(tmp_path / "plan.json")
    other = PLAN.with_tensors({"layer 2 mlp": torch.ones(8)})
    other.save(tmp_path / "plan.json")
    assert list(Plan.load(tmp_path / "plan.json").tensors) == ["layer 2 mlp"]


def test_several_plans_keep_their_own_tensors(tmp_path):
    second = replace(PLAN, outcome={"ratio": 0.1}).with_tensors({"layer 2 mlp": torch.ones(8)})
    save_plans([WITH_TENSORS, second, PLAN], tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "plan.2.json",
        "plan.2.tensors.safetensors",
        "plan.3.json",
        "plan.json",
        "plan.tensors.safetensors",
    ]
    plans = load_plans(tmp_path)
    assert plans == [WITH_TENSORS, second, PLAN]
    assert torch.equal(plans[0].tensors["layer 2 mlp"], TENSORS["layer 2 mlp"])
    assert plans[1].tensors["layer 2 mlp"].tolist() == [1.0] * 8
    assert plans[2].tensors == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["steps"][0].update(kind="keep_rows"), "step of kind 'keep_rows', known are .*'keep_channels'"),
        (lambda d: d["steps"][0].update(group="heads"), r"group is 'heads', allowed are \['attention', 'mlp'\]"),
        (lambda d: d["steps"][0].update(layer=True), "KeepChannels.layer is True, not an integer"),
        (lambda d: d["steps"][0].update(layer=2.0), "KeepChannels.layer is 2.0, not an integer"),
        (lambda d: d["steps"][0].update(indices=[0, "3"]), r"indices is \[0, '3'\], not a list of integers"),
        (lambda d: d["steps"][0].update(indices=[0, True]), "not a list of integers"),
        (lambda d: d["steps"][0].update(indices=3), "not a list of integers"),
        (lambda d: d["steps"][0].update(indices=None), "not a list of integers"),
        (lambda d: d["steps"][0].pop("indices"), "KeepChannels lacks the field 'indices'"),
        (lambda d: d["steps"][1].update(bias=7), "KeepChannels.bias is 7, not a string or null"),
        (lambda d: d["steps"][1].update(biases="x"), r"KeepChannels has no field \['biases'\]"),
        (lambda d: d["steps"][2].update(indices=[0.5]), "KeepHidden.indices is .* not a list of integers"),
        (lambda d: d["steps"][2].update(layer=1), r"KeepHidden has no field \['layer'\]"),
        (lambda d: d["steps"].append(["keep_hidden"]), "TypeError"),
    ],
)
def test_broken_width_steps_say_what_is_wrong(change, message, tmp_path):
    data = json.loads(PLAN.to_json())
    change(data)
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(UsageError, match=message):
        Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize("value", [7, ["ab"], True, {}])
def test_a_fingerprint_that_is_no_text_is_refused(value, tmp_path):
    data = json.loads(PLAN.to_json())
    data["tensors_sha256"] = value
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(UsageError, match="tensors"):
        Plan.load(tmp_path / "plan.json")


def test_layer_groups_pass_over_what_only_makes_layers_narrower():
    narrow = (KeepChannels(1, "mlp", (0, 1)), KeepChannels(4, "attention", ()))
    width = replace(PLAN, steps=narrow)
    both = replace(PLAN, steps=(narrow[0], MergeLayers(2, 3), DropLayers((4,))))
    hidden = replace(PLAN, steps=(KeepHidden((0, 1)),))
    assert layer_groups([width], 6) == layer_groups([hidden], 6) == [(n,) for n in range(6)]
    assert layer_groups([both], 6) == [(0,), (1,), (2, 3), (5,)]
    assert layer_groups([width, both, hidden, replace(PLAN, steps=(DropLayers((1,)),))], 6) == [(0,), (2, 3), (5,)]
