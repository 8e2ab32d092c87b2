"""Processes forked from one that has imported what takes each of them seven seconds, and has done nothing else."""

import multiprocessing
import os
from collections.abc import Callable
from typing import ParamSpec

P = ParamSpec("P")

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "slm_pl.cli",
        "slm_pl.trainer_cli",
        "callbacks",
        "transformers.models.llama.modeling_llama",
        "peft",
        "datasets",
        "matplotlib",
        "lm_eval",
        "tests.helpers.pico",
        "tests.helpers.run",
    ]
)


class AsHere:
    """Calls a function in another process with the environment and the directory of this one.

    Theirs are those of the process that they are forked from, which is as it was when the first of them was started.
    """

    def __init__(self, work: Callable[P, None]) -> None:
        self._work = work
        self._environment, self._directory = dict(os.environ), os.getcwd()

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> None:
        os.environ.clear()
        os.environ.update(self._environment)
        os.chdir(self._directory)
        self._work(*args, **kwargs)
