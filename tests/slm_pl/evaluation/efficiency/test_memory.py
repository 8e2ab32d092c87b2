import gc
import sys
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from slm_pl.compression import surgery
from slm_pl.compression.architecture import ARCHITECTURES, cache_values, decoder_layers, idle_expert_bytes
from slm_pl.compression.plan import Base, DropLayers, KeepChannels, Method, Plan
from slm_pl.evaluation.efficiency import memory
from slm_pl.evaluation.efficiency.memory import PeakMeter, cache_bytes, free_memory, tensor_bytes, weight_bytes
from slm_pl.evaluation.efficiency.runs import as_it_was
from slm_pl.evaluation.efficiency.work import account
from slm_pl.memory import TensorBytes, plain_tensors
from tests.helpers.pico import CONFIGS, pico_model
from tests.slm_pl.evaluation.efficiency.helpers import make_runner

pytestmark = pytest.mark.usefixtures("one_thread")

MIB = 2**20
SLIDING = ["gemma2", "gemma3_text", "mistral", "mixtral", "phi3", "qwen2", "qwen3"]  # with a window of 8
NARROW = ["gpt_neox", "llama", "olmo2", "opt", "phi3", "qwen3"]


def measured(model, tokens, new_tokens=4, batch_size=2, cache="dynamic"):
    """Of a run's own cache, whose last token was chosen and never read."""
    with as_it_was(model):
        return account(make_runner(model, batch_size, tokens, new_tokens, cache=cache), 0).cache_bytes


def narrow(model_type):
    """A layer fewer, one with half the heads, and one with none; in the middle and at the end of a window's layers."""
    model = pico_model(model_type)
    half = (0, 2) if model_type in ("gpt_neox", "opt") else (1,)
    steps = KeepChannels(1, "attention", half), KeepChannels(3, "attention", ()), KeepChannels(4, "mlp", (2, 3, 47))
    surgery.apply(model, Plan(Base.of(model), Method("test", {}), None, steps))
    surgery.apply(model, Plan(Base.of(model), Method("test", {}), None, (DropLayers((2,)),)))
    return model


# --- The key/value cache ---


@pytest.mark.parametrize("tokens", [3, 12])
@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_cache_by_arithmetic_is_the_cache_of_a_run(model_type, tokens):
    """Within the window of 8 and past it."""
    model = pico_model(model_type)
    found = measured(model, tokens)
    assert cache_bytes(model, 2, tokens + 3) == found
    whole = 6 * (tokens + 3) * 2 * 2 * 8 * (4 if model_type in ("bloom", "gpt_neox", "opt") else 2) * 4
    if model_type not in SLIDING or tokens == 3:
        assert found == whole
    else:
        assert found < whole


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_static_cache_by_arithmetic_is_the_cache_of_a_run(model_type):
    model = pico_model(model_type)
    found = measured(model, 7, cache="static")
    assert cache_bytes(model, 2, 10, static=True) == found
    assert (cache_bytes(model, 2, 10) < found) == (model_type in SLIDING)  # a growing one keeps a token less


@pytest.mark.parametrize("model_type", NARROW)
def test_cache_of_unequal_layers_and_of_none(model_type):
    model = narrow(model_type)
    assert len(decoder_layers(model)) == 5
    found = measured(model, 5)
    assert cache_bytes(model, 2, 8) == found
    assert cache_bytes(model, 2, 8, static=True) == measured(model, 5, cache="static")
    heads = 4 if model_type in ("gpt_neox", "opt") else 2
    values = [2 * 8 * heads, 8 * heads, 2, 2 * 8 * heads, 2 * 8 * heads]  # of one token; layer 2 is gone
    assert [cache_values(layer, ARCHITECTURES[model_type]) for layer in decoder_layers(model)] == values
    if model_type not in SLIDING:
        assert found == 2 * 8 * sum(values) * 4


