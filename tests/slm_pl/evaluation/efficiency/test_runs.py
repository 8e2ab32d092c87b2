from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import StaticCache

from slm_pl.evaluation.efficiency import clock
from slm_pl.evaluation.efficiency.clock import CudaClock, WallClock, clock_of
from slm_pl.evaluation.efficiency.runs import Times, as_it_was
from tests.helpers.pico import pico_model
from tests.helpers.tokenizer import pico_tokenizer
from tests.slm_pl.evaluation.efficiency.helpers import make_runner, record_generation, set_clock
from tests.slm_pl.evaluation.pico import pico_llama

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model():
    return pico_llama().eval()


@pytest.fixture
def calls(model, monkeypatch):
    return record_generation(model, monkeypatch)


class Bias(torch.nn.Module):
    """A head that gives every token the same score but for some far higher ones."""

    def __init__(self, *tokens):
        super().__init__()
        self.tokens = list(tokens)

    def forward(self, hidden):
        logits = torch.zeros(*hidden.shape[:-1], 512)
        logits[..., self.tokens] = 50.0
        return logits


def new_tokens(output, prompt=12):
    return output.sequences[:, prompt:].tolist()


# --- The protocol ---


@pytest.mark.parametrize("sampling", ["sampled", "greedy"])
def test_what_generate_is_asked_for(sampling, model, calls):
    make_runner(model, 3, None, sampling=sampling).timed(0)
    ((kwargs, output),) = calls
    short, long = (pico_tokenizer()(text)["input_ids"] for text in ("The tower", "A decoder layer that does nearly"))
    ids, mask = kwargs["input_ids"], kwargs["attention_mask"]
    assert ids[0, -len(short) :].tolist() == ids[2, -len(short) :].tolist() == short
    assert ids[1, : len(long)].tolist() == long
    assert mask.sum(dim=1).tolist() == [len(short), ids.shape[1], len(short)]
    assert output.sequences.shape == (3, ids.shape[1] + 5)
    assert torch.equal(output.sequences[:, : ids.shape[1]], ids)
    config = kwargs["generation_config"]
    drawn = (True, 50, 0.95, 1.0) if sampling == "sampled" else (False, None, None, None)
    assert (config.do_sample, config.top_k, config.top_p, config.temperature) == drawn


def test_greedy_takes_the_likeliest_token(model, calls):
    make_runner(model).timed(0)
    sequences = calls[0][1].sequences
    with torch.no_grad():
        scores = model(input_ids=sequences, use_cache=False).logits[:, 11:-1]
    scores[..., 1] = -torch.inf  # EOS
    assert torch.equal(scores.argmax(-1), sequences[:, 12:])


def test_draws_come_from_the_nucleus(model, calls):
    # Six tokens far above all others: each has about a sixth, so they are the nucleus of 0.95, and others are not.
    model.lm_head = Bias(*range(3, 9))
    for seed in range(4):
        make_runner(model, 8, sampling="sampled").timed(seed)
    drawn = [token for _, output in calls for row in new_tokens(output) for token in row]
    assert set(drawn) == set(range(3, 9))
    assert max(drawn.count(token) for token in range(3, 9)) < 60  # of 160; 27 each are expected


def test_runs_are_seeded_and_differ(model, calls):
    for seed in (1, 2, 1):
        make_runner(model, sampling="sampled").timed(seed)
    first, second, again = (new_tokens(output) for _, output in calls)
    assert first == again
    assert first != second


