import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from slm_pl.compression import surgery
from slm_pl.compression.architecture import decoder_layers
from slm_pl.compression.plan import Base, KeepChannels, KeepHidden, Method, Plan, count_parameters
from slm_pl.compression.structures import (
    hidden_axes,
    hidden_channel_parameters,
    masked,
    structure,
    structures,
)
from slm_pl.errors import UsageError
from tests.helpers.pico import CONFIGS, pico_model

IDS = torch.arange(3, 45).reshape(2, 21) * 7 % 512
WITH_EXPERTS = ("mixtral", "qwen3_moe")
DERIVE_THE_HEAD = ("bloom", "gpt_neox", "opt")  # from the hidden size, and have a key/value head for each query head
BY_GROUP = [
    (model_type, group)
    for model_type in sorted(CONFIGS)
    for group in ("attention", "mlp")
    if (model_type, group) not in (("bloom", "attention"), ("mixtral", "mlp"))
]


def plan_for(model, *steps) -> Plan:
    return Plan(Base.of(model), Method("test", {}), None, steps)


def span(start: int, length: int) -> list[int]:
    return list(range(start, start + length))


def entries_of_unit(model_type: str, group: str, u: int) -> dict[tuple[str, int], list[int]]:
    """By parameter and axis, what belongs to unit u, written down by hand; the columns that it writes with come last.

    Hidden size 32; heads of 8; 4 of them, of which 2 share a key/value head where there is one; 48 channels.
    """
    if group == "mlp":
        if model_type in ("glm4", "phi3"):  # first all of gate, then all of up
            return {("mlp.gate_up_proj.weight", 0): [u, 48 + u], ("mlp.down_proj.weight", 1): [u]}
        if model_type == "opt":
            return {("fc1.weight", 0): [u], ("fc1.bias", 0): [u], ("fc2.weight", 1): [u]}
        if model_type in ("bloom", "gpt_neox"):
            up, down = "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"
            return {(f"{up}.weight", 0): [u], (f"{up}.bias", 0): [u], (f"{down}.weight", 1): [u]}
        return {(f"mlp.{which}_proj.weight", int(which == "down")): [u] for which in ("gate", "up", "down")}
    if model_type == "gpt_neox":  # query, key and value of the first head, then those of the second
        qkv = "attention.query_key_value"
        return {
            (f"{qkv}.weight", 0): span(24 * u, 24),
            (f"{qkv}.bias", 0): span(24 * u, 24),
            ("attention.dense.weight", 1): span(8 * u, 8),
        }
    if model_type == "opt":
        kinds = [(f"self_attn.{which}_proj.{kind}", 0) for which in "qkv" for kind in ("weight", "bias")]
        return dict.fromkeys([*kinds, ("self_attn.out_proj.weight", 1)], span(8 * u, 8))
    if model_type == "phi3":  # 32 rows of queries, 16 of keys, 16 of values
        rows = span(16 * u, 16) + span(32 + 8 * u, 8) + span(48 + 8 * u, 8)
        return {("self_attn.qkv_proj.weight", 0): rows, ("self_attn.o_proj.weight", 1): span(16 * u, 16)}
    found = {}
    for which, size in (("q", 16), ("k", 8), ("v", 8)):
        kinds = ["weight", "bias"] if model_type in ("glm4", "qwen2") else ["weight"]
        found |= {(f"self_attn.{which}_proj.{kind}", 0): span(size * u, size) for kind in kinds}
        if model_type == "olmo2" and which != "v":  # the norms are over all heads
            found[f"self_attn.{which}_norm.weight", 0] = span(size * u, size)
    return {**found, ("self_attn.o_proj.weight", 1): span(16 * u, 16)}


def units_of(model_type: str, group: str) -> int:
    if group == "mlp":
        return 128 if model_type == "bloom" else 48
    return 4 if model_type in DERIVE_THE_HEAD else 2


