import functools
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from slm_pl.compression import surgery
from slm_pl.compression.plan import Base, KeepChannels, Method, Plan
from slm_pl.evaluation.efficiency import work
from slm_pl.evaluation.efficiency.memory import weight_bytes
from slm_pl.evaluation.efficiency.record import Limit, MachinePeak, Work
from slm_pl.evaluation.efficiency.work import (
    Account,
    account,
    limit_of,
    machine_peak,
    measure_peak,
    read_weights,
    work_of,
)
from slm_pl.loading import load_model, resolve
from tests.helpers.pico import CONFIGS, pico_model
from tests.slm_pl.evaluation.efficiency.helpers import make_runner

pytestmark = pytest.mark.usefixtures("one_thread")

# Of the pico Llama with 32 channels: 4 query and 2 KV heads of 8 entries, 48 intermediate channels, 512 tokens.
MAPS = 32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 32 * 48
HEAD = 32 * 512


def attention(queries, keys, heads=4, head_dim=8):
    """Multiply-accumulates of scores and of their sums of values: both have all query heads, not the KV heads."""
    return 2 * heads * head_dim * queries * keys


def run(model, batch_size=2, tokens=12, new_tokens=5, **switches):
    return account(make_runner(model, batch_size, tokens, new_tokens, **switches), 0)


# --- Operations, by hand ---


