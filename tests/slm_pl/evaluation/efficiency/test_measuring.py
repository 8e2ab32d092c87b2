import gc
import math
import sys
import weakref
from pathlib import Path

import pytest
import torch

from slm_pl.errors import UsageError
from slm_pl.evaluation.efficiency import measuring
from slm_pl.evaluation.efficiency.measuring import check_context, compare_point, measure_point
from slm_pl.evaluation.efficiency.memory import cache_bytes
from slm_pl.evaluation.efficiency.nvml import GpuFigures
from slm_pl.evaluation.efficiency.protocols import PISA, Point
from slm_pl.evaluation.efficiency.record import Energy, Utilisation
from tests.helpers.pico import pico_model
from tests.helpers.tokenizer import pico_tokenizer
from tests.slm_pl.evaluation.efficiency.helpers import PEAK, make_settings, record_generation, set_clock
from tests.slm_pl.evaluation.pico import pico_llama

pytestmark = pytest.mark.usefixtures("one_thread")

MIB = 2**20
ABSENT = {"latency_s", "time_to_first_token_s", "output_tokens_per_s", "peak_memory_bytes"}


@pytest.fixture
def model():
    return pico_llama()


@pytest.fixture
def calls(model, monkeypatch):
    return record_generation(model, monkeypatch)


def measure(model, point=Point(2, 6, 3, 2), step=lambda _: None, **settings):  # noqa: B008  frozen
    return measure_point(model, pico_tokenizer(), point, make_settings(**settings), PEAK, step)


def fail_at(model, monkeypatch, at, error):
    """The call of ``generate`` with this number, from 0, raises an error; gives what it held then."""
    held, numbers, generate = [], iter(range(1000)), model.generate

    def generate_or_fail(**kwargs):
        if next(numbers) != at:
            return generate(**kwargs)
        large = torch.ones(1000)
        held.append(weakref.ref(large))
        raise error

    monkeypatch.setattr(model, "generate", generate_or_fail)
    return held


# --- The protocol ---


def test_protocol_of_texts(model, calls):
    settings = make_settings("shortened_llama", warmup=2, texts=["The tower"])
    prompt = pico_tokenizer()("The tower")["input_ids"]
    point = Point(3, len(prompt), 5, 4, own_text=True)
    result, _ = measure_point(model, pico_tokenizer(), point, settings, PEAK)
    assert len(calls) == 2 + 4 + 1  # the last counts operations
    for kwargs, output in calls:
        assert output.sequences.shape == (3, len(prompt) + 5)
        assert kwargs["input_ids"].tolist() == [prompt] * 3
        assert kwargs["generation_config"].do_sample
    assert (result.protocol, result.warmup, result.repeats) == ("shortened_llama", 2, 4)
    assert (result.batch_size, result.prompt_tokens, result.new_tokens) == (3, len(prompt), 5)


def test_prose_where_a_length_is_asked_for(model, calls):
    measure(model, texts=["Not this one"])
    expected = make_settings().prompts.batch(2, 6).ids
    assert all(torch.equal(kwargs["input_ids"], expected) for kwargs, _ in calls)
    assert not any(kwargs["generation_config"].do_sample for kwargs, _ in calls)


def test_runs_are_seeded_and_differ(model, calls):
    settings = make_settings("shortened_llama", warmup=1, texts=["A"])
    for _ in range(2):
        measure_point(model, pico_tokenizer(), Point(2, 1, 8, 2, own_text=True), settings, PEAK)
    made = [output.sequences.tolist() for _, output in calls]
    assert made[:4] == made[4:]
    warm, first, second, counted = made[:4]
    assert first not in (warm, second)
    assert second != warm
    assert counted == warm  # the run that counts operations begins with the first seed again


def test_every_run_is_told(model):
    notes = []
    measure(model, Point(1, 6, 3, 2), notes.append, warmup=3)
    assert (notes[:3], notes[-1], len(notes)) == (["warm-up"] * 3, "counting", 3 + 2 + 1)


