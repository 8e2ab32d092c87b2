"""Holds every compression method to the contract: one walk over the subclasses, no list of names."""

import functools
import importlib
import inspect
import json
import pkgutil
import re
import sys
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import callbacks
from callbacks import CompressionCallback
from callbacks.base import citations
from slm_pl.compression import surgery
from slm_pl.compression.architecture import ARCHITECTURES
from slm_pl.compression.plan import Base, KeepChannels, KeepHidden, Method, Plan, RefitOutput, count_parameters
from slm_pl.data import CalibrationText
from slm_pl.data.corpora import CalibrationSet
from slm_pl.errors import UsageError
from slm_pl.export import load_compressed, save_compressed
from tests.helpers.pico import pico_model
from tests.helpers.tokenizer import pico_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

for module in pkgutil.iter_modules(callbacks.__path__):
    importlib.import_module(f"callbacks.{module.name}")
METHODS = sorted(
    (m for m in CompressionCallback.__subclasses__() if m.__module__.startswith("callbacks.")), key=lambda m: m.__name__
)
# How to ask each depth method for a model two layers smaller, in every variant that changes weights differently.
DEPTH = {
    "BlockInfluence": [
        {"remove_layers": 2, "distance": "cosine"},
        {"remove_layers": 2, "distance": "angular"},
        {"remove_layers": 2, "distance": "angular", "consolidation": "least_squares"},
    ],
    "LayerRemoval": [
        {"layers": [4, 1]},
        {"layers": [4, 1], "consolidation": "least_squares"},
        {"order": "reverse", "remove_layers": 2},
        {"order": "random", "remove_layers": 2},
    ],
    "SLEB": [{"remove_layers": 2}, {"remove_layers": 2, "consolidation": "least_squares"}],
    "ShortenedLLaMA": [
        {"remove_layers": 2, "criterion": "perplexity", "protect_first": 1, "protect_last": 1},
        {"remove_layers": 2, "criterion": "taylor", "protect_first": 1, "protect_last": 1},
        {"remove_layers": 2, "criterion": "taylor", "protect_first": 0, "one_shot": False, "per_sample": True},
        {"remove_layers": 2, "criterion": "magnitude", "protect_first": 1, "norm_power": 2},
        {"remove_layers": 2, "criterion": "magnitude", "protect_first": 0, "consolidation": "least_squares"},
    ],
    "SlidingWindowMerging": [
        {"remove_layers": 2, "consolidation": "keep_top", "other_parameters": "top"},
        {"remove_layers": 2, "consolidation": "keep_bottom", "other_parameters": "bottom"},
        {"remove_layers": 2, "consolidation": "sum", "other_parameters": "mean", "similarity": "cka"},
        {"remove_layers": 2, "consolidation": "mean", "other_parameters": "mean"},
        {"remove_layers": 2, "consolidation": "least_squares"},
        {"remove_layers": 2, "consolidation": "least_squares", "search": "best_first", "similarity": "kl"},
    ],
}
# The same for narrower models. A pico model has two KV groups in a layer, so half of them is the least that can go.
ATTENTION, MLP = {"attention_layers": [1, -1]}, {"mlp_layers": [0, None]}
BOTH = {**ATTENTION, **MLP}
WIDTH = {
    "FLAP": [
        {"ratio": 0.15},
        {"ratio": 0.15, "structure": "AL-MM", "metric": "IFV"},
        {"ratio": 0.15, "structure": "UL-UM", "metric": "WIFN"},
        {"ratio": 0.25, "structure": "UL-MM", "attention_ratio": 0.3},
        {"ratio": 0.15, "bias_compensation": False},
        {"ratio": 0.15, "as_published": True},
    ],
    "LLMPruner": [
        {"ratio": 0.15, **BOTH},
        {"ratio": 0.25, "taylor": "param_mix", "grouping": "mean", **BOTH},
        {"ratio": 0.15, "taylor": "vectorize", "grouping": "max", **BOTH},
        {"ratio": 0.25, "importance": "magnitude", "grouping": "last", **BOTH},
        {"ratio": 0.15, "importance": "random", **BOTH},
        {"ratio": 0.15, "global_ranking": True, **BOTH},
        {"ratio": 0.25, "iterative_steps": 2, **BOTH},
        {"layer_ratio": 0.5, "as_published": True, **BOTH},
        {"layer_ratio": 0.5, **ATTENTION, "mlp_layers": None},
        {"layer_ratio": 0.25, **MLP, "attention_layers": None},
        {"ratio": 0.3, "uniform": True},
        {"ratio": 0.15, "scope": "channel"},
        {"ratio": 0.15, "scope": "channel", "importance": "magnitude"},
    ],
    "WandaStructured": [{"ratio": 0.15}],
}
# Of these, the ones whose models differ in what their files have to say: some widths or all, with biases or without.
EXPORTED = (
    {"ratio": 0.15},  # of FLAP and WandaStructured
    {"ratio": 0.25, "structure": "UL-MM", "attention_ratio": 0.3},
    {"ratio": 0.15, "global_ranking": True, **BOTH},
    {"layer_ratio": 0.5, **ATTENTION, "mlp_layers": None},
    {"ratio": 0.3, "uniform": True},
    {"ratio": 0.15, "scope": "channel", "importance": "magnitude"},
)
# Of the ratios above, what such a model can lose of its attention and MLPs: one of experts, or where uniform has only
# MLPs to narrow.
SHARES = {"mixtral": 0.12, "gpt_neox": 0.6, "opt": 0.6}


