import pytest
import torch
from peft import LoraConfig, get_peft_model

from slm_pl.compression.architecture import (
    ARCHITECTURES,
    backbone,
    decoder_layers,
    final_hidden_state,
    logits,
    lora_targets,
    num_layers,
    projection_names,
)
from tests.helpers.pico import pico_model

IDS = torch.arange(3, 45).reshape(2, 21) * 7 % 512


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_entry_describes_the_model(model_type):
    model = pico_model(model_type)
    layers = decoder_layers(model)
    assert len(layers) == num_layers(model) == 6
    # Every matrix of a layer is a projection or an expert, and nothing else is.
    matrices = {name for layer in layers for name, p in layer.named_parameters() if p.ndim > 1}
    assert matrices == projection_names(ARCHITECTURES[model_type]) & {
        n for x in layers for n, _ in x.named_parameters()
    }
    outputs = []
    layers[-1].register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.inference_mode():
        final = backbone(model)(input_ids=IDS, use_cache=False).last_hidden_state
        last = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
        assert torch.equal(final_hidden_state(model, last), final)
        assert torch.equal(logits(model, final), model(input_ids=IDS, use_cache=False).logits)


@pytest.mark.parametrize("changes", [{"do_layer_norm_before": False}, {"word_embed_proj_dim": 32}])
def test_opt_without_final_norm_or_projection(changes):
    """As opt-350m and as the other sizes."""
    model = pico_model("opt", **changes)
    outputs = []
    decoder_layers(model)[-1].register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.inference_mode():
        final = backbone(model)(input_ids=IDS, use_cache=False).last_hidden_state
        last = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
        assert torch.equal(final_hidden_state(model, last), final)


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_lora_adapts_every_linear_map_of_the_layers_but_beside_experts(model_type):
    model = pico_model(model_type)
    experts = bool(ARCHITECTURES[model_type].experts)
    linear = {
        id(m)
        for layer in decoder_layers(model)
        for name, m in layer.named_modules()
        if isinstance(m, torch.nn.Linear) and (not experts or "attn" in name)
    }
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=lora_targets(model), task_type="CAUSAL_LM"))
    bases = {id(m.base_layer) for m in adapted.modules() if hasattr(m, "lora_A")}
    assert bases == linear
    assert len(bases) >= 4 * 6