@pytest.mark.parametrize("end", [1, [1, 7]])
def test_end_of_sequence_is_suppressed(end, model, calls):
    # Unsuppressed, it would end each text at once.
    model.lm_head = Bias(1, 7)
    model.generation_config.eos_token_id = end
    for sampling in ("sampled", "greedy"):
        make_runner(model, new_tokens=6, sampling=sampling).timed(0)
    made = [new_tokens(output) for _, output in calls]
    assert all(len(row) == 6 for rows in made for row in rows)
    suppressed = {1} if end == 1 else {1, 7}
    assert not suppressed & {token for rows in made for row in rows for token in row}
    assert made[1] == [[7] * 6] * 2 if end == 1 else made[1] == [[0] * 6] * 2


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3, "repetition_penalty": 2.0, "no_repeat_ngram_size": 1},
        {"temperature": 0.1, "top_k": 1, "top_p": 0.1},
        {"typical_p": 0.2},
        {"suppress_tokens": list(range(2, 500))},
        {"guidance_scale": 3.0},
        {"forced_eos_token_id": 1},
        {"num_return_sequences": 2},
        {"max_time": 0.0},
        {"stop_strings": ["a"]},
        {"cache_implementation": "static"},
        {"use_cache": False, "max_length": 13},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=lambda settings: next(iter(settings)),
)
@pytest.mark.parametrize("sampling", ["sampled", "greedy"])
def test_checkpoint_settings_do_not_change_the_protocol(settings, sampling, model, calls):
    runner = make_runner(model, sampling=sampling)
    runner.timed(3)
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    own = model.generation_config
    before = own.to_dict()
    runner.timed(3)
    (_, expected), (_, found) = calls
    assert new_tokens(found) == new_tokens(expected)
    kinds = {type(layer).__name__ for layer in found.past_key_values.layers}
    assert kinds == {"DynamicLayer"}
    assert model.generation_config is own
    assert own.to_dict() == before


def test_checkpoint_settings_are_back_after_an_error(model, monkeypatch):
    own = model.generation_config

    def fail(**kwargs):
        raise MemoryError

    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(MemoryError):
        make_runner(model).timed(0)
    assert model.generation_config is own


# --- Time ---


def test_a_mark_for_every_token(model, monkeypatch):
    left = set_clock(monkeypatch, [100.0, 100.5, 100.75, 101.75, 104.0, "one too many"])
    times = make_runner(model, new_tokens=3).timed(0)
    assert next(left) == "one too many"
    assert times == Times(4.0, [0.5, 0.75, 1.75])
    assert times.first == 0.5
    assert times.between == [0.25, 1.0]
    assert times.per_token == (4.0 - 0.5) / 2


def test_one_token_has_no_steps(model, monkeypatch):
    set_clock(monkeypatch, [7.0, 9.0, 10.0])
    times = make_runner(model, new_tokens=1).timed(0)
    assert (times.total, times.first, times.per_token, times.between) == (3.0, 2.0, None, [])


def test_a_mark_comes_after_its_token_and_before_the_next_step(model, monkeypatch):
    events = []
    ticking = SimpleNamespace(perf_counter=lambda: float(events.append("mark") or len(events)))
    monkeypatch.setattr(clock, "time", ticking)
    model.register_forward_hook(lambda *_: events.append("step"))
    make_runner(model, new_tokens=3).timed(0)
    assert events == ["mark", "step", "mark", "step", "mark", "step", "mark", "mark"]


def test_forward_pass_has_no_cache_and_no_tokens(model, monkeypatch):
    seen = []
    model.register_forward_hook(lambda module, args, kwargs, output: seen.append((kwargs, output)), with_kwargs=True)
    left = set_clock(monkeypatch, [5.0, 7.5, "one too many"])
    runner = make_runner(model, 3, new_tokens=0)
    times = runner.timed(0)
    assert next(left) == "one too many"
    assert (times.total, times.first, times.tokens, times.per_token, times.between) == (2.5, 2.5, [], None, [])
    ((kwargs, output),) = seen
    assert torch.equal(kwargs["input_ids"], runner.batch.ids)
    assert output.past_key_values is None
    assert output.logits.shape == (3, 12, 512)
    assert output.logits.is_inference()
    assert runner.plain(0, lambda: None) is None


def test_plain_run_tells_of_every_token_and_gives_the_cache(model, monkeypatch):
    set_clock(monkeypatch, [])  # no time is taken
    told = []
    cache = make_runner(model, new_tokens=4).plain(0, lambda: told.append(1))
    assert len(told) == 4
    assert [tuple(layer.keys.shape) for layer in cache.layers] == [(2, 2, 12 + 3, 8)] * 2


