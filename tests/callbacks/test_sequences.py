"""A depth and a width method in one run, in either order: real Lightning runs on pico models."""

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from callbacks import FLAP, ExportCheckpoint, LayerRemoval, LLMPruner, Perplexity, SlidingWindowMerging
from slm_pl.compression import surgery
from slm_pl.compression.plan import Base, DropLayers, KeepChannels, MergeLayers, Plan, tensors_file
from slm_pl.data import EvaluationText
from slm_pl.errors import UsageError
from slm_pl.export import load_compressed
from tests.helpers.run import IDS, Snapshot, add_adapters, alpaca_data, logits_of, make_module, make_trainer

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ("plan.json", "plan.2.json")


def merging(**options):
    return SlidingWindowMerging(**{"remove_layers": 2, **options})


def pruning(**options):
    return LLMPruner(**{"ratio": 0.1, "attention_layers": (1, -1), "mlp_layers": (0, -1), **options})


def fluctuation(**options):
    return FLAP(**{"ratio": 0.15, **options})


def removal(**options):
    return LayerRemoval(**{"layers": [1, 3], **options})


SEQUENCES = {
    "merge, then LLM-Pruner": (merging, pruning),
    "LLM-Pruner, then merge": (pruning, merging),
    "FLAP, then remove": (fluctuation, removal),
    "remove, then FLAP": (removal, fluctuation),
    "FLAP, then LLM-Pruner": (fluctuation, pruning),
    "LLM-Pruner twice": (pruning, pruning),
}
STEPS = {"merging": MergeLayers, "pruning": KeepChannels, "fluctuation": KeepChannels, "removal": DropLayers}


def values_of(model):
    return {name: value.tolist() for name, value in model.state_dict().items()}


@pytest.fixture(params=SEQUENCES.values(), ids=SEQUENCES.keys())
def pruned(request, pico_dir, tmp_path):
    """A run of two methods with its export: the methods, and the module with the model in memory."""
    module = make_module(pico_dir)
    methods = [make() for make in request.param]
    export = ExportCheckpoint(str(tmp_path / "export"))
    make_trainer(tmp_path / "run", *methods, export).prune(module, alpaca_data(tmp_path))
    return request.param, module


def test_two_methods_in_sequence(pruned, pico_dir, tmp_path):
    makers, module = pruned
    model = module.load_model()

    # Each plan describes the model that it was computed on, and stands in its place.
    dense = AutoModelForCausalLM.from_pretrained(pico_dir)
    for directory in (tmp_path / "run", tmp_path / "export"):
        assert sorted(path.name for path in directory.glob("plan*.json")) == sorted(NAMES)
        assert [(directory / name).read_text() for name in NAMES] == [plan.file_text for plan in module.plans]
    first, second = (Plan.load(tmp_path / "run" / name) for name in NAMES)
    assert [type(plan.steps[0]) for plan in (first, second)] == [STEPS[make.__name__] for make in makers]
    assert [plan.method.class_path for plan in (first, second)] == [make().class_path for make in makers]
    assert first.base == Base.of(dense)
    surgery.apply(dense, first)
    assert second.base == Base.of(dense)
    assert second.base.num_layers == len(dense.model.layers)
    assert second.base.num_parameters == sum(p.numel() for p in dense.parameters())
    assert (second.base.num_layers, second.base.num_parameters) != (6, first.base.num_parameters)
    surgery.apply(dense, second)
    assert values_of(dense) == values_of(model)
    for plan, make in zip((first, second), makers, strict=True):
        assert bool(plan.tensors) == (make is fluctuation)
        steps = [step for step in plan.steps if isinstance(step, KeepChannels)]
        assert all((step.bias is not None) == (make is fluctuation) for step in steps)
    assert [tensors_file(tmp_path / "export" / name).is_file() for name in NAMES] == [
        make is fluctuation for make in makers
    ]

    # The export is the model, with the code it brings and without.
    export = tmp_path / "export"
    theirs = AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True).eval()
    ours, _, plans = load_compressed(export)
    assert plans == [first, second]
    assert values_of(theirs) == values_of(ours) == values_of(model)
    assert torch.equal(logits_of(theirs), logits_of(model))
    assert torch.equal(logits_of(ours), logits_of(model))
    layers = model.config.num_hidden_layers
    assert len(model.config.layer_widths) == len(theirs.model.layers) == layers
    assert [layer.self_attn.layer_idx for layer in theirs.model.layers] == list(range(layers))
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    longer = [theirs.generate(IDS[:1], use_cache=use, **options) for use in (True, False)]
    assert torch.equal(*longer)


def test_the_plans_of_a_sequence_can_be_applied_again_each_by_its_callback(pruned, pico_dir, tmp_path):
    makers, module = pruned
    for directory in ("run", "export"):
        paths = [str(tmp_path / directory / name) for name in NAMES]
        again = make_module(pico_dir)
        methods = [type(make())(plan_path=path) for make, path in zip(makers, paths, strict=True)]
        # No calibration text is needed: predict runs without the data module.
        trainer = make_trainer(tmp_path / f"again_{directory}", *methods, limit_predict_batches=0)
        trainer.predict(again, torch.utils.data.DataLoader([{"prompt": "a"}]))
        assert values_of(again.load_model()) == values_of(module.load_model())
        for name in NAMES:
            for of in (lambda path: path, tensors_file):
                written, given = of(tmp_path / f"again_{directory}" / name), of(tmp_path / directory / name)
                assert written.is_file() == given.is_file()
                assert not given.is_file() or written.read_bytes() == given.read_bytes()


