"""Surgery on several layers: what the config says of their widths, and what is left of a layer that lost a group."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from slm_pl.compression import surgery
from slm_pl.compression.architecture import decoder_layers
from slm_pl.compression.feasibility import check_consolidation
from slm_pl.compression.modeling import EmptyAttention, EmptyMLP
from slm_pl.compression.plan import Base, DropLayers, KeepChannels, KeepHidden, MergeLayers, Method, Plan
from slm_pl.errors import UsageError
from slm_pl.export import load_compressed, save_compressed
from tests.helpers.pico import CONFIGS, pico_model
from tests.helpers.tokenizer import pico_tokenizer

IDS = torch.arange(3, 45).reshape(2, 21) * 7 % 512
HEADS_FOLLOW = ("gpt_neox", "opt")  # from the hidden size; every query head has a key/value head
ATTENTION = sorted(set(CONFIGS) - {"bloom"})
MLP = sorted(set(CONFIGS) - {"mixtral"})
WITH_MLP = {"qwen3_moe": [0, 2, 3, 4]}  # the others have experts


def plan_for(model, *steps, **tensors) -> Plan:
    plan = Plan(Base.of(model), Method("test", {}), None, steps)
    return plan.with_tensors(tensors) if tensors else plan


def apply(model, *steps, **tensors):
    plan = plan_for(model, *steps, **tensors)
    surgery.apply(model, plan)
    return plan


def wide_model(model_type: str, **changes: object):
    """In float64; the usual kernel for experts knows no such thing."""
    model = pico_model(model_type, **changes).double()
    model.config._experts_implementation = "eager"
    return model


def logits(model, ids=IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def assert_near(found: torch.Tensor, expected: torch.Tensor):
    """Models compute their norms in float32; what passes them may differ by its rounding."""
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 * expected.abs().max().item())


def assert_reloads(model, plans, directory):
    """Through the export, by the stock class or by ours: the same parameters and logits."""
    save_compressed(model, pico_tokenizer(), directory, plans, recovered=False)
    loaded, _, found = load_compressed(directory)
    assert found == plans
    assert_same(loaded, model)
    return loaded


def assert_same(loaded, model):
    """Where the loaded weights lie in memory may change a sum by its rounding."""
    own, expected = loaded.state_dict(), model.state_dict()
    assert own.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in own.items())
    torch.testing.assert_close(logits(loaded.eval()), logits(model), rtol=0, atol=1e-6)


def assert_generates(model, start: int = 6):
    """With the cache as without it, past the sliding window of 8."""
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    cached = model.generate(IDS[:1, :start], use_cache=True, **options)
    assert cached.shape == (1, start + 8)
    assert torch.equal(cached, model.generate(IDS[:1, :start], use_cache=False, **options))


def widths_of(model) -> list[tuple[int, int]]:
    """Of each layer: columns of its output maps, by the shapes of its matrices; 0 for what is not there."""
    names = {
        "attention": ("self_attn.o_proj", "self_attn.out_proj", "attention.dense", "self_attention.dense"),
        "mlp": ("mlp.down_proj", "fc2", "mlp.dense_4h_to_h"),
    }
    found = []
    for layer in decoder_layers(model):
        own = dict(layer.named_parameters())
        found.append(
            tuple(
                next((own[f"{path}.weight"].shape[1] for path in paths if f"{path}.weight" in own), 0)
                for paths in names.values()
            )
        )
    return found


# --- What the config says ---


@pytest.mark.parametrize("model_type", ATTENTION)
def test_equal_attention_widths_are_the_stock_configs(model_type, tmp_path):
    model = pico_model(model_type)
    kept = (0, 2) if model_type in HEADS_FOLLOW else (1,)
    plan = apply(model, *(KeepChannels(layer, "attention", kept) for layer in range(6)))
    assert [attention for attention, _ in widths_of(model)] == [16] * 6
    if model_type in HEADS_FOLLOW:  # the stock class takes hidden_size / heads for the size of a head
        assert [entry["attention"] for entry in model.config.layer_widths] == [2] * 6
        assert model.config.num_attention_heads == 4
    else:
        assert not hasattr(model.config, "layer_widths")
        assert not hasattr(model.config, "width_layout")
        config = model.config
        assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 1, 8)
        model.save_pretrained(tmp_path / "stock")
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock").eval()
        assert_same(stock, model)
    assert_reloads(model, [plan], tmp_path / "export")


@pytest.mark.parametrize("model_type", MLP)
def test_equal_mlp_widths_are_the_stock_configs(model_type, tmp_path):
    model = pico_model(model_type)
    kept = (0, 1, 5, 8, 13, 21, 34, 40)
    layers = WITH_MLP.get(model_type, range(6))
    plan = apply(model, *(KeepChannels(layer, "mlp", kept) for layer in layers))
    assert [mlp for _, mlp in widths_of(model)] == [8 if layer in layers else 0 for layer in range(6)]
    if model_type == "bloom":  # four times the hidden size
        assert [entry["mlp"] for entry in model.config.layer_widths] == [8] * 6
    else:
        assert not hasattr(model.config, "layer_widths")
        field = "ffn_dim" if model_type == "opt" else "intermediate_size"
        assert getattr(model.config, field) == 8
        model.save_pretrained(tmp_path / "stock")
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock").eval()
        assert_same(stock, model)
    assert_reloads(model, [plan], tmp_path / "export")


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_unequal_widths_stand_in_the_config_by_layer(model_type, tmp_path):
    model = pico_model(model_type)
    before, fields = widths_of(model), model.config.to_dict()
    steps, expected = [], [{} for _ in range(6)]
    if model_type != "bloom":
        all_heads = 4 if model_type in HEADS_FOLLOW else 2
        steps += [KeepChannels(0, "attention", (1,)), KeepChannels(4, "attention", ())]
        for layer, entry in enumerate(expected):
            entry["attention"] = {0: 1, 4: 0}.get(layer, all_heads)
    if model_type != "mixtral":
        steps += [KeepChannels(2, "mlp", (3, 4, 40)), KeepChannels(3, "mlp", ())]
        for layer in WITH_MLP.get(model_type, range(6)):
            expected[layer]["mlp"] = {2: 3, 3: 0}.get(layer, 128 if model_type == "bloom" else 48)
    plan = apply(model, *steps)
    assert model.config.layer_widths == expected
    assert model.config.width_layout["layers"] == {
        "bloom": "transformer.h",
        "gpt_neox": "gpt_neox.layers",
        "opt": "model.decoder.layers",
    }.get(model_type, "model.layers")
    for layer, (old, new) in enumerate(zip(before, widths_of(model), strict=True)):
        per_head = 8 if model_type in HEADS_FOLLOW else 16
        assert new[0] == (expected[layer]["attention"] * per_head if "attention" in expected[layer] else old[0])
        assert new[1] == expected[layer].get("mlp", old[1])
    now = model.config.to_dict()
    said_otherwise = {"mlp_only_layers", "decoder_sparse_step"}  # by index, and no longer as a rule
    assert {key for key in fields if now[key] != fields[key]} <= said_otherwise  # what the stock class reads
    assert_generates(loaded := assert_reloads(model, [plan], tmp_path / "export"))
    assert loaded.config.layer_widths == expected
    assert widths_of(loaded) == widths_of(model)


def test_widths_that_become_equal_are_the_stock_configs_again(tmp_path):
    model = pico_model()
    dense = pico_model()
    first = apply(model, KeepChannels(0, "mlp", tuple(range(40))), KeepChannels(3, "attention", (1,)))
    assert model.config.layer_widths[0] == {"attention": 2, "mlp": 40}
    rest = [KeepChannels(layer, "mlp", tuple(range(40))) for layer in range(1, 6)]
    rest += [KeepChannels(layer, "attention", (0,)) for layer in (0, 1, 2, 4, 5)]
    second = apply(model, *rest)
    assert not hasattr(model.config, "layer_widths")
    assert (model.config.intermediate_size, model.config.num_attention_heads, model.config.num_key_value_heads) == (
        40,
        2,
        1,
    )
    for layer in range(6):
        head = int(layer == 3)
        own = dense.model.layers[layer].self_attn.q_proj.weight[16 * head : 16 * head + 16]
        assert torch.equal(model.model.layers[layer].self_attn.q_proj.weight, own)
    assert_reloads(model, [first, second], tmp_path / "export")


def test_a_second_plan_narrows_what_the_first_left(tmp_path):
    """Its indices are those of the narrower layer."""
    model, dense = pico_model("phi3"), pico_model("phi3")
    first = apply(model, KeepChannels(1, "mlp", (2, 3, 5, 7, 11)), KeepChannels(2, "attention", (1,)))
    second = apply(model, KeepChannels(1, "mlp", (0, 3)), KeepChannels(1, "attention", (0,)))
    assert [(entry["attention"], entry["mlp"]) for entry in model.config.layer_widths] == [
        (2, 48),
        (1, 2),
        (1, 48),
        (2, 48),
        (2, 48),
        (2, 48),
    ]
    both = dense.model.layers[1].mlp.gate_up_proj.weight
    assert torch.equal(model.model.layers[1].mlp.gate_up_proj.weight, both[[2, 7, 48 + 2, 48 + 7]])
    qkv = dense.model.layers[1].self_attn.qkv_proj.weight
    rows = [*range(16), *range(32, 40), *range(48, 56)]
    assert torch.equal(model.model.layers[1].self_attn.qkv_proj.weight, qkv[rows])
    assert_reloads(model, [first, second], tmp_path / "export")


def test_narrow_hidden_state_after_narrow_layers(tmp_path):
    model = pico_model()
    first = apply(
        model,
        KeepChannels(1, "mlp", (2, 3)),
        KeepChannels(2, "attention", (), "b"),
        KeepChannels(3, "mlp", (4,), "b"),
        b=torch.arange(32.0),
    )
    second = apply(model, KeepHidden(tuple(range(1, 25))))
    assert model.model.layers[2].self_attn.o_proj.bias.tolist() == list(range(1, 25))
    assert model.model.layers[3].mlp.down_proj.bias.tolist() == list(range(1, 25))
    assert_reloads(model, [first, second], tmp_path / "export")


# Stock configs of these refuse a hidden size that the number of heads does not divide.
CHECKED = ("gemma2", "gemma3_text", "llama")


@pytest.mark.parametrize("model_type", [*CHECKED, "mistral", "phi3"])
def test_equal_widths_with_heads_that_do_not_divide_the_hidden_size(model_type, tmp_path):
    """Three of four heads, as 28 of Llama-2-7B's 32 for its hidden size of 4096."""
    model = pico_model(model_type, num_key_value_heads=4)
    plan = apply(model, *(KeepChannels(layer, "attention", (0, 1, 3)) for layer in range(6)))
    assert [attention for attention, _ in widths_of(model)] == [24] * 6
    assert model.config.num_attention_heads == (4 if model_type in CHECKED else 3)
    assert hasattr(model.config, "layer_widths") == (model_type in CHECKED)
    assert_reloads(model, [plan], tmp_path / "export")


