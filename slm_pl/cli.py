"""The command line: what all commands have in common. See :mod:`slm_pl.trainer_cli` and :mod:`slm_pl.commands`."""

import contextlib
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from types import FrameType

import torch
from jsonargparse import set_parsing_settings

from slm_pl import commands, quantization

set_parsing_settings(import_path_denylist=[])  # what jsonargparse has on its own list is refused, not only warned of


def quieten() -> None:
    """Drops messages of the libraries that no user of this program can act on."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # dataloader workers fork after tokenising
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed tells so on standard output
    for message in (
        ".*does not have many workers.*",
        ".*`isinstance\\(treespec, LeafSpec\\)`.*",
        ".*is_gradient_checkpointing.*",
        ".*gradient_checkpointing_enable.*",
        ".*LightningCLI's args parameter is intended.*",
    ):
        warnings.filterwarnings("ignore", message=message)
    # Lightning's advertisements.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_says_something)
    quantization.quieten()  # transformers imports torchao wherever it is installed


def _says_something(record: logging.LogRecord) -> bool:
    return "Tip: For seamless cloud" not in record.getMessage()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Makes every Ctrl-C count.

    Python only reports, and then forgets, what is raised in the callback of a weak reference or in ``__del__``. These
    run whenever a tensor or a file is freed, right after the long calls in which an interrupt is likely to come. There,
    it is sent again a moment later.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        while frame is not None:
            code = frame.f_code
            if code.co_name == "__del__" or os.path.basename(code.co_filename) in ("weakref.py", "_weakrefset.py"):
                threading.Timer(0.02, os.kill, (os.getpid(), number)).start()
                return
            frame = frame.f_back
        raise KeyboardInterrupt

    ours = threading.current_thread() is threading.main_thread()
    ours = ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line.

    What the user can mend is told in one message without a traceback.

    Args:
        args: Arguments after the program's name; default: those of the process.

    Raises:
        SystemExit: With status 1 after a :class:`~slm_pl.errors.UsageError` or an interrupted run, 2 after an unknown
            option.
    """
    given = list(sys.argv[1:] if args is None else args)
    quieten()
    try:
        with interruptible():
            _run(given, args is None)
    except Exception as error:
        from slm_pl.failures import message_of

        message = message_of(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _run(given: list[str], own: bool) -> None:
    """Hands the arguments to their command; ``own`` if they are the process's."""
    command, rest = given[0] if given else "", given[1:]
    if command == "compare":
        commands.run_compare(rest)
    elif command == "sweep":
        commands.run_sweep(rest)
    elif command == "estimate":
        commands.run_estimate(rest)
    elif command == "data":
        commands.mirror_data(rest)
    elif command == "export":
        from slm_pl.gguf_export import run_export

        run_export(rest)
    elif command == "demo":
        from slm_pl.demo.command import run_demo

        run_demo(rest)
    else:
        names_data = commands.check_configs(given)
        from slm_pl.trainer_cli import CLI

        CLI(None if own else given, names_data=names_data)