def test_an_export_of_two_methods_is_not_compressed_again(pruned, pico_dir, tmp_path):
    makers, module = pruned
    again = make_module(tmp_path / "export")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not compressed again.*")
        make_trainer(tmp_path / "again", *(make() for make in makers)).test(again, alpaca_data(tmp_path), verbose=False)
    assert values_of(again.load_model()) == values_of(module.load_model())
    assert again.plans == module.plans
    assert not list((tmp_path / "again").glob("plan*"))


def test_a_plan_whose_tensors_are_not_beside_it_is_refused(pico_dir, tmp_path):
    make_trainer(tmp_path / "run", fluctuation()).prune(make_module(pico_dir), alpaca_data(tmp_path))
    shutil.copy(tmp_path / "run" / "plan.json", tmp_path / "alone.json")
    tensors = load_file(tmp_path / "run" / "plan.tensors.safetensors")
    plan = Plan.load(tmp_path / "run" / "plan.json")
    assert sorted(tensors) == sorted(step.bias for step in plan.steps)
    module = make_module(pico_dir)
    with pytest.raises(UsageError, match="alone.tensors.safetensors"):
        make_trainer(tmp_path / "again", FLAP(plan_path=str(tmp_path / "alone.json"))).prune(
            module, alpaca_data(tmp_path)
        )
    assert not (tmp_path / "again").exists()
    assert module.load_model().config.num_hidden_layers == 6
    assert not hasattr(module.load_model().config, "layer_widths")


@pytest.mark.parametrize("empty", [False, True])
def test_recovery_of_layers_that_differ_in_width(empty, pico_dir, tmp_path):
    # So few are to stay that whole layers lose their attention; a constant stands for it.
    method = fluctuation(ratio=0.45, allow_empty=True) if empty else fluctuation()
    seen = Snapshot()
    export = ExportCheckpoint(str(tmp_path / "recovered"), compressed_dir=str(tmp_path / "pruned"))
    module = make_module(pico_dir)
    trainer = make_trainer(tmp_path / "run", method, removal(layers=[4]), export, seen)
    trainer.fit(module, alpaca_data(tmp_path))

    expected, _, plans = load_compressed(tmp_path / "pruned")
    pruned = logits_of(expected)
    widths = [(entry.get("attention"), entry.get("mlp")) for entry in expected.config.layer_widths]
    assert len(widths) == 5
    assert len(set(widths)) > 1
    assert (0 in {attention for attention, _ in widths}) == empty
    # Nothing but adapters was trained, on every projection that is left. Of two steps, the first is warm-up, with a
    # learning rate of zero, and while B is zero, A has no gradient.
    assert all("lora_" in name for name in seen.trainable)
    projections = sum(isinstance(m, torch.nn.Linear) and m.in_features > 0 for m in expected.model.layers.modules())
    assert len(seen.trainable) == 2 * projections
    changed = [name for name, value in seen.after.items() if not torch.equal(value, seen.before[name])]
    assert changed
    assert set(changed) == {name for name in seen.trainable if "lora_B" in name}
    add_adapters(expected, seen.after, scale=8 / 2)
    for recovered in (
        load_compressed(tmp_path / "recovered")[0],
        AutoModelForCausalLM.from_pretrained(tmp_path / "recovered", trust_remote_code=True),
    ):
        torch.testing.assert_close(logits_of(recovered), logits_of(expected), rtol=0, atol=1e-5)
        assert torch.equal(logits_of(recovered), logits_of(module.load_model()))
        assert (logits_of(recovered) - pruned).abs().max() > 1e-3  # training changed something
    assert [plan.file_text for plan in plans] == [(tmp_path / "run" / name).read_text() for name in NAMES]
    assert load_compressed(tmp_path / "recovered")[2] == plans
    assert "Recovered by training" in (tmp_path / "recovered" / "README.md").read_text()


def test_an_export_of_unequal_layers_is_measured_without_its_own_code(pico_dir, tmp_path):
    text = EvaluationText(sequence_length=16, max_tokens=96)
    module = make_module(pico_dir)
    export = ExportCheckpoint(str(tmp_path / "export"))
    make_trainer(tmp_path / "prune", fluctuation(), removal(), export).prune(module, alpaca_data(tmp_path))
    assert (tmp_path / "export" / "modeling_pruned.py").is_file()

    def measured(name, pretrained, *methods):
        trainer = make_trainer(tmp_path / name, *methods, Perplexity([text]))
        trainer.test(make_module(pretrained), alpaca_data(tmp_path), verbose=False)
        return json.loads((tmp_path / name / "results.json").read_text())

    exported = measured("exported", tmp_path / "export")
    at_once = measured("at_once", pico_dir, fluctuation(), removal())
    dense = measured("dense", pico_dir)
    assert exported["perplexity"] == at_once["perplexity"] != dense["perplexity"]
    assert exported["perplexity"][0]["tokens"] == 90  # six windows; nothing predicts a first token
    assert exported["missing"] == {}
    for key in ("num_layers", "num_parameters", "plan_sha256", "base"):
        assert exported["model"][key] == at_once["model"][key]
    assert exported["model"]["num_layers"] == 4
    assert exported["model"]["num_parameters"] == sum(p.numel() for p in module.load_model().parameters())
    assert dense["model"]["num_parameters"] > exported["model"]["num_parameters"]
