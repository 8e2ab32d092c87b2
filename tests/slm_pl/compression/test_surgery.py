import json
from typing import get_args

import pytest
import torch
from transformers import AutoModelForCausalLM

from slm_pl.compression import surgery
from slm_pl.compression.architecture import ARCHITECTURES, architecture_of, decoder_layers
from slm_pl.compression.plan import (
    Base,
    Consolidation,
    DropLayers,
    MergeLayers,
    Method,
    OtherParameters,
    Plan,
    count_parameters,
)
from slm_pl.errors import UsageError
from tests.helpers.pico import CONFIGS, pico_model

IDS = torch.arange(3, 45).reshape(2, 21) * 7 % 512
CONSOLIDATIONS = get_args(Consolidation)
WITH_EXPERTS = ("mixtral", "qwen3_moe")


def plan_for(model, *steps) -> Plan:
    return Plan(Base.of(model), Method("test", {}), None, steps)


def weights(model) -> list[dict[str, torch.Tensor]]:
    return [{k: v.clone() for k, v in layer.state_dict().items()} for layer in decoder_layers(model)]


def test_every_architecture_has_a_pico_model():
    assert set(CONFIGS) == set(ARCHITECTURES)


def formula(consolidation: str, window: list[torch.Tensor]) -> torch.Tensor:
    """The formulas as the paper and the issue give them, in float64."""
    low, *above = [w.double() for w in window]
    return {
        "top": window[-1].double(),
        "keep_top": window[-1].double(),
        "bottom": low,
        "keep_bottom": low,
        "sum": low + sum(w - low for w in above),
        "mean": torch.stack([low, *above]).mean(0),
    }[consolidation]


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
@pytest.mark.parametrize("consolidation", CONSOLIDATIONS)
@pytest.mark.parametrize("other_parameters", get_args(OtherParameters))
def test_merged_layer_is_the_formula_and_the_others_stay(model_type, consolidation, other_parameters):
    model = pico_model(model_type)
    before = weights(model)
    if model_type in WITH_EXPERTS and consolidation in ("sum", "mean"):
        with pytest.raises(UsageError, match=f"'{consolidation}', but a {model_type} model has experts.*keep_top"):
            surgery.apply(model, plan_for(model, MergeLayers(1, 3, consolidation, other_parameters)))
        assert len(weights(model)) == 6
        return
    surgery.apply(model, plan_for(model, MergeLayers(1, 3, consolidation, other_parameters)))
    after = weights(model)
    assert len(after) == model.config.num_hidden_layers == 4
    for kept, origin in ((0, 0), (2, 4), (3, 5)):
        for name in before[origin]:
            assert torch.equal(after[kept][name], before[origin][name])
    kinds = set()
    for name, value in after[1].items():
        # Independent of the entries in architecture.py: projections and experts are matrices, nothing else is.
        how = consolidation if value.ndim > 1 else other_parameters
        kinds.add(value.ndim > 1)
        names = [name in layer for layer in before[1:4]]
        window = [layer[name] for layer in before[1:4]] if all(names) else [before[3 if names[2] else 1][name]]
        expected = formula(how, window)
        if how in ("sum", "mean"):
            torch.testing.assert_close(value.double(), expected, rtol=0, atol=2e-6)
            assert not torch.equal(value, window[-1])
        else:
            assert torch.equal(value.double(), expected), name
    assert kinds == {True, False}
    origins = [0, 1 if consolidation == "keep_bottom" else 3, 4, 5]
    original = pico_model(model_type).config.to_dict()
    for field, entries in original.items():
        if isinstance(entries, list) and len(entries) == 6:  # one for each layer
            assert getattr(model.config, field) == [entries[origin] for origin in origins], field


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_accumulated_in_float32(dtype):
    model = pico_model().to(dtype)
    before = weights(model)
    surgery.apply(model, plan_for(model, MergeLayers(0, 4, "sum", "mean")))
    for name, value in weights(model)[0].items():
        how = "sum" if value.ndim > 1 else "mean"
        # Rounded once, at the end: in half precision the running sum would be wrong in many entries.
        assert (value == formula(how, [layer[name] for layer in before[:5]]).to(dtype)).float().mean() > 0.99, name


@pytest.mark.parametrize("consolidation", CONSOLIDATIONS)
def test_window_that_grows_is_the_window_merged_at_once(consolidation):
    model = pico_model("qwen3")
    layers, architecture = list(decoder_layers(model)), architecture_of(model)
    growing = surgery.GrowingWindow(layers[5], consolidation, "mean", architecture)
    addresses = set()
    for low in range(4, 0, -1):
        growing.grow(layers[low])
        addresses.add(frozenset(merged.data_ptr() for merged in growing._merged.values()))
        grown, whole = growing.layer(), surgery.merge(layers[low:6], consolidation, "mean", architecture)
        assert grown.host is whole.host is layers[low if consolidation == "keep_bottom" else 5]
        assert grown.parameters.keys() == whole.parameters.keys()
        assert all(torch.equal(grown.parameters[name], value) for name, value in whole.parameters.items())
    assert len(addresses) == 1  # updated in place: one merged layer in memory