# --- Figures ---


def test_figures_hang_together(model):
    result, gpu = measure(model, Point(2, 6, 8, 5))
    latency, first, step = result.latency_s, result.time_to_first_token_s, result.time_per_output_token_s
    rate, total = result.output_tokens_per_s, result.total_tokens_per_s
    assert (latency.n, first.n, step.n, rate.n, total.n) == (5,) * 5
    assert result.inter_token_s.n == 5 * 7
    assert 0 < first.min <= first.median <= first.max
    assert first.max < latency.max
    assert latency.mean == pytest.approx(first.mean + 7 * step.mean)
    assert result.inter_token_s.mean <= step.mean  # the last token's way back is part of the run, too
    for rates, tokens in ((rate, 2 * 8), (total, 2 * (6 + 8))):
        assert (rates.min, rates.max) == pytest.approx((tokens / latency.max, tokens / latency.min))
    memory, work, limit = result.memory, result.work, result.limit
    assert memory.kv_cache == memory.kv_cache_computed == 2 * work.kv_bytes_per_token * (6 + 8 - 1)
    assert work.kv_bytes_per_token == 2 * 2 * 2 * 8 * 4  # of two layers
    assert memory.activations > 0
    assert result.machine_peak == PEAK
    assert limit.latency_s == pytest.approx(limit.time_to_first_token_s + 7 * limit.time_per_output_token_s)
    assert limit.latency_share == pytest.approx(limit.latency_s / latency.median)
    assert limit.prefill_flops_share == pytest.approx(2 * work.prefill_macs / first.median / 1e9)
    assert limit.decode_bandwidth_share == pytest.approx(work.step_bytes / step.median / 4e8)
    assert (result.utilisation, result.energy, result.paired) == (None, None, None)
    assert set(gpu.missing) == {"gpu_utilisation", "gpu_energy", "gpu_memory"}


def test_figures_of_a_forward_pass(model, calls):
    result, _ = measure(model, Point(2, 6, 0, 3))
    assert not calls
    assert result.latency_s == result.time_to_first_token_s
    total = result.total_tokens_per_s
    assert (total.min, total.n) == (pytest.approx(2 * 6 / result.latency_s.max), 3)
    absent = (result.output_tokens_per_s, result.time_per_output_token_s, result.inter_token_s)
    assert absent == (None, None, None)
    assert (result.memory.kv_cache, result.memory.kv_cache_computed) == (None, None)
    assert (result.work.decode_macs, result.limit.time_per_output_token_s, result.runtime.sampling) == (0, None, None)
    assert "output_tokens_per_s" not in result.missing


def test_limit_is_that_of_the_weights_that_are_read():
    # 12 rows of an embedding of 4,096 are read; on a machine that computes in no time, the rest are the limit.
    model = pico_model("llama", vocab_size=4096)
    quick = PEAK.__class__(1e30, 1e6, "float32", "", 1)
    result, _ = measure_point(model, pico_tokenizer(), Point(2, 6, 1, 2), make_settings(), quick)
    assert result.limit.time_to_first_token_s == pytest.approx((result.memory.weights - 4084 * 32 * 4) / 1e6)


def test_parts_of_the_peak():
    result, _ = measure(pico_model("llama"))
    peak = result.peak_memory_bytes
    if peak is None:
        pytest.skip(result.missing["peak_memory_bytes"])
    memory = result.memory
    assert memory.weights + memory.kv_cache + memory.activations + memory.other == peak.max
    assert memory.other > 50 * MIB  # Python and torch


def test_how_the_model_was_run():
    runtime = measure(pico_model("llama"), cache="static", sdpa_backend="math")[0].runtime
    assert (runtime.dtype, runtime.attention, runtime.sdpa_backend) == ("float32", "sdpa", "math")
    assert (runtime.cache, runtime.compile, runtime.sampling) == ("static", False, "greedy")
    assert runtime.quantization is None
    runtime = measure(pico_model("bloom").bfloat16(), protocol="shortened_llama")[0].runtime
    assert (runtime.dtype, runtime.attention, runtime.sampling) == ("bfloat16", "eager", "sampled")