def variants(table):
    return [
        pytest.param(method, arguments, id=f"{method.__name__}-{'-'.join(map(str, arguments.values()))}")
        for method in METHODS
        for arguments in table.get(method.__name__, [])
    ]


ALL = variants(DEPTH | WIDTH)
WITH_EXPERTS = ("mixtral", "qwen3_moe")
FIXED_HEADS = ("bloom",)  # ALiBi
ONLY_EXPERTS = ("mixtral",)
DERIVED_HEAD_SIZE = ("bloom", "gpt_neox", "opt")  # hidden size / heads, in the config
EVERY_HEAD = ("bloom", "gpt_neox", "opt")  # no grouped queries: a unit is a head
WHOLE_HEADS = ("gemma2", "gemma3_text", "llama")  # their configs want a hidden size of a multiple of the heads
IDS = torch.randint(3, 512, (2, 16), generator=torch.Generator().manual_seed(1))
CALIBRATION = CalibrationSet.from_ids(IDS.tolist(), CalibrationText(source="ids", samples=2, sequence_length=16))
FITTED = torch.randint(3, 512, (16, 24), generator=torch.Generator().manual_seed(2))
FITTING = CalibrationSet.from_ids(FITTED.tolist(), CalibrationText(source="ids", samples=16, sequence_length=24))
HIDDEN, HEAD, CHANNELS = 32, 8, 48  # of tests/helpers/pico.py


@functools.cache
def dense(model_type: str) -> PreTrainedModel:
    """Only read; the contract test sees to it."""
    model = pico_model(model_type)
    model.get_input_embeddings().weight.requires_grad_(False)
    return model


def make(method, arguments, model_type):
    given = {**arguments}
    if model_type in SHARES and "ratio" in given and "scope" not in given:
        given["ratio"] *= SHARES[model_type]
    return method(**given)


PLANS: dict[tuple[str, str], tuple[Plan | UsageError, list[str]]] = {}


def planned(method, arguments, model_type) -> tuple[Plan | UsageError, list[str]]:
    """What a method says of a model: its plan or its refusal, and what it warns of. Two tests look at it."""
    key = f"{method.__name__} {arguments}", model_type
    if key not in PLANS:
        with warnings.catch_warnings(record=True) as seen, torch.no_grad():
            warnings.simplefilter("always")
            try:
                found = make(method, arguments, model_type).decide(dense(model_type), CALIBRATION, FITTING)
            except UsageError as error:
                found = error
        PLANS[key] = found, [str(warning.message) for warning in seen]
    return PLANS[key]