def test_cache_by_hand():
    # Three of six layers look back 7 tokens beside the present one; 2 KV heads of 8 entries, keys and values.
    model = pico_model("gemma2")
    assert model.config.layer_types == ["sliding_attention", "full_attention"] * 3
    assert cache_bytes(model, 5, 100) == 5 * (3 * 7 + 3 * 100) * 2 * 2 * 8 * 4
    assert cache_bytes(model.bfloat16(), 5, 100) == 5 * (3 * 7 + 3 * 100) * 2 * 2 * 8 * 2
    assert cache_bytes(pico_model("qwen2", use_sliding_window=False), 1, 100) == 6 * 100 * 2 * 2 * 8 * 4


def test_cache_of_half_precision_is_measured_so():
    model = pico_model("llama").bfloat16()
    assert cache_bytes(model, 2, 8) == measured(model, 5) == 6 * 2 * 8 * 2 * 2 * 8 * 2


def test_cache_of_another_architecture_is_not_guessed():
    config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16, n_positions=8, bos_token_id=0, eos_token_id=1)
    assert cache_bytes(GPT2LMHeadModel(config), 1, 4) is None


# --- Weights ---


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_counted_once(tied):
    model = pico_model("llama", tie_word_embeddings=tied)
    layer = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32 + 2 * 32
    parameters = (1 if tied else 2) * 512 * 32 + 6 * layer + 32
    buffers = 2 * 4  # frequencies of the rotary embedding, now and as they were
    assert weight_bytes(model) == 4 * (parameters + buffers)
    assert weight_bytes(model.bfloat16()) < 4 * parameters


def test_storages_are_counted_once_and_whole():
    whole = torch.zeros(10, 10)
    assert tensor_bytes([whole, whole[2:], whole.t(), torch.zeros(3, dtype=torch.int8)]) == 403
    assert tensor_bytes([whole[2:3]]) == 400  # the rest of its storage is held, too
    assert tensor_bytes([]) == 0


@pytest.fixture(scope="module")
def int8_model():
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is an optional dependency")
    model = pico_model("llama")
    settings = torchao.Int8WeightOnlyConfig(version=2, set_inductor_config=False)
    torchao.quantize_(model, settings, lambda module, name: isinstance(module, torch.nn.Linear) and name != "lm_head")
    return model


def zero_point(model):
    """Bytes of it for each row: some versions of torchao keep one where it is zero."""
    return int(getattr(decoder_layers(model)[0].mlp.up_proj.weight, "zero_point", None) is not None)


def test_quantised_weights_count_as_they_are_stored(int8_model):
    maps = {"q": (32, 32), "k": (16, 32), "v": (16, 32), "o": (32, 32)}
    maps |= {"gate": (48, 32), "up": (48, 32), "down": (32, 48)}
    numbers = 6 * sum(rows * columns for rows, columns in maps.values())
    scales = 6 * sum(rows for rows, _ in maps.values()) * (4 + zero_point(int8_model))
    rest = 2 * 512 * 32 + 6 * 2 * 32 + 32 + 2 * 4
    assert weight_bytes(int8_model) == numbers + scales + 4 * rest
    # The cache is that of the numbers it computes with.
    assert cache_bytes(int8_model, 2, 8) == measured(int8_model, 5) == cache_bytes(pico_model("llama"), 2, 8)


def test_quantised_tensor_is_numbers_and_scales(int8_model):
    weight = decoder_layers(int8_model)[0].mlp.up_proj.weight
    found = {(plain.dtype, plain.numel()) for plain in plain_tensors(weight)}
    zeros = {(torch.int8, 48)} if zero_point(int8_model) else set()
    assert found == {(torch.int8, 48 * 32), (torch.float32, 48)} | zeros
    plain = torch.zeros(3)
    assert plain_tensors(plain)[0] is plain
    assert len(plain_tensors(plain)) == 1


# --- Experts ---


