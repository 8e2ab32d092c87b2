"""A short run of ``tests.faults.kill``: commands are killed between two changes of files, and go on."""

import random

import pytest

from tests.faults.kill import kill_once, outcome, stages


@pytest.mark.long
def test_commands_are_killed_and_go_on(tmp_path):
    generator = random.Random(7)
    for stage in stages(tmp_path, ["fit", "prune"]):
        doing = kill_once(stage, 1, generator, tmp_path)
        assert doing != "before anything was written"
        assert outcome(stage.run) == stage.outcome
