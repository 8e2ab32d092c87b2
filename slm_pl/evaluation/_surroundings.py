"""What lm-eval changes of the program around it, kept as it was."""

import contextlib
import logging
import random
import re
from collections.abc import Iterator

import torch

from slm_pl.evaluation._ranks import world

# What follows from how this package calls the harness, or is for those who write its tasks.
_NO_CONCERN = re.compile(
    r"`pretrained` model kwarg is not of type `str`|Passed an already-initialized model|"
    r"Overwriting default num_fewshot|model.chat_template was called with|Chat template name provided|"
    r".*metric .* is defined, but (aggregation|higher_is_better) is not|.*Custom kwargs can be passed to `--metadata`|"
    r".*num_fewshot > 0 but fewshot_split is None"
)
_OF_EACH_PROMPT = re.compile(r"Combined length of context|Left truncation applied")


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


class _Concerns(logging.Filter):
    """Of the harness's warnings, those that matter to who measures, on the first rank, each kind once."""

    def __init__(self) -> None:
        super().__init__()
        self._told: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether it is shown."""
        text = record.getMessage()
        if record.levelno >= logging.ERROR:
            return True
        if world()[0] > 0 or _NO_CONCERN.match(text) or text in self._told:
            return False
        self._told.add(text)
        if kind := _OF_EACH_PROMPT.match(text):
            if kind[0] in self._told:
                return False
            self._told.add(kind[0])
            record.msg, record.args = f"{text} Further prompts that are cut are not told.", ()
        return True


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leaves out lm-eval's warnings that concern nobody here, and datasets' bars; lm-eval's own progress bar stays."""
    import datasets

    # Imported here because importing the harness sets its log level, and for the names of its loggers.
    import lm_eval.evaluator
    import lm_eval.models.huggingface  # noqa: F401

    logger = logging.getLogger("lm_eval")
    level = logger.level
    # A logger's filter is for what is logged with it alone, not with those below it.
    names = [name for name in logging.root.manager.loggerDict if name.split(".")[0] == "lm_eval"]
    loggers, concerns = [logging.getLogger(name) for name in names], _Concerns()
    had_bars = datasets.utils.are_progress_bars_disabled() is False
    logger.setLevel(logging.WARNING)
    for one in loggers:
        one.addFilter(concerns)
    datasets.utils.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        for one in loggers:
            one.removeFilter(concerns)
        if had_bars:
            datasets.utils.enable_progress_bars()