def test_idle_experts():
    # Two of four experts are idle; an expert is gate, up and down.
    mixtral = pico_model("mixtral", num_experts_per_tok=2)
    assert idle_expert_bytes(mixtral) == 6 * 2 * (3 * 48 * 32) * 4
    assert idle_expert_bytes(mixtral.bfloat16()) == 6 * 2 * (3 * 48 * 32) * 2
    assert idle_expert_bytes(pico_model("mixtral", num_experts_per_tok=1)) == 6 * 3 * (3 * 48 * 32) * 4
    # Layers 1 and 5 have experts, of width 16; the others an ordinary MLP.
    assert idle_expert_bytes(pico_model("qwen3_moe")) == 2 * 2 * (3 * 16 * 32) * 4


@pytest.mark.parametrize("model_type", sorted(set(CONFIGS) - {"mixtral", "qwen3_moe"}))
def test_no_idle_experts_without_experts(model_type):
    assert idle_expert_bytes(pico_model(model_type)) == 0


def test_idle_experts_go_with_their_layer():
    model = pico_model("qwen3_moe")
    surgery.apply(model, Plan(Base.of(model), Method("test", {}), None, (DropLayers((0, 1)),)))
    assert idle_expert_bytes(model) == 2 * (3 * 16 * 32) * 4


# --- Bytes alive ---


def test_most_bytes_alive_at_a_time():
    weight = torch.nn.Linear(10, 10, bias=False)
    with torch.inference_mode(), TensorBytes(weight) as tensors:
        first = torch.ones(100, dtype=torch.float64)
        second = first * 2
        assert (tensors.live, tensors.peak) == (1600, 1600)
        del first
        assert (tensors.live, tensors.peak) == (800, 1600)
        view = second.view(10, 10)[:5]
        second.add_(1)
        assert (tensors.live, tensors.peak) == (800, 1600)
        del second  # the view holds it
        assert tensors.live == 800
        third = weight.weight.t()[:3] + 1
        assert (tensors.live, tensors.peak) == (920, 1600)
        del view, third
        assert (tensors.live, tensors.peak) == (0, 1600)


def test_tensors_where_weights_were_are_counted():
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4, bias=False) for _ in range(20)))
    with torch.no_grad(), TensorBytes(model) as tensors:
        for linear in model:
            linear.weight = None  # its storage is freed, and the next may get its address
        made = [torch.zeros(4, 4) for _ in range(20)]
        assert tensors.live == sum(tensor.nbytes for tensor in made)


# --- What the system tells ---


def test_free_memory_is_what_the_system_calls_available(tmp_path, monkeypatch):
    info = tmp_path / "meminfo"
    monkeypatch.setattr(memory, "Path", lambda name: info if name == "/proc/meminfo" else Path(name))
    assert free_memory() is None  # no such file: not Linux
    info.write_text("MemTotal:       16384000 kB\nMemFree:          100000 kB\nMemAvailable:    8000000 kB\n")
    assert free_memory() == 8_000_000 * 1024
    info.write_text("MemTotal:       16384000 kB\nMemFree:          100000 kB\n")
    assert free_memory() is None


@pytest.mark.skipif(sys.platform != "linux", reason="the peak resident set is Linux's")
def test_peak_is_that_since_the_reset():
    def peak(before, after):
        """With so many bytes used before the reset, and after it."""
        torch.ones(before, dtype=torch.uint8)
        meter = PeakMeter(torch.device("cpu"))
        meter.reset()
        torch.ones(after, dtype=torch.uint8)
        found, reason = meter.read()
        if found is None:
            assert "cannot be reset" in reason
            pytest.skip(reason)
        assert (found.source, found.reserved, reason) == ("process peak resident set (VmHWM)", None, "")
        return found.max

    gc.collect()
    small, before, after = peak(1, 1), peak(150 * MIB, 1), peak(1, 150 * MIB)
    assert abs(before - small) < 50 * MIB
    assert after - small > 100 * MIB


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_peak_that_cannot_be_measured_says_why(device, monkeypatch):
    def refuse(self, text):
        raise PermissionError("not allowed")

    monkeypatch.setattr(Path, "write_text", refuse)
    meter = PeakMeter(torch.device(device))
    meter.reset()
    found, reason = meter.read()
    assert found is None
    assert ("not allowed" in reason) == (device == "cpu")
    assert ("no peak memory counter for device 'mps'" in reason) == (device == "mps")