def refusal(method, arguments, model_type) -> str | None:
    """Why a method has to refuse a model, if it has to."""
    if arguments.get("consolidation") in ("sum", "mean") and model_type in WITH_EXPERTS:
        return "has experts"
    if method is callbacks.LLMPruner and not pruned_groups(method, arguments, model_type):
        return f"Nothing of this {model_type} model can be pruned with attention_layers"
    return None


def pruned_groups(method, arguments, model_type) -> dict[str, str | None]:
    """By group of a width method that is asked for and can be pruned: which layers, as a slice."""
    if arguments.get("scope") == "channel":
        return {"hidden": None}
    everywhere = method is not callbacks.LLMPruner or arguments.get("uniform")
    groups = {
        "attention": (0, None) if everywhere else arguments["attention_layers"],
        "mlp": (0, None) if everywhere else arguments["mlp_layers"],
    }
    if model_type in FIXED_HEADS or arguments.get("uniform") and model_type in DERIVED_HEAD_SIZE:
        groups["attention"] = None
    if model_type in ONLY_EXPERTS or arguments.get("uniform") and model_type == "bloom":
        groups["mlp"] = None
    return {group: slice(*bounds) for group, bounds in groups.items() if bounds is not None}


def expected_warnings(method, arguments, model_type) -> list[str]:
    if method is not callbacks.LLMPruner or arguments.get("scope") == "channel":
        return []
    found = []
    there = pruned_groups(method, arguments, model_type)
    for group in ("attention", "mlp"):
        if group in there or arguments.get(f"{group}_layers", ()) is None:
            continue
        if arguments.get("uniform") and model_type in DERIVED_HEAD_SIZE:
            found.append(f"{group} keeps its width: the config of a {model_type} model cannot say another one")
        else:
            reason = "position biases (ALiBi) go by" if group == "attention" else "layers have experts"
            found.append(f"{group} of this model keeps its width: its {reason}")
    return found


