"""FLAP, LLM-Pruner and Wanda on structures, against computations of their own on a pico Llama."""

import math
import re
from dataclasses import replace

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from callbacks import FLAP, LLMPruner, WandaStructured
from slm_pl.compression import surgery
from slm_pl.compression.plan import KeepChannels
from slm_pl.data import CalibrationSet, CalibrationText
from slm_pl.errors import UsageError
from slm_pl.export import load_compressed, save_compressed
from tests.helpers.pico import pico_model
from tests.helpers.run import alpaca_data, make_module, make_trainer
from tests.helpers.tokenizer import pico_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.randint(3, 512, (4, 16), generator=torch.Generator().manual_seed(1))
# A pico Llama: two KV groups of two query heads, each of 8 entries, and 48 channels.
HIDDEN, GROUP, UNITS = 32, 16, {"attention": 2, "mlp": 48}
SIZE = {"attention": (16 + 8 + 8 + 16) * HIDDEN, "mlp": 3 * HIDDEN}
KEYS = [(layer, group) for layer in range(6) for group in ("attention", "mlp")]
EVERYWHERE = {"attention_layers": (0, None), "mlp_layers": (0, None)}


def calibration(ids=IDS, seed=1234):
    text = CalibrationText(source="ids", samples=len(ids), sequence_length=ids.shape[1], seed=seed)
    return CalibrationSet.from_ids(ids.tolist(), text)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():  # as the lifecycle lends the model
        yield


def writer(model, layer, group):
    own = model.model.layers[layer]
    return own.self_attn.o_proj if group == "attention" else own.mlp.down_proj


def columns(group, units):
    size = GROUP if group == "attention" else 1
    return [column for unit in units for column in range(unit * size, unit * size + size)]


def of_units(group, values):
    """One row of channels for each unit."""
    return values.reshape(UNITS[group], -1)


def inputs(model, ids=IDS):
    """What goes into the maps that write, over all tokens, by structure; float64."""
    seen = {}
    handles = [
        writer(model, *key).register_forward_pre_hook(
            lambda _, args, key=key: seen.__setitem__(key, args[0].reshape(-1, args[0].shape[-1]).double())
        )
        for key in KEYS
    ]
    model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def kept_of(plan):
    kept = {key: tuple(range(UNITS[key[1]])) for key in KEYS}
    return kept | {(step.layer, step.group): step.indices for step in plan.steps}


def gone_of(plan):
    return {key: sorted(set(range(UNITS[key[1]])) - set(kept)) for key, kept in kept_of(plan).items()}


def scores_of(plan):
    return {(row["layer"], row["group"]): row["scores"] for row in plan.trace}


def assert_scores(plan, expected, rel=1e-4):
    found = scores_of(plan)
    assert sorted(found) == sorted(expected)
    for key, values in expected.items():
        scale = values.abs().max().item()
        assert found[key] == pytest.approx(values.tolist(), rel=rel, abs=rel * scale), key


def silence(model, gone):
    """The model as if these units were not there: what they hand on counts nothing."""
    for key, units in gone.items():
        writer(model, *key).weight[:, columns(key[1], units)] = 0
    return model


def total_of(model):
    return sum(p.numel() for p in model.parameters())