@pytest.mark.parametrize("kernel", ["sdpa", "sdpa, math", "eager"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_operations_of_generation(kv_heads, kernel):
    model = pico_model("llama", num_key_value_heads=kv_heads)
    model.set_attn_implementation(kernel.partition(",")[0])
    done = run(model, sdpa_backend="math" if "math" in kernel else None)
    maps = MAPS + 2 * (kv_heads - 2) * 8 * 32
    # The head reads the last token of each prompt alone.
    assert done.prefill_flops == 2 * 2 * (12 * 6 * maps + HEAD + 6 * attention(12, 12))
    steps = [6 * maps + HEAD + 6 * attention(1, keys) for keys in (13, 14, 15, 16)]  # the fifth token is never read
    assert done.decode_flops == 2 * 2 * sum(steps)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_operations_of_a_forward_pass(kernel):
    model = pico_model("llama")
    model.set_attn_implementation(kernel)
    done = run(model, 3, 10, 0)
    assert done.prefill_flops == 3 * 2 * (10 * (6 * MAPS + HEAD) + 6 * attention(10, 10))
    assert (done.decode_flops, done.cache_bytes) == (0, None)


def test_operations_of_padding_count_as_those_of_tokens():
    model = pico_model("llama")
    tokens = make_runner(model, 2, None).batch.ids.shape[1]
    padded, whole = run(model, 2, None), run(model, 2, tokens)
    assert (padded.prefill_flops, padded.decode_flops) == (whole.prefill_flops, whole.decode_flops)
    assert padded.cache_bytes == whole.cache_bytes


def test_operations_of_a_window():
    # Beside the present token, a step sees the 7 before it; the prefill computes all scores, and masks.
    done = run(pico_model("mistral"))
    assert done.prefill_flops == 2 * 2 * (12 * 6 * MAPS + HEAD + 6 * attention(12, 12))
    assert done.decode_flops == 2 * 2 * 4 * (6 * MAPS + HEAD + 6 * attention(1, 8))


def test_operations_of_a_static_cache_are_those_of_its_whole_length():
    model = pico_model("llama")
    done = run(model, cache="static")
    assert done.decode_flops == 2 * 2 * 4 * (6 * MAPS + HEAD + 6 * attention(1, 16))


@pytest.mark.parametrize("top", [1, 2])
def test_operations_of_experts_are_those_of_the_chosen(top):
    experts = 4 * 32 + top * 3 * 32 * 48  # the router chooses among four
    layer = MAPS - 3 * 32 * 48 + experts
    done = run(pico_model("mixtral", num_experts_per_tok=top, sliding_window=None))
    assert done.prefill_flops == 2 * 2 * (12 * 6 * layer + HEAD + 6 * attention(12, 12))
    assert done.decode_flops == 2 * 2 * sum(6 * layer + HEAD + 6 * attention(1, keys) for keys in (13, 14, 15, 16))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_operations_of_experts_do_not_depend_on_how_they_are_run(implementation):
    model = pico_model("qwen3_moe")
    model.set_experts_implementation(implementation)
    experts = 4 * 32 + 2 * 3 * 32 * 16
    maps = 4 * MAPS + 2 * (MAPS - 3 * 32 * 48 + experts)
    assert run(model).prefill_flops == 2 * 2 * (12 * maps + HEAD + 6 * attention(12, 12))


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_operations_of_every_architecture(model_type):
    """Those of the linear maps, by their sizes, and of attention and experts; nothing else and nothing twice."""
    model = pico_model(model_type)
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    of_experts = {"mixtral": 6 * (4 * 32 + 2 * 3 * 32 * 48), "qwen3_moe": 2 * (4 * 32 + 2 * 3 * 32 * 16)}
    macs = 12 * (linear + of_experts.get(model_type, 0)) + 6 * attention(12, 12)
    assert run(model, 2, 12, 0).prefill_flops == 2 * 2 * macs


def test_operations_of_layers_of_unequal_width():
    model = pico_model("llama")
    # Of layer 1 one of two KV groups is left, of layer 2 none, but a bias, of layer 4 three channels.
    steps = (
        KeepChannels(1, "attention", (1,)),
        KeepChannels(2, "attention", (), "layers.2.attention.bias"),
        KeepChannels(4, "mlp", (2, 3, 47)),
    )
    plan = Plan(Base.of(model), Method("test", {}), None, steps)
    surgery.apply(model, plan.with_tensors({"layers.2.attention.bias": torch.ones(32)}))
    trained = [parameter.requires_grad for parameter in model.parameters()]
    done = run(model, new_tokens=0)
    maps = 6 * MAPS - (MAPS - 3 * 32 * 48) // 2 - (MAPS - 3 * 32 * 48) - 3 * 32 * 45
    assert done.prefill_flops == 2 * 2 * (12 * (maps + HEAD) + 4 * attention(12, 12) + attention(12, 12, heads=2))
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert all(trained)


def test_operations_of_int8_are_those_of_its_model(tmp_path):
    pytest.importorskip("torchao", reason="torchao is an optional dependency")
    model = pico_model("llama")
    model.save_pretrained(tmp_path)
    quantised = load_model(resolve(str(tmp_path)), quantization="int8")
    own, plain = run(quantised), run(model)
    assert (own.prefill_flops, own.decode_flops) == (plain.prefill_flops, plain.decode_flops)


# --- Memory of a run ---


@pytest.mark.parametrize("vocab_size", [512, 4096])
def test_peak_of_a_forward_pass(vocab_size):
    batch, tokens, model = 2, 12, pico_model("llama", vocab_size=vocab_size)
    logits, hidden = 4 * batch * tokens * vocab_size, 4 * batch * tokens * 32
    peak = run(model, batch, tokens, 0).peak_bytes
    # At the end the logits and what they are made from; no more than the hidden states of some operations beside.
    assert logits + hidden <= peak <= logits + 8 * hidden


def test_peak_of_generation():
    batch, tokens, model = 2, 40, pico_model("llama")
    done = run(model, batch, tokens, 3)
    cache = 6 * batch * (tokens + 2) * 2 * 2 * 8 * 4
    assert done.cache_bytes == cache
    # While the last layer's MLP reads the prompts, the cache of the prompts is there, and gate, up and their product.
    prompts = cache * tokens // (tokens + 2)
    assert prompts + 3 * 4 * batch * tokens * 48 <= done.peak_bytes <= cache + 12 * 4 * batch * tokens * 48


def test_peak_grows_with_the_scores_where_they_are_made():
    batch, tokens = 4, 200
    found = {}
    for kernel in ("sdpa", "eager"):
        model = pico_model("llama", num_hidden_layers=1, vocab_size=512)
        model.set_attn_implementation(kernel)
        found[kernel] = run(model, batch, tokens, 1).peak_bytes
    scores = 4 * batch * 4 * tokens * tokens
    assert found["sdpa"] < scores < found["eager"] < 4 * scores


# --- In relation to tokens ---


def test_work_by_hand():
    model = pico_model("llama")
    done = run(model)
    found = work_of(model, 2, 12, 5, done)
    assert (2 * found.prefill_macs, 2 * found.decode_macs) == (done.prefill_flops, done.decode_flops)
    assert found.macs_per_prompt_token == 6 * MAPS + HEAD / 12 + 6 * attention(12, 12) / 12
    assert found.macs_per_output_token == 6 * MAPS + HEAD + 6 * attention(1, 14.5)
    assert found.kv_bytes_per_token == 6 * 2 * 2 * 8 * 4


def test_work_of_a_forward_pass():
    model = pico_model("llama")
    found = work_of(model, 2, 12, 0, run(model, new_tokens=0))
    assert found.macs_per_prompt_token == 6 * MAPS + HEAD + 6 * attention(12, 12) / 12
    assert (found.decode_macs, found.macs_per_output_token) == (0, None)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_bytes_of_a_step(tied, batch_size):
    model = pico_model("llama", tie_word_embeddings=tied)
    found = work_of(model, batch_size, 12, 6, Account(0, 0, 0, 0)).step_bytes
    norms, frequencies = 13 * 32, 2 * 4
    # An embedding that is not the head gives a row for each token; the head is read whole.
    weights = 6 * MAPS + norms + HEAD + frequencies + (0 if tied else batch_size * 32)
    cache = batch_size * 6 * 2 * 2 * 8 * 15  # five steps see 13 to 17 tokens
    assert found == 4 * (weights + cache)


def test_bytes_of_a_step_with_experts():
    model = pico_model("mixtral", sliding_window=None)
    found = work_of(model, 2, 12, 6, Account(0, 0, 0, 0)).step_bytes
    layer = MAPS - 3 * 32 * 48 + 4 * 32 + 2 * 3 * 32 * 48 + 2 * 32
    weights = 6 * layer + 32 + HEAD + 2 * 4 + 2 * 32
    assert found == 4 * (weights + 2 * 6 * 2 * 2 * 8 * 15)


def test_weights_that_tokens_read():
    untied, tied = (pico_model("llama", tie_word_embeddings=tied) for tied in (False, True))
    assert weight_bytes(untied) - read_weights(untied, 100) == (512 - 100) * 32 * 4
    assert read_weights(untied, 5000) == weight_bytes(untied)  # each row at most once
    assert read_weights(tied, 1) == weight_bytes(tied)


def test_work_of_another_architecture_is_from_what_was_measured():
    ids = {"bos_token_id": 0, "eos_token_id": 1}
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=512, n_positions=64, **ids)).eval()
    found = work_of(model, 2, 12, 6, run(model, new_tokens=6))
    assert found.kv_bytes_per_token == 2 * 2 * 32 * 4
    layer = 4 * 32 * 32 + 4 * 32 + 8 * 32 * 32 + 5 * 32 + 4 * 32
    weights = 512 * 32 + 64 * 32 + 2 * layer + 2 * 32
    assert found.step_bytes == 4 * weights + 2 * 15 * 2 * 2 * 32 * 4


