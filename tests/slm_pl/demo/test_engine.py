import gc
import itertools
import threading
import time
import weakref

import pytest
import torch

from slm_pl.demo.engine import Absent, DemoModel, Draw, Failed, Finished, Waiting, Writing, load
from slm_pl.demo.line import Line
from slm_pl.demo.runs import MOST_CHARACTERS, MOST_REMEMBERED, Runs, Settings
from slm_pl.errors import UsageError
from tests.helpers.pico import pico_model
from tests.helpers.tokenizer import pico_tokenizer

PROMPT = "A decoder layer that"


def served(label="pico", seed=0, **changes):
    model = pico_model(seed=seed, bos_token_id=0, eos_token_id=None, pad_token_id=2, **changes)
    return DemoModel(label, model, pico_tokenizer())


def begin(prompt=PROMPT, person="someone", runs=None, **settings):
    return (runs or Runs()).begin(person, prompt, Settings(**{"new_tokens": 8, **settings}))


@torch.no_grad()
def greedy(model, prompt, new_tokens):
    """Greedy decoding without a cache and without generate."""
    tokenizer = pico_tokenizer()
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(new_tokens):
        ids = torch.cat([ids, model._model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_the_text_that_streams_is_that_of_greedy_decoding(one_thread):
    model = served()
    *before, last = model.complete(begin(new_tokens=24))
    assert last.text == greedy(model, PROMPT, 24)
    assert isinstance(last, Finished)
    assert (last.tokens, last.stopped, last.prompt_tokens) == (24, False, len(pico_tokenizer()(PROMPT)["input_ids"]))
    assert all(isinstance(event, Writing) and last.text.startswith(event.text) for event in before)
    assert 0 < last.first_s < last.seconds
    assert last.tokens_per_s == pytest.approx(24 / last.seconds)
    # Keys and values of two heads of 8 in 6 layers, float32, for all tokens but the last, which no other one sees.
    assert last.cache_bytes == 2 * 2 * 8 * 6 * 4 * (last.prompt_tokens + 23)


def test_a_seed_decides_what_is_drawn_and_nothing_else_does(one_thread):
    model = served()
    drawn = []
    for seed, noise in ((3, 0), (3, 1), (4, 0)):
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        drawn.append(list(model.complete(begin(temperature=1.0, seed=seed, new_tokens=16)))[-1].text)
        assert torch.equal(torch.get_rng_state(), state)
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] != greedy(model, PROMPT, 16)


def test_draws_follow_the_softmax():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, float("-inf")]]).repeat(200_000, 1)
    found = torch.bincount(Draw(0.8, 5)(None, logits).argmax(-1), minlength=5) / len(logits)
    expected = torch.softmax(logits[0] / 0.8, 0)
    torch.testing.assert_close(found, expected, atol=0.004, rtol=0)  # three and a half standard errors
    assert found[4] == 0


def test_a_draw_is_of_the_dtype_of_the_logits_however_low_the_temperature():
    # No float64 goes to the device: MPS has none.
    drawn = Draw(1e-60, 5)(None, torch.tensor([[1.0, 3.0, 2.0]]))
    assert drawn.dtype == torch.float32
    assert drawn.argmax().item() == 1
    assert torch.isfinite(drawn).sum() == 1


def test_stop_ends_the_work_and_frees_the_line(one_thread):
    model, runs = served(max_position_embeddings=4096), Runs()
    events = model.complete(begin(runs=runs, new_tokens=1000))
    assert isinstance(next(events), Writing)
    runs.stop("someone")
    last = list(events)[-1]
    assert isinstance(last, Finished)
    assert last.stopped
    assert 0 < last.tokens < 1000
    assert list(model.complete(begin(new_tokens=2)))[-1].tokens == 2
    assert "demo pico" not in [thread.name for thread in threading.enumerate()]


def test_who_does_not_listen_any_more_is_not_served(one_thread):
    model = served(max_position_embeddings=4096)
    run = begin(new_tokens=1000)
    events = model.complete(run)
    next(events)
    events.close()  # such as of a page that was closed
    assert "demo pico" not in [thread.name for thread in threading.enumerate()]
    assert not run.stop.is_set()  # the other columns go on
    assert list(model.complete(begin(new_tokens=2)))[-1].tokens == 2


