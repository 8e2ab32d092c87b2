"""A short run of ``tests.benchmarks.endurance``."""

import pytest

from tests.benchmarks.endurance import MB, evaluations, training


@pytest.mark.long
def test_a_process_that_evaluates_again_and_again_does_not_grow(tmp_path):
    memory = dict(evaluations(tmp_path, 16))
    assert list(memory) == list(range(1, 17))
    assert memory[16] - memory[8] < 4 * MB  # a tokenizer that left its cache behind took 1 MB each


@pytest.mark.long
def test_a_process_that_trains_does_not_grow(tmp_path):
    memory = dict(training(tmp_path, 400))
    assert list(memory) == [0, 100, 200, 300, 400]
    assert memory[400] - memory[200] < 2 * MB