# --- Clocks ---


@pytest.fixture
def gpu_log(monkeypatch):
    """What happens to stand-ins for CUDA events, as this machine has no GPU; one record every 1.5 ms."""
    log = []

    class Event:
        def __init__(self, enable_timing=False):
            self.timing, self.at = enable_timing, None

        def record(self, stream):
            self.at = 1.5 * sum(what == "recorded" for what, _ in log)
            log.append(("recorded", stream))

        def synchronize(self):
            log.append(("waited for", self.at))

        def elapsed_time(self, end):
            assert self.timing
            assert end.timing
            return end.at - self.at  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    return log


def test_cuda_clock_waits_once_and_gives_seconds(gpu_log):
    clock = clock_of(torch.device("cuda", 3))
    assert isinstance(clock, CudaClock)
    marks = [clock.mark() for _ in range(4)]
    assert gpu_log == [("recorded", "stream of cuda:3")] * 4  # and nothing waited
    assert clock.seconds(marks) == pytest.approx([0.0015, 0.003, 0.0045])
    assert gpu_log[4:] == [("waited for", 4.5)]


def test_wall_clock_of_a_cpu(monkeypatch):
    set_clock(monkeypatch, [3.0, 3.5, 5.0])
    clock = clock_of(torch.device("cpu"))
    assert isinstance(clock, WallClock)
    assert clock.seconds([clock.mark() for _ in range(3)]) == [0.5, 2.0]


# --- Caches ---


@pytest.mark.parametrize("model_type", ["bloom", "gemma3_text", "llama", "mistral", "opt", "qwen3_moe"])
@pytest.mark.parametrize("tokens", [12, None])
def test_static_cache_gives_the_same_tokens(model_type, tokens, monkeypatch):
    model = pico_model(model_type)
    calls = record_generation(model, monkeypatch)
    with as_it_was(model):
        for cache in ("dynamic", "static"):
            make_runner(model, tokens=tokens, new_tokens=10, cache=cache).timed(0)
    (_, dynamic), (_, static) = calls
    assert torch.equal(dynamic.sequences, static.sequences)
    assert not isinstance(dynamic.past_key_values, StaticCache)
    assert isinstance(static.past_key_values, StaticCache)


def test_leftovers_of_a_static_cache_are_forgotten(model, calls):
    before = set(vars(model))
    for new in (9, 3):  # a cache that was longer before would stay so
        with as_it_was(model):
            make_runner(model, new_tokens=new, cache="static").plain(0, lambda: None)
            assert model._previous_max_cache_length == 12 + new - 1
        assert set(vars(model)) == before
    assert [output.past_key_values.layers[0].keys.shape[2] for _, output in calls] == [20, 14]


def test_runs_share_one_static_cache_that_is_empty_before_each(model, calls):
    runner = make_runner(model, new_tokens=4, cache="static")
    for _ in range(2):
        runner.timed(0)
    (_, first), (_, second) = calls
    assert first.past_key_values is second.past_key_values
    assert first.past_key_values.layers[0].keys.shape[2] == 12 + 4 - 1
    assert torch.equal(first.sequences, second.sequences)
    runner.plain(0, lambda: None)  # its tensors are counted, so they are made anew
    assert calls[2][1].past_key_values is not first.past_key_values


def test_leftovers_are_forgotten_after_an_error(model):
    def fail():
        raise MemoryError

    with pytest.raises(MemoryError), as_it_was(model):
        make_runner(model, cache="static").plain(0, fail)
    assert not hasattr(model, "_previous_max_cache_length")


# --- Attention kernels ---


def allowed():
    cuda = torch.backends.cuda
    flags = {
        "flash": cuda.flash_sdp_enabled(),
        "efficient": cuda.mem_efficient_sdp_enabled(),
        "cudnn": cuda.cudnn_sdp_enabled(),
        "math": cuda.math_sdp_enabled(),
    }
    return {name for name, on in flags.items() if on}