# Arguments


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (LLMPruner, {}, "LLMPruner got none of ratio and layer_ratio; give exactly one of ratio, layer_ratio"),
        (LLMPruner, {"ratio": 0.2, "layer_ratio": 0.25}, "got ratio=0.2 and layer_ratio=0.25; give exactly one"),
        (LLMPruner, {"ratio": 20.0}, "ratio is 20.0; it is a share of all parameters, in (0, 1). For 20 % give 0.2"),
        (LLMPruner, {"ratio": 0.0}, "ratio is 0.0; it is a share"),
        (LLMPruner, {"ratio": 1.0}, "ratio is 1.0; it is a share"),
        (LLMPruner, {"ratio": math.nan}, "ratio is nan; it is a share"),
        (LLMPruner, {"layer_ratio": 25.0}, "layer_ratio is 25.0"),
        (LLMPruner, {"layer_ratio": 1.0}, "layer_ratio is 1.0"),
        (LLMPruner, {"layer_ratio": 0.0}, "layer_ratio is 0.0"),
        (LLMPruner, {"layer_ratio": -0.25}, "layer_ratio is -0.25"),
        (LLMPruner, {"ratio": 0.2, "importance": "l2"}, "importance is 'l2'; allowed are taylor, magnitude, random"),
        (LLMPruner, {"ratio": 0.2, "taylor": "first"}, "taylor is 'first'; allowed are param_first, param_second, "),
        (LLMPruner, {"ratio": 0.2, "grouping": "min"}, "grouping is 'min'; allowed are sum, mean, max, last"),
        (LLMPruner, {"ratio": 0.2, "scope": "layer"}, "scope is 'layer'; allowed are block, channel"),
        (LLMPruner, {"ratio": 0.2, "iterative_steps": 0}, "iterative_steps is 0; give at least 1"),
        (LLMPruner, {"ratio": 0.2, "uniform": True, "global_ranking": True}, "give one of them"),
        (LLMPruner, {"ratio": 0.2, "scope": "channel", "global_ranking": True}, "leave out uniform, global_ranking"),
        (LLMPruner, {"ratio": 0.2, "scope": "channel", "iterative_steps": 2}, "uniform, global_ranking, iterative_"),
        (LLMPruner, {"ratio": 0.2, "scope": "channel", "as_published": True}, "uniform, global_ranking, iterative_"),
        (LLMPruner, {"ratio": 0.2, "scope": "channel", "grouping": "last"}, "as_published and grouping last"),
        (
            LLMPruner,
            {"ratio": 0.2, "attention_layers": None, "mlp_layers": None},
            "attention_layers and mlp_layers are both null: nothing is pruned. Give one of them",
        ),
        (LLMPruner, {"ratio": 0.2, "scope": "channel", "uniform": True}, "leave out uniform, global_ranking"),
        (LLMPruner, {"ratio": 0.2, "uniform": True, "mlp_layers": (1, 5)}, "mlp_layers is [1, 5], but uniform and"),
        (LLMPruner, {"ratio": 0.2, "importance": "magnitude", "taylor": "vectorize"}, "Leave taylor out"),
        (LLMPruner, {"ratio": 0.2, "importance": "random", "grouping": "max"}, "Leave grouping and as_published out"),
        (FLAP, {}, "FLAP got no ratio; give ratio (or plan_path)."),
        (FLAP, {"ratio": 1.2}, "ratio is 1.2; it is a share of all parameters, in (0, 1)"),
        (FLAP, {"ratio": -0.2}, "ratio is -0.2; it is a share of all parameters, in (0, 1)"),
        (FLAP, {"ratio": 0.2, "metric": "WIFX"}, "metric is 'WIFX'; allowed are WIFV, WIFN and IFV"),
        (FLAP, {"ratio": 0.2, "structure": "UL"}, "structure is 'UL'; allowed are AL-AM, UL-UM, AL-MM and UL-MM"),
        (
            FLAP,
            {"ratio": 0.2, "attention_ratio": 0.2},
            "attention_ratio is 0.2 with structure AL-AM; it is a share in [0, 1) for AL-MM and UL-MM",
        ),
        (FLAP, {"ratio": 0.2, "structure": "AL-MM", "attention_ratio": 1.0}, "attention_ratio is 1.0 with structure "),
        (FLAP, {"ratio": 0.2, "structure": "UL-MM", "attention_ratio": -0.1}, "attention_ratio is -0.1 with struct"),
        (FLAP, {"ratio": 0.2, "structure": "AL-MM", "as_published": True}, "reproduces AL-AM and UL-UM; structure is "),
        (WandaStructured, {}, "WandaStructured got no ratio; give ratio (or plan_path)."),
        (WandaStructured, {"ratio": 2.0}, "ratio is 2.0; it is a share of all parameters, in (0, 1)"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(method, options, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        method(**options)


@pytest.mark.parametrize("method", [LLMPruner, FLAP, WandaStructured])
def test_a_plan_is_enough(method):
    assert method(plan_path="some/plan.json").arguments()["ratio"] is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: LLMPruner(ratio=0.2),
            "attention_layers is [4, -2], which names no layer of this model with 6. Give [first, end], such as [2, ",
        ),
        (
            lambda: LLMPruner(ratio=0.2, attention_layers=None, mlp_layers=(3, 3)),
            "mlp_layers is [3, 3], which names no layer",
        ),
        (lambda: LLMPruner(ratio=0.2, attention_layers=(1,)), "attention_layers is [1], which names no layer"),
        (
            lambda: LLMPruner(layer_ratio=0.3, attention_layers=(0, None), mlp_layers=None),
            "layer_ratio 0.3 removes no whole unit of any layer. The layers have [2] units",
        ),
        (
            lambda: LLMPruner(layer_ratio=0.99, **EVERYWHERE),
            "layer_ratio 0.99 removes all units of a layer. The layers have [2, 48] units",
        ),
        (
            lambda: LLMPruner(ratio=0.3, attention_layers=(0, 2), mlp_layers=(0, 2)),
            "ratio 0.3 means 23,779 of 79,264 parameters; the attention and MLP units that may go have 12,096 (ratio ",
        ),
        (lambda: LLMPruner(ratio=0.99, scope="channel"), "of 32 channels of the hidden state; 1 to 31 can be removed"),
        (lambda: LLMPruner(ratio=0.001, scope="channel"), "means 0 of 32 channels of the hidden state"),
        (
            lambda: FLAP(ratio=0.5),
            "ratio 0.5 means 39,632 of 79,264 parameters; the attention and MLP units that may go have 36,288 (ratio "
            "0.0012 to 0.458), with one of each staying. Give another ratio",
        ),
        (lambda: FLAP(ratio=0.7, allow_empty=True), "that may go have 46,080 (ratio 0.0012 to 0.581). Give another"),
        (lambda: FLAP(ratio=1e-4), "ratio 0.0001 means 8 of 79,264 parameters"),
        (
            lambda: FLAP(ratio=0.05, structure="UL-MM", attention_ratio=0.5),
            "parameters for the MLPs to lose, which can lose 0 to 27,072. Give another of both.",
        ),
        (lambda: WandaStructured(ratio=0.5), "ratio 0.5 means 39,632 of 79,264 parameters"),
    ],
)
@pytest.mark.filterwarnings("ignore:LLMPruner. layer_ratio .* keeps its width")
def test_what_a_model_cannot_lose_is_refused(make, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        make().plan(pico_model(), calibration())


# FLAP


def channel_metric(name, weight, x):
    if name == "WIFN":
        return weight.abs().mean(0) * (x * x).sum(0).sqrt()
    variance = ((x - x.mean(0)) ** 2).sum(0) / (len(x) - 1)
    return variance if name == "IFV" else variance * (weight * weight).sum(0)


def flap_scores(model, metric, standardised=True, ids=IDS):
    scores = {}
    for (layer, group), x in inputs(model, ids).items():
        values = channel_metric(metric, writer(model, layer, group).weight.double(), x)
        if standardised:
            values = (values - values.mean()) / values.std()
        scores[layer, group] = of_units(group, values).mean(1)
    return scores


def first_of(scores, count):
    """The structures' units of the lowest scores, by structure, and how many parameters they are."""
    order = sorted((value, key, unit) for key, values in scores.items() for unit, value in enumerate(values.tolist()))
    gone = {}
    for _, key, unit in order[:count]:
        gone.setdefault(key, []).append(unit)
    return {key: sorted(units) for key, units in gone.items()}


def parameters(gone):
    return sum(SIZE[group] * len(units) for (_, group), units in gone.items())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("metric", ["WIFV", "IFV", "WIFN"])
def test_flap_takes_what_varies_least_down_to_the_share_asked_for(metric, bias):
    model = pico_model()
    expected = flap_scores(model, metric)
    total = total_of(model)
    some = set()
    empties = (n for n in range(200) if any(len(u) == UNITS[g] for (_, g), u in first_of(expected, n).items()))
    most = next(empties, 191)
    for count in (30, most // 2, most - 1):
        gone = first_of(expected, count)
        removed = parameters(gone) - (HIDDEN * len(gone) if bias else 0)
        plan = FLAP(ratio=removed / total, metric=metric, bias_compensation=bias).plan(model, calibration())
        assert_scores(plan, expected)
        assert {key: units for key, units in gone_of(plan).items() if units} == gone
        assert plan.outcome["removed_parameters"] == removed
        pruned = pico_model()
        surgery.apply(pruned, plan)
        assert total_of(pruned) == total - removed
        some |= {group for _, group in gone}
    assert some == {"attention", "mlp"}


def test_flap_of_each_module_by_itself():
    model = pico_model()
    expected = flap_scores(model, "WIFV")
    for ratio, share in ((0.15, 0.25), (0.2, 0.5)):
        plan = FLAP(ratio=ratio, structure="AL-MM", attention_ratio=share).plan(model, calibration())
        gone = gone_of(plan)
        heads = {key: values for key, values in expected.items() if key[1] == "attention"}
        lost = sum(len(units) for key, units in gone.items() if key in heads)
        assert lost == share * 12  # of two groups in each of six layers
        channels = {key: values for key, values in expected.items() if key[1] == "mlp"}
        wide = sum(len(units) for key, units in gone.items() if key in channels)
        one_stays = first_of(heads, lost)  # unless the lowest of a layer were both of them
        if all(len(units) == 1 for units in one_stays.values()):
            assert {key: units for key, units in gone.items() if key in heads and units} == one_stays
        assert {key: units for key, units in gone.items() if key in channels and units} == first_of(channels, wide)
        assert abs(plan.outcome["ratio"] - ratio) * total_of(model) <= SIZE["mlp"]


def test_flap_of_each_layer_by_itself():
    model = pico_model()
    expected = flap_scores(model, "WIFV", standardised=False)
    for options in ({"structure": "UL-UM"}, {"structure": "UL-MM", "attention_ratio": 0.5}):
        plan = FLAP(ratio=0.25, **options).plan(model, calibration())
        assert_scores(plan, expected)
        counts = {group: {len(gone) for key, gone in gone_of(plan).items() if key[1] == group} for group in UNITS}
        assert counts["attention"] == {1}
        assert max(counts["mlp"]) - min(counts["mlp"]) <= 1
        for key, gone in gone_of(plan).items():
            assert gone == sorted(expected[key].argsort()[: len(gone)].tolist())
        assert abs(plan.outcome["ratio"] - 0.25) * total_of(model) <= SIZE["mlp"]


def test_flap_divides_the_share_itself_where_none_is_given():
    """Of few heads the share is rounded, but never to more than is to go in all."""
    model = pico_model("opt")  # a quarter of the heads are 6,336 parameters
    for ratio in (0.05, 0.0824, 0.2):
        plan = FLAP(ratio=ratio, structure="UL-MM", bias_compensation=False).plan(model, calibration())
        assert abs(plan.outcome["ratio"] - ratio) * total_of(model) <= 65  # an MLP channel


def test_flap_adds_what_the_removed_channels_gave_on_average():
    model = pico_model()
    plan = FLAP(ratio=0.2).plan(model, calibration())
    gone = {key: units for key, units in gone_of(plan).items() if units}
    assert {(step.layer, step.group) for step in plan.steps if step.bias} == set(gone)
    means = {key: x.mean(0) for key, x in inputs(model).items()}
    for step in plan.steps:
        lost = columns(step.group, gone[step.layer, step.group])
        weight = writer(model, step.layer, step.group).weight.double()
        expected = weight[:, lost] @ means[step.layer, step.group][lost]
        torch.testing.assert_close(plan.tensors[step.bias].double(), expected, rtol=1e-5, atol=1e-6)
    without = FLAP(ratio=0.2, bias_compensation=False).plan(model, calibration())
    assert not without.tensors
    assert all(step.bias is None for step in without.steps)


@pytest.mark.parametrize("structure", ["AL-AM", "UL-UM"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "phi3", "opt", "gpt_neox", "bloom"])
def test_channels_that_do_not_vary_are_replaced_by_their_constant(model_type, structure):
    """Of one token again and again, attention gives the same at every place, whatever it looks at."""
    ids = torch.full((2, 8), 77)
    options = {"structure": structure, "metric": "WIFN"}  # the others are zero for all

    def model_without_places():
        model = pico_model(model_type)
        if model_type == "opt":
            model.model.decoder.embed_positions.weight[:] = 0.1
        return model

    dense = model_without_places()
    logits = dense(input_ids=ids).logits
    differences = {}
    for bias in (True, False):
        plan = FLAP(ratio=0.2, bias_compensation=bias, **options).plan(dense, calibration(ids))
        pruned = model_without_places()
        surgery.apply(pruned, plan)
        assert len({step.layer for step in plan.steps}) > 3
        differences[bias] = (pruned(input_ids=ids).logits - logits).abs().max().item()
    assert differences[True] < 2e-5
    assert differences[False] > 100 * differences[True]
    assert differences[False] > 1e-3


def test_flap_of_a_structure_whose_channels_are_all_worth_the_same():
    """Nothing varies there, as where an earlier method wrote zeros: it is worth its mean, as little as any other."""
    model = pico_model()
    model.model.layers[2].mlp.down_proj.weight.zero_()
    for options in ({}, {"as_published": True}, {"metric": "WIFN", "bias_compensation": False}):
        plan = FLAP(ratio=0.2, **options).plan(model, calibration())
        scores = scores_of(plan)
        assert all(math.isfinite(value) for values in scores.values() for value in values)
        kept = kept_of(plan)
        for layer in (0, 1, 3, 4, 5):  # of the others, those that are worth least went
            own = scores[layer, "mlp"]
            lost = gone_of(plan)[layer, "mlp"]
            assert 0 < len(lost) < 47
            assert max(own[unit] for unit in lost) <= min(own[unit] for unit in kept[layer, "mlp"])


@pytest.mark.parametrize("structure", ["AL-AM", "UL-UM"])
def test_one_unit_stays_of_every_structure(structure):
    plan = FLAP(ratio=0.45, structure=structure).plan(pico_model(), calibration())
    assert min(len(kept) for kept in kept_of(plan).values()) == 1
    published = FLAP(ratio=0.9, as_published=True).plan(pico_model(), calibration())
    assert min(len(kept) for kept in kept_of(published).values()) == 1
    empty = FLAP(ratio=0.9, as_published=True, allow_empty=True).plan(pico_model(), calibration())
    assert min(len(kept) for kept in kept_of(empty).values()) == 0


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_that_lost_everything_is_skipped(bias, tmp_path, monkeypatch):
    plan = FLAP(ratio=0.53, allow_empty=True, bias_compensation=bias).plan(pico_model(), calibration())
    assert abs(plan.outcome["ratio"] - 0.53) * 79264 <= SIZE["mlp"]
    kept = kept_of(plan)
    empty = {group: {layer for layer in range(6) if not kept[layer, group]} for group in UNITS}
    assert empty["attention"]
    model = pico_model()
    surgery.apply(model, plan)
    calls = {"linear": 0, "scaled_dot_product_attention": 0}

    def counted(name):
        original = getattr(functional, name)

        def call(*args, **kwargs):
            calls[name] += 1
            return original(*args, **kwargs)

        return call

    with monkeypatch.context() as patched:
        for name in calls:
            patched.setattr(functional, name, counted(name))
        logits = model(input_ids=IDS).logits
    left = {group: 6 - len(layers) for group, layers in empty.items()}
    assert calls == {
        "linear": 4 * left["attention"] + 3 * left["mlp"] + 1,  # the head
        "scaled_dot_product_attention": left["attention"],
    }
    for layer in empty["attention"]:
        own = dict(model.model.layers[layer].self_attn.named_parameters())
        assert [(name, value.tolist()) for name, value in own.items()] == (
            [("o_proj.weight", [[]] * HIDDEN)]  # of no inputs: stock classes find a shape that is not theirs
            + ([("o_proj.bias", plan.tensors[f"layers.{layer}.attention.bias"].tolist())] if bias else [])
        )
    expected = silence(pico_model(), gone_of(plan))
    for step in plan.steps:
        if bias:
            map_, value = writer(expected, step.layer, step.group), plan.tensors[step.bias]
            map_.register_forward_hook(lambda _, args, output, value=value: output + value)
    torch.testing.assert_close(logits, expected(input_ids=IDS).logits, rtol=0, atol=1e-5)


EMPTIED = [
    "bloom",
    "gemma2",
    "gemma3_text",
    "glm4",
    "gpt_neox",
    "llama",
    "mixtral",
    "opt",
    "phi3",
    "qwen2",
    "qwen3_moe",
]


@pytest.mark.parametrize("model_type", EMPTIED)
def test_an_export_without_the_attention_of_some_layers_is_the_model(model_type, tmp_path):
    """The first and the last layer lose a group altogether, by a plan made by hand from FLAP's."""
    plan = FLAP(ratio=0.02).plan(pico_model(model_type), calibration())
    groups = {row["group"] for row in plan.trace}
    there = {(row["layer"], row["group"]) for row in plan.trace}
    steps = [
        KeepChannels(layer, group, ())
        for layer, group in ((0, "attention"), (2, "mlp"), (3, "attention"), (4, "attention"), (5, "mlp"))
        if (layer, group) in there
    ]
    assert {step.group for step in steps} == groups
    plan = replace(plan, steps=tuple(steps)).with_tensors({})
    model = pico_model(model_type)
    surgery.apply(model, plan)
    logits = model(input_ids=IDS).logits
    assert torch.isfinite(logits).all()
    path = save_compressed(model, pico_tokenizer(), tmp_path / "export", [], recovered=False)
    theirs = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()
    for loaded in (theirs, load_compressed(path)[0]):
        assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in model.parameters())
        torch.testing.assert_close(loaded(input_ids=IDS).logits, logits, rtol=0, atol=1e-6)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(IDS)
    mask[1, :5] = 0  # a shorter prompt, padded on the left
    longer = [theirs.generate(IDS, attention_mask=mask, use_cache=use, **options) for use in (True, False)]
    assert torch.equal(*longer)


# LLM-Pruner


def taylor_scores(model, ids=IDS):
    """Sum of |w g| over a unit, with g of the mean loss over all predicted tokens."""
    with torch.enable_grad():
        model.zero_grad()
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    return weight_scores(model, lambda weight: (weight * weight.grad).abs())


def weight_scores(model, of, published=False):
    def heads(values):
        """[units] of the entries of all heads: those of a KV group, or as the program adds them up."""
        each = values.double().reshape(-1, 8).sum(1)
        return each.view(-1, 2).sum(0) if published else each.view(2, -1).sum(1)

    scores = {}
    for layer, own in enumerate(model.model.layers):
        attention, mlp = own.self_attn, own.mlp
        rows = [of(m.weight).sum(1) for m in (attention.q_proj, attention.k_proj, attention.v_proj)]
        scores[layer, "attention"] = sum(heads(values) for values in [*rows, of(attention.o_proj.weight).sum(0)])
        scores[layer, "mlp"] = (
            of(mlp.gate_proj.weight).sum(1) + of(mlp.up_proj.weight).sum(1) + of(mlp.down_proj.weight).sum(0)
        ).double()
    return scores


def test_published_heads_are_not_those_that_go():
    """With grouped queries, heads 0 and 1 share the first key; the authors' program adds up heads 0 and 2."""
    model = pico_model()
    plans = {
        published: LLMPruner(layer_ratio=0.5, importance="magnitude", as_published=published, **EVERYWHERE).plan(
            model, calibration()
        )
        for published in (False, True)
    }
    for published, plan in plans.items():
        expected = weight_scores(model, torch.square, published)
        assert_scores(plan, expected)
        for key, gone in gone_of(plan).items():
            assert gone == sorted(expected[key].argsort()[: UNITS[key[1]] // 2].tolist())
    differs = {key for key, kept in kept_of(plans[True]).items() if kept != kept_of(plans[False])[key]}
    assert differs
    assert {group for _, group in differs} == {"attention"}
    # Where every head has its own key, there is nothing to misalign.
    each = [
        LLMPruner(layer_ratio=0.5, importance="magnitude", as_published=published, **EVERYWHERE).plan(
            pico_model(num_key_value_heads=4), calibration()
        )
        for published in (False, True)
    ]
    assert each[0].steps == each[1].steps


def test_a_share_that_is_no_whole_group_is_warned_of_and_the_rest_is_pruned():
    model = pico_model()
    message = (
        r"LLMPruner: layer_ratio 0.25 of 2 attention units is less than a whole one, so attention keeps its width. "
        "The rest is pruned."
    )
    with pytest.warns(UserWarning, match=message):
        plan = LLMPruner(layer_ratio=0.25, **EVERYWHERE).plan(model, calibration())
    lost = {key: len(gone) for key, gone in gone_of(plan).items()}
    assert lost == {(layer, group): 12 if group == "mlp" else 0 for layer, group in KEYS}


def test_taylor_takes_the_least_of_each_layer():
    model = pico_model()
    plan = LLMPruner(ratio=0.25, **EVERYWHERE).plan(model, calibration())
    expected = taylor_scores(pico_model())
    assert_scores(plan, expected, rel=1e-3)
    for key, gone in gone_of(plan).items():
        assert gone == sorted(expected[key].argsort()[: len(gone)].tolist())
    assert {len(gone) for key, gone in gone_of(plan).items() if key[1] == "attention"} == {1}


def test_global_ranking_is_by_importance_for_each_parameter():
    model = pico_model()
    expected = {
        (layer, group): values / SIZE[group]
        for (layer, group), values in weight_scores(model, torch.square).items()
        if 1 <= layer < 5
    }
    for count in (40, 90):
        gone = first_of(expected, count)
        options = {"global_ranking": True, "attention_layers": (1, -1), "mlp_layers": (1, 5)}
        plan = LLMPruner(ratio=parameters(gone) / total_of(model), importance="magnitude", **options).plan(
            model, calibration()
        )
        assert {key: units for key, units in gone_of(plan).items() if units} == gone
        assert plan.calibration is None


@pytest.mark.parametrize("ranking", [True, False])
def test_the_second_estimate_is_of_the_model_pruned_so_far(ranking):
    model = pico_model()
    options = {"ratio": 0.25, "global_ranking": ranking, **EVERYWHERE}
    plan = LLMPruner(iterative_steps=2, **options).plan(model, calibration())
    final = gone_of(plan)
    scores = scores_of(plan)
    before = {key: [unit for unit, value in enumerate(values) if value is None] for key, values in scores.items()}
    assert any(before.values())
    assert all(set(units) <= set(final[key]) for key, units in before.items())

    # The first half is what a single estimate takes first.
    first = taylor_scores(pico_model())
    if ranking:
        each = {key: values / SIZE[key[1]] for key, values in first.items()}
        count = sum(map(len, before.values()))
        assert {key: units for key, units in before.items() if units} == first_of(each, count)
        half = round(0.25 * total_of(model)) / 2
        assert abs(parameters(before) - half) <= SIZE["mlp"]
    else:
        assert {len(units) for (_, group), units in before.items() if group == "attention"} == {0}  # of one, half
        for key, units in before.items():
            assert len(units) == len(final[key]) // 2
            assert units == sorted(first[key].argsort()[: len(units)].tolist())

    # The second is what is least in a model without them.
    second = taylor_scores(silence(pico_model(), before))
    for key, values in scores.items():
        left = [unit for unit, value in enumerate(values) if value is not None]
        found, expected = [values[unit] for unit in left], second[key][left].tolist()
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-3 * max(expected))
    if not ranking:
        for key, values in second.items():
            left = [unit for unit in values.argsort().tolist() if unit not in before[key]]
            assert final[key] == sorted(before[key] + left[: len(final[key]) - len(before[key])])
    dense = {key: [values[unit].item() for unit in range(len(values))] for key, values in first.items()}
    assert any(
        value is not None and abs(value / dense[key][unit] - 1) > 0.01
        for key, values in scores.items()
        for unit, value in enumerate(values)
    )
    assert plan.outcome["removed_parameters"] == parameters(final)
    assert abs(parameters(final) - 0.25 * total_of(model)) <= SIZE["mlp"]


@pytest.mark.parametrize(("model_type", "heads"), [("llama", (1, 2, 4)), ("mistral", (1, 2, 3, 4))])
def test_uniform_widths_are_those_that_the_stock_config_takes(model_type, heads, tmp_path):
    """Three heads do not divide a hidden size of 32, and the config of a Llama minds."""
    found = set()
    for ratio in (0.1, 0.2, 0.3, 0.4):
        model = pico_model(model_type, num_key_value_heads=4)
        total = total_of(model)
        plan = LLMPruner(ratio=ratio, importance="magnitude", uniform=True).plan(model, calibration())
        surgery.apply(model, plan)
        assert abs((total - total_of(model)) - ratio * total) <= 6 * SIZE["mlp"]
        path = save_compressed(model, pico_tokenizer(), tmp_path / str(ratio), [], recovered=False)
        stock = AutoModelForCausalLM.from_pretrained(path).eval()
        assert torch.equal(stock(input_ids=IDS).logits, model(input_ids=IDS).logits)
        assert stock.config.num_key_value_heads == stock.config.num_attention_heads
        found.add(stock.config.num_attention_heads)
    assert found <= set(heads)
    assert len(found) > 1


def test_random_units_are_drawn_by_the_seed_of_the_calibration_text():
    model = pico_model()

    def steps(seed, **options):
        method = LLMPruner(ratio=0.15, importance="random", **options)
        return method.plan(model, calibration(seed=seed)).steps

    for options in (EVERYWHERE, {**EVERYWHERE, "iterative_steps": 2}, {"scope": "channel"}):
        drawn = [steps(seed, **options) for seed in range(5)]
        assert drawn == [steps(seed, **options) for seed in range(5)]
        assert len(set(drawn)) == 5
    # Every unit is drawn about as often.
    often = [0] * 48
    for seed in range(100):
        kept = {(step.layer, step.group): step.indices for step in steps(seed, **EVERYWHERE)}
        for unit in kept[3, "mlp"]:
            often[unit] += 1
    assert min(often) > 30
    assert max(often) < 90


# Wanda


def wanda_scores(model, ids=IDS):
    """Sum over a unit of mean |W_c| · ‖x_c‖."""
    return {
        (layer, group): of_units(
            group,
            writer(model, layer, group).weight.abs().double().mean(0) * x.square().sum(0).sqrt(),
        ).sum(1)
        for (layer, group), x in inputs(model, ids).items()
    }


def test_wanda_measures_each_layer_above_the_pruned_ones():
    model = pico_model()
    plan = WandaStructured(ratio=0.25).plan(model, calibration())
    gone, found = gone_of(plan), scores_of(plan)
    lost = {group: {len(units) for key, units in gone.items() if key[1] == group} for group in UNITS}
    assert lost["attention"] == {1}
    assert max(lost["mlp"]) - min(lost["mlp"]) <= 1
    assert abs(plan.outcome["ratio"] - 0.25) * total_of(model) <= SIZE["mlp"]

    sequential = pico_model()
    for layer in range(6):
        expected = wanda_scores(sequential)
        for group in UNITS:
            own = expected[layer, group]
            assert found[layer, group] == pytest.approx(own.tolist(), rel=1e-4)
            assert gone[layer, group] == sorted(own.argsort()[: len(gone[layer, group])].tolist())
        silence(sequential, {key: units for key, units in gone.items() if key[0] == layer})
    at_once = wanda_scores(pico_model())
    assert found[0, "mlp"] == pytest.approx(at_once[0, "mlp"].tolist(), rel=1e-4)
    for layer in range(1, 6):
        assert found[layer, "mlp"] != pytest.approx(at_once[layer, "mlp"].tolist(), rel=1e-2)
    # Units of the same size are chosen otherwise than at once; else the order above would show nothing.
    assert any(
        gone[layer, "mlp"] != sorted(at_once[layer, "mlp"].argsort()[: len(gone[layer, "mlp"])].tolist())
        for layer in range(1, 6)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.03, "mlp_layers": None}, r"ratio 0.03 cannot be met with one width.*the nearest is 0.0000"),
        ({"ratio": 0.09, "mlp_layers": None}, r"ratio 0.09 cannot be met with one width.*the nearest is 0.14\d\d"),
    ],
)
def test_one_width_for_all_that_is_far_from_the_share_is_refused(options, message):
    model = pico_model(num_key_value_heads=4)
    with pytest.raises(UsageError, match=message):
        LLMPruner(importance="magnitude", uniform=True, **options).plan(model, calibration())


