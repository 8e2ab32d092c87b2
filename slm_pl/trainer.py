"""The Lightning trainer with one more entry point, and checkpoints that survive whatever stops a run."""

import contextlib
import functools
import os
import pickle  # noqa: S403  for its exception
import shutil
import signal
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.connectors.data_connector import _DataConnector
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from slm_pl import files
from slm_pl.errors import UsageError
from slm_pl.evaluation._ranks import agreed
from slm_pl.lock import locked

PARTIAL = ".partial"
_ASIDE = ".old"
"""Behind the hidden names of an earlier run's checkpoints, from when another begins until it trains."""


class _Signals(_SignalConnector):
    """Notes a signal to stop; the run ends itself between two optimizer steps, on all processes together.

    Lightning's own would talk to the other processes, or save, in the middle of whatever was going on.
    """

    trainer: "Trainer"

    def register_signal_handlers(self) -> None:
        """Once for a run: it is done before the set-up, which may search for long, and Lightning does it behind."""
        if not self._original_handlers:
            super().register_signal_handlers()

    def _sigterm_notifier_fn(self, signum: int, _: FrameType | None) -> None:
        if self.trainer.stop_signal is None and self.trainer.strategy.launcher is not None:
            self.trainer.strategy.launcher.kill(signum)  # to the processes that this one started
        self._stop(signum)

    def _slurm_sigusr_handler_fn(self, signum: int, _: FrameType | None) -> None:
        self._stop(signum)

    def _stop(self, signum: int) -> None:
        self.trainer.stop_signal = signum
        if not self.trainer.looping:  # nothing is trained yet, or nothing at all
            self.trainer.requeue()
            raise SystemExit(128 + signum)


class _Data(_DataConnector):
    """Begins the run where its ranks can talk and nothing of it is written yet, no log and no prepared data."""

    trainer: "Trainer"

    def prepare_data(self) -> None:
        """Has the first rank begin the run; where that is refused, all end."""
        agreed(lambda: self.trainer.begin() if self.trainer.is_global_zero else None)
        super().prepare_data()