@pytest.mark.parametrize("method", METHODS)
def test_signature_is_the_configuration(method):
    for parameter in inspect.signature(method).parameters.values():
        assert parameter.kind is parameter.POSITIONAL_OR_KEYWORD, parameter
        assert parameter.default is not parameter.empty, parameter
        assert parameter.annotation is not parameter.empty, parameter
    assert "plan_path" in inspect.signature(method).parameters
    assert (method.__name__ in DEPTH) != (method.__name__ in WIDTH), "say above what to ask of it"
    for arguments in (DEPTH | WIDTH)[method.__name__]:
        instance = method(**arguments)
        assert json.loads(json.dumps(instance.arguments())) == instance.arguments()
    assert getattr(callbacks, method.__name__) is method
    assert instance.class_path == f"callbacks.{method.__name__}"
    doc = inspect.getdoc(method) or ""
    assert "https://arxiv.org/abs/" in doc
    assert f"class_path: callbacks.{method.__name__}" in doc
    assert "Args:" in doc


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
@pytest.mark.parametrize(("method", "arguments"), ALL)
def test_a_plan_is_a_decision_and_nothing_else(method, arguments, model_type, tmp_path):
    model = dense(model_type)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    config = model.config.to_dict()
    trainable = [p.requires_grad for p in model.parameters()]
    assert sorted(set(trainable)) == [False, True]
    plan, warned = planned(method, arguments, model_type)
    callback = make(method, arguments, model_type)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.config.to_dict() == config
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    expected = expected_warnings(method, arguments, model_type)
    assert len(warned) == len(expected)
    assert all(message in text for message, text in zip(expected, warned, strict=True)), warned
    if (reason := refusal(method, arguments, model_type)) is not None:
        assert isinstance(plan, UsageError)
        assert reason in str(plan)
        return
    if isinstance(plan, UsageError):
        if "attention_ratio" in arguments:  # one group alone cannot have a share of its own
            assert model_type in FIXED_HEADS or model_type in ONLY_EXPERTS
            assert "of this model only" in str(plan)
            return
        assert arguments.get("scope") == "channel"
        assert model_type in DERIVED_HEAD_SIZE
        assert f"The hidden state of a {model_type} model cannot be made narrower" in str(plan)
        return
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = callback.decide(model, CALIBRATION, FITTING)
    assert again.to_json() == plan.to_json()
    assert Plan.from_dict(json.loads(plan.to_json()), "the plan") == plan
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert {name: value.tolist() for name, value in loaded.tensors.items()} == {
        name: value.tolist() for name, value in plan.tensors.items()
    }
    assert (plan.base.num_layers, plan.base.num_parameters) == (6, count_parameters(model))
    assert (plan.calibration and plan.calibration.sha256) == (CALIBRATION.sha256 if callback.uses_calibration else None)
    assert bool(plan.trace) == (method is not callbacks.LayerRemoval)  # which tries nothing
    given = {name: plan.method.init_args[name] for name in arguments}
    assert given == {name: getattr(callback, name) for name in arguments}
    assert {**given, "ratio": arguments.get("ratio")} == {"ratio": None, **arguments}


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
@pytest.mark.parametrize(("method", "arguments"), variants(DEPTH))
def test_a_model_of_fewer_layers_loads_anywhere(method, arguments, model_type, tmp_path):
    plan, _ = planned(method, arguments, model_type)
    if isinstance(plan, UsageError):  # the test above knows which
        return
    assert plan.outcome["removed_layers"] == 2
    model = pico_model(model_type)
    surgery.apply(model, plan)
    fits = plan.outcome.get("least_squares", {}).get("fits", [])
    assert bool(fits) == (arguments.get("consolidation") == "least_squares")
    assert all((fit["error_after"] < fit["error_before"]) == (fit["ridge"] is not None) for fit in fits)
    refitted = [(step.layer, step.group) for step in plan.steps if isinstance(step, RefitOutput)]
    assert refitted == [(fit["layer"], fit["group"]) for fit in fits if fit["ridge"] is not None]
    assert model.config.num_hidden_layers == 4
    with torch.inference_mode():
        logits = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        assert torch.equal(loaded(input_ids=IDS).logits, logits)
    assert_cache_agrees(loaded)


def assert_cache_agrees(model: PreTrainedModel) -> None:
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    with_cache, without = (model.generate(IDS[:1], use_cache=use, **options) for use in (True, False))
    assert with_cache.shape == (1, IDS.shape[1] + 8)
    assert torch.equal(with_cache, without)


def spans(units: list[int], size: int) -> list[int]:
    return [entry for unit in units for entry in range(unit * size, unit * size + size)]


def rows_and_columns(model_type: str, group: str, units: list[int]) -> tuple[dict[str, list[int]], str, list[int]]:
    """By hand, where these units are in a layer: rows of maps and entries of norms, and columns of the last map."""
    if group == "mlp":
        both = units + [CHANNELS + unit for unit in units]
        if model_type in ("glm4", "phi3"):
            return {"mlp.gate_up_proj": both}, "mlp.down_proj", units
        if model_type in ("bloom", "gpt_neox"):
            return {"mlp.dense_h_to_4h": units}, "mlp.dense_4h_to_h", units
        if model_type == "opt":
            return {"fc1": units}, "fc2", units
        return {"mlp.gate_proj": units, "mlp.up_proj": units}, "mlp.down_proj", units
    if model_type == "gpt_neox":  # query, key and value of a head, then those of the next
        return {"attention.query_key_value": spans(units, 3 * HEAD)}, "attention.dense", spans(units, HEAD)
    if model_type == "opt":
        rows = {f"self_attn.{name}_proj": spans(units, HEAD) for name in "qkv"}
        return rows, "self_attn.out_proj", spans(units, HEAD)
    queries, keys = spans(units, 2 * HEAD), spans(units, HEAD)
    if model_type == "phi3":  # 32 rows of queries, 16 of keys, 16 of values
        stacked = queries + [32 + row for row in keys] + [48 + row for row in keys]
        return {"self_attn.qkv_proj": stacked}, "self_attn.o_proj", queries
    rows = {"self_attn.q_proj": queries, "self_attn.k_proj": keys, "self_attn.v_proj": keys}
    if model_type == "olmo2":  # norms over all heads
        rows |= {"self_attn.q_norm": queries, "self_attn.k_norm": keys}
    return rows, "self_attn.o_proj", queries


