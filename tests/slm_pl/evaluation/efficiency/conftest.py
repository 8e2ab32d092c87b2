import gc
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def _quick_collection() -> Iterator[None]:
    """Every measurement collects garbage; without what all imports left, that takes no third of a second."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[SimpleNamespace]]:
    """What torch.compile makes: of each graph the shapes of its inputs and how often it ran. It stays Python: making
    machine code of it takes a quarter of a minute, and is done by the test for those who have the time."""
    made, compile_ = [], torch.compile

    def backend(graph, inputs):
        shapes = [tuple(i.shape) for i in inputs if isinstance(i, torch.Tensor)]
        symbols = [i for i in inputs if isinstance(i, torch.SymInt)]
        made.append(SimpleNamespace(shapes=shapes, symbols=symbols, runs=0))
        own = made[-1]

        def run(*args):
            own.runs += 1
            return graph(*args)

        return run

    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_(f, **{**options, "backend": backend}))
    yield made
    torch.compiler.reset()