def test_keep_modes_copy_no_projection():
    model = pico_model()
    layers, architecture = list(decoder_layers(model)), architecture_of(model)
    own = {p.data_ptr() for p in model.parameters()}
    for consolidation in ("keep_top", "keep_bottom"):
        for other in ("top", "bottom"):
            merged = surgery.merge(layers[1:4], consolidation, other, architecture)
            assert {p.data_ptr() for p in merged.parameters.values()} <= own


@pytest.mark.parametrize(
    ("model_type", "consolidation"),
    [(m, c) for m in sorted(ARCHITECTURES) for c in CONSOLIDATIONS if m not in WITH_EXPERTS or c.startswith("keep")],
)
def test_export_loads_in_stock_transformers_with_equal_logits_and_cache(model_type, consolidation, tmp_path):
    model = pico_model(model_type)
    surgery.apply(model, plan_for(model, MergeLayers(3, 4, consolidation, "bottom"), DropLayers((1,))))
    with torch.inference_mode():
        logits = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        assert torch.equal(loaded(input_ids=IDS).logits, logits)
        # Past the sliding window (8), with and without the cache: a stale cache index or layer type would differ.
        options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
        cached = loaded.generate(IDS[:1], use_cache=True, **options)
        plain = loaded.generate(IDS[:1], use_cache=False, **options)
    assert cached.shape == (1, IDS.shape[1] + 12)
    assert torch.equal(cached, plain)
    types = json.loads((tmp_path / "config.json").read_text()).get("layer_types")
    original = getattr(pico_model(model_type).config, "layer_types", None)
    if original is not None:
        assert types == [original[origin] for origin in (0, 2, 3 if consolidation == "keep_bottom" else 4, 5)]


def test_tied_embeddings_stay_tied(tmp_path):
    """SmolLM2 and Llama-3.2 have them; the other pico Llama has not."""
    model = pico_model(tie_word_embeddings=True)
    surgery.apply(model, plan_for(model, MergeLayers(1, 4, "sum", "mean")))
    with torch.inference_mode():
        logits = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert count_parameters(loaded) == count_parameters(model) < count_parameters(pico_model()) - 512 * 32
    with torch.inference_mode():
        assert torch.equal(loaded(input_ids=IDS).logits, logits)


def test_layers_with_and_without_experts_keep_their_kind(tmp_path):
    model = pico_model("qwen3_moe")  # experts in layers 1 and 5
    kinds = [hasattr(layer.mlp, "experts") for layer in decoder_layers(model)]
    assert kinds == [False, True, False, False, False, True]
    surgery.apply(model, plan_for(model, MergeLayers(1, 2, "keep_bottom", "top"), DropLayers((0,))))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["mlp_only_layers"], config["decoder_sparse_step"]) == ([1, 2], 1)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [hasattr(layer.mlp, "experts") for layer in decoder_layers(loaded)] == [True, False, False, True]


def test_layer_removal_equals_a_model_built_without_the_layer():
    model = pico_model()
    state = model.state_dict()
    smaller = pico_model(num_hidden_layers=5)
    # Independent construction: rename the weights of layers 3.. to 2..
    renamed = {}
    for name, value in state.items():
        parts = name.split(".")
        if parts[1] == "layers":
            index = int(parts[2])
            if index == 2:
                continue
            parts[2] = str(index - (index > 2))
        renamed[".".join(parts)] = value.clone()
    smaller.load_state_dict(renamed)
    dense = count_parameters(model)
    surgery.apply(model, plan_for(model, DropLayers((2,))))
    with torch.inference_mode():
        assert torch.equal(model(input_ids=IDS).logits, smaller(input_ids=IDS).logits)
    assert count_parameters(model) == count_parameters(smaller) < dense


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((MergeLayers(2, 2),), "at least two layers"),
        ((MergeLayers(4, 6),), "this model has 0..5"),
        ((MergeLayers(1, 3), DropLayers((3,))), "touches a layer twice"),
        ((DropLayers(tuple(range(6))),), "removes all 6 layers"),
    ],
)
def test_impossible_steps_are_refused_and_leave_the_model_alone(steps, message):
    model = pico_model()
    before = weights(model)
    with pytest.raises(UsageError, match=message):
        surgery.apply(model, plan_for(model, *steps))
    assert model.config.num_hidden_layers == 6
    assert all(torch.equal(a[k], b[k]) for a, b in zip(before, weights(model), strict=True) for k in a)


def test_plan_of_another_model_is_refused():
    plan = plan_for(pico_model(), MergeLayers(1, 2))
    with pytest.raises(UsageError, match="num_layers 6 .*this model has num_layers 5"):
        surgery.apply(pico_model(num_hidden_layers=5), plan)
    with pytest.raises(UsageError, match="model_type llama"):
        surgery.apply(pico_model("qwen3"), plan)


def test_unsupported_architecture_is_refused_with_the_way_to_add_it():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=64))
    with pytest.raises(
        UsageError,
        match=r"GPT2LMHeadModel of model_type 'gpt2'; supported are .*llama.*'transformer\.h' \(2 x GPT2Block\) with "
        r"the weight matrices attn\.c_attn\.weight, .*architecture\.py",
    ):
        decoder_layers(model)
