"""The figures of ``main.py test`` are those of lm-eval's command line, on the real model and the real questions."""

import pytest

from slm_pl.evaluation import SEVEN_TASKS
from tests.benchmarks.zero_shot import compare_commands
from tests.helpers.shared import SHARED

DATA = SHARED / "data" / "lm_eval"


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.skipif(not DATA.is_dir(), reason=f"the seven tasks' data are not in {DATA}")
def test_equal_to_the_last_bit():
    runs, checks = compare_commands(["dense"], DATA, SEVEN_TASKS, limit=2, repeats=1)
    (mine,), (theirs,) = runs["dense"]
    assert {name: len(answers) for name, answers in mine.answers.items()} == dict.fromkeys(SEVEN_TASKS, 2)
    assert mine.figures == theirs.figures
    assert mine.answers == theirs.answers
    assert all(check.passed for check in checks)