def test_quantisation_is_named(tmp_path):
    pytest.importorskip("torchao", reason="torchao is an optional dependency")
    from slm_pl.loading import load_model, resolve

    pico_model("llama").save_pretrained(tmp_path)
    result, _ = measure(load_model(resolve(str(tmp_path)), quantization="int8"))
    assert result.runtime.quantization == "int8 weight-only (torchao)"
    assert result.memory.weights < measure(pico_model("llama"))[0].memory.weights


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_cache_by_arithmetic_is_that_of_the_switch(cache):
    memory = measure(pico_model("mistral"), Point(2, 12, 4, 2), cache=cache)[0].memory
    assert memory.kv_cache == memory.kv_cache_computed == 6 * 2 * 2 * 2 * 8 * 4 * (7 if cache == "dynamic" else 8)


# --- What does not count ---


def test_warm_up_is_not_counted(model, monkeypatch):
    warm = [100.0, 150.0, 180.0, 199.0, 199.5]
    left = set_clock(
        monkeypatch, [*warm, 200.0, 200.5, 201.0, 201.5, 202.0, 300.0, 301.0, 302.0, 303.5, 304.0, "one too many"]
    )
    result, _ = measure(model, Point(1, 6, 3, 2), warmup=1)
    assert next(left) == "one too many"
    assert (result.latency_s.min, result.latency_s.max) == (2.0, 4.0)
    assert (result.time_to_first_token_s.min, result.time_to_first_token_s.max) == (0.5, 1.0)
    assert result.output_tokens_per_s.mean == pytest.approx((3 / 2 + 3 / 4) / 2)
    assert result.total_tokens_per_s.mean == pytest.approx((9 / 2 + 9 / 4) / 2)
    assert result.latency_s.stdev == pytest.approx(math.sqrt(2))
    assert (result.time_per_output_token_s.min, result.time_per_output_token_s.max) == (0.75, 1.5)
    assert sorted({result.inter_token_s.min, result.inter_token_s.max}) == [0.5, 1.5]


@pytest.mark.skipif(sys.platform != "linux", reason="the peak resident set is Linux's")
def test_peak_memory_is_that_of_the_counted_runs(monkeypatch):
    def peak(hungry):
        """With a call of ``generate`` that takes 150 MiB: 0 warms up, 1 and 2 count, 3 counts operations."""
        model, numbers = pico_llama(), iter(range(4))
        generate = model.generate

        def generate_with_ballast(**kwargs):
            if next(numbers) == hungry:
                torch.ones(150 * MIB, dtype=torch.uint8)
            return generate(**kwargs)

        monkeypatch.setattr(model, "generate", generate_with_ballast)
        result, _ = measure(model)
        if result.peak_memory_bytes is None:
            assert "cannot be reset" in result.missing["peak_memory_bytes"]
            pytest.skip(result.missing["peak_memory_bytes"])
        assert next(numbers, None) is None
        return result.peak_memory_bytes.max

    usual, warm, counted, after = (peak(hungry) for hungry in (None, 0, 2, 3))
    assert abs(warm - usual) < 50 * MIB
    assert abs(after - usual) < 50 * MIB
    assert counted - usual > 100 * MIB


def test_peak_memory_that_cannot_be_measured_is_absent(model, monkeypatch):
    def refuse(self, text):
        raise PermissionError("not allowed")

    monkeypatch.setattr(Path, "write_text", refuse)
    result, _ = measure(model)
    assert (result.peak_memory_bytes, result.memory.other) == (None, None)
    assert set(result.missing) == {"peak_memory_bytes"}
    assert "not allowed" in result.missing["peak_memory_bytes"]
    assert result.memory.weights > 0


