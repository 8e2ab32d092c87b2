import sys

import pytest
import torch

from slm_pl.errors import UsageError
from slm_pl.evaluation import measure_generation
from slm_pl.evaluation.efficiency import generation as efficiency
from tests.helpers.tokenizer import pico_tokenizer
from tests.slm_pl.evaluation.pico import pico_llama


@pytest.fixture
def model():
    return pico_llama()


@pytest.fixture
def calls(model, monkeypatch):
    """What ``generate`` was called with and gave back."""
    recorded = []
    generate = model.generate

    def recording(**kwargs):
        recorded.append((kwargs, generate(**kwargs)))
        return recorded[-1][1]

    monkeypatch.setattr(model, "generate", recording)
    return recorded


def test_protocol(model, calls):
    result = measure_generation(
        model,
        pico_tokenizer(),
        prompt="The tower",
        batch_size=3,
        new_tokens=5,
        warmup=2,
        repeats=4,
        show_progress=False,
    )
    assert len(calls) == 2 + 4
    prompt = pico_tokenizer()("The tower")["input_ids"]
    for kwargs, output in calls:
        assert output.shape == (3, len(prompt) + 5)
        assert output[:, : len(prompt)].tolist() == [prompt] * 3
        assert kwargs["attention_mask"].tolist() == [[1] * len(prompt)] * 3
        config = kwargs["generation_config"]
        assert (config.do_sample, config.top_k, config.top_p, config.temperature) == (True, 50, 0.95, 1.0)
    assert (result.batch_size, result.prompt_tokens, result.new_tokens) == (3, len(prompt), 5)
    assert (result.protocol, result.warmup, result.repeats) == ("shortened_llama", 2, 4)


def test_figures_hang_together(model):
    result = measure_generation(
        model, pico_tokenizer(), batch_size=2, new_tokens=8, warmup=1, repeats=5, show_progress=False
    )
    latency, first, rate = result.latency_s, result.time_to_first_token_s, result.output_tokens_per_s
    assert 0 < first.min <= first.median <= first.max
    assert first.max <= latency.max
    assert first.mean < latency.mean
    assert latency.min <= latency.mean <= latency.max
    assert rate.max == pytest.approx(2 * 8 / latency.min)
    assert rate.min == pytest.approx(2 * 8 / latency.max)
    assert rate.median == pytest.approx(2 * 8 / latency.median)


def test_warm_up_is_not_counted(model, monkeypatch):
    clock = iter([100.0, 150.0, 199.0, 200.0, 200.5, 202.0, 300.0, 301.0, 304.0])
    monkeypatch.setattr(efficiency.time, "perf_counter", lambda: next(clock))
    result = measure_generation(model, pico_tokenizer(), new_tokens=3, warmup=1, repeats=2, show_progress=False)
    assert (result.latency_s.min, result.latency_s.max) == (2.0, 4.0)
    assert (result.time_to_first_token_s.min, result.time_to_first_token_s.max) == (0.5, 1.0)
    assert result.output_tokens_per_s.mean == pytest.approx((3 / 2 + 3 / 4) / 2)
    assert result.latency_s.stdev == pytest.approx(2**0.5)


def test_end_of_sequence_is_suppressed(model, calls):
    # Every token but EOS gets the same score and EOS a far higher one: unsuppressed, it would end each text at once.
    class Bias(torch.nn.Module):
        def forward(self, hidden):
            logits = torch.zeros(*hidden.shape[:-1], 512)
            logits[..., 1] = 50.0
            return logits

    model.lm_head = Bias()
    measure_generation(model, pico_tokenizer(), new_tokens=6, warmup=0, repeats=2, show_progress=False)
    prompt_tokens = calls[0][0]["input_ids"].shape[1]
    for _, output in calls:
        assert output.shape[1] == prompt_tokens + 6
        assert 1 not in output[:, prompt_tokens:]


def test_checkpoint_settings_do_not_change_the_protocol(model, calls):
    model.generation_config.num_beams = 3
    model.generation_config.repetition_penalty = 2.0
    measure_generation(model, pico_tokenizer(), new_tokens=6, warmup=0, repeats=2, show_progress=False)
    with_settings = [output for _, output in calls]
    model.generation_config.num_beams = 1
    model.generation_config.repetition_penalty = 1.0
    measure_generation(model, pico_tokenizer(), new_tokens=6, warmup=0, repeats=2, show_progress=False)
    assert all(torch.equal(a, output) for a, (_, output) in zip(with_settings, calls[2:], strict=True))


def test_runs_are_seeded_and_differ(model, calls):
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    for _ in range(2):
        measure_generation(model, pico_tokenizer(), new_tokens=8, warmup=0, repeats=2, show_progress=False)
    first, second, first_again, second_again = (output for _, output in calls)
    assert torch.equal(first, first_again)
    assert torch.equal(second, second_again)
    assert not torch.equal(first, second)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak resident set is Linux's")
def test_peak_memory_counts_the_runs_only(model, monkeypatch):
    small = measure_generation(model, pico_tokenizer(), new_tokens=2, warmup=0, repeats=2, show_progress=False)
    if small.peak_memory_bytes is None:
        assert "cannot be reset" in small.missing["peak_memory_bytes"]
        pytest.skip(small.missing["peak_memory_bytes"])
    ballast = torch.ones(100 * 2**20, dtype=torch.uint8)
    del ballast
    after = measure_generation(model, pico_tokenizer(), new_tokens=2, warmup=0, repeats=2, show_progress=False)
    generate = model.generate

    def hungry(**kwargs):
        torch.ones(100 * 2**20, dtype=torch.uint8)
        return generate(**kwargs)

    monkeypatch.setattr(model, "generate", hungry)
    large = measure_generation(model, pico_tokenizer(), new_tokens=2, warmup=0, repeats=2, show_progress=False)
    # What was allocated and freed before does not count, what the runs allocate does.
    assert abs(after.peak_memory_bytes.max - small.peak_memory_bytes.max) < 30 * 2**20
    assert large.peak_memory_bytes.max - after.peak_memory_bytes.max > 70 * 2**20


def test_peak_memory_that_cannot_be_measured_is_absent(model, monkeypatch):
    def refuse(self, text):
        raise PermissionError("not allowed")

    monkeypatch.setattr(efficiency.Path, "write_text", refuse)
    result = measure_generation(model, pico_tokenizer(), new_tokens=2, warmup=0, repeats=2, show_progress=False)
    assert result.peak_memory_bytes is None
    assert "not allowed" in result.missing["peak_memory_bytes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size 0"),
        ({"new_tokens": 0}, "new_tokens 0"),
        ({"warmup": -1}, "warmup -1"),
        ({"repeats": 1}, "repeats 1; allowed is 2"),
        ({"prompt": ""}, "without a single token"),
        ({"prompt": "a", "new_tokens": 512}, "new_tokens 511 or fewer"),
    ],
)
def test_bad_input(model, arguments, message):
    with pytest.raises(UsageError, match=message):
        measure_generation(model, pico_tokenizer(), **arguments)
