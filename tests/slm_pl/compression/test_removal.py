import math

import pytest
import torch

from slm_pl.compression import surgery
from slm_pl.compression.architecture import ARCHITECTURES, decoder_layers
from slm_pl.compression.calibration import batched, token_losses
from slm_pl.compression.plan import Base, DropLayers, Method, Plan
from slm_pl.compression.removal import RemovalSweep, finite, least
from slm_pl.memory import TensorBytes
from tests.helpers.pico import pico_model

SAMPLES = torch.randint(3, 512, (5, 24), generator=torch.Generator().manual_seed(1))
BATCHES = SAMPLES.split(2)


def loss_without(model_type: str, gone: tuple[int, ...], samples=SAMPLES) -> float:
    """Of a really pruned model, by a full forward of one sample at a time and transformers' own logits."""
    model = pico_model(model_type)
    surgery.apply(model, Plan(Base.of(model), Method("t", {}), None, (DropLayers(gone),)))
    total, tokens = 0.0, 0
    with torch.no_grad():
        for ids in samples:
            log_probabilities = model(input_ids=ids[None], use_cache=False).logits[0, :-1].double().log_softmax(-1)
            total -= log_probabilities.gather(1, ids[1:, None]).sum().item()
            tokens += len(ids) - 1
    return total / tokens


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_scores_are_those_of_really_pruned_models(model_type):
    model = pico_model(model_type)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    sweep = RemovalSweep(model, BATCHES, memory_budget=1)
    assert sweep.dense == pytest.approx(loss_without(model_type, ()), rel=1e-6)
    first = sweep.score(range(6), [0, 2, 5])
    assert first == {gone: pytest.approx(loss_without(model_type, (gone,)), rel=1e-6) for gone in (0, 2, 5)}
    second = sweep.score([0, 1, 3, 5], [1, 5])  # without 2 and 4, of which layers may slide
    assert second == {gone: pytest.approx(loss_without(model_type, (gone, 2, 4)), rel=1e-6) for gone in (1, 5)}
    assert len({round(v, 6) for v in (*first.values(), *second.values())}) == 5  # each removal shows
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_layer_forwards_are_counted_and_are_half_of_full_passes():
    model = pico_model(num_hidden_layers=12)
    calls = {"layer": 0, "head": 0}

    def count(what):
        def hook(*_):
            calls[what] += 1

        return hook

    sweep = RemovalSweep(model, BATCHES, memory_budget=1)
    assert sweep.chunks == 1
    for layer in decoder_layers(model):
        layer.register_forward_hook(count("layer"))
    model.lm_head.register_forward_hook(count("head"))
    dense = sweep.layer_forwards, sweep.head_forwards
    assert dense == (12, 1)
    sweep.score(range(12), range(12))
    assert sweep.layer_forwards - 12 == calls["layer"] == 11 + 12 * 11 // 2
    assert sweep.head_forwards - 1 == calls["head"] == 12
    sweep.score([i for i in range(12) if i != 4], [1, 2, 9])
    # Eleven are left; place 8 holds layer 9. Prefix 8, then what is above each candidate.
    assert calls["layer"] == 11 + 66 + 8 + 9 + 8 + 2


def test_samples_of_other_lengths_count_by_their_tokens():
    samples = [SAMPLES[0], SAMPLES[1, :7], SAMPLES[2, :7], SAMPLES[3]]
    sweep = RemovalSweep(pico_model(), [s[None] for s in samples], memory_budget=1)
    assert sweep.chunks == 3  # 24; 7 and 7; 24
    assert sweep.score(range(6), [3])[3] == pytest.approx(loss_without("llama", (3,), samples), rel=1e-6)