@pytest.mark.parametrize(("point", "tokens"), [(Point(2, 6, 3, 4), 2 * 3 * 4), (Point(2, 6, 0, 4), 2 * 6 * 4)])
def test_gpu_is_watched_in_the_counted_runs_only(point, tokens, model, monkeypatch):
    events = []
    model.register_forward_hook(lambda *_: events.append("step"))

    class Sampler:
        """Stands in for NVML: this machine has no GPU."""

        def __init__(self, device):
            assert device == torch.device("cpu")

        def __enter__(self):
            events.append("watch")
            return self

        def __exit__(self, *_):
            events.append("stop")

        def figures(self, tokens):
            assert events[-1] == "stop"
            return GpuFigures(Utilisation(2.0, 5), Energy(8.0, 8.0 / tokens, "counter"), 10**9, 2 * 10**9)

    monkeypatch.setattr(measuring, "GpuSampler", Sampler)
    result, gpu = measure(model, point, warmup=3)
    steps = max(point.new_tokens, 1)
    assert events == ["step"] * 3 * steps + ["watch"] + ["step"] * 4 * steps + ["stop"] + ["step"] * steps
    assert (result.utilisation, result.energy) == (gpu.utilisation, gpu.energy)
    assert result.energy.joules_per_token == 8.0 / tokens
    assert (result.memory.process, result.memory.device) == (10**9, 2 * 10**9)


# --- Too little memory ---

OUT_OF_MEMORY = [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has …"), "Tried to allocate 20"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried …"), "DefaultCPUAllocator"),
    (MemoryError(), "MemoryError"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), "CUBLAS_STATUS_ALLOC_FAILED"),
    (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be …"), "CUDA error: out of memory"),
]


@pytest.mark.parametrize(("error", "reason"), OUT_OF_MEMORY, ids=["gpu", "cpu", "python", "cublas", "cuda"])
@pytest.mark.parametrize("at", [0, 2])
def test_out_of_memory_is_a_result(error, reason, at, monkeypatch):
    """In the warm-up, and in a counted run."""
    model = pico_llama()
    held = fail_at(model, monkeypatch, at, error.with_traceback(None))
    result, gpu = measure(model)
    assert gpu is None
    assert set(result.missing) == ABSENT
    assert set(result.missing.values()) == {next(iter(result.missing.values()))}
    assert result.missing["latency_s"].startswith("out of memory: ")
    assert reason in result.missing["latency_s"]
    assert "\n" not in result.missing["latency_s"]
    figures = "latency_s", "time_to_first_token_s", "output_tokens_per_s", "peak_memory_bytes", "memory", "work"
    figures += "limit", "machine_peak", "time_per_output_token_s", "inter_token_s", "total_tokens_per_s"
    assert [getattr(result, name) for name in figures] == [None] * len(figures)
    assert (result.batch_size, result.prompt_tokens, result.new_tokens, result.repeats) == (2, 6, 3, 2)
    assert result.runtime.dtype == "float32"
    # The next point begins with free memory: nothing holds what the failed run held, once the error is gone.
    error.__traceback__ = None
    gc.collect()
    assert held[0]() is None


def test_times_stay_where_the_counting_does_not_fit(model, monkeypatch):
    fail_at(model, monkeypatch, 3, MemoryError("too much"))
    result, gpu = measure(model)
    assert gpu is not None
    assert result.latency_s.n == 2
    assert result.missing == dict.fromkeys(("work", "memory", "limit"), "while counting, out of memory: too much")
    assert (result.work, result.memory, result.limit) == (None, None, None)
    fail_at(model, monkeypatch, 3, ValueError("a defect"))
    with pytest.raises(ValueError, match="a defect"):
        measure(model)


def test_kernel_that_is_not_there_is_a_result(model, monkeypatch):
    fail_at(model, monkeypatch, 0, RuntimeError("No available kernel. Aborting execution."))
    result, _ = measure(model, sdpa_backend="flash")
    assert result.missing["latency_s"] == (
        "sdpa_backend has no kernel for this: No available kernel. Aborting execution."
    )


