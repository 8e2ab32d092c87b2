from typing import get_args

import pytest
import torch

from slm_pl.compression.architecture import decoder_layers
from slm_pl.compression.structures import structures
from slm_pl.compression.unit_scores import Grouping, HiddenScores, Taylor, UnitScores, differentiate, weigh
from tests.helpers.pico import pico_model
from tests.helpers.ranks import in_two_processes

SAMPLES = torch.randint(3, 512, (4, 24), generator=torch.Generator().manual_seed(1))
CRITERIA = ("magnitude", *get_args(Taylor))
LAYERS = (1, 4)


def wide_model(model_type: str, **changes: object):
    """In float64; the usual kernel for experts knows no such thing."""
    model = pico_model(model_type, **changes).double()
    model.config._experts_implementation = "eager"
    return model


def gradients_of(model, ids) -> dict:
    """By layer and name, of the mean cross-entropy per predicted token, from transformers' own logits in one graph."""
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    return {
        (i, name): torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for i, layer in enumerate(decoder_layers(model))
        for name, p in layer.named_parameters()
    }


def importances(model, criterion: str) -> dict:
    """Of every entry of every weight; of ``vectorize``, before the absolute value is taken."""
    weights = {(i, n): p.detach() for i, layer in enumerate(decoder_layers(model)) for n, p in layer.named_parameters()}
    if criterion == "magnitude":
        return {key: w**2 for key, w in weights.items()}
    mean = gradients_of(model, SAMPLES)
    own = [gradients_of(model, ids[None]) for ids in SAMPLES] if criterion in ("param_second", "param_mix") else []
    found = {}
    for key, w in weights.items():
        fisher = sum(g[key] ** 2 for g in own) / 4 if own else None
        found[key] = {
            "param_first": lambda w=w, g=mean[key], a=fisher: (w * g).abs(),
            "param_second": lambda w=w, g=mean[key], a=fisher: w * a * w,
            "param_mix": lambda w=w, g=mean[key], a=fisher: (w * g - 0.5 * w * a * w).abs(),
            "vectorize": lambda w=w, g=mean[key], a=fisher: w * g,
        }[criterion]()
    return found


def rows(value: torch.Tensor) -> torch.Tensor:
    """``[rows]``; the absolute value matters to ``vectorize`` alone."""
    return value.sum(1).abs()


def columns(value: torch.Tensor) -> torch.Tensor:
    return value.sum(0).abs()


def attention_parts(model_type: str, layer: dict) -> list[torch.Tensor]:
    """Of query, key, value and output: ``[units, 8]``, written down by hand (hidden size 32, heads of 8)."""
    if model_type == "gpt_neox":  # query, key and value of each of 4 heads, one after another
        qkv = rows(layer["attention.query_key_value.weight"])
        parts = [[qkv[24 * u + 8 * which :][:8] for u in range(4)] for which in range(3)]
        output = columns(layer["attention.dense.weight"])
        return [*map(torch.stack, parts), torch.stack([output[8 * u :][:8] for u in range(4)])]
    if model_type == "opt":
        found = [rows(layer[f"self_attn.{which}_proj.weight"]) for which in "qkv"]
        found.append(columns(layer["self_attn.out_proj.weight"]))
        return [torch.stack([value[8 * u :][:8] for u in range(4)]) for value in found]
    if model_type == "phi3":
        qkv = rows(layer["self_attn.qkv_proj.weight"])
        q, k, v = qkv[:32], qkv[32:48], qkv[48:64]
    else:
        q, k, v = (rows(layer[f"self_attn.{which}_proj.weight"]) for which in "qkv")
    o = columns(layer["self_attn.o_proj.weight"])
    # Query heads 2u and 2u + 1 share the key/value head u.
    two = [torch.stack([x[16 * u :][:8] + x[16 * u + 8 :][:8] for u in range(2)]) for x in (q, o)]
    one = [torch.stack([x[8 * u :][:8] for u in range(2)]) for x in (k, v)]
    return [two[0], *one, two[1]]


def mlp_parts(model_type: str, layer: dict) -> list[torch.Tensor]:
    if model_type == "phi3":
        both = rows(layer["mlp.gate_up_proj.weight"])
        found = [both[:48], both[48:], columns(layer["mlp.down_proj.weight"])]
    elif model_type == "opt":
        found = [rows(layer["fc1.weight"]), columns(layer["fc2.weight"])]
    elif model_type == "gpt_neox":
        found = [rows(layer["mlp.dense_h_to_4h.weight"]), columns(layer["mlp.dense_4h_to_h.weight"])]
    else:
        found = [rows(layer["mlp.gate_proj.weight"]), rows(layer["mlp.up_proj.weight"])]
        found.append(columns(layer["mlp.down_proj.weight"]))
    return [value[:, None] for value in found]


def joined(parts: list[torch.Tensor], grouping: str) -> torch.Tensor:
    together = torch.stack(parts)
    if grouping == "last":
        return parts[-1].sum(1)
    return {"sum": together.sum(0), "mean": together.mean(0), "max": together.max(0).values}[grouping].sum(1)


