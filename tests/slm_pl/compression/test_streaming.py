"""Weights that stay in their files, on a CPU."""

import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from slm_pl.compression.architecture import decoder_layers
from slm_pl.compression.calibration import capture, first_of
from slm_pl.compression.streaming import Spill, _range, _Sent, _sent, check_streamed, streaming
from slm_pl.errors import UsageError
from slm_pl.loading import load_model, resolve
from tests.helpers.pico import pico_model

pytestmark = pytest.mark.usefixtures("one_thread")

WIDE = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "num_hidden_layers": 8}
CPU = torch.device("cpu")
IDS = torch.arange(3, 35).view(2, 16)


@pytest.fixture(scope="module")
def wide_dir(tmp_path_factory) -> Path:
    """Eight layers of 3.7 MB, in shards that cut through layers."""
    directory = tmp_path_factory.mktemp("wide") / "model"
    pico_model(**WIDE).save_pretrained(directory, max_shard_size="9MB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    return directory


def load(directory: Path, dtype: str = "auto") -> nn.Module:
    return load_model(resolve(str(directory)), dtype=dtype).eval()


def resident(tensors: list[torch.Tensor]) -> int:
    """Bytes of the pages that are in this process' memory, by the kernel's own list of its 4 KiB pages."""
    count = 0
    with open("/proc/self/pagemap", "rb") as pages:
        for start, end in map(_range, tensors):
            first, last = start // 4096, -(-end // 4096)
            pages.seek(first * 8)
            content = pages.read((last - first) * 8)
            count += sum(bool(content[i + 7] & 0x80) for i in range(0, len(content), 8))
    return count * 4096


def by_layer(model: nn.Module) -> list[int]:
    return [resident([p for p in layer.parameters() if p.ndim == 2]) for layer in decoder_layers(model)]


def size_of(layer: nn.Module) -> int:
    return sum(p.nbytes for p in layer.parameters())


def hooked(layers: list[nn.Module], stream: _Sent) -> list:
    """As :func:`streaming` does it."""
    return [
        hook
        for index, layer in enumerate(layers)
        for hook in (
            layer.register_forward_pre_hook(lambda module, _, index=index: stream.begin(index, module)),
            layer.register_forward_hook(lambda module, *_: stream.end(module), always_call=True),
        )
    ]


def test_only_the_layers_at_work_are_in_memory(wide_dir):
    model, same = load(wide_dir), load(wide_dir)
    check_streamed(model)
    layers = decoder_layers(model)
    most: list[int] = []
    hooks = [layer.register_forward_hook(lambda *_: most.append(sum(by_layer(model)))) for layer in layers]
    with torch.inference_mode(), streaming(model, CPU):
        logits = model(IDS).logits
    streamed, after = max(most), by_layer(model)
    for hook in hooks:
        hook.remove()
    with torch.inference_mode():
        assert torch.equal(logits, same(IDS).logits)
    everything = sum(by_layer(same))
    one = size_of(layers[0])
    assert everything > 0.95 * len(layers) * one  # all of them, where nothing is given back
    assert streamed < 1.1 * one
    assert sum(after) < 0.1 * one
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, logits)  # and they come back without streaming


def test_what_was_written_to_is_never_given_back(wide_dir):
    model = load(wide_dir)
    layers = decoder_layers(model)
    with torch.no_grad():
        for parameter in layers[2].parameters():
            parameter.copy_(parameter + 1)
        layers[4].mlp.down_proj.weight.mul_(2)
        layers[5].mlp.down_proj.weight.data.mul_(3)  # which no counter of versions sees
        layers[6].mlp.up_proj.weight.data[700, 5] = 7.0  # one page of it
    expected = [p.clone() for p in model.parameters()]
    with torch.inference_mode(), streaming(model, CPU):
        model(IDS)
        model(IDS)
    for parameter, before in zip(model.parameters(), expected, strict=True):
        assert torch.equal(parameter, before)


def test_an_error_leaves_no_hook_behind(wide_dir):
    model = load(wide_dir)
    own = dict(model.named_parameters())
    broken = decoder_layers(model)[3].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), streaming(model, CPU):
        model(IDS)
    with _sent(model, list(decoder_layers(model)), CPU) as stream:
        hooks = hooked(list(decoder_layers(model)), stream)
        with pytest.raises(ZeroDivisionError):
            model(IDS)
        for hook in hooks:
            hook.remove()
    broken.remove()
    assert all(p is own[name] for name, p in model.named_parameters())
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in decoder_layers(model))