@pytest.mark.parametrize("options", [{"ratio": 0.1}, {"layer_ratio": 0.2}])
def test_one_width_for_layers_that_differ_already_is_refused(options):
    model = pico_model()
    surgery.apply(model, FLAP(ratio=0.1).plan(model, calibration()))
    with pytest.raises(UsageError, match="differ in width already, or carry biases"):
        LLMPruner(uniform=True, **options).plan(model, calibration())


@pytest.mark.parametrize(
    "method",
    [
        LLMPruner(layer_ratio=0.999, global_ranking=True, importance="magnitude", **EVERYWHERE),
        FLAP(ratio=0.45, structure="AL-MM", attention_ratio=0.9),
        FLAP(ratio=0.3, structure="UL-MM", attention_ratio=0.6),
    ],
)
def test_a_share_that_would_empty_layers_is_refused(method):
    with pytest.raises(UsageError, match="these settings remove|at most 0.5 of its units can go"):
        method.plan(pico_model(), calibration())


def test_published_flap_asks_for_another_share():
    """Of the decoder layers' weights, so that it is not written beside a share of all parameters."""
    plan = FLAP(ratio=0.2, as_published=True).plan(pico_model(), calibration())
    assert plan.outcome["requested_ratio"] is None
    assert plan.requested_ratio is None
    assert FLAP(ratio=0.2).plan(pico_model(), calibration()).requested_ratio == 0.2