# --- The machine ---


def test_machine_peak_is_of_the_best_counted_run(monkeypatch):
    def peak(*seconds):
        stamps = iter([stamp for one in seconds for stamp in (100.0, 100.0 + one)])
        monkeypatch.setattr(work, "time", SimpleNamespace(perf_counter=lambda: next(stamps)))
        found = measure_peak(torch.device("cpu"), torch.float32)
        assert next(stamps, "none left") == "none left"
        return found

    # Products of 512 and 1,024, which are quick enough to double; then the one that counts, and copies.
    state = torch.random.get_rng_state()
    found = peak(0.01, 0.02, 0.02, 0.03, 0.25, 0.0625, 0.125, 0.3, 0.03125, 0.125)
    assert found == MachinePeak(2 * 2048**3 / 0.0625, 2 * 2**30 / 0.03125, "float32", "2048 x 2048 x 2048", 2**30)
    assert torch.equal(torch.random.get_rng_state(), state)
    monkeypatch.setattr(work, "free_memory", lambda: 2**31)
    slow = peak(0.5, 0.25, 2.0, 1.0, 0.5, 0.25)
    assert slow.copy_bytes == 2**29  # both sides are half of what is free
    assert (slow.flops_per_s, slow.matmul) == (2 * 512**3 / 1.0, "512 x 512 x 512")