@pytest.mark.parametrize("model_type", [*CHECKED, "qwen2"])
def test_a_hidden_size_that_the_config_does_not_take_is_refused(model_type, tmp_path):
    model = pico_model(model_type)
    if model_type in CHECKED:
        before = logits(model)
        with pytest.raises(
            UsageError, match=rf"keeps 21 channels .* config of a {model_type} .*multiple of its number"
        ):
            apply(model, KeepHidden(tuple(range(21))))
        assert torch.equal(logits(model), before)
        assert model.config.hidden_size == 32
    else:
        assert_reloads(model, [apply(model, KeepHidden(tuple(range(21))))], tmp_path / "export")


# --- Groups that lost everything ---

WRITERS = {
    "bloom": {"mlp": "mlp.dense_4h_to_h"},
    "gpt_neox": {"attention": "attention.dense", "mlp": "mlp.dense_4h_to_h"},
    "opt": {"attention": "self_attn.out_proj", "mlp": "fc2"},
}
CONSTANT = torch.linspace(-1, 2, 32)
BY_GROUP = [(m, "attention") for m in ATTENTION] + [(m, "mlp") for m in MLP]


def constant_by_hand(model_type: str, group: str, layers: dict[int, torch.Tensor | None]):
    """A dense model whose output maps write a constant alone: what bias they have, and what is added to it."""
    model = wide_model(model_type)
    path = WRITERS.get(model_type, {"attention": "self_attn.o_proj", "mlp": "mlp.down_proj"})[group]
    for layer, added in layers.items():
        module = decoder_layers(model)[layer].get_submodule(path)

        def constant(module, args, output, added=added):
            value = torch.zeros(32, dtype=torch.float64)
            if module.bias is not None:
                value = value + module.bias.detach()
            if added is not None:
                value = value + added.double()
            return value.expand(output.shape)

        module.register_forward_hook(constant)
    return model