def lost(model_type: str, group: str) -> dict[int, list[int]]:
    """By layer, units to remove; of different numbers, and in layers that differ in their kind of attention."""
    if group == "mlp":
        return {0: [5, 40], 2: [0, 1, 47]}
    return {1: [0], 3: [1, 3]} if model_type in DERIVE_THE_HEAD else {1: [0], 3: [1]}


def entries(model_type: str, group: str, units: list[int]) -> dict[tuple[str, int], list[int]]:
    all_of_them = [entries_of_unit(model_type, group, u) for u in units]
    return {key: [entry for one in all_of_them for entry in one[key]] for key in all_of_them[0]}


def without(value: torch.Tensor, axis: int, gone: list[int]) -> torch.Tensor:
    return value[[n for n in range(len(value)) if n not in gone]] if axis == 0 else without(value.T, 0, gone).T


def keep_steps(model_type: str, group: str) -> list[KeepChannels]:
    units = range(units_of(model_type, group))
    return [
        KeepChannels(layer, group, tuple(u for u in units if u not in gone))
        for layer, gone in lost(model_type, group).items()
    ]


def wide_model(model_type: str):
    """In float64; the usual kernel for experts knows no such thing."""
    model = pico_model(model_type).double()
    model.config._experts_implementation = "eager"
    return model


def logits(model, ids=IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def zeroed(model_type: str, group: str):
    """A float64 model in which nothing that the lost units compute is written; its shapes are the dense model's."""
    model = wide_model(model_type)
    with torch.no_grad():
        for layer, gone in lost(model_type, group).items():
            (name, axis), columns = list(entries(model_type, group, gone).items())[-1]
            assert axis == 1
            dict(decoder_layers(model)[layer].named_parameters())[name][:, columns] = 0
    return model


def count_only(norm: torch.nn.Module, kept: list[int]):
    """Makes a norm over all heads count these entries alone."""
    mask = torch.zeros(len(norm.weight), dtype=torch.float64)
    mask[kept] = 1

    def narrow(module, args, output):
        x = args[0] * mask
        variance = x.square().sum(-1, keepdim=True) / len(kept)
        return module.weight * x * (variance + module.variance_epsilon).rsqrt()

    norm.register_forward_hook(narrow)


def assert_near(found: torch.Tensor, expected: torch.Tensor):
    """Models compute their norms in float32; what passes them may differ by its rounding."""
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 * expected.abs().max().item())


@pytest.mark.parametrize(("model_type", "group"), BY_GROUP)
def test_removing_units_is_writing_nothing_of_what_they_compute(model_type, group):
    by_hand = zeroed(model_type, group)
    if (model_type, group) == ("olmo2", "attention"):
        for layer, (gone,) in lost(model_type, group).items():
            attention = by_hand.model.layers[layer].self_attn
            count_only(attention.q_norm, span(16 * (1 - gone), 16))
            count_only(attention.k_norm, span(8 * (1 - gone), 8))
    expected = logits(by_hand)
    model = wide_model(model_type)
    dense = logits(model)
    assert (expected - dense).abs().max() > 1e-3 * dense.abs().max()
    surgery.apply(model, plan_for(model, *keep_steps(model_type, group)))
    assert_near(logits(model), expected)


@pytest.mark.parametrize(("model_type", "group"), BY_GROUP)
def test_masked_model_is_the_zeroed_one_and_is_left_as_it_was(model_type, group):
    model = wide_model(model_type)
    dense = logits(model)
    units = structures(model, range(6), [group])
    kept = {key: list(range(found.units)) for key, found in units.items()}
    kept |= {(step.layer, group): list(step.indices) for step in keep_steps(model_type, group)}
    with masked(model, units, kept):
        assert_near(logits(model), logits(zeroed(model_type, group)))
    with pytest.raises(RuntimeError, match="in the middle"), masked(model, units, kept):
        raise RuntimeError("in the middle")
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(logits(model), dense)