def test_two_people_at_once_get_their_own_text_one_after_the_other(one_thread):
    model, runs, prompts = served(), Runs(), {"a": "def main", "b": "The calibration set"}
    seen = {person: [] for person in prompts}

    def ask(person):
        run = begin(prompts[person], person, runs, new_tokens=40)
        seen[person] = [(time.perf_counter(), event) for event in model.complete(run)]

    threads = [threading.Thread(target=ask, args=person) for person in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for person, events in seen.items():
        assert events[-1][1].text == greedy(model, prompts[person], 40)
    first, second = sorted(seen.values(), key=lambda events: events[-1][0])
    waited = [event for _, event in second if isinstance(event, Waiting)]
    assert waited in ([], [Waiting(1)])
    # The second one's work began after the first one's end.
    assert second[-1][0] - second[-1][1].seconds > first[-1][0] - 0.05


def test_who_waits_can_stop_and_is_told_the_place(one_thread):
    model, runs = served(max_position_embeddings=4096), Runs()
    working = model.complete(begin(runs=runs, person="first", new_tokens=1000))
    next(working)
    second, third = (model.complete(begin(runs=runs, person=person, new_tokens=2)) for person in ("second", "third"))
    assert next(second) == Waiting(1)
    assert next(third) == Waiting(2)
    runs.stop("second")
    ((last),) = list(second)
    assert (last.stopped, last.tokens, last.text) == (True, 0, "")
    assert next(third) == Waiting(1)
    runs.stop("first")
    list(working)
    assert list(third)[-1].tokens == 2


def test_a_new_run_takes_the_place_of_the_old_one_which_shows_nothing_more(one_thread):
    model, runs = served(max_position_embeddings=4096), Runs()
    before = model.complete(begin(runs=runs, new_tokens=1000))
    next(before)
    run = begin("def main", runs=runs, new_tokens=4)
    assert list(before) == []
    assert list(model.complete(run))[-1].text == greedy(model, "def main", 4)
    late = begin("token " * 400, runs=runs, new_tokens=56)
    begin("def main", runs=runs)
    assert list(model.complete(late)) == []  # it does not fit, which nobody wants to know any more
    runs.leave("someone")
    assert runs.current("someone") is None
    assert list(model.complete(run)) == []


def test_models_in_turn_do_not_work_at_the_same_time_whoever_asks(one_thread):
    models, runs = [served("a"), served("b", seed=1)], Runs()
    asked = [begin(person=person, runs=runs, in_turn=True, new_tokens=30) for person in ("first", "second")]
    spans = []

    def ask(model, run):
        last = list(model.complete(run))[-1]
        spans.append((time.perf_counter() - last.seconds, time.perf_counter()))

    threads = [threading.Thread(target=ask, args=(model, run)) for run in asked for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    spans.sort()
    assert len(spans) == 4
    for before, after in itertools.pairwise(spans):
        assert after[0] > before[1] - 0.05


def test_the_runs_of_people_who_left_without_a_word_are_forgotten():
    runs = Runs()
    works = begin(person="works", runs=runs)
    with runs.claim("works", works.number, 0) as run:
        assert run is works
        for person in range(MOST_REMEMBERED + 5):
            begin(person=str(person), runs=runs)
        assert runs.current("works") is works
        assert runs.current("5") is None
        assert runs.current("6") is not None
    begin(person="another", runs=runs)
    assert runs.current("works") is None
    assert len(runs._runs) == MOST_REMEMBERED


@pytest.mark.parametrize(
    ("prompt", "settings", "told"),
    [
        ("", {}, "The prompt is empty"),
        (" \n\t", {}, "The prompt is empty"),
        ("x" * (MOST_CHARACTERS + 1), {}, "200,001 characters"),
        ("x", {"new_tokens": 0}, "New tokens are 0"),
        ("x", {"temperature": float("nan")}, "temperature is nan"),
        ("x", {"seed": -1}, "seed is -1"),
    ],
)
def test_what_cannot_be_begun_leaves_what_runs_alone(prompt, settings, told):
    runs = Runs()
    before = begin(runs=runs)
    with pytest.raises(UsageError, match=told):
        begin(prompt, runs=runs, **settings)
    assert runs.current("someone") is before
    assert not before.stop.is_set()


def test_a_prompt_that_does_not_fit_is_refused_and_the_room_is_told(one_thread):
    model = served()  # of 256 tokens
    long = "token " * 400
    tokens = len(pico_tokenizer()(long)["input_ids"])
    (failed,) = model.complete(begin(long, new_tokens=56))
    assert f"has {tokens:,} tokens, and 56 new ones" in failed.reason
    assert "pico holds 256. Shorten the prompt to 200 tokens, or take fewer new tokens" in failed.reason
    (failed,) = model.complete(begin(new_tokens=256))
    assert "Take fewer than 256 new tokens" in failed.reason
    ids = pico_tokenizer()("x " * 300)["input_ids"][:200]
    fitting = pico_tokenizer().decode(ids)
    assert len(pico_tokenizer()(fitting)["input_ids"]) <= 200
    assert list(model.complete(begin(fitting, new_tokens=56)))[-1].tokens == 56


def test_a_prompt_may_hold_what_is_no_text(one_thread):
    assert list(served().complete(begin("a \ud800 b", new_tokens=2)))[-1].tokens == 2


def test_a_model_that_fails_says_so_and_goes_on_with_the_next_request(one_thread, monkeypatch, tmp_path):
    model, other, run = served(), served("other", seed=1), begin()
    calls = []

    def fail(module, args):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("no <b>luck</b>\nand more")

    hook = model._model.model.layers[2].register_forward_pre_hook(fail)
    events = list(model.complete(run))
    assert events[-1] == Failed("The model failed: RuntimeError: no <b>luck</b>")
    assert list(other.complete(run))[-1].tokens == 8
    hook.remove()
    assert list(model.complete(begin()))[-1].text == greedy(model, PROMPT, 8)

    absent = load("gone", str(tmp_path / "gone"), False, "auto", torch.device("cpu"))
    assert isinstance(absent, Absent)
    (failed,) = absent.complete(run)
    assert "There is no directory" in failed.reason


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "does not fit into the memory of cpu"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "does not fit into the memory"),
        (RuntimeError("no kernel image\nand more"), "cannot be used on cpu: RuntimeError: no kernel image."),
    ],
)
def test_weights_that_do_not_fit_are_an_absent_model(pico_dir, monkeypatch, error, told):
    def to(self, device):
        raise error

    monkeypatch.setattr("transformers.PreTrainedModel.to", to)
    absent = load("pico", str(pico_dir), False, "auto", torch.device("cpu"))
    assert isinstance(absent, Absent)
    assert told in absent.reason


