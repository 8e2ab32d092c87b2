import math

import numpy
import pytest
import torch

from slm_pl.compression.architecture import decoder_layers
from slm_pl.compression.fluctuation import PublishedFluctuation, input_statistics
from slm_pl.compression.structures import structures
from tests.helpers.pico import CONFIGS, pico_model
from tests.helpers.ranks import in_two_processes

SAMPLES = torch.randint(3, 512, (5, 24), generator=torch.Generator().manual_seed(1))
OUTPUTS = {
    "bloom": {"mlp": "mlp.dense_4h_to_h"},
    "gpt_neox": {"attention": "attention.dense", "mlp": "mlp.dense_4h_to_h"},
    "mixtral": {"attention": "self_attn.o_proj"},
    "opt": {"attention": "self_attn.out_proj", "mlp": "fc2"},
}
USUAL = {"attention": "self_attn.o_proj", "mlp": "mlp.down_proj"}


def inputs_of(model, samples=SAMPLES) -> dict[tuple[int, str], list[numpy.ndarray]]:
    """What goes into the output maps, by layer and group: ``[tokens, channels]`` of each sample, run by itself."""
    found: dict[tuple[int, str], list[numpy.ndarray]] = {}
    handles = []
    for index, layer in enumerate(decoder_layers(model)):
        modules = dict(layer.named_modules())
        for group, path in OUTPUTS.get(model.config.model_type, USUAL).items():
            if path in modules:  # a layer may have experts in place of an MLP

                def see(module, args, key=(index, group)):
                    found.setdefault(key, []).append(args[0].double().numpy().reshape(-1, args[0].shape[-1]))

                handles.append(modules[path].register_forward_pre_hook(see))
    with torch.no_grad():
        for ids in samples:
            model(input_ids=ids[None])
    for handle in handles:
        handle.remove()
    return found


def assert_close(found: torch.Tensor, expected: numpy.ndarray, rtol: float = 1e-6):
    assert found.dtype == torch.float64
    numpy.testing.assert_allclose(found.numpy(), expected, rtol=rtol, atol=rtol * abs(expected).max())


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_moments_are_those_of_what_goes_into_the_output_maps(model_type):
    model = pico_model(model_type)
    state = {name: p.clone() for name, p in model.named_parameters()}
    expected = inputs_of(model)
    units = structures(model, range(6))
    notes = []
    with torch.no_grad():
        statistics = input_statistics(model, SAMPLES.split(2), units, advance=notes.append)
    assert statistics.keys() == expected.keys() == units.keys()
    for key, own in statistics.items():
        tokens = numpy.concatenate(expected[key])
        assert own.tokens == len(tokens) == 5 * 24
        assert own.published is None
        assert_close(own.mean, tokens.mean(0))
        assert_close(own.variance, tokens.var(0, ddof=1))
        assert_close(own.norm, numpy.linalg.norm(tokens, axis=0))
    assert notes == ["", "", ""]
    assert all(torch.equal(p, state[name]) for name, p in model.named_parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_variance_survives_a_large_mean():
    """In float32, Σx² − (Σx)²/n would lose it: 1e4 ± 1e-2."""
    model = pico_model("opt")
    with torch.no_grad():
        model.model.decoder.layers[2].fc1.bias += 1e4
    units = structures(model, [2], ["mlp"])
    own = input_statistics(model, [SAMPLES], units)[2, "mlp"]
    tokens = numpy.concatenate(inputs_of(model)[2, "mlp"])
    assert tokens.mean() > 1e3 * tokens.std()
    assert_close(own.variance, tokens.var(0, ddof=1), rtol=1e-3)


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_batches_do_not_matter(model_type):
    model, found = pico_model(model_type).double(), []
    for size in (1, 2, 5):
        found.append(input_statistics(model, SAMPLES.split(size), structures(model, range(6)), published=True))
    for statistics in found[1:]:
        for key, own in statistics.items():
            one = found[0][key]
            assert own.tokens == one.tokens
            for name in ("mean", "variance", "norm"):
                assert_close(getattr(own, name), getattr(one, name).numpy(), rtol=1e-9)
            assert own.published.samples == one.published.samples == 5
            torch.testing.assert_close(own.published.fluctuation, one.published.fluctuation, rtol=1e-4, atol=1e-9)


def test_samples_of_other_lengths_count_by_their_tokens():
    model = pico_model()
    samples = [SAMPLES[0], SAMPLES[1, :7], SAMPLES[2, :7]]
    found = input_statistics(model, [SAMPLES[:1], SAMPLES[1:3, :7]], structures(model, [3]))
    for key, own in found.items():
        tokens = numpy.concatenate(inputs_of(model, samples)[key])
        assert own.tokens == len(tokens) == 38
        assert_close(own.mean, tokens.mean(0), rtol=1e-5)
        assert_close(own.variance, tokens.var(0, ddof=1), rtol=1e-5)


def published(samples: list[numpy.ndarray]) -> tuple[numpy.ndarray, numpy.ndarray]:
    """definitions.md §4: the running mean of the samples' means over tokens, and what ``old_baseline`` makes of F."""
    baseline = numpy.zeros(samples[0].shape[1])
    fluctuation = numpy.zeros(samples[0].shape[1])
    for k, x in enumerate(samples, start=1):
        baseline *= (k - 1) / k
        baseline += x.mean(0) / k
        old_baseline = baseline  # an alias, after the update
        if k >= 2:
            fluctuation *= (k - 2) / (k - 1)
            fluctuation += ((x - baseline) * (x - old_baseline)).sum(0) / k
    return baseline, fluctuation


@pytest.mark.parametrize("model_type", ["llama", "opt", "gpt_neox"])
def test_published_fluctuation_is_the_programs_arithmetic(model_type):
    model = pico_model(model_type)
    expected = inputs_of(model)
    found = input_statistics(model, SAMPLES.split(2), structures(model, range(6)), published=True)
    for key, own in found.items():
        mean, fluctuation = published(expected[key])
        assert own.published.samples == 5
        torch.testing.assert_close(own.published.mean.double(), torch.from_numpy(mean), rtol=1e-4, atol=1e-6)
        largest = fluctuation.max()
        torch.testing.assert_close(
            own.published.fluctuation.double(), torch.from_numpy(fluctuation), rtol=1e-4, atol=1e-6 * largest
        )
        assert largest > 3 * own.variance.max()  # it grows with the tokens of a sample


def test_published_fluctuation_of_samples_of_unequal_length():
    r = numpy.random.default_rng(3)
    samples = [r.normal(1, 2, (length, 6)) for length in (5, 9, 1, 4)]
    own = PublishedFluctuation(0, torch.zeros(6), torch.zeros(6))
    own.add(torch.from_numpy(samples[0]))
    assert own.samples == 1
    assert own.fluctuation.tolist() == [0] * 6  # the first sample gives nothing
    for x in samples[1:]:
        own.add(torch.from_numpy(x))
    mean, fluctuation = published(samples)
    numpy.testing.assert_allclose(own.mean.numpy(), mean, rtol=1e-5)
    numpy.testing.assert_allclose(own.fluctuation.numpy(), fluctuation, rtol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "opt", "qwen3_moe"])