def units_of(model_type: str, group: str) -> int:
    if group == "mlp":
        return 128 if model_type == "bloom" else CHANNELS
    return 4 if model_type in EVERY_HEAD else 2


def has(model_type: str, layer: int, group: str) -> bool:
    """Whether a layer has such units."""
    if group == "attention":
        return model_type not in FIXED_HEADS
    return model_type not in ONLY_EXPERTS and not (model_type == "qwen3_moe" and layer in (1, 5))


def layer_values(model: PreTrainedModel, layer: int) -> dict[str, torch.Tensor]:
    path = ARCHITECTURES[model.config.model_type].layers
    return {name: p.detach() for name, p in model.get_submodule(f"{path}.{layer}").named_parameters()}


def size_of_unit(model_type: str, layer: int, group: str) -> int:
    """Counted on the parameters of the dense model."""
    values = layer_values(dense(model_type), layer)
    rows, writer, columns = rows_and_columns(model_type, group, [0])
    total = len(columns) * HIDDEN
    for path, own in rows.items():
        for name in (f"{path}.weight", f"{path}.bias"):
            if name in values:
                total += len(own) * (1 if values[name].ndim == 1 else HIDDEN)
    return total


def assert_layer_is_narrowed(model: PreTrainedModel, layer: int, steps: list[KeepChannels], plan: Plan) -> None:
    """Every weight that stayed is exactly what it was; the rest is exactly what the plan says to remove."""
    model_type = model.config.model_type
    expected = dict(layer_values(dense(model_type), layer))
    for step in steps:
        rows, writer, columns = rows_and_columns(model_type, step.group, list(step.indices))
        for path, own in rows.items():
            for name in (f"{path}.weight", f"{path}.bias"):
                if name in expected:
                    expected[name] = expected[name][own]
        expected[f"{writer}.weight"] = expected[f"{writer}.weight"][:, columns]
        if step.bias is not None:
            old = expected.get(f"{writer}.bias", torch.zeros(HIDDEN))
            expected[f"{writer}.bias"] = old + plan.tensors[step.bias]
    found = layer_values(model, layer)
    assert sorted(found) == sorted(expected)
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


def hidden_axis(name: str) -> int | None:
    """By hand, which axis of a parameter is the hidden state's, in the architectures that can say its size."""
    *_, module, kind = name.split(".")
    if module in ("q_norm", "k_norm") or kind == "bias":  # these biases are those of q, k and v
        return None
    if kind in ("gate_up_proj", "down_proj"):  # of experts: [experts, rows, columns]
        return 2 if kind == "gate_up_proj" else 1
    if "norm" in module or module in ("o_proj", "down_proj"):
        return 0
    return 1


def assert_hidden_is_narrowed(model: PreTrainedModel, step: KeepHidden) -> None:
    kept = torch.tensor(step.indices)
    expected = {}
    for name, value in dense(model.config.model_type).named_parameters():
        axis = hidden_axis(name)
        expected[name] = value if axis is None else value.index_select(axis, kept)
    found = dict(model.named_parameters())
    assert sorted(found) == sorted(expected)
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


