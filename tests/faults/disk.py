"""Runs every command on a disk that fills up, then with room: ``python -m tests.faults.disk --times 40``.

Half of the times the disk says at a random change of a file, and from then on, that it is full, or that it may be read
only; the others, the commands write to a real file system in memory (``tmpfs``, which only root may make) with room for
a random share of what they write. Then the command must end with one message and no traceback, no file with its proper
name may be broken, and with room, the same command must leave what an undisturbed run had left. With ``--each``, it is
full at every change of a file that ``prune``, ``test`` and ``compare`` make, one after the other: once with nothing
there before, once over what an earlier run left, of which nothing may be missing afterwards.
"""

import argparse
import errno
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.faults.kill import Stage, outcome, stages, whole
from tests.faults.processes import DiskFails, finish

FAILURES = {"full": errno.ENOSPC, "read-only": errno.EROFS}


def said_once(log: Path) -> str:
    """The message of a command that failed; fails if it is more than that."""
    text = log.read_text()
    assert "Traceback" not in text, text[-4000:]
    messages = [line for line in text.splitlines() if line.startswith("error: ")]
    if not messages and "Mend the cause, then run the same command again" in text:  # a sweep of which cells failed
        return "a table of the cells that failed"
    assert len(messages) == 1, text[-4000:]
    return messages[0]


def _ends_or_is_told(stage: Stage, log: Path, fault: DiskFails | None = None) -> str:
    log.unlink(missing_ok=True)
    code = finish(stage.arguments, log, fault)
    assert code in (0, 1), log.read_text()[-4000:]
    return said_once(log) if code else "ended all the same"


def _goes_on(stage: Stage, log: Path) -> None:
    whole(stage.run)
    log.unlink(missing_ok=True)
    code = finish(stage.arguments, log)
    refusal = "exists and is not empty" in log.read_text() or "--overwrite" in log.read_text()
    assert code == 0 or refusal, log.read_text()[-4000:]
    found = outcome(stage.run)
    for name in stage.outcome.keys() | found.keys():
        assert found.get(name) == stage.outcome.get(name), f"{name} is not what an undisturbed run makes"


def fail_at(stage: Stage, number: int, failure: int, place: Path) -> str:
    """Lets the disk fail from the ``number``-th change of a file on; what the command said."""
    shutil.rmtree(stage.run, ignore_errors=True)
    fault = DiskFails(str(stage.run), number, str(place / "events.txt"), failure)
    said = _ends_or_is_told(stage, place / "log.txt", fault)
    _goes_on(stage, place / "again.txt")
    return said


def fail_over(stage: Stage, number: int, place: Path) -> str:
    """The same, of a full disk, over what an earlier run left: that is still there, or its successor is.

    A directory that had stepped aside, and that the disk did not let go back, is there after the next run.
    """
    overwrite = [] if stage.name == "compare" else ["--overwrite"]
    again = replace(stage, arguments=[*stage.arguments, *overwrite])
    if outcome(stage.run) != stage.outcome:
        shutil.rmtree(stage.run, ignore_errors=True)
        assert finish(stage.arguments, place / "log.txt") == 0
    fault = DiskFails(str(stage.run), number, str(place / "events.txt"), errno.ENOSPC)
    said = _ends_or_is_told(again, place / "log.txt", fault)
    whole(stage.run)
    if any(path.name.endswith(".old") for path in stage.run.glob(".*")):
        assert stage.name == "compare" or finish(stage.arguments, place / "again.txt") == 1  # is told that it is there
    found = outcome(stage.run)
    for name, expected in stage.outcome.items():
        assert found.get(name) == expected, f"{name} is not what the run before left"
    return said


def fill(stage: Stage, room: int, place: Path) -> str:
    """Gives a command a disk with so many bytes, then one with enough; what it said."""
    stage.run.parent.mkdir(exist_ok=True)
    mount(stage.run.parent, room)
    try:
        said = _ends_or_is_told(stage, place / "log.txt")
        whole(stage.run)
        mount(stage.run.parent, 2**30, "remount")
        _goes_on(stage, place / "again.txt")
    finally:
        subprocess.run(["umount", str(stage.run.parent)], check=True)
    return said


def mount(directory: Path, room: int, *options: str) -> None:
    """Makes a file system in memory, or gives it another size."""
    options = ",".join([*options, f"size={max(room, 4096)}"])
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)], check=True, capture_output=True)


def can_mount() -> bool:
    """Whether this process may make file systems."""
    with tempfile.TemporaryDirectory() as directory:
        try:
            mount(Path(directory), 4096)
        except (OSError, subprocess.CalledProcessError):
            return False
        subprocess.run(["umount", directory], check=True)
    return True


def size(run: Path) -> int:
    """Bytes of all files below a directory."""
    return sum(path.stat().st_size for path in run.rglob("*") if path.is_file())


def main() -> None:
    """Runs the script."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--times", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--each", action="store_true", help="Every change of a file in turn, of three commands.")
    options = parser.parse_args()
    generator = random.Random(options.seed)
    real = can_mount()
    if not real:
        print("This process may not mount file systems: the disk is only told to be full.")
    tried, lost = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    with tempfile.TemporaryDirectory(prefix="slm_pl_disk_") as directory:
        place = Path(directory)
        all_stages = stages(place, ("prune", "test", "compare")) if options.each else stages(place)
        written = {stage.name: size(stage.run) for stage in all_stages}

        def attempt(stage: Stage, how: str, work: Callable[[], str]) -> None:
            tried[stage.name, how] += 1
            try:
                said = work()
            except Exception as error:
                lost[stage.name, how] += 1
                said = f"LOST: {error}"
            print(f"{stage.name}, {how}: {said}", flush=True)

        for stage in all_stages:
            if options.each:
                for at in range(1, stage.events + 1):
                    attempt(stage, "full", partial(fail_at, stage, at, errno.ENOSPC, place))
                for at in range(1, stage.events + 1):
                    attempt(stage, "full, over an earlier run", partial(fail_over, stage, at, place))
                continue
            for number in range(max(4, round(stage.share * options.times))):
                how = ["full", "tmpfs", "read-only", "tmpfs"][number % 4] if real else ["full", "read-only"][number % 2]
                if how == "tmpfs":
                    room = int(generator.uniform(0.0, 1.1) * written[stage.name])
                    attempt(stage, how, partial(fill, stage, room, place))
                else:
                    at = generator.randint(1, stage.events)
                    attempt(stage, how, partial(fail_at, stage, at, FAILURES[how], place))
    table = Table("stage", "disk", "times", "broken or lost", title="Disks that fail")
    for (name, how), times in tried.items():
        table.add_row(name, how, str(times), str(lost[name, how]))
    Console(width=100).print(table)
    if lost:
        sys.exit(1)


if __name__ == "__main__":
    main()