@pytest.mark.parametrize(("model_type", "group"), BY_GROUP)
def test_emptied_group_contributes_its_constant_alone(model_type, group, tmp_path):
    dense = logits(wide_model(model_type))
    expected = logits(constant_by_hand(model_type, group, {0: None, 3: CONSTANT}))
    assert (expected - dense).abs().max() > 1e-3 * dense.abs().max()
    model = wide_model(model_type)
    steps = KeepChannels(0, group, ()), KeepChannels(3, group, (), bias="c")
    apply(model, *steps, c=CONSTANT)
    assert_near(logits(model), expected)
    entries = [model.config.layer_widths[layer] for layer in (0, 3, 2)]
    biased = model_type in ("gpt_neox", "opt", "bloom")
    assert [entry[group] == 0 for entry in entries] == [True, True, False]
    assert [f"{group}_bias" in entry for entry in entries] == [False, not biased, False]
    if not (model_type == "opt" and group == "mlp"):  # whose MLP is no module of its own
        kind = {"attention": EmptyAttention, "mlp": EmptyMLP}[group]
        assert [sum(isinstance(m, kind) for m in layer.modules()) for layer in decoder_layers(model)] == [
            1,
            0,
            0,
            1,
            0,
            0,
        ]
    single = pico_model(model_type)
    plan = apply(single, *steps, c=CONSTANT)
    assert_generates(assert_reloads(single, [plan], tmp_path / "export"))