def test_text_that_was_continued_is_named(model):
    named = {
        "prose": measure(model, protocol="serving")[0],
        "protocol": measure(model, Point(1, 25, 3, 2, own_text=True), protocol="shortened_llama", texts=[PISA])[0],
    }
    assert [result.prompt for result in named.values()] == list(named)
    own = measure(model, Point(1, 3, 3, 2, own_text=True), protocol="shortened_llama", texts=["A"])[0].prompt
    assert own == "own 559aead0"  # sha256 of A


def test_padding_is_no_token(model):
    texts = ["A", "A decoder layer"]
    result, _ = measure(model, Point(2, 9, 3, 2, own_text=True), protocol="shortened_llama", texts=texts)
    tokens = sum(len(pico_tokenizer()(text)["input_ids"]) for text in texts) + 2 * 3
    assert result.total_tokens_per_s.max == pytest.approx(tokens / result.latency_s.min)


def test_out_of_memory_in_a_forward_pass(model):
    def fail(*_):
        raise MemoryError

    model.lm_head.register_forward_hook(fail)
    result, _ = measure(model, Point(2, 6, 0, 2))
    assert set(result.missing) == ABSENT - {"output_tokens_per_s"}  # there is none of a forward pass


@pytest.mark.parametrize("error", [RuntimeError("shape '[2]' is invalid"), ValueError("no"), KeyboardInterrupt()])
def test_other_errors_are_errors(error, model, monkeypatch):
    fail_at(model, monkeypatch, 1, error)
    with pytest.raises(type(error)) as caught:
        measure(model)
    assert caught.value is error


def test_next_point_is_measured_after_one_that_did_not_fit(model, monkeypatch):
    fail_at(model, monkeypatch, 1, MemoryError())
    assert measure(model)[0].latency_s is None
    result, _ = measure(model)
    assert (result.latency_s.n, result.missing.get("latency_s")) == (2, None)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_cache_that_cannot_fit_is_not_tried(cache, model, calls, monkeypatch):
    needed = cache_bytes(model, 2, 6 + 3 - 1, cache == "static")
    monkeypatch.setattr(measuring, "free_memory", lambda: needed - 1)
    result, _ = measure(model, cache=cache)
    assert not calls
    assert set(result.missing) == ABSENT
    assert "the key/value cache alone takes 0.0 GB, 0.0 GB are free" in result.missing["latency_s"]
    for enough in (needed, None):  # None: the system does not tell
        monkeypatch.setattr(measuring, "free_memory", lambda enough=enough: enough)
        assert measure(model, cache=cache)[0].latency_s is not None
    monkeypatch.setattr(measuring, "free_memory", lambda: 0)
    assert measure(model, Point(2, 6, 0, 2))[0].latency_s is not None  # no cache


# --- Compiled ---


def test_every_point_and_both_models_run_compiled(graphs):
    baseline, model = (pico_model("llama", num_hidden_layers=layers) for layers in (2, 1))
    settings = make_settings(warmup=1, cache="static", compile=True)
    # More than twice, torch would compile nothing further; each point forgets what it compiled.
    with torch._dynamo.config.patch(recompile_limit=2):
        for batch_size in (2, 3, 4):
            point = Point(batch_size, 6, 3, 2)
            result, _ = measure_point(model, pico_tokenizer(), point, settings, PEAK)
            assert (result.runtime.compile, result.memory.kv_cache) == (True, result.memory.kv_cache_computed)
        compare_point(baseline, "dense", model, pico_tokenizer(), Point(2, 6, 3, 2), settings)
    # Two steps of each run, warm-up among them; what counts and what times the parts is not compiled.
    assert [graph.runs for graph in graphs] == [2 * (1 + 2)] * 5


# --- What stays ---


def frozen_half(model):
    for number, module in enumerate(model.modules()):
        module.training = number % 2 == 0
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0)