class TrainedCallback(pl.Callback, ABC):
    """A callback that works on the trained model."""

    @abstractmethod
    def on_trained(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called on every rank when a fit has nothing left to train, after all checkpoints were written.

        Unlike in Lightning's ``on_train_end``, that is also so for a run that resumes where the last step was made; and
        unlike in ``on_fit_end``, the strategy still has its hold of the weights.
        """


class Trainer(pl.Trainer):
    """Lightning's trainer with :meth:`prune`, and with ``ckpt_path`` known to the set-up hooks.

    A checkpoint is written under a hidden name and moved into place, so that one with its proper name is whole, be it a
    file or, with DeepSpeed, a directory. SIGTERM, and SLURM's signal to requeue, end a fit between two optimizer steps
    with a checkpoint.

    Attributes:
        overwrite: Whether outputs of an earlier run may be replaced.
        baseline: A model that speed is compared with in ``test``.
        pruning: Whether :meth:`prune` is running.
        resuming: Whether this run goes on with the one of its run directory, though it may have left no checkpoint yet.
        looping: Whether the training loop is running, which a signal does not break off.
        stop_signal: The signal that asked this process to stop, if one came.
    """

    overwrite: bool = False
    baseline: str | None = None
    pruning: bool = False
    resuming: bool = False
    looping: bool = False
    stop_signal: int | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._signal_connector = _Signals(self)
        self._data_connector = _Data(self)
        self._held: contextlib.ExitStack | None = None
        for callback in self.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                # Lightning's would be one of the logger's version, where the next run does not look.
                callback.dirpath = os.path.join(self.default_root_dir, "checkpoints")

    def prune(self, model: pl.LightningModule, datamodule: pl.LightningDataModule | None = None) -> None:
        """Compress the model and export it, without training.

        Runs the set-up of every callback, on every rank, and no loop: compression callbacks compress,
        ``callbacks.ExportCheckpoint`` exports.
        """
        limit, self.limit_predict_batches = self.limit_predict_batches, 0
        self.pruning = True
        try:
            self.predict(model, datamodule=datamodule, return_predictions=False)
        finally:
            self.pruning = False
            self.limit_predict_batches = limit

    @property
    def checkpoint_directories(self) -> list[Path]:
        """Where the checkpoint callbacks write; several may write in one."""
        own = [callback.dirpath for callback in self.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
        found = [Path(directory) for directory in dict.fromkeys(own) if directory]
        return found or [Path(self.default_root_dir) / "checkpoints"]

    @property
    def _own_directories(self) -> list[Path]:
        """Those of the checkpoint directories that are of this run alone; others may be of several runs."""
        root = Path(self.default_root_dir).resolve()
        return [directory for directory in self.checkpoint_directories if directory.resolve().is_relative_to(root)]

    def begin(self) -> None:
        """Keeps other runs out of the run directory until this one ends, and puts away what it would take for its own.

        Called on the first rank; again in the same run, it does nothing. Checkpoints of an earlier run step aside, and
        come back if this one fails before it trains.

        Raises:
            UsageError: If another run works there, or a fit that begins anew finds checkpoints and may not remove them.
        """
        directory = os.fspath(self.default_root_dir)
        if self._held is None or "://" in directory:
            return
        held, self._held = self._held, None
        held.enter_context(locked(Path(directory)))
        if self.state.fn != TrainerFn.FITTING or self.fast_dev_run:  # type: ignore[attr-defined]
            return
        own = self._own_directories
        for place in self.checkpoint_directories:
            for left in place.glob(f".*{PARTIAL}"):  # of a run that was killed
                if place in own or files.is_stale(left):
                    _remove(left)
        if self.ckpt_path is not None or self.resuming:
            return
        found = _checkpoints(own)
        if found and not self.overwrite:
            raise UsageError(
                f"{found[0]} is a checkpoint of an earlier run. Pass --ckpt_path last to go on with that run, "
                "--overwrite to remove its checkpoints and begin anew, or another --trainer.default_root_dir."
            )
        held.callback(self._put_back)
        for path in found:
            _remove(_aside(path))
            os.replace(path, _aside(path))

    def _asides(self) -> list[Path]:
        return [path for place in self._own_directories for path in place.glob(f".*.ckpt{_ASIDE}")]

    def _put_back(self) -> None:
        """Undoes :meth:`begin` for the checkpoints of the run before, as far as they are still there."""
        for path in self._asides():
            before = path.with_name(path.name.removeprefix(".").removesuffix(_ASIDE))
            with contextlib.suppress(OSError):
                if not before.exists():
                    os.replace(path, before)

    def newest_checkpoint(self) -> Path | None:
        """The newest whole checkpoint of this run directory, best or last; None if there is none."""
        found = [path for path in _checkpoints(self.checkpoint_directories) if path.exists()]  # a link may lead nowhere
        newest_first = sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True)
        return next(
            (path for path in newest_first if path.is_dir() or "optimizer_states" in read_checkpoint(path, mmap=True)),
            None,
        )

    def save_checkpoint(
        self, filepath: str | Path, weights_only: bool | None = None, storage_options: Any = None
    ) -> None:
        """Writes a checkpoint, to be called on all ranks; it appears when it is whole.

        Args:
            filepath: Where; several nodes need a file system that they share.
            weights_only: Without the state of the optimizer.
            storage_options: Lightning's.
        """
        if "://" in os.fspath(filepath):
            super().save_checkpoint(filepath, weights_only, storage_options)
            return
        path = Path(self.strategy.broadcast(os.fspath(filepath)))
        partial = path.with_name(f".{path.name}{PARTIAL}")
        if self.is_global_zero:
            _remove(partial)  # of a run that was killed
        self.strategy.barrier("before a checkpoint")
        # As Lightning does it, but where the first rank cannot write, the others do not wait for it. Where each writes
        # a part, they wait for each other: then the one that fails ends, and who launched them ends the others.
        apart = type(self.strategy).save_checkpoint is Strategy.save_checkpoint
        with self.profiler.profile("save_checkpoint"):  # type: ignore[attr-defined]
            content = self._checkpoint_connector.dump_checkpoint(weights_only)
            write = functools.partial(self._write, content, partial, path, storage_options)
            agreed(write) if apart else write()
            agreed(functools.partial(self._place, partial, path))

    def _write(self, content: dict[str, Any], partial: Path, path: Path, storage_options: Any) -> None:
        with self._explained(partial, path):
            self.strategy.save_checkpoint(content, partial, storage_options=storage_options)
            if self.is_global_zero:
                files.sync(partial)

    def _place(self, partial: Path, path: Path) -> None:
        if self.is_global_zero:
            with self._explained(partial, path):
                _replace(partial, path)

    @contextlib.contextmanager
    def _explained(self, partial: Path, path: Path) -> Iterator[None]:
        """Tells what a disk said no to in one message, and leaves no part of the checkpoint."""
        try:
            yield
        except Exception as error:
            reason = files.disk_failure(error)
            if reason is None:
                raise
            if self.is_global_zero:  # others may still write their parts
                with contextlib.suppress(OSError):
                    _remove(partial)
            raise UsageError(
                f"The checkpoint {path} could not be written: {reason}. Those that were written before are whole. Make "
                "room, then run the same command with --ckpt_path last."
            ) from error

    def stop_with_checkpoint(self) -> None:
        """Ends the run after a signal, on all ranks.

        Raises:
            SystemExit: With 128 plus the signal's number on the first rank.
        """
        path = self.checkpoint_directories[0] / "last.ckpt"
        self.save_checkpoint(path)
        rank_zero_info(
            f"Asked to stop, so this run ends after optimizer step {self.global_step}. To go on, run the same command "
            f"with --ckpt_path last ({path})."
        )
        self.requeue()
        # Lightning takes a child process that fails for a reason to kill all others.
        raise SystemExit(128 + (self.stop_signal or signal.SIGTERM) if self.is_global_zero else 0)

    def requeue(self) -> None:
        """Gives the job back to SLURM, if that is who asked to stop."""
        environment = self._accelerator_connector.cluster_environment
        requeue = isinstance(environment, SLURMEnvironment) and self.stop_signal == environment.requeue_signal
        if requeue and self.is_global_zero and "SLURM_JOB_ID" in os.environ:
            # SLURM's own program, wherever the node has it, with SLURM's own number.
            subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=False)  # noqa: S603, S607

    def catch_up_validation(self, done: Collection[int]) -> None:
        """Validates where the run stopped after an optimizer step and before the validation that was due behind it.

        Lightning takes it for done, and the best checkpoint could be another one.

        Args:
            done: The optimizer steps after which there was a validation.
        """
        epoch, ready = divmod(self.global_step * self.accumulate_grad_batches, int(self.fit_loop.max_batches))
        if not ready:
            epoch, ready = epoch - 1, int(self.fit_loop.max_batches)
        every, interval = self.check_val_every_n_epoch, self.val_check_batch
        if every is None:
            ready = self.global_step * self.accumulate_grad_batches
        if not self.enable_validation or interval is None or self.global_step in done or (epoch + 1) % (every or 1):
            return
        if ready % interval and not (interval == float("inf") and ready == self.fit_loop.max_batches):
            return
        loop = self.fit_loop.epoch_loop.val_loop
        loop.restarting = False
        self.validating = True
        loop.run()
        self.training = True

    def _place_loops(self) -> None:
        """Tells the loops where the run is, by the optimizer steps that were made.

        What a checkpoint says of them differs with the hook it was written in, and is wrong behind one that was written
        after the last batch of an epoch: Lightning then forgets to count the epoch that it goes on with.
        """
        loop = self.fit_loop
        loop.setup_data()
        epoch, ready = divmod(self.global_step * self.accumulate_grad_batches, int(loop.max_batches))
        if not ready and loop.max_epochs == epoch:
            return
        epochs, batches = loop.epoch_progress, loop.epoch_loop.batch_progress
        for part in (epochs.total, epochs.current):
            part.ready = part.started = epoch + (ready > 0)  # type: ignore[attr-defined]
            part.processed = part.completed = epoch  # type: ignore[attr-defined]
        batches.is_last_batch = False
        for part, count in ((batches.total, self.global_step * self.accumulate_grad_batches), (batches.current, ready)):
            part.ready = part.started = part.processed = count  # type: ignore[attr-defined]
            part.completed = count - (ready > 0)  # as in `on_train_batch_end`, or behind an epoch
        loop.epoch_loop._batches_that_stepped = self.global_step - 1

    def _run_stage(self) -> Any:
        if self.state.fn == TrainerFn.FITTING and self.ckpt_path is not None and self.global_step:
            self._place_loops()
        self.looping = self.state.fn == TrainerFn.FITTING
        if self.looping and self.is_global_zero and not self.fast_dev_run:  # type: ignore[attr-defined]
            for path in self._asides():
                _remove(path)
        try:
            result = super()._run_stage()
        finally:
            self.looping = False
        if self.state.fn == TrainerFn.FITTING:
            for callback in self.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, TrainedCallback):
                    callback.on_trained(self, self.lightning_module)
        return result

    def _run(
        self,
        model: pl.LightningModule,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> Any:
        # Lightning fills `ckpt_path` in after the set-up hooks; ours must know whether weights will be restored: a
        # resumed run takes its plan from disk, and `test` wraps the model in the adapters that the checkpoint holds.
        self._checkpoint_connector._ckpt_path = ckpt_path
        if ckpt_path is not None and "://" not in os.fspath(ckpt_path):
            if weights_only and os.path.isfile(ckpt_path):
                read_checkpoint(Path(ckpt_path), mmap=True)
            else:
                check_checkpoint(Path(ckpt_path))
        self.stop_signal = None
        self._signal_connector.register_signal_handlers()
        with contextlib.ExitStack() as self._held:
            return super()._run(model, ckpt_path=ckpt_path, weights_only=weights_only)


def _checkpoints(directories: Collection[Path]) -> list[Path]:
    """Whole checkpoints, of this run or an earlier one."""
    return [path for directory in directories for path in directory.glob("[!.]*.ckpt")]


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}{_ASIDE}")


def previous(path: Path) -> Path:
    """Where a checkpoint directory steps aside to while another takes its place."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def _replace(partial: Path, path: Path) -> None:
    """Moves a checkpoint into the place of an older one; at every moment, one of them is there."""
    if not path.is_dir() or path.is_symlink():
        if partial.is_dir():
            path.unlink(missing_ok=True)
        os.replace(partial, path)
        files.sync_entries(path.parent)
        return
    # A directory cannot be replaced in one step: the old one steps aside, under a name that is found, too.
    aside = previous(path)
    _remove(aside)
    os.replace(path, aside)
    os.replace(partial, path)
    files.sync_entries(path.parent)
    _remove(aside)


def check_checkpoint(path: Path) -> None:
    """Refuses a checkpoint that is damaged; of DeepSpeed's, which is a directory, every file is looked at.

    Raises:
        UsageError: With the file's name.
    """
    for part in sorted(path.rglob("*.pt")) if path.is_dir() else [path]:
        files.check_archive(part, "Remove it to go on from an older one, or give another --ckpt_path.")


def read_checkpoint(path: Path, mmap: bool = False) -> dict[str, Any]:
    """Reads a checkpoint that is one file, without running anything that is in it.

    Raises:
        UsageError: If it is damaged, or holds more than tensors and numbers.
    """
    check_checkpoint(path)
    try:
        read = torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"The checkpoint {path} holds more than tensors and plain values, and to read that is to run it. If it is "
            "your own, pass --weights_only false."
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # what is damaged or made by hand ends the reader in any way: KeyError, struct.error, …
        raise UsageError(
            f"The checkpoint {path} is damaged ({type(error).__name__}: {error}). Remove it to go on from an older "
            "one, or give another --ckpt_path."
        ) from error
    if not isinstance(read, dict):
        raise UsageError(f"{path} is no checkpoint of a run: it holds a {type(read).__name__}. Give one that fit made.")
    return read


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
