import pytest
import torch

from slm_pl.compression import importance, surgery
from slm_pl.compression.architecture import ARCHITECTURES, decoder_layers
from slm_pl.compression.gradients import layer_gradients
from slm_pl.compression.importance import magnitude, taylor
from slm_pl.compression.plan import Base, DropLayers, Method, Plan
from slm_pl.memory import TensorBytes
from tests.helpers.pico import pico_model

SAMPLES = torch.randint(3, 512, (4, 24), generator=torch.Generator().manual_seed(1))


def loss_of(model, ids):
    """Mean cross-entropy per predicted token, from transformers' own logits in one graph."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def gradients_of(model, ids):
    """By layer and name, of that loss."""
    model.zero_grad()
    loss_of(model, ids).backward()
    return {
        (i, name): torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for i, layer in enumerate(decoder_layers(model))
        for name, p in layer.named_parameters()
    }


def assert_same(found, expected):
    """To float32's rounding of sums: entries that nearly cancel are as exact as the largest ones."""
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    assert largest > 1e-4
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=3e-6 * largest, msg=str(key))


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
@pytest.mark.parametrize("size", [1, 4])
def test_gradients_are_those_of_one_ordinary_backward(model_type, size):
    model = pico_model(model_type)
    found = {}
    tokens = layer_gradients(
        model, SAMPLES.split(size), lambda i, name, w, g: found.update({(i, name): (w, g.clone())})
    )
    assert tokens == 4 * 23
    expected = gradients_of(model, SAMPLES)
    assert found.keys() == expected.keys()
    assert [layer for layer, _ in found] == sorted((layer for layer, _ in expected), reverse=True)
    own = {(i, n): p for i, layer in enumerate(decoder_layers(model)) for n, p in layer.named_parameters()}
    for key, (weight, _) in found.items():
        assert weight.data_ptr() == own[key].data_ptr()
    assert_same({key: gradient / tokens for key, (_, gradient) in found.items()}, expected)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "bloom"])
def test_gradients_without_some_layers_are_those_of_the_really_pruned_model(model_type):
    model, kept = pico_model(model_type), [0, 2, 3, 5]
    found = {}
    layer_gradients(model, [SAMPLES], lambda i, name, w, g: found.update({(kept.index(i), name): g.clone()}), kept)
    surgery.apply(model, Plan(Base.of(model), Method("t", {}), None, (DropLayers((1, 4)),)))
    assert_same({key: gradient / (4 * 23) for key, gradient in found.items()}, gradients_of(model, SAMPLES))


def test_flags_and_gradients_are_left_as_they_were():
    model = pico_model()
    model.model.layers[2].mlp.up_proj.weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    loss_of(model, SAMPLES).backward()
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    assert sum(g is None for g in gradients) == 1

    def untouched():
        pairs = zip(gradients, (p.grad for p in model.parameters()), strict=True)
        return all(a is b is None or torch.equal(a, b) for a, b in pairs)

    with torch.no_grad():
        layer_gradients(model, [SAMPLES], lambda *_: None)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert untouched()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())

    def fail(*_):
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        layer_gradients(model, [SAMPLES], fail)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert untouched()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.parametrize(("batches", "gradients"), [(1, "the largest tensor"), (4, "a layer")])
def test_memory_is_what_is_promised(batches, gradients, monkeypatch):
    """Wide layers and few tokens, so that gradients are what counts."""
    model = pico_model(hidden_size=128, intermediate_size=1024, num_hidden_layers=8)
    layer = list(decoder_layers(model)[0].parameters())
    monkeypatch.setattr(importance, "_SLICE", 4096)
    with TensorBytes(model) as tensors:
        taylor(model, SAMPLES[:, :8].split(4 // batches), range(8), 1, per_sample=False)
    unit = 4 * (max(p.numel() for p in layer) if batches == 1 else sum(p.numel() for p in layer))
    inputs = 4 * 9 * 4 * 8 * 128
    activations = 4 * 4 * 8 * (12 * 1024 + 20 * 128) + 3 * 4 * 4 * 8 * 512
    # A matrix product of the backward pass may hold its result and the gradient that it becomes.
    assert tensors.peak < inputs + activations + 2 * unit, gradients
    assert tensors.peak < 0.4 * 4 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("norm_power", [1, 2])
def test_taylor_is_the_formula(norm_power):
    model = pico_model()
    weights = {(i, n): p.detach() for i, layer in enumerate(model.model.layers) for n, p in layer.named_parameters()}
    together = gradients_of(model, SAMPLES)
    by_batch = taylor(model, SAMPLES.split(3), range(6), norm_power, per_sample=False)

    def formula(gradients):
        return {key: (w * gradients[key]).double().abs().pow(norm_power).sum().item() for key, w in weights.items()}

    expected = formula(together)
    largest = max(expected.values())
    for (i, name), value in expected.items():
        assert by_batch[i][name] == pytest.approx(value, rel=1e-4, abs=1e-5 * largest)
    alone = [formula(gradients_of(model, ids[None])) for ids in SAMPLES]
    by_sample = taylor(model, SAMPLES.split(3), range(6), norm_power, per_sample=True)
    for i, name in weights:
        value = sum(one[i, name] for one in alone) / 4
        assert by_sample[i][name] == pytest.approx(value, rel=1e-4, abs=1e-5 * largest)
        assert by_sample[i][name] > 1.2 * by_batch[i][name]  # nothing cancels
    plain = magnitude(model, [4], norm_power)
    assert list(plain) == [4]
    for name, value in plain[4].items():
        assert value == pytest.approx(weights[4, name].double().abs().pow(norm_power).sum().item(), rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_half_precision_are_formed_in_single(dtype):
    """In float16, products below 6e-8 would be zero; here nearly all are."""
    model = pico_model().to(dtype)
    layer = model.model.layers[3]
    with torch.no_grad():
        layer.mlp.down_proj.weight.mul_(1e-5 if dtype == torch.float16 else 1)
    found = taylor(model, [SAMPLES], range(6), 1, per_sample=False)[3]["mlp.down_proj.weight"]
    gradients = {}
    layer_gradients(model, [SAMPLES], lambda i, name, w, g: gradients.update({(i, name): g.clone()}))
    gradient = gradients[3, "mlp.down_proj.weight"]
    assert gradient.dtype == dtype
    expected = (layer.mlp.down_proj.weight.detach().double() * gradient.double()).abs().sum().item() / (4 * 23)
    assert found == pytest.approx(expected, rel=1e-5)
    if dtype == torch.float16:
        assert (layer.mlp.down_proj.weight * gradient == 0).float().mean() > 0.5


def test_taylor_of_broken_weights_is_refused():
    model = pico_model()
    with torch.no_grad():
        model.model.layers[4].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="not a finite number"):
        taylor(model, [SAMPLES], range(6), 1, per_sample=False)
    assert magnitude(model, [3], 1)[3]
    with pytest.raises(FloatingPointError, match=r"Layer 4 has weights in mlp.down_proj.weight that are not finite"):
        magnitude(model, range(6), 1)