@pytest.mark.parametrize(("model_type", "group"), BY_GROUP)
def test_a_bias_is_added_to_what_a_narrower_group_writes(model_type, group, tmp_path):
    by_hand, kept = wide_model(model_type), (1, 3) if model_type in HEADS_FOLLOW or group == "mlp" else (1,)
    path = WRITERS.get(model_type, {"attention": "self_attn.o_proj", "mlp": "mlp.down_proj"})[group]
    apply(by_hand, KeepChannels(2, group, kept))
    module = decoder_layers(by_hand)[2].get_submodule(path)
    module.register_forward_hook(lambda _, args, output: output + CONSTANT.double())
    model = wide_model(model_type)
    step = KeepChannels(2, group, kept, bias="c")
    apply(model, step, c=CONSTANT)
    assert_near(logits(model), logits(by_hand))
    if model_type in ("llama", "opt", "phi3"):
        assert_reloads(single := pico_model(model_type), [apply(single, step, c=CONSTANT)], tmp_path / "export")


@pytest.mark.parametrize("model_type", ATTENTION)
def test_generation_with_the_cache_when_the_first_attentions_are_empty(model_type):
    """The length of what is cached is asked of the first layer, or of the first of its kind."""
    for layers in ((0,), (0, 1, 2), tuple(range(6))):
        model = pico_model(model_type)
        apply(model, *(KeepChannels(layer, "attention", ()) for layer in layers))
        assert_generates(model, start=1 if len(layers) == 3 else 12)
        expected = logits(model, IDS)[:, -1]
        with torch.no_grad():  # prefill, then the rest in two pieces
            cache = model(input_ids=IDS[:, :10], use_cache=True).past_key_values
            cache = model(input_ids=IDS[:, 10:15], past_key_values=cache, use_cache=True).past_key_values
            found = model(input_ids=IDS[:, 15:], past_key_values=cache, use_cache=True).logits[:, -1]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "opt"])