def everything(model):
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        set(vars(model)),
        model.generation_config.to_dict(),
        model.config.to_dict(),
        torch.random.get_rng_state(),
        torch.is_inference_mode_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()),
    )


def assert_unchanged(model, before):
    state, *rest, rng, inference, flash, hooks = everything(model)
    old_state, *old_rest, old_rng, old_inference, old_flash, old_hooks = before
    assert state.keys() == old_state.keys()
    assert all(torch.equal(value, old_state[name]) for name, value in state.items())
    assert rest == old_rest
    assert torch.equal(rng, old_rng)
    assert (inference, flash, hooks) == (old_inference, old_flash, old_hooks)


@pytest.mark.parametrize("error", [None, MemoryError(), ValueError()], ids=["fits", "too large", "fails"])
def test_model_and_caller_are_left_as_they_were(error, monkeypatch):
    torch.manual_seed(7)
    model = pico_llama()
    frozen_half(model)
    if error is not None:
        fail_at(model, monkeypatch, 2, error)
    before = everything(model)
    try:
        measure(model, protocol="shortened_llama", texts=["A"], cache="static", sdpa_backend="math")
    except ValueError:
        assert isinstance(error, ValueError)
    assert_unchanged(model, before)


def test_both_models_are_left_as_they_were():
    models = [pico_llama(layers) for layers in (2, 1)]
    for model in models:
        frozen_half(model)
    before = [everything(model) for model in models]
    compare_point(
        models[0], "dense", models[1], pico_tokenizer(), Point(2, 6, 3, 2), make_settings("serving", cache="static")
    )
    for model, old in zip(models, before, strict=True):
        assert_unchanged(model, old)


def test_dropout_is_off_while_it_is_measured(calls, model):
    seen = []
    model.model.register_forward_hook(lambda module, *_: seen.append(module.training))
    assert model.training
    measure(model)
    assert len(seen) == 4 * 3
    assert not any(seen)


# --- In turn with a baseline ---


def test_speed_up_of_half_the_layers():
    baseline, model = pico_model("llama", num_hidden_layers=24), pico_model("llama", num_hidden_layers=12)
    notes = []
    point = Point(2, 6, 3, 6)
    found = compare_point(baseline, "models/dense", model, pico_tokenizer(), point, make_settings(), notes.append)
    assert len(notes) == 1 + 6
    assert (found.baseline, found.num_layers) == ("models/dense", 24)
    assert found.num_parameters == sum(parameter.numel() for parameter in baseline.parameters())
    for ratio in (found.latency, found.time_to_first_token, found.time_per_output_token):
        assert ratio.low <= ratio.value <= ratio.high
        assert (ratio.pairs, ratio.confidence) == (6, 1 - 2 / 2**6)
    assert (found.latency_s.n, found.baseline_latency_s.n, found.baseline_time_to_first_token_s.n) == (6, 6, 6)
    assert found.promise.layers == 2
    layer, head = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32, 512 * 32
    scores = 2 * 32 * 6
    expected = [6 * layers * (layer + scores) + head for layers in (24, 12)]
    assert found.promise.prefill_macs == pytest.approx(expected[0] / expected[1])
    assert 1 < found.promise.prefill_layer_times < 2
    assert 1 < found.promise.decode_layer_times < 2
    assert 1 < found.promise.decode_bytes < 2


def test_speed_up_of_a_forward_pass():
    models = [pico_model("llama", num_hidden_layers=layers) for layers in (2, 1)]
    found = compare_point(models[0], "dense", models[1], pico_tokenizer(), Point(2, 6, 0, 2), make_settings())
    assert found.time_per_output_token is None
    assert (found.promise.decode_layer_times, found.promise.decode_bytes) == (None, None)
    assert found.latency == found.time_to_first_token


