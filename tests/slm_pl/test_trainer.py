"""What a run does to what an earlier one left, and what its ranks do when one of them cannot write."""

import os
import re
import time
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy

from slm_pl import files
from slm_pl.errors import UsageError
from slm_pl.lock import locked
from slm_pl.trainer import read_checkpoint
from tests.helpers.pico import pico_model
from tests.helpers.ranks import under_torchrun
from tests.helpers.run import alpaca_data, make_module, make_trainer
from tests.helpers.tokenizer import pico_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


def last() -> pl.callbacks.ModelCheckpoint:
    return pl.callbacks.ModelCheckpoint(filename="last", every_n_train_steps=1)


def fit(pico_dir, run: Path, rate: float, steps: int = 2, overwrite: bool = False, **options) -> Path:
    trainer = make_trainer(run, last(), overwrite=overwrite, max_steps=steps)
    trainer.fit(make_module(pico_dir, learning_rate=rate), alpaca_data(run / "data"), **options)
    return run / "checkpoints" / "last.ckpt"


def test_a_run_that_begins_anew_leaves_no_checkpoint_of_the_one_before(pico_dir, tmp_path):
    first = fit(pico_dir, tmp_path, 1e-2).read_bytes()
    with pytest.raises(UsageError, match="last.ckpt is a checkpoint of an earlier run. Pass --ckpt_path last .*--over"):
        fit(pico_dir, tmp_path, 1e-3)
    assert (tmp_path / "checkpoints" / "last.ckpt").read_bytes() == first
    # Goes on with it; also one that is not of the run's own directory may be given.
    fit(pico_dir, tmp_path, 1e-2, steps=3, ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 3

    class Killed(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            raise KeyboardInterrupt

    # Killed before its first checkpoint, it must not go on with another run's.
    trainer = make_trainer(tmp_path, last(), Killed(), overwrite=True)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer.fit(make_module(pico_dir), alpaca_data(tmp_path / "data"))
    assert trainer.newest_checkpoint() is None


@pytest.mark.parametrize("resumes", [False, True])
def test_a_run_that_fails_before_it_trains_leaves_what_was_there(pico_dir, tmp_path, resumes):
    first = fit(pico_dir, tmp_path, 1e-2).read_bytes()

    class Fails(pl.Callback):
        def setup(self, trainer, pl_module, stage):
            assert trainer.newest_checkpoint() is None  # killed now, it would not go on with another run's weights
            raise UsageError("There is no such export.")

    best = pl.callbacks.ModelCheckpoint(filename="best", every_n_train_steps=2)  # two in one directory
    trainer = make_trainer(tmp_path, last(), best, Fails(), overwrite=True)
    with pytest.raises(UsageError, match="There is no such export"):
        trainer.fit(make_module(pico_dir), alpaca_data(tmp_path / "data"))
    directory = tmp_path / "checkpoints"
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == {"last.ckpt": first}
    # Of a run that was killed there, the next one that trains removes what had stepped aside.
    (directory / "last.ckpt").rename(directory / ".last.ckpt.old")
    (directory / ".x.ckpt.partial").write_text("of a killed run")
    trainer = make_trainer(tmp_path, last())
    trainer.resuming = resumes
    trainer.fit(make_module(pico_dir), alpaca_data(tmp_path / "data"))
    assert [path.name for path in directory.iterdir()] == ["last.ckpt"]


def test_a_trial_run_removes_no_checkpoint(pico_dir, tmp_path):
    first = fit(pico_dir, tmp_path, 1e-2).read_bytes()
    trainer = make_trainer(tmp_path, last(), overwrite=True, fast_dev_run=True)
    trainer.fit(make_module(pico_dir), alpaca_data(tmp_path / "data"))
    assert (tmp_path / "checkpoints" / "last.ckpt").read_bytes() == first


def test_checkpoints_in_a_directory_of_several_runs_stay(pico_dir, tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    for name in (".other.ckpt.partial", ".killed.ckpt.partial"):
        (shared / name).write_text("of another run")
    long_ago = time.time() - 8 * 24 * 3600
    os.utime(shared / ".killed.ckpt.partial", (long_ago, long_ago))
    for name in ("one", "two"):
        keep = pl.callbacks.ModelCheckpoint(shared, filename=name, every_n_train_steps=1)
        make_trainer(tmp_path / name, keep, overwrite=True).fit(make_module(pico_dir), alpaca_data(tmp_path / name))
    assert sorted(path.name for path in shared.iterdir()) == [".other.ckpt.partial", "one.ckpt", "two.ckpt"]


def test_a_run_that_is_kept_out_does_not_touch_the_logs_of_the_other(pico_dir, tmp_path):
    log = tmp_path / "logs" / "version_0" / "metrics.csv"
    log.parent.mkdir(parents=True)
    log.write_text("of the run that works here")
    trainer = make_trainer(tmp_path, logger=CSVLogger(tmp_path, "logs", version=0))
    with locked(tmp_path), pytest.raises(UsageError, match="Another run works in"):
        trainer.fit(make_module(pico_dir), alpaca_data(tmp_path / "data"))
    assert log.read_text() == "of the run that works here"


def kept_out(rank: int, place: str) -> None:
    directory = Path(place)
    options = {"devices": 2, "strategy": DDPStrategy(process_group_backend="gloo")}
    trainer = make_trainer(directory / "run", logger=CSVLogger(directory / "run", "logs", version=0), **options)
    with pytest.raises(UsageError) as caught:
        trainer.fit(make_module(directory / "model"), alpaca_data(directory / "data"))
    (directory / f"told_{rank}").write_text(str(caught.value))


@pytest.mark.long
def test_two_processes_that_are_kept_out_do_not_touch_them_either(tmp_path):
    pico_model().save_pretrained(tmp_path / "model")
    pico_tokenizer().save_pretrained(tmp_path / "model")
    log = tmp_path / "run" / "logs" / "version_0" / "metrics.csv"
    log.parent.mkdir(parents=True)
    log.write_text("of the run that works here")
    with locked(tmp_path / "run"):
        under_torchrun(kept_out, tmp_path)
    assert all("Another run works in" in (tmp_path / f"told_{rank}").read_text() for rank in (0, 1))
    assert log.read_text() == "of the run that works here"


def test_a_checkpoint_that_was_looked_at_is_not_read_again_until_it_changes(pico_dir, tmp_path, monkeypatch):
    path = fit(pico_dir, tmp_path, 1e-2)
    looked, zipped = [], files.zipfile.ZipFile
    monkeypatch.setattr(files.zipfile, "ZipFile", lambda one: looked.append(one) or zipped(one))
    for _ in range(2):
        read_checkpoint(path)
    assert looked == [str(path.resolve())]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    for _ in range(2):
        with pytest.raises(UsageError, match=f"{path} is damaged"):
            read_checkpoint(path)
    assert len(looked) == 2


def full_disk(rank: int, place: str) -> None:
    """The first rank of two cannot write its checkpoint."""
    directory = Path(place)
    save = torch.save

    def fail(content, target, *rest):
        if rank == 0:
            raise OSError(28, "No space left on device", os.fspath(directory))
        save(content, target, *rest)

    torch.save = fail
    trainer = make_trainer(directory / "run", last(), devices=2, strategy=DDPStrategy(process_group_backend="gloo"))
    with pytest.raises(UsageError) as caught:
        trainer.fit(make_module(directory / "model"), alpaca_data(directory / f"data_{rank}"))
    (directory / f"told_{rank}").write_text(str(caught.value))


def test_no_rank_waits_for_one_that_cannot_write(tmp_path):
    pico_model().save_pretrained(tmp_path / "model")
    pico_tokenizer().save_pretrained(tmp_path / "model")
    under_torchrun(full_disk, tmp_path)
    told = [(tmp_path / f"told_{rank}").read_text() for rank in (0, 1)]
    assert told[0] == told[1]
    assert re.search(r"last\.ckpt could not be written: No space left on device\. Those .*--ckpt_path last", told[0])
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_a_checkpoint_that_finds_no_place(pico_dir, tmp_path, monkeypatch):
    whole, replace = fit(pico_dir, tmp_path, 1e-2).read_bytes(), os.replace

    def full(source, target):
        if str(source).endswith(".partial"):
            raise OSError(28, "No space left on device", os.fspath(source))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    path = tmp_path / "checkpoints" / "last.ckpt"
    with pytest.raises(
        UsageError, match=r"last\.ckpt could not be written: No space left on device\. Those .* are whole"
    ):
        fit(pico_dir, tmp_path, 1e-2, steps=3, ckpt_path=path)
    assert {one.name: one.read_bytes() for one in path.parent.iterdir()} == {"last.ckpt": whole}


class InParts(DDPStrategy):
    """A strategy of whose checkpoint each rank writes a part, as DeepSpeed's: they wait for each other meanwhile."""

    def save_checkpoint(self, checkpoint, filepath, storage_options=None):
        if self.global_rank == 0:
            raise OSError(28, "No space left on device", os.fspath(filepath))
        self.barrier()


def full_disk_of_parts(rank: int, place: str) -> None:
    directory = Path(place)
    trainer = make_trainer(directory / "run", last(), devices=2, strategy=InParts(process_group_backend="gloo"))
    with pytest.raises((UsageError, RuntimeError)) as caught:  # the second rank: that the first one is gone
        trainer.fit(make_module(directory / "model"), alpaca_data(directory / f"data_{rank}"))
    (directory / f"told_{rank}").write_text(f"{type(caught.value).__name__}: {caught.value}")
    os._exit(0)  # as who launched them ends them, without a word to each other


@pytest.mark.long
def test_where_ranks_wait_for_each_other_the_one_that_cannot_write_tells_why(tmp_path):
    pico_model().save_pretrained(tmp_path / "model")
    pico_tokenizer().save_pretrained(tmp_path / "model")
    under_torchrun(full_disk_of_parts, tmp_path)
    assert re.match(r"UsageError: The checkpoint .*last\.ckpt could not be written", (tmp_path / "told_0").read_text())
    assert not (tmp_path / "told_1").read_text().startswith("UsageError")