def test_a_run_draws_by_the_seed_of_its_calibration_text(pico_dir, tmp_path):
    kept = {}
    for seed in (7, 7, 8):
        method = LLMPruner(ratio=0.1, importance="random", **EVERYWHERE)
        data = alpaca_data(tmp_path / "data")
        data.calibration = replace(data.calibration, seed=seed)
        module = make_module(pico_dir)
        make_trainer(tmp_path / "run", method).prune(module, data)
        (plan,) = module.plans
        assert plan.outcome["seed"] == seed
        assert plan.calibration is None
        kept.setdefault(seed, set()).add(tuple(step.indices for step in plan.steps))
    assert {seed: len(draws) for seed, draws in kept.items()} == {7: 1, 8: 1}
    assert kept[7] != kept[8]


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_adapters_pass_over_what_a_layer_lost_whole(model_type, tmp_path):
    model = pico_model(model_type)
    steps = (KeepChannels(1, "attention", ()), KeepChannels(2, "mlp", ()), KeepChannels(3, "mlp", tuple(range(40))))
    plan = replace(LLMPruner(ratio=0.1, importance="magnitude", **EVERYWHERE).plan(model, calibration()), steps=steps)
    surgery.apply(model, plan)
    save_compressed(model, pico_tokenizer(), tmp_path / "export", [plan], recovered=False)
    module = make_module(tmp_path / "export")
    with torch.enable_grad():
        make_trainer(tmp_path / "run").fit(module, alpaca_data(tmp_path / "data", batching="grouped"))
    adapters = [name for name, parameter in module.named_parameters() if "lora_" in name]
    layers = "model.decoder.layers" if model_type == "opt" else "model.layers"
    maps = ("fc1", "fc2") if model_type == "opt" else ("mlp.",)
    assert any(f"{layers}.0.self_attn" in name for name in adapters)
    assert not any(f"{layers}.1.self_attn" in name for name in adapters)
    assert any(f"{layers}.3.{own}" in name for name in adapters for own in maps)
    assert not any(f"{layers}.2.{own}" in name for name in adapters for own in maps)
    assert all(parameter.numel() for name, parameter in module.named_parameters() if "lora_" in name)
