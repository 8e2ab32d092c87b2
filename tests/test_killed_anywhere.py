"""A short run of ``tests.faults.kill``: every command is killed, and goes on."""

import random

import pytest

from tests.faults.kill import kill_once, stages


@pytest.mark.long
def test_every_command_is_killed_and_goes_on(tmp_path):
    generator = random.Random(7)
    for stage in stages(tmp_path):
        for number in (0, 1):
            kill_once(stage, number, generator, tmp_path)
