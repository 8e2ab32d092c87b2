"""What lm-eval changes of the program around it, kept as it was."""

import contextlib
import logging
import random
from collections.abc import Iterator

import torch


def seed() -> None:
    """Seeds as lm-eval's command line does."""
    import numpy

    random.seed(0)
    numpy.random.seed(1234)
    torch.manual_seed(1234)


@contextlib.contextmanager
def same_random_state() -> Iterator[None]:
    """Gives the caller's random states back: lm-eval seeds Python, numpy and torch."""
    import numpy

    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python_state)
            numpy.random.set_state(numpy_state)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences lm-eval's log below errors and datasets' bars; lm-eval's own progress bar stays."""
    import datasets

    # Imported here because importing the harness sets its log level.
    import lm_eval.models.huggingface  # noqa: F401

    logger = logging.getLogger("lm_eval")
    level = logger.level
    had_bars = datasets.utils.are_progress_bars_disabled() is False
    logger.setLevel(logging.ERROR)
    datasets.utils.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if had_bars:
            datasets.utils.enable_progress_bars()