def test_padding_on_the_left_with_an_empty_first_attention(model_type):
    model = pico_model(model_type)
    apply(model, KeepChannels(0, "attention", ()), KeepChannels(1, "mlp", ()))
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    alone = model.generate(IDS[:1, :9], **options)[0, 9:]
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), IDS[:1, :9]], 1)
    together = torch.cat([padded, IDS[1:, :13]])
    mask = torch.ones_like(together)
    mask[0, :4] = 0
    assert torch.equal(model.generate(together, attention_mask=mask, **options)[0, 13:], alone)


# --- With depth ---


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_widths_follow_the_layers_when_some_are_dropped(model_type, tmp_path):
    model, group = pico_model(model_type), "mlp" if model_type == "bloom" else "attention"
    first = apply(model, KeepChannels(1, group, (1,)), KeepChannels(4, group, ()), KeepChannels(5, group, (0,)))
    widths = model.config.layer_widths
    parameters = [[p.clone() for p in layer.parameters()] for layer in decoder_layers(model)]
    second = apply(model, DropLayers((0, 2)))
    assert model.config.layer_widths == [widths[layer] for layer in (1, 3, 4, 5)]
    for layer, origin in zip(decoder_layers(model), (1, 3, 4, 5), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), parameters[origin], strict=True))
    assert_generates(loaded := assert_reloads(model, [first, second], tmp_path / "export"))
    assert widths_of(loaded) == widths_of(model)


def test_one_plan_may_narrow_some_layers_and_drop_others(tmp_path):
    model = pico_model()
    plan = apply(model, KeepChannels(1, "mlp", (0, 1)), DropLayers((0, 3)), KeepChannels(5, "attention", ()))
    assert model.config.layer_widths == [
        {"attention": 2, "mlp": 2},
        {"attention": 2, "mlp": 48},
        {"attention": 2, "mlp": 48},
        {"attention": 0, "mlp": 48},
    ]
    assert_reloads(model, [plan], tmp_path / "export")


@pytest.mark.parametrize(
    ("consolidation", "other", "host"), [("keep_top", "top", 3), ("keep_bottom", "bottom", 1), ("keep_top", "top", 2)]
)
def test_unequal_layers_are_merged_where_one_of_them_is_kept(consolidation, other, host, tmp_path):
    model = pico_model("qwen2")
    first = apply(model, KeepChannels(1, "mlp", (0, 1)), KeepChannels(2, "attention", ()), KeepChannels(3, "mlp", ()))
    widths = model.config.layer_widths
    before = [dict(layer.state_dict()) for layer in decoder_layers(model)]
    high = max(host, 2)
    second = apply(model, MergeLayers(1, high, consolidation, other))
    left = [0, host, *range(high + 1, 6)]
    assert model.config.layer_widths == [widths[layer] for layer in left]
    for layer, origin in zip(decoder_layers(model), left, strict=True):
        own = layer.state_dict()
        assert own.keys() == before[origin].keys()
        assert all(torch.equal(own[name], value) for name, value in before[origin].items())
    assert_reloads(model, [first, second], tmp_path / "export")


# qwen2 has biases on q, k and v, which are "other parameters" and shaped as the heads; norms are all alike.
UNEQUAL_HEADS = (KeepChannels(2, "attention", (1,)),)
UNEQUAL_CHANNELS = (KeepChannels(4, "mlp", (1, 2)),)
BIASED = (KeepChannels(4, "mlp", (1, 2), "c"),)