@pytest.mark.parametrize("model_type", ["llama", "bloom", "gemma2", "mixtral", "opt", "gpt_neox"])
@pytest.mark.parametrize("mib", [2, 4, 8])
def test_chunks_fit_the_memory_budget(model_type, mib):
    """Eager attention and experts, too: what a sample takes is measured, not computed from the config."""
    samples = torch.randint(3, 512, (48, 96), generator=torch.Generator().manual_seed(2))
    model = pico_model(model_type)
    with TensorBytes(model) as tensors:
        sweep = RemovalSweep(model, samples.split(7), memory_budget=mib / 1024)
        chunked = sweep.score(range(6), [1, 4])
    given = samples.numel() * samples.element_size()
    assert sweep.chunks > 1
    assert tensors.peak <= mib * 2**20 + given  # the token ids are the caller's
    assert tensors.peak > 0.3 * mib * 2**20  # and the budget is used
    whole = RemovalSweep(model, samples.split(7), memory_budget=1)
    assert whole.chunks == 1
    assert chunked == pytest.approx(whole.score(range(6), [1, 4]), rel=1e-6)


def test_a_sample_beyond_the_budget_is_told_and_goes_alone():
    with pytest.warns(UserWarning, match=r"One calibration sample of 24 tokens needs .* memory_budget = 1e-05 GiB"):
        sweep = RemovalSweep(pico_model(), BATCHES, memory_budget=1e-5)
    assert (sweep.chunk_size, sweep.chunks) == (1, 5)
    assert sweep.score(range(6), [2])[2] == pytest.approx(loss_without("llama", (2,)), rel=1e-6)


def test_masks_of_equal_chunks_are_kept_once():
    sweep = RemovalSweep(pico_model("gemma2"), BATCHES, memory_budget=2e-4)
    assert sweep.chunks > 1
    masks = [chunk.arguments[0]["attention_mask"] for chunk in sweep._chunks if len(chunk.ids) == sweep.chunk_size]
    assert len(masks) > 1
    assert len({mask.data_ptr() for mask in masks}) == 1


def test_a_dense_model_that_is_not_finite_is_refused():
    model = pico_model()
    ids = SAMPLES.clone()
    ids[ids == 511], ids[3, 7] = 510, 511
    with torch.no_grad():
        model.model.embed_tokens.weight[511] = float("nan")
    with pytest.raises(FloatingPointError, match=r"^On calibration sample 3, the dense model gives hidden states"):
        RemovalSweep(model, ids.split(2), memory_budget=1)


def test_a_candidate_that_overflows_ranks_last():
    """Layer 1 undoes what layer 0 does; without it, the states leave float16's range."""
    model = pico_model()
    with torch.no_grad():
        for index, sign in ((0, 1), (1, -1)):
            layer = model.model.layers[index]
            for p in layer.parameters():
                p.zero_()
            layer.register_forward_hook(lambda m, args, out, sign=sign: out + sign * 40_000)
        model.model.layers[2].register_forward_hook(lambda m, args, out: out + args[0].abs())
    sweep = RemovalSweep(model.half(), BATCHES, memory_budget=1)
    scores = sweep.score(range(6), range(6))
    assert math.isinf(scores[1])
    assert all(math.isfinite(scores[layer]) for layer in (2, 3, 4, 5))
    assert least({layer: scores[layer] for layer in range(1, 6)}, 4) == sorted(range(2, 6), key=scores.__getitem__)
    assert finite(scores[1]) is None
    assert finite(scores[2]) == scores[2]
    with pytest.raises(FloatingPointError, match=r"Without any of the layers \[.*1\] .* so 6 cannot be chosen"):
        least(scores, 6)


@pytest.mark.parametrize("logits_bytes", [1, 5 * 4 * 512, 2**20])
def test_losses_do_not_depend_on_the_slices(logits_bytes):
    model = pico_model("granite")
    with torch.no_grad():
        output = model(input_ids=SAMPLES, output_hidden_states=True)
        hidden = torch.randn(5, 24, 32, generator=torch.Generator().manual_seed(3))
        losses = token_losses(model, hidden, SAMPLES, logits_bytes)
        expected = model.lm_head(model.model.norm(hidden)) / model.config.logits_scaling
    assert output.logits.shape == expected.shape
    expected = torch.nn.functional.cross_entropy(expected[:, :-1].transpose(1, 2), SAMPLES[:, 1:], reduction="none")
    torch.testing.assert_close(losses, expected)


def test_batches_hold_consecutive_samples_of_equal_length():
    samples = [SAMPLES[0], SAMPLES[1], SAMPLES[2, :7], SAMPLES[3]]
    assert [tuple(b.shape) for b in batched(samples, 8)] == [(2, 24), (1, 7), (1, 24)]