@pytest.mark.parametrize(("model_type", "group"), BY_GROUP)
def test_surviving_weights_are_the_original_rows_and_columns(model_type, group):
    model = pico_model(model_type)
    before = [{k: v.clone() for k, v in layer.named_parameters()} for layer in decoder_layers(model)]
    total = count_parameters(model)
    found = structures(model, range(6), [group])
    surgery.apply(model, plan_for(model, *keep_steps(model_type, group)))
    fewer = 0
    for layer, module in enumerate(decoder_layers(model)):
        after = dict(module.named_parameters())
        gone = lost(model_type, group).get(layer, [])
        removed = {name: (axis, where) for (name, axis), where in entries(model_type, group, gone or [0]).items()}
        assert after.keys() == before[layer].keys()
        own = 0
        for name, value in after.items():
            axis, where = removed.get(name, (0, []))
            expected = without(before[layer][name], axis, where if gone else [])
            assert torch.equal(value, expected), (layer, name)
            own += before[layer][name].numel() - expected.numel()
        if gone:
            assert found[layer, group].unit_parameters * len(gone) == own > 0
        fewer += own
    assert total - count_parameters(model) == fewer


# Rows of the maps that read plus columns of the one that writes, each of 32 entries; biases and norms beside them.
UNIT_PARAMETERS = {
    "attention": {
        "gpt_neox": 24 * 33 + 8 * 32,
        "opt": 3 * 8 * 33 + 8 * 32,
        "glm4": 32 * 33 + 16 * 32,
        "qwen2": 32 * 33 + 16 * 32,
        "olmo2": 32 * 32 + 16 + 8 + 16 * 32,
    },
    "mlp": {"opt": 33 + 32, "gpt_neox": 33 + 32, "bloom": 33 + 32},
}


@pytest.mark.parametrize(("model_type", "group"), BY_GROUP)
def test_units_are_counted(model_type, group):
    model = pico_model(model_type)
    usual = {"attention": (32 + 16) * 32, "mlp": 3 * 32}[group]
    found = structures(model, range(6), [group])
    layers = [0, 2, 3, 4] if (model_type, group) == ("qwen3_moe", "mlp") else list(range(6))  # others have experts
    assert list(found) == [(layer, group) for layer in layers]
    for (layer, _), own in found.items():
        assert own == structure(model, layer, group)
        assert (own.group, own.units) == (group, units_of(model_type, group))
        assert own.head_dim == (8 if group == "attention" else 1)
        assert own.unit_parameters == UNIT_PARAMETERS[group].get(model_type, usual)


def test_what_has_no_units_has_no_structure():
    assert structure(pico_model("bloom"), 0, "attention") is None
    assert structure(pico_model("mixtral"), 0, "mlp") is None
    assert structure(pico_model("qwen3_moe"), 1, "mlp") is None
    model = pico_model("opt")
    surgery.apply(model, plan_for(model, KeepChannels(1, "mlp", ()), KeepChannels(2, "attention", ())))
    assert structure(model, 1, "mlp") is None
    assert structure(model, 2, "attention") is None
    assert structure(model, 1, "attention").units == 4


# --- The hidden state ---

HIDDEN = sorted(set(CONFIGS) - set(DERIVE_THE_HEAD))
AXES = {
    r"model\.embed_tokens\.weight|lm_head\.weight": 1,
    r"model\.norm\.weight|model\.layers\.\d\.\w+_layernorm\.weight": 0,
    r".*\.(q|k|v|qkv|gate|up|gate_up)_proj\.weight": 1,
    r".*\.(o|down)_proj\.weight": 0,
    r".*\.mlp\.gate\.weight": 1,  # the router of the experts, [experts, hidden]
    r".*\.experts\.gate_up_proj": 2,  # [experts, 2 * width, hidden]
    r".*\.experts\.down_proj": 1,  # [experts, hidden, width]
}