@pytest.mark.parametrize(
    ("model_type", "narrow", "consolidation", "other", "where"),
    [
        ("llama", UNEQUAL_CHANNELS, "sum", "top", r"0 and 4 .*\(mlp\.down_proj\.weight: \(32, 48\) and \(32, 2\)\)"),
        ("llama", UNEQUAL_CHANNELS, "mean", "mean", "0 and 4"),
        ("llama", UNEQUAL_HEADS, "sum", "top", r"0 and 2 .*\(self_attn\.k_proj\.weight: \(16, 32\) and \(8, 32\)\)"),
        ("qwen2", UNEQUAL_HEADS, "keep_top", "mean", r"0 and 2 .*self_attn\.k_proj\.bias: \(16,\) and \(8,\)"),
        ("qwen2", UNEQUAL_HEADS, "keep_top", "bottom", "0 and 2"),
        ("qwen2", UNEQUAL_HEADS, "keep_bottom", "top", "0 and 2"),
        ("llama", BIASED, "keep_top", "mean", r"0 and 4 .*mlp\.down_proj\.bias: none and \(32,\)"),
        ("llama", (KeepChannels(0, "attention", ()),), "sum", "top", r"0 and 1 .*k_proj\.weight: none and \(16, 32\)"),
    ],
)
def test_mixing_unequal_layers_is_refused(model_type, narrow, consolidation, other, where):
    model = pico_model(model_type)
    apply(model, *narrow, **({"c": torch.ones(32)} if narrow is BIASED else {}))
    before = logits(model)
    with pytest.raises(UsageError, match=rf"layers {where}.*Use keep_top with other_parameters top"):
        apply(model, MergeLayers(1, 4, consolidation, other))
    assert torch.equal(logits(model), before)
    assert model.config.num_hidden_layers == 6


@pytest.mark.parametrize("other", ["bottom", "mean"])
def test_norms_of_unequal_layers_correspond(other, tmp_path):
    """Of a Llama, what is not a projection has the same shape in all layers."""
    model, dense = pico_model(), pico_model()
    first = apply(model, *UNEQUAL_CHANNELS, *UNEQUAL_HEADS)
    second = apply(model, MergeLayers(3, 4, "keep_top", other))
    norms = [dense.model.layers[n].input_layernorm.weight.double() for n in (3, 4)]
    expected = norms[0] if other == "bottom" else (norms[0] + norms[1]) / 2
    torch.testing.assert_close(model.model.layers[3].input_layernorm.weight.double(), expected, rtol=0, atol=1e-7)
    assert widths_of(model) == [(32, 48), (32, 48), (16, 48), (32, 2), (32, 48)]
    assert_reloads(model, [first, second], tmp_path / "export")


def test_equally_narrow_layers_can_be_mixed(tmp_path):
    model = pico_model()
    first = apply(model, *(KeepChannels(layer, "mlp", (1, 2 + layer)) for layer in range(6)))
    ups = [layer.mlp.up_proj.weight.double() for layer in decoder_layers(model)]
    second = apply(model, MergeLayers(1, 3, "mean", "mean"))
    merged = model.model.layers[1].mlp.up_proj.weight
    torch.testing.assert_close(merged.double(), (ups[1] + ups[2] + ups[3]) / 3, rtol=0, atol=1e-6)
    assert_reloads(model, [first, second], tmp_path / "export")


# --- Refusals ---


