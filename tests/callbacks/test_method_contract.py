"""Holds every compression method to the contract: one walk over the subclasses, no list of names."""

import importlib
import inspect
import json
import pkgutil

import pytest
import torch
from transformers import AutoModelForCausalLM

import callbacks
from callbacks import CompressionCallback
from slm_pl.compression import surgery
from slm_pl.compression.architecture import ARCHITECTURES
from slm_pl.compression.plan import Plan
from slm_pl.data import CalibrationText
from slm_pl.data.corpora import CalibrationSet
from slm_pl.errors import UsageError
from tests.helpers.pico import pico_model

for module in pkgutil.iter_modules(callbacks.__path__):
    importlib.import_module(f"callbacks.{module.name}")
METHODS = sorted(
    (m for m in CompressionCallback.__subclasses__() if m.__module__.startswith("callbacks.")), key=lambda m: m.__name__
)
# How to ask each method for a model two layers smaller, in every variant that changes weights differently.
ARGUMENTS = {
    "BlockInfluence": [
        {"remove_layers": 2, "distance": "cosine"},
        {"remove_layers": 2, "distance": "angular"},
    ],
    "LayerRemoval": [
        {"layers": [4, 1]},
        {"order": "reverse", "remove_layers": 2},
        {"order": "random", "remove_layers": 2},
    ],
    "SLEB": [{"remove_layers": 2}],
    "ShortenedLLaMA": [
        {"remove_layers": 2, "criterion": "perplexity", "protect_first": 1, "protect_last": 1},
        {"remove_layers": 2, "criterion": "taylor", "protect_first": 1, "protect_last": 1},
        {"remove_layers": 2, "criterion": "taylor", "protect_first": 0, "one_shot": False, "per_sample": True},
        {"remove_layers": 2, "criterion": "magnitude", "protect_first": 1, "norm_power": 2},
    ],
    "SlidingWindowMerging": [
        {"remove_layers": 2, "consolidation": "keep_top", "other_parameters": "top"},
        {"remove_layers": 2, "consolidation": "keep_bottom", "other_parameters": "bottom"},
        {"remove_layers": 2, "consolidation": "sum", "other_parameters": "mean", "similarity": "cka"},
        {"remove_layers": 2, "consolidation": "mean", "other_parameters": "mean"},
    ],
}
VARIANTS = [(method, arguments) for method in METHODS for arguments in ARGUMENTS[method.__name__]]
VARIANT_NAMES = [f"{method.__name__}-{'-'.join(map(str, arguments.values()))}" for method, arguments in VARIANTS]
WITH_EXPERTS = ("mixtral", "qwen3_moe")
IDS = torch.randint(3, 512, (3, 24), generator=torch.Generator().manual_seed(1))
CALIBRATION = CalibrationSet.from_ids(IDS.tolist(), CalibrationText(source="ids", samples=3, sequence_length=24))


@pytest.mark.parametrize("method", METHODS)
def test_signature_is_the_configuration(method):
    for parameter in inspect.signature(method).parameters.values():
        assert parameter.kind is parameter.POSITIONAL_OR_KEYWORD, parameter
        assert parameter.default is not parameter.empty, parameter
        assert parameter.annotation is not parameter.empty, parameter
    assert "plan_path" in inspect.signature(method).parameters
    instance = method(**ARGUMENTS[method.__name__][0])
    assert json.loads(json.dumps(instance.arguments())) == instance.arguments()
    assert getattr(callbacks, method.__name__) is method
    assert instance.class_path == f"callbacks.{method.__name__}"
    doc = inspect.getdoc(method) or ""
    assert "https://arxiv.org/abs/" in doc
    assert f"class_path: callbacks.{method.__name__}" in doc
    assert "Args:" in doc


@pytest.mark.parametrize(("method", "arguments"), VARIANTS, ids=VARIANT_NAMES)
@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_plan_decides_and_surgery_makes_a_model_that_loads_anywhere(method, arguments, model_type, tmp_path):
    model = pico_model(model_type)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.get_input_embeddings().weight.requires_grad_(False)
    trainable = [p.requires_grad for p in model.parameters()]
    callback = method(**arguments)
    if model_type in WITH_EXPERTS and arguments.get("consolidation") in ("sum", "mean"):
        with pytest.raises(UsageError, match="has experts"):
            callback.plan(model, CALIBRATION)
        return
    with torch.no_grad():
        plan = callback.plan(model, CALIBRATION)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert callback.plan(model, CALIBRATION).to_json() == plan.to_json()
    assert Plan.from_dict(json.loads(plan.to_json()), "the plan") == plan
    assert plan.base.num_layers == 6
    assert (plan.calibration and plan.calibration.sha256) == (CALIBRATION.sha256 if callback.uses_calibration else None)
    assert bool(plan.trace) == (method is not callbacks.LayerRemoval)  # which tries nothing
    assert plan.outcome["removed_layers"] == 2
    assert {name: plan.method.init_args[name] for name in arguments} == arguments

    surgery.apply(model, plan)
    assert model.config.num_hidden_layers == 4
    with torch.inference_mode():
        logits = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        assert torch.equal(loaded(input_ids=IDS).logits, logits)
        options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
        assert torch.equal(
            loaded.generate(IDS[:1], use_cache=True, **options), loaded.generate(IDS[:1], use_cache=False, **options)
        )