@pytest.mark.parametrize("new", [0, 2])
@pytest.mark.parametrize("backend", ["flash", "math", None])
def test_one_kernel_is_allowed_during_a_run(backend, new, model):
    usual, seen = allowed(), []
    model.register_forward_hook(lambda *_: seen.append(allowed()))
    runner = make_runner(model, new_tokens=new, sdpa_backend=backend)
    runner.timed(0)
    runner.plain(0, lambda: None)
    assert len(usual) > 1
    assert seen == [{backend} if backend else usual] * 2 * max(new, 1)
    assert allowed() == usual


def test_the_allowed_kernel_is_what_runs(model):
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    ran = {}
    for backend in ("flash", "math"):
        # The counter hears of the fused kernel where it is told what to count for it.
        with FlopCounterMode(display=False, custom_mapping={fused: lambda *_, **__: 1}) as flops:
            make_runner(model, new_tokens=0, sdpa_backend=backend).plain(0, lambda: None)
        ran[backend] = flops.get_flop_counts()["Global"]
    assert ran["flash"][fused] == 2  # one for each layer
    assert fused not in ran["math"]
    assert torch.ops.aten.bmm in ran["math"]
    assert torch.ops.aten.bmm not in ran["flash"]


# --- torch.compile ---


def test_decode_steps_run_compiled_and_the_prefill_does_not(graphs, monkeypatch):
    model = pico_model(num_hidden_layers=1)
    calls = record_generation(model, monkeypatch)
    before = set(vars(model))
    with as_it_was(model, compiled=True):
        for compile_ in (False, True, True):
            make_runner(model, new_tokens=5, cache="static", compile=compile_).timed(0)
        (graph,) = graphs
        assert graph.runs == 2 * 4
        assert (2, 1) in graph.shapes  # one token of each row
        assert not [shape for shape in graph.shapes if 12 in shape]  # nor a prompt
        make_runner(model, new_tokens=5, cache="static", compile=True).plain(0, lambda: None)
        assert graph.runs == 2 * 4  # the run that counts operations is not compiled
    assert set(vars(model)) == before
    uncompiled, first, second, plain = (new_tokens(output) for _, output in calls)
    assert uncompiled == first == second == plain


@pytest.mark.parametrize(("new", "width"), [(2, 1), (0, 12)])
def test_code_is_for_the_shapes_at_hand(new, width, graphs):
    """Whatever was compiled before: left to itself, torch makes code for any batch from the second on."""
    model = pico_model(num_hidden_layers=1)
    with as_it_was(model, compiled=True):
        for batch_size in (2, 3):
            make_runner(model, batch_size, new_tokens=new, cache="static", compile=True).timed(0)
    assert [graph.shapes[0] for graph in graphs] == [(2, width), (3, width)]
    assert not any(graph.symbols for graph in graphs)


@pytest.mark.parametrize("new", [2, 0])
def test_every_point_is_compiled(new, graphs):
    """The last of more points than torch keeps code for is no slower than the first."""
    model = pico_model(num_hidden_layers=1)
    with torch._dynamo.config.patch(recompile_limit=1):
        for batch_size in (2, 3):
            with as_it_was(model, compiled=True):
                make_runner(model, batch_size, new_tokens=new, cache="static", compile=True).timed(0)
    assert [graph.runs for graph in graphs] == [1, 1]


def test_forward_pass_runs_compiled(graphs):
    model = pico_model(num_hidden_layers=1)
    with as_it_was(model, compiled=True):
        runner = make_runner(model, new_tokens=0, compile=True)
        for seed in range(3):
            runner.timed(seed)
        (graph,) = graphs
        assert graph.runs == 3
        runner.plain(0, lambda: None)
    assert graph.runs == 3


@pytest.mark.long
def test_machine_code_gives_the_same_tokens(monkeypatch):
    model = pico_model(num_hidden_layers=1)
    calls = record_generation(model, monkeypatch)
    with as_it_was(model, compiled=True):
        for compile_ in (False, True):
            make_runner(model, new_tokens=8, cache="static", compile=compile_).timed(0)
        assert model._last_compile_config.backend == "inductor"
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    (_, expected), (_, found) = calls
    assert torch.equal(found.sequences, expected.sequences)