@pytest.mark.parametrize(
    ("model_type", "steps", "message"),
    [
        ("llama", (KeepChannels(1, "attention", (0, 2)),), r"attention of layer 1, which has 2; .*within 0\.\.1"),
        ("llama", (KeepChannels(1, "attention", (-1,)),), r"within 0\.\.1"),
        ("llama", (KeepChannels(1, "mlp", (0, 48)),), r"keeps 2 units of mlp of layer 1, which has 48; .*0\.\.47"),
        ("llama", (KeepChannels(1, "mlp", (5, 4)),), "the indices must ascend"),
        ("llama", (KeepChannels(1, "mlp", (4, 4)),), "the indices must ascend"),
        ("llama", (KeepChannels(6, "mlp", (4,)),), r"touches layers \[6\]; this model has 0\.\.5"),
        ("llama", (KeepChannels(-1, "mlp", (4,)),), r"touches layers \[-1\]"),
        ("llama", (KeepChannels(1, "mlp", (4,)), KeepChannels(1, "mlp", (4, 5))), "touches a layer twice"),
        ("llama", (KeepChannels(1, "mlp", (4,)), DropLayers((1,))), "touches a layer twice"),
        ("llama", (MergeLayers(0, 2), KeepChannels(1, "attention", (0,))), "touches a layer twice"),
        ("llama", (KeepChannels(0, "mlp", (4,)), KeepChannels(1, "mlp", (4,), "c")), "'c' to a bias; it is missing"),
        ("llama", (KeepChannels(1, "mlp", (4,), "short"),), r"'short' to a bias; its shape is \(31,\), needed are 32"),
        ("llama", (KeepChannels(1, "mlp", (4,), "flat"),), r"'flat' to a bias; its shape is \(1, 32\)"),
        ("llama", (KeepChannels(1, "mlp", (4,), "nan"),), "numbers that are not finite in torch.float32"),
        ("llama", (KeepHidden((0, 1)), KeepChannels(1, "mlp", (4,))), "Make it a plan of its own"),
        ("llama", (KeepHidden(()),), "keeps 0 channels of the hidden state"),
        ("llama", (KeepHidden((3, 32)),), r"the hidden state, which has 32; .*0\.\.31"),
        ("llama", (KeepHidden((3, 2)),), "must ascend"),
        ("mixtral", (KeepChannels(1, "mlp", (4,)),), "mlp of layer 1 narrower, which has no units to remove"),
        ("qwen3_moe", (KeepChannels(0, "mlp", (4,)), KeepChannels(1, "mlp", (4,))), "mlp of layer 1 .* no units"),
        ("bloom", (KeepChannels(1, "attention", (0,)),), "attention of layer 1 narrower, which has no units"),
        ("opt", (KeepChannels(1, "attention", (0, 4)),), r"which has 4; .*0\.\.3"),
    ],
)
def test_impossible_steps_are_refused_and_leave_the_model_alone(model_type, steps, message):
    model = pico_model(model_type)
    before, config = {k: v.clone() for k, v in model.state_dict().items()}, model.config.to_dict()
    tensors = {"short": torch.ones(31), "flat": torch.ones(1, 32), "nan": torch.full((32,), float("nan"))}
    with pytest.raises(UsageError, match=message):
        apply(model, *steps, **tensors)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert model.config.to_dict() == config


@pytest.mark.parametrize(("model_type", "group"), [("llama", "attention"), ("llama", "mlp"), ("opt", "mlp")])
def test_an_emptied_group_cannot_be_narrowed_again(model_type, group):
    model = pico_model(model_type)
    apply(model, KeepChannels(2, group, ()))
    before = logits(model)
    with pytest.raises(UsageError, match=f"{group} of layer 2 narrower, which has no units to remove"):
        apply(model, KeepChannels(2, group, ()))
    assert torch.equal(logits(model), before)


def test_a_plan_of_the_model_before_it_was_narrowed_is_refused():
    model = pico_model()
    plan = plan_for(model, KeepChannels(1, "mlp", (0,)))
    surgery.apply(model, plan)
    with pytest.raises(UsageError, match="num_parameters"):
        surgery.apply(model, plan)


def test_biases_of_several_plans_add_up(tmp_path):
    c, d = CONSTANT, CONSTANT.flip(0) ** 2
    by_hand = constant_by_hand("llama", "mlp", {3: c.double() + d.double()})
    # Of layer 1, nothing is removed; what is added stays when all is removed.
    by_hand.model.layers[1].mlp.down_proj.register_forward_hook(lambda _, args, output: output + c.double())
    plans = []
    for model in (wide_model("llama"), single := pico_model()):
        first = KeepChannels(1, "mlp", tuple(range(48)), "c"), KeepChannels(3, "mlp", (0, 1, 2), "c")
        plans = [apply(model, *first, c=c), apply(model, KeepChannels(3, "mlp", (), "d"), d=d)]
        if model is not single:
            assert_near(logits(model), logits(by_hand))
    assert single.config.layer_widths[1] == {"attention": 2, "mlp": 48, "mlp_bias": True}
    assert_reloads(single, plans, tmp_path / "export")


