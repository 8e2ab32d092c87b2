import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from slm_pl.compression import surgery
from slm_pl.compression.architecture import ARCHITECTURES, decoder_layers
from slm_pl.compression.plan import Base, DropLayers, MergeLayers, Method, Plan, count_parameters
from slm_pl.errors import UsageError
from tests.helpers.pico import CONFIGS, pico_model

IDS = torch.arange(3, 45).reshape(2, 21) * 7 % 512
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def plan_for(model, *steps) -> Plan:
    return Plan(Base.of(model), Method("test", {}), None, steps)


def weights(model) -> list[dict[str, torch.Tensor]]:
    return [{k: v.clone() for k, v in layer.state_dict().items()} for layer in decoder_layers(model)]


def test_every_architecture_has_a_pico_model():
    assert set(CONFIGS) == set(ARCHITECTURES)


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
@pytest.mark.parametrize("other_parameters", ["top", "bottom"])
def test_merge_takes_projections_of_the_top_and_the_rest_as_asked(model_type, other_parameters):
    model = pico_model(model_type)
    before = weights(model)
    surgery.apply(model, plan_for(model, MergeLayers(1, 3, "keep_top", other_parameters)))
    after = weights(model)
    other = 3 if other_parameters == "top" else 1
    assert len(after) == model.config.num_hidden_layers == 4
    for kept, origin in ((0, 0), (2, 4), (3, 5)):
        for name in before[origin]:
            assert torch.equal(after[kept][name], before[origin][name])
    for name, value in after[1].items():
        is_projection = name.split(".")[-2] in PROJECTIONS and name.endswith(".weight")
        assert torch.equal(value, before[3 if is_projection else other][name]), name
    assert any(not torch.equal(before[1][name], before[3][name]) for name in before[1] if "norm" in name)


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_export_loads_in_stock_transformers_with_equal_logits_and_cache(model_type, tmp_path):
    model = pico_model(model_type)
    surgery.apply(model, plan_for(model, MergeLayers(3, 4, "keep_top", "bottom"), DropLayers((1,))))
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
        assert types == [original[origin] for origin in (0, 2, 4, 5)]


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
        UsageError, match=r"GPT2LMHeadModel of model_type 'gpt2'; supported are llama.*architecture\.py"
    ):
        decoder_layers(model)