def test_each_layer_runs_once_for_each_batch_and_the_head_never(model_type):
    model = pico_model(model_type)
    calls = {"layer": 0, "head": 0, "embedding": 0}

    def count(what):
        def hook(*_):
            calls[what] += 1

        return hook

    for layer in decoder_layers(model):
        layer.register_forward_hook(count("layer"))
    model.get_output_embeddings().register_forward_hook(count("head"))
    model.get_input_embeddings().register_forward_hook(count("embedding"))
    input_statistics(model, SAMPLES.split(2), structures(model, [1, 2]), published=True)
    assert calls == {"layer": 6 * 3, "head": 0, "embedding": 3}


@pytest.mark.parametrize(
    ("module", "where"),
    [("self_attn.v_proj", "attention of layer 3"), ("mlp.up_proj", "mlp of layer 3")],
)
def test_activations_that_are_not_finite_are_refused_with_the_layer_named(module, where):
    model = pico_model()
    with torch.no_grad():
        model.model.layers[3].get_submodule(module).weight[0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match=f"On the calibration text, {where} has activations that are not fin"):
        input_statistics(model, SAMPLES.split(2), structures(model, range(6)))
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_half_precision_is_summed_in_double():
    """The squares leave float16's range."""
    model = pico_model("opt").half()
    with torch.no_grad():
        model.model.decoder.layers[2].fc1.bias += 300
    own = input_statistics(model, [SAMPLES], structures(model, [2], ["mlp"]))[2, "mlp"]
    tokens = numpy.concatenate(inputs_of(model)[2, "mlp"])
    assert (tokens**2).min() > 65504
    assert_close(own.norm, numpy.linalg.norm(tokens, axis=0), rtol=2e-3)
    assert math.isclose(own.mean.mean().item(), tokens.mean(), rel_tol=2e-3)


def _rank(rank: int, directory: str) -> None:
    for name, shares in {"uneven": (SAMPLES[:3].split(2), SAMPLES[3:].split(2)), "few": (SAMPLES.split(5), ())}.items():
        model = pico_model()
        found = input_statistics(model, shares[rank], structures(model, [0, 4]))
        rows = {f"{layer} {group}": [own.tokens, own.total, own.squares] for (layer, group), own in found.items()}
        torch.save(rows, f"{directory}/{name}.{rank}.pt")


def test_two_processes_measure_what_one_does(tmp_path):
    in_two_processes(_rank, tmp_path)
    expected = inputs_of(pico_model())
    for name in ("uneven", "few"):
        ranks = [torch.load(tmp_path / f"{name}.{rank}.pt", weights_only=True) for rank in (0, 1)]
        assert list(ranks[0]) == ["0 attention", "0 mlp", "4 attention", "4 mlp"]
        for key, (tokens, total, squares) in ranks[0].items():
            layer, group = key.split()
            together = numpy.concatenate(expected[int(layer), group])
            assert tokens == ranks[1][key][0] == len(together)
            assert torch.equal(total, ranks[1][key][1])
            assert torch.equal(squares, ranks[1][key][2])
            assert_close(total, together.sum(0), rtol=1e-5)
            assert_close(squares, (together**2).sum(0), rtol=1e-5)


def test_the_model_is_only_looked_at():
    """In float64 a cast copies nothing: what is read are the activations themselves."""
    model = pico_model().double()
    seen, undisturbed = [], []
    model.model.norm.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        input_statistics(model, [SAMPLES], structures(model, range(6)))
        model.model(input_ids=SAMPLES, use_cache=False)
    undisturbed = seen.pop()
    assert torch.equal(seen.pop(), undisturbed)
