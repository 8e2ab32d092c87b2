import pytest
import torch

from slm_pl.compression import surgery
from slm_pl.compression.architecture import ARCHITECTURES, architecture_of
from slm_pl.compression.calibration import LayerReplay, mean_over_ranks
from slm_pl.compression.plan import Base, MergeLayers, Method, Plan
from slm_pl.compression.scores import FlattenedCosine, flattened_cosine
from tests.helpers.pico import pico_model

BATCHES = [torch.randint(3, 512, (2, 20), generator=torch.Generator().manual_seed(s)) for s in (1, 2, 3)]


def reference_cosine(dense: torch.Tensor, merged: torch.Tensor) -> torch.Tensor:
    a, b = dense.flatten(1).double(), merged.flatten(1).double()
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
@pytest.mark.parametrize("other_parameters", ["top", "bottom"])
@pytest.mark.parametrize(("low", "high"), [(0, 1), (2, 4), (4, 5)])
def test_replay_scores_what_a_full_forward_of_the_really_merged_model_gives(model_type, other_parameters, low, high):
    model = pico_model(model_type)
    replay = LayerReplay(model, BATCHES)
    with torch.inference_mode():
        dense = [model(input_ids=ids, output_hidden_states=True).hidden_states[-1] for ids in BATCHES]
    merged = surgery.merge(replay.layers[low : high + 1], "keep_top", other_parameters, architecture_of(model))
    candidate = [(high, merged), *((i, replay.layers[i]) for i in range(high + 1, 6))]
    score = replay.score(candidate, low, FlattenedCosine())

    plan = Plan(Base.of(model), Method("t", {}), None, (MergeLayers(low, high, "keep_top", other_parameters),))
    surgery.apply(model, plan)
    with torch.inference_mode():
        after = [model(input_ids=ids, output_hidden_states=True).hidden_states[-1] for ids in BATCHES]
    expected = torch.cat([reference_cosine(a, b) for a, b in zip(dense, after, strict=True)]).mean().item()
    assert score == pytest.approx(expected, abs=1e-6)
    assert score < 0.99999  # the merge is visible: a replay of the dense layers would give 1
    assert replay.layer_forwards == 6 + 1 + 5 - high


def test_replay_changes_nothing_and_leaves_no_hooks():
    model = pico_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    replay = LayerReplay(model, BATCHES)
    merged = surgery.merge(replay.layers[1:4], "keep_top", "bottom", architecture_of(model))
    replay.score([(3, merged), (4, replay.layers[4]), (5, replay.layers[5])], 1, FlattenedCosine())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    # The whole model from layer 0 is the dense model: similarity 1.
    assert replay.score(list(enumerate(replay.layers)), 0, FlattenedCosine()) == pytest.approx(1, abs=1e-12)


def test_score_is_per_sample_whatever_the_batching():
    model = pico_model()
    ids = torch.cat(BATCHES)
    scores = []
    for size in (1, 3, 6):
        replay = LayerReplay(model, ids.split(size))
        merged = surgery.merge(replay.layers[2:5], "keep_top", "top", architecture_of(model))
        scores.append(replay.score([(4, merged), (5, replay.layers[5])], 2, FlattenedCosine()))
    assert scores == pytest.approx([scores[0]] * 3, abs=1e-6)


def test_cosine_never_exceeds_one():
    x = torch.full((1, 3, 7), 0.1)
    assert 1 - 1e-12 < flattened_cosine(x, x * 3).item() <= 1
    assert -1 <= flattened_cosine(x, -x).item() < -1 + 1e-12


def test_mean_over_ranks_is_of_each_column_and_rounds_once():
    assert mean_over_ranks([[0.1, 1.0]] * 10) == [0.1, 1.0]  # fsum: no accumulated rounding
    with pytest.raises(FloatingPointError, match=r"not a finite number, .* --model\.dtype bfloat16 or float32"):
        mean_over_ranks([[0.5], [float("nan")]])


@pytest.mark.parametrize("size", [1, 3, 6])
@pytest.mark.parametrize(("layer", "name"), [(-1, "the embeddings"), (2, "layer 2"), (5, "layer 5 or the final norm")])
def test_dense_states_that_are_not_finite_name_layer_and_sample(size, layer, name):
    model = pico_model()
    ids = torch.cat(BATCHES)
    ids[4, 7] = 511  # a token that no other sample has
    assert (ids[:4] != 511).all()
    with torch.no_grad():
        if layer < 0:
            model.model.embed_tokens.weight[511] = float("inf")
        else:
            # Channel 0 is the largest by far for token 511 alone, and this layer multiplies it beyond float32.
            model.model.embed_tokens.weight[:, 0] = 0
            model.model.embed_tokens.weight[511, 0] = 1e30
            model.model.layers[layer].register_forward_hook(lambda module, args, output: output * 1e15)
    with pytest.raises(FloatingPointError, match=rf"^On calibration sample 4, {name} of the dense model gives hidden"):
        LayerReplay(model, ids.split(size))


def test_candidate_that_overflows_names_layer_and_sample():
    """Activations near the end of half precision, as in Llama-2 in float16: real overflow, no planted value."""
    model = pico_model()
    with torch.inference_mode():
        largest = max(model.model(ids, output_hidden_states=True).hidden_states[3].abs().max() for ids in BATCHES)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight *= 30_000 / largest
    model = model.half()
    replay = LayerReplay(model, BATCHES)  # the dense model stays below 65,504
    layers = replay.layers
    candidate = [(2, layers[2]), *[(3, layers[2])] * 60, (4, layers[4]), (5, layers[5])]
    with pytest.raises(FloatingPointError, match=r"^On calibration sample \d, layer 3 of the candidate gives .*65,504"):
        replay.score(candidate, 2, FlattenedCosine())