def is_stock(model_type: str, plan: Plan, gone: dict[tuple[int, str], int]) -> bool:
    """Whether the stock class has these widths: one for all layers, which the config can say, and no new biases."""
    if any(step.bias for step in plan.steps) and model_type not in EVERY_HEAD:
        return False
    changed = {group for _, group in gone}
    if "attention" in changed and model_type in DERIVED_HEAD_SIZE or "mlp" in changed and model_type == "bloom":
        return False
    there = {(layer, group) for layer in range(6) for group in changed if has(model_type, layer, group)}
    return all(len({gone.get(key, 0) for key in there if key[1] == group}) == 1 for group in changed)


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
@pytest.mark.parametrize(("method", "arguments"), variants(WIDTH))
def test_a_narrower_model_keeps_what_the_plan_says_and_loads(method, arguments, model_type, tmp_path):
    plan, _ = planned(method, arguments, model_type)
    if isinstance(plan, UsageError):  # the test above knows which
        return
    model = pico_model(model_type)
    model.config._name_or_path = "some/model"
    dense_parameters = count_parameters(model)
    groups = pruned_groups(method, arguments, model_type)
    if "hidden" in groups and model_type in DERIVED_HEAD_SIZE:
        with pytest.raises(UsageError, match=f"The hidden state of a {model_type} model cannot be made narrower"):
            surgery.apply(model, plan)
        assert count_parameters(model) == dense_parameters
        return
    surgery.apply(model, plan)
    removed = dense_parameters - count_parameters(model)
    assert plan.outcome["removed_parameters"] == removed > 0
    assert plan.outcome["ratio"] == removed / dense_parameters
    # The published program's ratio is of something else.
    asked = None if arguments.get("as_published") and method is callbacks.FLAP else plan.method.init_args["ratio"]
    assert plan.outcome["requested_ratio"] == asked
    wanted = None if plan.outcome["requested_ratio"] is None else plan.outcome["requested_ratio"] * dense_parameters

    if "hidden" in groups:
        (step,) = plan.steps
        assert_hidden_is_narrowed(model, step)
        # The experts' kernels want it, or the check of the config.
        at_once = 8 if model_type in WITH_EXPERTS else 4 if model_type in WHOLE_HEADS else 1
        assert len(step.indices) % at_once == 0
        assert abs(removed - wanted) <= at_once * removed / (HIDDEN - len(step.indices))
        uniform = True
    else:
        names = {(layer, group) for group, bounds in groups.items() for layer in range(6)[bounds]}
        allowed = {key for key in names if has(model_type, *key)}
        assert {(step.layer, step.group) for step in plan.steps} <= allowed
        assert all(0 < len(step.indices) < units_of(model_type, step.group) for step in plan.steps)
        for layer in range(6):
            assert_layer_is_narrowed(model, layer, [step for step in plan.steps if step.layer == layer], plan)
        path = ARCHITECTURES[model_type].layers
        outside = {name: p for name, p in dense(model_type).named_parameters() if not name.startswith(f"{path}.")}
        assert all(torch.equal(model.get_parameter(name), p) for name, p in outside.items())
        sizes = {key: size_of_unit(model_type, *key) for key in allowed}
        gone = {(s.layer, s.group): units_of(model_type, s.group) - len(s.indices) for s in plan.steps}
        if arguments.get("uniform"):
            for group in groups:
                assert len({gone.get(key, 0) for key in allowed if key[1] == group}) == 1
            assert abs(removed - wanted) <= sum(sizes.values())
        elif "layer_ratio" in arguments:  # of the channels, rounded up; of heads as many as these fill
            share = arguments["layer_ratio"]
            assert gone == {key: int(units_of(model_type, key[1]) * share) for key in allowed}
        elif not arguments.get("as_published"):
            assert abs(removed - wanted) <= min(sizes.values())

        uniform = is_stock(model_type, plan, gone)
        assert uniform or not arguments.get("uniform")
    with torch.inference_mode():
        logits = model(input_ids=IDS).logits
    assert torch.isfinite(logits).all()
    if arguments not in EXPORTED:
        return
    plans = [plan] if model_type == "llama" else []  # without plans, no picture is drawn, which takes longest
    path = save_compressed(model, pico_tokenizer(), tmp_path / "export", plans, recovered=False)
    config = json.loads((path / "config.json").read_text())
    assert ("auto_map" in config) == (not uniform)
    if uniform:
        assert not list(path.glob("*.py"))
        assert "layer_widths" not in config
        loaded = AutoModelForCausalLM.from_pretrained(path).eval()
        assert type(loaded) is type(model)
    else:
        loaded = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()
        assert type(loaded).__module__.startswith("transformers_modules.")
    ours, _, loaded_plans = load_compressed(path)
    assert not type(ours).__module__.startswith("transformers_modules.")
    assert loaded_plans == plans
    values = model.state_dict()
    for one in (loaded, ours):
        found = one.state_dict()
        assert sorted(found) == sorted(values)
        assert [name for name, value in values.items() if not torch.equal(found[name], value)] == []
        with torch.inference_mode():  # experts are multiplied in another order, where the file has them in memory
            torch.testing.assert_close(one(input_ids=IDS).logits, logits, rtol=0, atol=1e-6)
    assert_cache_agrees(loaded)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_says_whom_to_cite(method):
    """One or more whole BibTeX entries, of the papers that the docstrings name."""
    entries = method.citation.split("\n\n")
    for entry in entries:
        assert re.match(r"@(article|inproceedings)\{[a-z]+20\d\d[a-z]+,\n", entry)
        assert entry.endswith("\n}")
        assert entry.count("{") == entry.count("}")
        fields = set(re.findall(r"^  (\w+) = \{", entry, re.MULTILINE))
        assert fields >= {"title", "author", "year"}
        (number,) = re.findall(r"arXiv:(\d{4}\.\d{5})", entry)
        assert f"https://arxiv.org/abs/{number}" in (method.__doc__ or "")
        assert max(map(len, entry.splitlines())) <= 120