def test_new_weights_are_spilled_with_their_values(wide_dir, tmp_path):
    model = load(wide_dir)
    layer = decoder_layers(model)[1]
    tied = nn.Parameter(torch.randn(300, 40).T)  # not contiguous
    layer.register_parameter("own", tied)
    layer.mlp.register_parameter("shared", tied)
    with torch.no_grad():
        layer.mlp.up_proj.weight = nn.Parameter(layer.mlp.up_proj.weight[:700].clone(), requires_grad=False)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    with pytest.raises(UsageError, match="GB of the weights were read into memory"):
        check_streamed(layer)
    Spill(tmp_path)(layer.parameters())
    check_streamed(layer)
    assert layer.own is layer.mlp.shared is tied
    assert not list(tmp_path.iterdir())
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter, before[name])


def test_weights_that_were_read_are_refused(wide_dir):
    with pytest.raises(UsageError, match=r"leave out model\.dtype"):
        check_streamed(load(wide_dir, "bfloat16"))


def test_sent_layers_compute_the_same_and_leave_the_parameters_alone(wide_dir):
    """The way of a GPU, with the CPU in its place."""
    from torch.func import functional_call

    model, same = load(wide_dir), load(wide_dir)
    layers = list(decoder_layers(model))
    own = dict(model.named_parameters())
    with torch.inference_mode():
        expected = model(IDS).logits
    lent: list[bool] = []
    with _sent(model, layers, CPU) as stream:
        hooks = hooked(layers, stream)
        for index, layer in enumerate(layers):
            name = f"model.layers.{index}.mlp.up_proj.weight"
            hooks.append(
                layer.mlp.register_forward_hook(
                    lambda mlp, *_, name=name: lent.append(mlp.up_proj.weight is not own[name])
                )
            )
        with torch.inference_mode():
            assert torch.equal(model(IDS).logits, expected)
        assert lent == [True] * len(layers)
        assert set(stream._there) == {id(p) for p in layers[-1].parameters()}
        # A layer with some parameters of another, as the search tries it, twice with others in the same place.
        hidden, arguments = torch.randn(2, 16, 256), capture(same, IDS).arguments[0]
        for other in (1, 2):
            name = "mlp.up_proj.weight"
            with torch.inference_mode():
                lent_weight = {name: own[f"model.layers.{other}.{name}"] * 2}
                merged = functional_call(layers[0], lent_weight, (hidden,), arguments)
                twin = decoder_layers(same)[0]
                twin.mlp.up_proj.weight.copy_(lent_weight[name])
                assert torch.equal(first_of(merged), first_of(twin(hidden, **arguments)))
        model.requires_grad_(True)
        model(IDS).logits.square().sum().backward()
        found = [layer.mlp.up_proj.weight.grad for layer in layers]
        for hook in hooks:
            hook.remove()
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in own.items()}
    model.zero_grad()
    model(IDS).logits.square().sum().backward()
    for layer, gradient in zip(layers, found, strict=True):
        assert gradient is not None
        assert torch.equal(gradient, layer.mlp.up_proj.weight.grad)


def test_the_next_layer_is_sent_while_one_runs(wide_dir):
    """With the CPU in the place of the GPU, and another thread as it is there."""
    model = load(wide_dir)
    layers = list(decoder_layers(model))
    senders: list[str] = []
    first = {id(p) for p in layers[0].parameters()}
    with torch.no_grad(), _sent(model, layers, CPU) as stream:
        send = stream._send
        stream._send = lambda index: (senders.append(threading.current_thread().name), send(index))[1]
        stream.begin(2, layers[2])
        stream.end(layers[2])
        assert stream._ahead is not None
        index, sent = stream._ahead
        assert index == 3
        assert set(sent.result()) == {id(p) for p in layers[3].parameters()}
        used = sent.result()[id(layers[3].mlp.up_proj.weight)]
        own = layers[3].mlp.up_proj.weight
        stream.begin(3, layers[3])
        assert layers[3].mlp.up_proj.weight is used is not own
        assert torch.equal(used, own)
        stream.end(layers[3])
        # Another one than expected: what was sent goes, and its own weights are there.
        stream.begin(0, layers[0])
        assert set(stream._there) == first
        stream.end(layers[0])
        stream.begin(len(layers) - 1, layers[-1])
        assert stream._ahead is None
        stream.end(layers[-1])
    assert senders
    assert all(name.startswith("weights") for name in senders)
    assert not any(thread.name.startswith("weights") for thread in threading.enumerate())