def assert_close(found: torch.Tensor, expected: torch.Tensor):
    assert found.dtype == torch.float64
    assert expected.min() < 0.9995 * expected.max()  # units differ
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * expected.max().item())


def look(model, criterion: str, *visitors, size: int = 3) -> None:
    def visit(layer, name, entries_of):
        for visitor in visitors:
            visitor.add(layer, name, entries_of)

    if criterion == "magnitude":
        weigh(model, range(6), visit)
    else:
        differentiate(model, SAMPLES.split(size), criterion, visit)


@pytest.mark.parametrize("model_type", ["llama", "olmo2", "phi3", "gpt_neox", "opt"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_unit_scores_are_the_formulas_on_one_ordinary_backward(model_type, criterion):
    model = wide_model(model_type)
    before = {name: p.clone() for name, p in model.named_parameters()}
    units = structures(model, LAYERS)
    scorers = {grouping: UnitScores(units, grouping) for grouping in get_args(Grouping)}
    look(model, criterion, *scorers.values())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    entries = importances(model, criterion)
    different = set()
    for grouping, scorer in scorers.items():
        scores = scorer.scores()
        assert scores.keys() == {(layer, group) for layer in LAYERS for group in ("attention", "mlp")}
        for layer in LAYERS:
            own = {name: value for (index, name), value in entries.items() if index == layer}
            assert_close(scores[layer, "attention"], joined(attention_parts(model_type, own), grouping))
            assert_close(scores[layer, "mlp"], joined(mlp_parts(model_type, own), grouping))
            different.add((layer, scores[layer, "mlp"].sum().item()))
    assert len(different) == 2 * 4


@pytest.mark.parametrize("model_type", ["llama", "phi3"])
@pytest.mark.parametrize("criterion", ["magnitude", "param_first"])
def test_published_alignment_adds_up_every_nth_query_head(model_type, criterion):
    """Of six query heads, 3h, 3h + 1 and 3h + 2 share the key/value head h; the program adds h, h + 2 and h + 4."""
    model = wide_model(model_type, hidden_size=48, num_attention_heads=6)
    units = structures(model, LAYERS)
    published, ordinary = UnitScores(units, "sum", as_published=True), UnitScores(units, "sum")
    look(model, criterion, published, ordinary)
    entries = importances(model, criterion)
    for layer in LAYERS:
        own = {name: value for (index, name), value in entries.items() if index == layer}
        if model_type == "phi3":
            qkv = rows(own["self_attn.qkv_proj.weight"])
            q, k, v = qkv[:48], qkv[48:64], qkv[64:80]
        else:
            q, k, v = (rows(own[f"self_attn.{which}_proj.weight"]) for which in "qkv")
        o = columns(own["self_attn.o_proj.weight"])

        def of_heads(value, heads):
            return sum(value[8 * head : 8 * head + 8].sum() for head in heads)

        def expected(sharing, q=q, k=k, v=v, o=o):
            return torch.stack(
                [
                    of_heads(q, sharing[h]) + of_heads(o, sharing[h]) + of_heads(k, [h]) + of_heads(v, [h])
                    for h in (0, 1)
                ]
            )

        assert_close(published.scores()[layer, "attention"], expected({0: [0, 2, 4], 1: [1, 3, 5]}))
        assert_close(ordinary.scores()[layer, "attention"], expected({0: [0, 1, 2], 1: [3, 4, 5]}))
        assert torch.equal(published.scores()[layer, "mlp"], ordinary.scores()[layer, "mlp"])


def hidden_members(model_type: str, entries: dict) -> list[torch.Tensor]:
    """All parameters of the layers that see the hidden state, each brought to ``[32]``, by hand."""
    found = []
    for (_, name), value in entries.items():
        if name.endswith(("_norm.weight", ".bias")):  # of heads; biases of q, k and v
            continue
        if name.endswith("layernorm.weight"):
            found.append(value.abs())
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            found.append(rows(value))
        elif name == "mlp.experts.gate_up_proj":  # [experts, 96, hidden]
            found.append(columns(value.flatten(0, 1)))
        elif name == "mlp.experts.down_proj":  # [experts, hidden, 48]
            found.append(rows(value.transpose(0, 1).flatten(1)))
        else:
            found.append(columns(value))
    assert len(found) == 6 * {"llama": 9, "qwen3": 9, "mixtral": 9}[model_type]
    return found


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "mixtral"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_hidden_scores_are_the_formulas_over_all_that_sees_a_channel(model_type, criterion):
    model = wide_model(model_type)
    scorers = {grouping: HiddenScores(model, grouping) for grouping in ("sum", "mean", "max")}
    look(model, criterion, *scorers.values())
    members = torch.stack(hidden_members(model_type, importances(model, criterion)))
    expected = {"sum": members.sum(0), "mean": members.mean(0), "max": members.max(0).values}
    for grouping, scorer in scorers.items():
        assert_close(scorer.scores(), expected[grouping])


@pytest.mark.parametrize("criterion", get_args(Taylor))
def test_scores_do_not_depend_on_the_batches(criterion):
    """Samples of one length: the mean over tokens is the mean over samples, however they are put together."""
    model, found = wide_model("llama"), []
    for size in (1, 2, 4):
        scorer, notes = UnitScores(structures(model, LAYERS), "sum"), []
        differentiate(model, SAMPLES.split(size), criterion, scorer.add, notes.append)
        found.append(scorer.scores())
        assert notes == [f"layer {layer}" for layer in (5, 4, 3, 2, 1, 0)]
    for scores in found[1:]:
        for key, value in scores.items():
            torch.testing.assert_close(value, found[0][key], rtol=1e-6, atol=0)


def test_first_order_weighs_tokens_and_second_order_samples():
    """Samples of different lengths: the loss is the mean over all tokens, the Fisher matrix that over the samples."""
    model = wide_model("llama")
    samples = [SAMPLES[:1], SAMPLES[1:2, :7]]
    first, second = (UnitScores(structures(model, [2], ["mlp"]), "last") for _ in range(2))
    differentiate(model, samples, "param_first", first.add)
    differentiate(model, samples, "param_second", second.add)
    weight = model.model.layers[2].mlp.down_proj.weight.detach()
    a, b = (gradients_of(model, ids)[2, "mlp.down_proj.weight"] for ids in samples)
    assert_close(first.scores()[2, "mlp"], columns((weight * (23 * a + 6 * b) / 29).abs()))
    assert_close(second.scores()[2, "mlp"], columns(weight**2 * (a**2 + b**2) / 2))


def test_half_precision_is_multiplied_in_single():
    """The products here are below float16's smallest number."""
    model = pico_model().half()
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight.mul_(1e-3)
    single = pico_model()
    single.load_state_dict(model.state_dict())
    scorers = {criterion: UnitScores(structures(model, [3], ["mlp"]), "last") for criterion in CRITERIA}
    weight = model.model.layers[3].mlp.down_proj.weight.detach()
    for criterion, scorer in scorers.items():
        look(model, criterion, scorer)
        expected = columns(importances(single, criterion)[3, "mlp.down_proj.weight"].double())
        torch.testing.assert_close(
            scorer.scores()[3, "mlp"], expected, rtol=0.05, atol=0.05 * expected.max().item(), msg=criterion
        )
    squares = (gradients_of(single, SAMPLES)[3, "mlp.down_proj.weight"] * weight).square()
    assert (squares.half() == 0).float().mean() > 0.9


@pytest.mark.parametrize("criterion", ["magnitude", "param_first"])
def test_broken_weights_are_refused_with_the_layer_named(criterion):
    model = pico_model()
    with torch.no_grad():
        model.model.layers[4].mlp.down_proj.weight[0, 0] = float("inf")
    units, hidden = UnitScores(structures(model, [4]), "sum"), HiddenScores(model, "sum")
    look(model, criterion, units, hidden)
    layer = "mlp of layer 4" if criterion == "magnitude" else "(attention|mlp) of layer 4"
    with pytest.raises(FloatingPointError, match=rf"importance of {layer} is not finite.*bfloat16"):
        units.scores()
    with pytest.raises(FloatingPointError, match="importance of the hidden state is not finite"):
        hidden.scores()


def _rank(rank: int, directory: str) -> None:
    shares = {"uneven": (SAMPLES[:3].split(2), SAMPLES[3:].split(1)), "few": (SAMPLES[:1].split(1), ())}
    found = {}
    for name, share in shares.items():
        for criterion in get_args(Taylor):
            model = wide_model("llama")
            units, hidden = UnitScores(structures(model, LAYERS), "sum"), HiddenScores(model, "max")

            def visit(*found, visitors=(units, hidden)):
                for visitor in visitors:
                    visitor.add(*found)

            differentiate(model, share[rank], criterion, visit)
            found[name, criterion] = {**units.scores(), "hidden": hidden.scores()}
    torch.save(found, f"{directory}/{rank}.pt")


@pytest.mark.long
def test_two_processes_give_the_scores_of_one(tmp_path):
    in_two_processes(_rank, tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert len(ranks[0]) == 2 * 4
    for (name, criterion), scores in ranks[0].items():
        model = wide_model("llama")
        units, hidden = UnitScores(structures(model, LAYERS), "sum"), HiddenScores(model, "max")
        for visitor in (units, hidden):
            differentiate(model, [SAMPLES if name == "uneven" else SAMPLES[:1]], criterion, visitor.add)
        one = {**units.scores(), "hidden": hidden.scores()}
        assert one.keys() == scores.keys()
        for key, value in scores.items():
            assert torch.equal(ranks[1][name, criterion][key], value)
            torch.testing.assert_close(value, one[key], rtol=1e-6, atol=0)