def test_only_methods_that_are_there_are_cited():
    def made_by(class_path, **arguments):
        return Plan(Base("m", None, "llama", 6, 1, "x"), Method(class_path, arguments), None, ())

    cited = citations([made_by("callbacks.SLEB"), made_by("callbacks.FLAP"), made_by("callbacks.SLEB")])
    assert cited == [callbacks.SLEB.citation, callbacks.FLAP.citation]
    shared = citations([made_by("callbacks.WandaStructured"), made_by("callbacks.FLAP")])
    assert "\n\n".join(shared) == callbacks.WandaStructured.citation
    assert citations([made_by("antigravity.Evil"), made_by("callbacks.LayerRemoval", layers=[1])]) == []
    assert "antigravity" not in sys.modules
    (reverse,) = citations([made_by("callbacks.LayerRemoval", order="reverse")])
    (angular,) = citations([made_by("callbacks.BlockInfluence", distance="angular")])
    (cosine,) = citations([made_by("callbacks.BlockInfluence", distance="cosine")])
    assert "2403.17887" in reverse == angular
    assert "2403.03853" in cosine


def test_more_than_a_model_with_experts_can_lose_is_refused():
    message = r"ratio 0.15 means 24,446 of 162,976 parameters; .* may go have [69],\d+ "
    only_attention = {**ATTENTION, "mlp_layers": None}
    for method in (
        callbacks.FLAP(ratio=0.15),
        callbacks.WandaStructured(ratio=0.15),
        callbacks.LLMPruner(0.15, **only_attention),
    ):
        with pytest.raises(UsageError, match=message):
            method.plan(dense("mixtral"), CALIBRATION)