def test_speed_up_by_the_clock(monkeypatch):
    """Warm-up is left out, and each run belongs to its own model."""
    models = [pico_model("llama", num_hidden_layers=1) for _ in range(2)]
    # One warm-up pair, the model first; then a pair with the baseline first, and one with the model first.
    lengths = [50.0, 70.0, 3.0, 2.0, 4.0, 6.0]
    runs = [stamp for number, length in enumerate(lengths) for stamp in (100.0 * number, 100.0 * number + length)]
    parts = 3 * [1.0, 1.5, 2.0, 2.25]  # layer and head, three times
    left = set_clock(monkeypatch, [*runs, *parts, "one too many"])
    found = compare_point(models[0], "dense", models[1], pico_tokenizer(), Point(1, 6, 0, 2), make_settings())
    assert next(left) == "one too many"
    assert (found.baseline_latency_s.min, found.baseline_latency_s.max) == (3.0, 6.0)
    assert (found.latency_s.min, found.latency_s.max) == (2.0, 4.0)
    assert (found.latency.low, found.latency.high) == (1.5, 1.5)
    assert found.promise.prefill_layer_times == 1.0


@pytest.mark.parametrize(("error", "_"), OUT_OF_MEMORY, ids=["gpu", "cpu", "python", "cublas", "cuda"])
@pytest.mark.parametrize("which", [0, 1])
def test_no_memory_for_both(error, _, which, monkeypatch):
    models = [pico_llama(1) for _ in range(2)]
    fail_at(models[which], monkeypatch, 1, error)
    found = compare_point(models[0], "dense", models[1], pico_tokenizer(), Point(2, 6, 3, 2), make_settings())
    assert found.startswith("with both models, out of memory: ")


def test_pairs_stay_where_the_counting_does_not_fit(monkeypatch):
    models = [pico_llama(1) for _ in range(2)]
    fail_at(models[1], monkeypatch, 3, MemoryError())  # one run warms up, two are pairs
    found = compare_point(models[0], "dense", models[1], pico_tokenizer(), Point(2, 6, 3, 2), make_settings())
    assert (found.latency.pairs, found.promise) == (2, None)


def test_other_errors_are_errors_with_a_baseline_too(monkeypatch):
    models = [pico_llama(1) for _ in range(2)]
    fail_at(models[1], monkeypatch, 1, RuntimeError("shape"))
    with pytest.raises(RuntimeError, match="shape"):
        compare_point(models[0], "dense", models[1], pico_tokenizer(), Point(2, 6, 3, 2), make_settings())


# --- The context ---


def test_points_that_the_context_cannot_hold_are_refused():
    fits = [Point(1, 500, 12, 2), Point(64, 512, 0, 2)]
    check_context("some/model", 512, fits)
    check_context("some/model", None, [Point(1, 10**6, 10**6, 2)])  # no limit
    with pytest.raises(UsageError, match=r"500 tokens and new_tokens 13; the context of some/model holds 512. .* 12"):
        check_context("some/model", 512, [*fits, Point(1, 500, 13, 2)])
    with pytest.raises(UsageError, match="Take new_tokens 0 or fewer, or a shorter prompt"):
        check_context("some/model", 512, [Point(1, 513, 0, 2)])


def test_work_that_was_counted_alone_is_not_counted_again(monkeypatch):
    models = [pico_llama(2), pico_llama(1)]
    counted = []
    account = measuring.accounts.account
    monkeypatch.setattr(
        measuring.accounts, "account", lambda runner, seed: counted.append(runner.model) or account(runner, seed)
    )
    point, settings = Point(2, 6, 3, 2), make_settings()
    own = measure_point(models[1], pico_tokenizer(), point, settings, PEAK)[0].work
    before = compare_point(models[0], "dense", models[1], pico_tokenizer(), point, settings).promise
    del counted[:]
    after = compare_point(models[0], "dense", models[1], pico_tokenizer(), point, settings, counted=own).promise
    assert counted == [models[0]]
    assert (after.prefill_macs, after.decode_bytes) == (before.prefill_macs, before.decode_bytes)