def test_out_of_memory_lets_go_of_what_was_in_memory(one_thread):
    model, caches = served(), []

    def fill(module, args, kwargs):
        caches.append(weakref.ref(kwargs["past_key_values"]))
        raise torch.OutOfMemoryError("CUDA out of memory")

    hook = model._model.model.layers[2].register_forward_pre_hook(fill, with_kwargs=True)
    gc.collect()
    gc.disable()
    try:
        (failed,) = model.complete(begin())
        assert [cache() for cache in caches] == [None]
    finally:
        gc.enable()
        hook.remove()
    assert failed == Failed("Out of memory. Take a shorter prompt or fewer new tokens.")


def test_a_streamer_that_fails_does_not_hang(one_thread, monkeypatch):
    model = served()

    def decode(*args, **kwargs):
        raise ValueError("no such token")

    monkeypatch.setattr(model, "_tokenizer", type("T", (), {"decode": decode, "__call__": model._tokenizer.__call__})())
    monkeypatch.setattr(model, "_read", lambda run: {"input_ids": torch.tensor([[5, 6]])})
    assert list(model.complete(begin())) == [Failed("The model failed: ValueError: no such token")]


def test_a_line_has_an_end():
    line, stop = Line("pico", most=1), threading.Event()
    first, second = line.join(), line.join()
    with pytest.raises(UsageError, match="pico is busy: 1 requests wait"):
        line.join()
    assert list(line.wait(first, stop)) == []
    line.leave(first)
    assert list(line.wait(second, stop)) == []


def test_a_model_is_read_as_it_is(pico_dir, one_thread):
    model = load("pico", str(pico_dir), False, "auto", torch.device("cpu"))
    dense = pico_model(bos_token_id=0, eos_token_id=1, pad_token_id=2)
    assert (model.label, model.num_layers, model.directory) == ("pico", 6, pico_dir)
    assert model.parameters == sum(p.numel() for p in dense.parameters())
    assert model.weight_bytes >= 4 * model.parameters
    before = {name: p.clone() for name, p in model._model.state_dict().items()}
    list(model.complete(begin(temperature=1.0)))
    torch.testing.assert_close(dict(model._model.state_dict()), before, rtol=0, atol=0)