def test_layers_that_become_equal_by_what_goes_are_stock_again(tmp_path):
    model = pico_model()
    first = apply(model, *(KeepChannels(layer, "mlp", tuple(range(40))) for layer in (2, 3, 4, 5)))
    assert [mlp for _, mlp in widths_of(model)] == [48, 48, 40, 40, 40, 40]
    assert model.config.layer_widths[0] == {"attention": 2, "mlp": 48}
    second = apply(model, DropLayers((0, 1)))
    assert model.config.intermediate_size == 40
    assert not hasattr(model.config, "layer_widths")
    assert not hasattr(model.config, "width_layout")
    save_compressed(model, pico_tokenizer(), tmp_path / "export", [first, second], recovered=False)
    assert not (tmp_path / "export" / "modeling_pruned.py").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert torch.equal(logits(loaded.eval()), logits(model))


def test_a_bias_that_half_precision_cannot_hold_is_refused():
    model = pico_model().half()
    with pytest.raises(UsageError, match="numbers that are not finite in torch.float16.*bfloat16"):
        apply(model, KeepChannels(1, "mlp", tuple(range(40)), "b"), b=torch.full((32,), 1e5))
    assert [mlp for _, mlp in widths_of(model)] == [48] * 6
    assert all(layer.mlp.down_proj.bias is None for layer in decoder_layers(model))


def test_a_bias_that_one_layer_has_is_not_lost_where_layers_with_experts_are_merged():
    model = pico_model("qwen3_moe")
    apply(model, KeepChannels(3, "attention", (1,), "b"), b=torch.arange(32.0))
    for other in ("bottom", "mean"):
        with pytest.raises(UsageError, match=r"layers 0 and 3 .*differ in width \(self_attn.o_proj.bias: none and"):
            check_consolidation(model, "keep_top", other)
    check_consolidation(model, "keep_top", "top")


def test_what_a_strangers_config_says_of_the_layout_is_not_used(tmp_path):
    import json

    model = pico_model()
    plan = apply(model, KeepChannels(2, "mlp", tuple(range(40))))
    path = save_compressed(model, pico_tokenizer(), tmp_path / "export", [plan], recovered=False)
    config = json.loads((path / "config.json").read_text())
    right = config["width_layout"]
    config["width_layout"] = {"layers": "model.layers", "mlp": {**right["mlp"], "units": 7, "in": {"mlp.up_proj": 1}}}
    (path / "config.json").write_text(json.dumps(config))
    (path / "slm_pl.sha256").unlink()
    loaded, _, _ = load_compressed(path)
    assert loaded.config.width_layout == right
    apply(loaded, KeepChannels(4, "attention", (0,)))
    assert widths_of(loaded)[4] == (16, 48)


@pytest.mark.parametrize(
    "widths",
    ["wide", [{"mlp": 40}], [{"mlp": -1}] * 6, [{"mlp": 40.0}] * 6, [{"mlp": 2**40}] * 6, [[40]] * 6, [{"x": 1}] * 6],
)
def test_widths_of_which_no_model_can_be_made_are_refused(widths, tmp_path):
    import json

    model = pico_model()
    plan = apply(model, KeepChannels(2, "mlp", tuple(range(40))))
    path = save_compressed(model, pico_tokenizer(), tmp_path / "export", [plan], recovered=False)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "layer_widths": widths}))
    (path / "slm_pl.sha256").unlink()
    with pytest.raises(UsageError, match="layer_widths .*is not a list of 6 entries such as"):
        load_compressed(path)


def test_a_config_with_a_null_in_that_place_is_an_ordinary_one(tmp_path):
    import json

    model = pico_model()
    path = save_compressed(model, pico_tokenizer(), tmp_path / "export", [], recovered=False)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "layer_widths": None}))
    (path / "slm_pl.sha256").unlink()
    loaded, _, _ = load_compressed(path)
    assert torch.equal(logits(loaded.eval()), logits(model))