def hidden_axis(name: str) -> int | None:
    """By hand; None for biases inside attention and for norms of heads, which do not see the hidden state."""
    found = [axis for pattern, axis in AXES.items() if re.fullmatch(pattern, name)]
    assert len(found) <= 1
    return found[0] if found else None


def hidden_kept(model_type: str) -> list[int]:
    """A multiple of the 4 heads, which some configs demand, and of 8 where there are experts; with gaps."""
    order = torch.randperm(32, generator=torch.Generator().manual_seed(5)).tolist()
    return sorted(order[: 24 if model_type in WITH_EXPERTS else 20])


@pytest.mark.parametrize("model_type", HIDDEN)
@pytest.mark.parametrize("tied", [True, False])
def test_kept_hidden_channels_are_the_chosen_entries_of_every_parameter(model_type, tied, tmp_path):
    model, kept = pico_model(model_type, tie_word_embeddings=tied), hidden_kept(model_type)
    before = {name: p.clone() for name, p in model.named_parameters()}
    total, (channels, each, step) = count_parameters(model), hidden_channel_parameters(model)
    assert hidden_axes(model) == {name: hidden_axis(name) for name in before if hidden_axis(name) is not None}
    surgery.apply(model, plan_for(model, KeepHidden(tuple(kept))))
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, value in before.items():
        axis = hidden_axis(name)
        expected = value if axis is None else value.movedim(axis, 0)[kept].movedim(0, axis)
        assert torch.equal(after[name], expected), name
    assert channels == 32
    assert step == {"mixtral": 8, "qwen3_moe": 8, "llama": 4, "gemma2": 4, "gemma3_text": 4}.get(model_type, 1)
    assert total - count_parameters(model) == each * (32 - len(kept)) > 0
    assert (32 - len(kept)) % step == 0
    assert (model.config.hidden_size, model.config.head_dim) == (len(kept), 8)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    values = logits(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert all(torch.equal(p, after[name]) for name, p in loaded.named_parameters())
    torch.testing.assert_close(logits(loaded), values, rtol=0, atol=1e-6)
    assert count_parameters(loaded) == count_parameters(model)


@pytest.mark.parametrize("model_type", HIDDEN)
def test_narrower_hidden_state_is_a_dense_one_with_zeros_that_no_norm_counts(model_type):
    """Root-mean-square norms divide by the root of the width; what goes in is scaled up, and what comes out down."""
    kept = hidden_kept(model_type)
    gone, wider = [n for n in range(32) if n not in kept], (32 / len(kept)) ** 0.5
    by_hand = wide_model(model_type)
    with torch.no_grad():
        for name, parameter in by_hand.named_parameters():
            axis = hidden_axis(name)
            if axis is not None and parameter.ndim > 1:
                parameter.movedim(axis, 0)[gone] = 0
    for name, module in by_hand.named_modules():
        if name.endswith("layernorm") or name == "model.norm":
            module.register_forward_pre_hook(lambda _, args: (args[0] * wider,))
            module.register_forward_hook(lambda _, args, output: output / wider)
    if model_type.startswith("gemma"):  # which multiplies embeddings by the root of the hidden size
        by_hand.model.embed_tokens.register_forward_hook(lambda _, args, output: output / wider)
    model = wide_model(model_type)
    surgery.apply(model, plan_for(model, KeepHidden(tuple(kept))))
    assert_near(logits(model), logits(by_hand))


@pytest.mark.parametrize("model_type", DERIVE_THE_HEAD)
def test_hidden_state_that_the_heads_follow_from_is_refused(model_type):
    model = pico_model(model_type)
    before = logits(model)
    with pytest.raises(
        UsageError, match=f"hidden state of a {model_type} model cannot be made narrower.*size of a head"
    ):
        surgery.apply(model, plan_for(model, KeepHidden(tuple(range(24)))))
    assert torch.equal(logits(model), before)
