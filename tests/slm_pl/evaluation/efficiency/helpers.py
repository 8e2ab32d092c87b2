"""What more than one of these test modules needs."""

from functools import cache
from types import SimpleNamespace

from slm_pl.evaluation.efficiency import clock
from slm_pl.evaluation.efficiency.measuring import Settings
from slm_pl.evaluation.efficiency.prompts import Prompts
from slm_pl.evaluation.efficiency.protocols import PROTOCOLS
from slm_pl.evaluation.efficiency.record import MachinePeak
from slm_pl.evaluation.efficiency.runs import Runner, Switches
from tests.helpers.tokenizer import pico_tokenizer

PEAK = MachinePeak(1e9, 4e8, "float32", "2 x 2 x 2", 16)


@cache
def make_prompts(*texts):
    """Once: they read all of the prose."""
    return Prompts(pico_tokenizer(), texts or None)


def make_runner(model, batch_size=2, tokens=12, new_tokens=5, sampling="greedy", **switches):
    """Of prose or, without ``tokens``, of the two texts."""
    prompts = make_prompts("The tower", "A decoder layer that does nearly the same as its neighbour")
    return Runner(model, prompts.batch(batch_size, tokens), new_tokens, sampling, Switches(**switches), 2)


def make_settings(protocol="serving", warmup=1, texts=(), **switches):
    return Settings(PROTOCOLS[protocol], make_prompts(*texts), warmup, Switches(**switches))


def record_generation(model, monkeypatch):
    """What ``generate`` was called with and gave back from here on."""
    recorded, generate = [], model.generate

    def recording(**kwargs):
        recorded.append((kwargs, generate(**kwargs)))
        return recorded[-1][1]

    monkeypatch.setattr(model, "generate", recording)
    return recorded


def set_clock(monkeypatch, stamps):
    """In place of ``perf_counter``, for these modules alone; what is left of it stays in the iterator."""
    left = iter(stamps)
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: next(left)))
    return left