def test_machine_peak_is_measured_once_for_each_number_of_threads(monkeypatch):
    asked = []
    monkeypatch.setattr(
        work, "measure_peak", lambda *what: asked.append((*what, torch.get_num_threads())) or len(asked)
    )
    monkeypatch.setattr(work, "_peak_with", functools.lru_cache(work._peak_with.__wrapped__))
    device, threads = torch.device("cpu"), torch.get_num_threads()
    assert [machine_peak(device, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float32)] == [1, 2, 1]
    torch.set_num_threads(threads + 1)
    try:
        assert machine_peak(device, torch.float32) == 3
    finally:
        torch.set_num_threads(threads)
    assert asked[-1] == (device, torch.float32, threads + 1)


# --- The least time ---

PEAK = MachinePeak(flops_per_s=1e12, bytes_per_s=1e11, dtype="float32", matmul="", copy_bytes=1)


def test_limit_where_the_prefill_computes_and_the_steps_read():
    work = Work(10**12, 4 * 10**9, 1.0, 1.0, 1, step_bytes=2 * 10**9)
    found = limit_of(work, PEAK, 10**9, 5, first=4.0, per_token=0.1, latency=4.4)
    assert found == Limit(
        time_to_first_token_s=2.0,  # 2e12 operations at 1e12; the weights would take 0.01 s
        time_per_output_token_s=pytest.approx(0.02),  # 2e9 bytes at 1e11; 2e9 operations would take 0.002 s
        latency_s=pytest.approx(2.0 + 4 * 0.02),
        prefill_flops_share=0.5,
        decode_bandwidth_share=pytest.approx(0.2),
        latency_share=pytest.approx(2.08 / 4.4),
    )


def test_limit_where_the_prefill_reads_and_the_steps_compute():
    work = Work(10**9, 4 * 10**12, 1.0, 1.0, 1, step_bytes=10**9)
    found = limit_of(work, PEAK, 5 * 10**9, 5, first=0.1, per_token=4.0, latency=16.1)
    assert found.time_to_first_token_s == pytest.approx(0.05)  # 5e9 bytes at 1e11; 2e9 operations would take 0.002 s
    assert found.time_per_output_token_s == pytest.approx(2.0)  # 2e12 operations at 1e12
    assert found.latency_s == pytest.approx(0.05 + 4 * 2.0)
    assert found.prefill_flops_share == pytest.approx(2e9 / 0.1 / 1e12)
    assert found.decode_bandwidth_share == pytest.approx(10**9 / 4.0 / 1e11)
    assert found.latency_share == pytest.approx(8.05 / 16.1)


@pytest.mark.parametrize("new_tokens", [0, 1])
def test_limit_without_a_step(new_tokens):
    found = limit_of(Work(10**12, 0, 1.0, None, 1, 10**9), PEAK, 10**9, new_tokens, 4.0, None, 4.0)
    assert found == Limit(2.0, None, 2.0, 0.5, None, 0.5)
