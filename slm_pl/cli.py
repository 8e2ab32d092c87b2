"""The command line: what a trainer does, ``prune``, and commands that train nothing, such as ``compare``."""

import contextlib
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, cast

import lightning.pytorch as pl
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from slm_pl import failures, files, quantization
from slm_pl.compression.target import give_ratio
from slm_pl.data import TrainingData
from slm_pl.demo.command import demo_parser, run_demo
from slm_pl.errors import UsageError
from slm_pl.estimate.command import estimate_parser
from slm_pl.gguf_export import export_parser, run_export
from slm_pl.module import CausalLM
from slm_pl.parts import PartsFile, read
from slm_pl.trainer import Trainer

CONFIG_VERSION = 1


class SaveConfig(SaveConfigCallback):
    """Leaves the whole configuration in the run directory, beside what the run writes."""

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called on the first rank."""
        path = Path(trainer.default_root_dir) / self.config_filename
        files.write_text(path, self.parser.dump(self.config, skip_none=False))


class CLI(LightningCLI):
    """LightningCLI for :class:`~slm_pl.module.CausalLM` and a :class:`~slm_pl.data.TrainingData`."""

    def __init__(self, args: list[str] | None, names_data: bool = False) -> None:
        self._names_data = names_data  # a default class would leave its own numbers to the one that is named
        super().__init__(
            CausalLM,
            TrainingData,
            subclass_mode_data=True,
            trainer_class=Trainer,
            trainer_defaults={"default_root_dir": os.path.join("runs", "latest")},
            save_config_callback=SaveConfig,
            # The saved config belongs to this run; what must not be lost is guarded by its own checks.
            save_config_kwargs={"overwrite": True, "save_to_log_dir": False},
            seed_everything_default=1234,
            auto_configure_optimizers=False,
            args=args,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """The parser, with a ``--config`` that is put together from parts."""
        kwargs.setdefault("dump_header", [f"lightning.pytorch=={pl.__version__}"])
        parser = self.parser_class(**kwargs)
        parser.add_argument("-c", "--config", action=PartsFile, help="A YAML; its parts are paths relative to it.")
        return parser

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The trainer's entry points, and the arguments that are not options."""
        return {**LightningCLI.subcommands(), "prune": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the options that are not a class's."""
        if not self._names_data:
            parser.set_defaults({"data": {"class_path": "slm_pl.data.AlpacaDataModule"}})
        parser.add_argument(
            "--overwrite", action="store_true", help="Replace results and exports that an earlier run left."
        )
        parser.add_argument(
            "--ratio",
            type=float | None,
            default=None,
            help="Share of all parameters that the compression callbacks remove, in the place of their own sizes; "
            "methods that remove layers meet it to the nearest layer. Several take the same share each of what the one "
            "before left, which together is this. null leaves them their own.",
        )
        parser.add_argument(
            "--config_version", type=int, default=CONFIG_VERSION, help="Which version of these options a YAML is for."
        )

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        # Never parsed from here, see main(): it stands in the help.
        parser.description = "Makes a causal language model smaller and faster, and measures what that cost."
        action = parser._subcommands_action
        assert action is not None
        action.add_subcommand("compare", compare_parser(), help="Put results side by side.")
        assert action.choices is not None
        action.choices["test"].add_argument(
            "--baseline",
            type=str | None,
            default=None,
            help="A model, such as the dense one, that callbacks.Efficiency runs in turn with this one.",
        )
        action.add_subcommand("sweep", sweep_parser(), help="Methods x ratios x seeds on one model, and one table.")
        action.add_subcommand("estimate", estimate_parser(), help="Memory, time and GPU-hours of configs, on paper.")
        action.add_subcommand("export", export_parser(), help="Write an exported Llama as GGUF, for llama.cpp.")
        action.add_subcommand("demo", demo_parser(), help="Show models side by side in the browser.")
        action.add_subcommand("data", data_parser(), help="Download what evaluation needs, for use without network.")

    def before_instantiate_classes(self) -> None:
        """Checks what would fail late; one saved config for each subcommand of a run directory."""
        version = self._get(self.config, "config_version")
        if version != CONFIG_VERSION:
            raise UsageError(f"config_version is {version}; this slm_pl reads {CONFIG_VERSION}.")
        checkpoint = self.config[self.subcommand].get("ckpt_path")
        if checkpoint not in (None, "best", "last") and not os.path.exists(checkpoint):
            raise UsageError(f"There is no checkpoint {checkpoint}. Give a path, `last` or `best`.")
        ratio = self._get(self.config, "ratio")
        if ratio is not None:
            give_ratio(ratio, self._get(self.config, "trainer")["callbacks"] or [])
        self.save_config_kwargs["config_filename"] = f"config_{self.subcommand}.yaml"

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Makes the trainer, with a progress bar and, to train, with loggers; and hands it ``--overwrite``."""
        options = {**self._get(self.config_init, "trainer", default={}), **kwargs}
        root = options["default_root_dir"]
        if options["logger"] in (None, True):
            kwargs["logger"] = False
            if self.subcommand == "fit":
                csv = CSVLogger(root, "logs", flush_logs_every_n_steps=10)
                kwargs["logger"] = [csv, TensorBoardLogger(root, "logs", version=csv.version)]
        callbacks = list(options["callbacks"] or [])
        if options["enable_progress_bar"] is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            kwargs["callbacks"] = [*callbacks, RichProgressBar(leave=True)]
        trainer = super().instantiate_trainer(**kwargs)
        assert isinstance(trainer, Trainer)
        trainer.overwrite = bool(self._get(self.config_init, "overwrite"))
        trainer.baseline = self._get(self.config_init, "baseline")
        if trainer.baseline is not None and not any(hasattr(c, "baseline") for c in trainer.callbacks):  # type: ignore[attr-defined]
            raise UsageError(
                f"--baseline is {trainer.baseline}, and no hook compares speed. Add callbacks.Efficiency to "
                "trainer.callbacks."
            )
        return trainer

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if "weights_only" in kwargs:
            kwargs["weights_only"] = kwargs["weights_only"] is not False  # a checkpoint is never unpickled by default
        path = kwargs.get("ckpt_path")
        if path is not None and os.path.isdir(path) and kwargs.get("weights_only"):
            raise UsageError(
                f"{path} is a checkpoint of DeepSpeed, which runs whatever code is pickled in it. If it is your own, "
                "pass --weights_only false, or --ckpt_path last in its run directory."
            )
        if path == "last":
            trainer = cast(Trainer, self.trainer)
            trainer.resuming = True
            newest = trainer.newest_checkpoint()
            if newest is None:
                directory = trainer.checkpoint_directories[0]
                if subcommand != "fit":
                    raise UsageError(f"There is no checkpoint in {directory}. Give a path, or run fit first.")
                rank_zero_info(f"There is no checkpoint in {directory} yet: starting from the beginning")
            kwargs["ckpt_path"] = newest
        return kwargs


def compare_parser() -> ArgumentParser:
    """Options of ``compare``."""
    parser = ArgumentParser(
        description="Puts the results of several models side by side: a table on the terminal, the same as "
        "comparison.md, .tex, .csv, .json and .html (sortable, one file), and the pictures comparison.png, pareto.png "
        "and efficiency.png."
    )
    parser.add_argument(
        "results", nargs="+", help="results.json files that `test` wrote, the dense model's among them."
    )
    parser.add_argument("--output_dir", type=str | None, default=None, help="Default: the files' common directory.")
    parser.add_argument(
        "--cards", action="store_true", help="Also put the figures into the model cards of the exports measured."
    )
    return parser


def sweep_parser() -> ArgumentParser:
    """Options of ``sweep``."""
    from slm_pl.sweep.config import SweepConfig

    parser = ArgumentParser(
        prog="main.py sweep",
        description="Compresses one model with several methods to several sizes with several seeds, measures and "
        "compares. What is finished stays; the same command does what is missing. What was finished with another "
        "program, other versions of torch, transformers, lm_eval or peft, another config, or other content of the "
        "files and directories that it names is not replaced without --overwrite. Not seen are changes of models and "
        "data on the hub, of Python modules of your own, and of files that other files name. configs/sweeps/ has "
        "examples.",
    )
    parser.add_argument("--config", action=PartsFile, help="The sweep as YAML; its parts are paths relative to it.")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="Also do what is finished again, and replace what was finished with other settings; an export whose own "
        "settings are the same is then measured as it is. To go on after an interruption, leave this out.",
    )
    parser.add_argument("--dry_run", action="store_true", help="Print what would be done, and stop.")
    parser.add_class_arguments(SweepConfig)
    return parser


def run_sweep(args: Sequence[str]) -> None:
    """Runs ``sweep``.

    Raises:
        SystemExit: With status 1 if a cell failed.
    """
    check_configs(args, "configs/sweeps")
    options = sweep_parser().parse_args(args).as_dict()
    from slm_pl.sweep.config import SweepConfig
    from slm_pl.sweep.run import sweep

    overwrite, dry_run, _ = (options.pop(name) for name in ("overwrite", "dry_run", "config"))
    if sweep(SweepConfig.from_dict(options), overwrite, dry_run, check_run):
        raise SystemExit(1)


def check_run(command: str, path: str) -> None:
    """Tells a config that a subcommand does not take, without running it.

    Raises:
        UsageError: With what the parser says.
    """
    whole_config(command, path, names_data=True)


def whole_config(command: str, path: str, names_data: bool) -> dict[str, Any]:
    """What a subcommand would run with, every default in its place.

    Raises:
        UsageError: If it does not take the config.
    """
    shown, said = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(said):
            CLI([command, "--config", path, "--print_config"], names_data=names_data)
    except SystemExit as done:
        if done.code not in (0, None):
            message = said.getvalue().partition("error: ")[2].strip()
            raise UsageError(f"{command} does not take what {Path(path).stem} would give it: {message}") from None
    # Behind the header, since a library may have printed something when it was imported.
    return cast(
        dict[str, Any], yaml.safe_load(shown.getvalue().rpartition("# lightning.pytorch==")[2].partition("\n")[2])
    )


def run_estimate(args: Sequence[str]) -> None:
    """Runs ``estimate``."""
    options = estimate_parser().parse_args(args)
    from slm_pl.estimate.command import machine_of, show
    from slm_pl.estimate.run import estimate

    machine, found = machine_of(options.machine, options.utilisation), []
    for path in options.config:
        run = whole_config("fit", path, names_data=check_configs(["--config", path]))
        ratio = run["ratio"] if options.ratio is None else options.ratio
        if ratio is not None:
            give_ratio(ratio, run["trainer"]["callbacks"] or [])
        found.append(estimate(Path(path).stem, run, options.architecture))
    show(found, machine, options.utilisation)


def data_parser() -> ArgumentParser:
    """Options of ``data``."""
    parser = ArgumentParser(
        description="Writes the data of zero-shot tasks and the texts of perplexity to a directory, on a machine with "
        "network. Elsewhere, give that directory to the hooks as local_data: <task>/<split>.jsonl, and SOURCES.json."
    )
    parser.add_argument("--tasks", nargs="*", default=[], help="Tasks, groups and tags of lm-eval, or task files.")
    parser.add_argument("--texts", nargs="*", default=[], help="Texts of perplexity: wikitext2, ptb, c4.")
    parser.add_argument("--output", type=str, required=True, help="The directory; what it holds already stays.")
    parser.add_argument("--overwrite", action="store_true", help="Fetch again what is there.")
    return parser


def mirror_data(args: Sequence[str]) -> None:
    """Runs ``data``.

    Raises:
        UsageError: If something could not be fetched; what could be is there.
    """
    options = data_parser().parse_args(args)
    if not options.tasks and not options.texts:
        raise UsageError("data got nothing to fetch. Give --tasks, for example boolq piqa, or --texts wikitext2.")
    from slm_pl.evaluation.mirror import make_mirror

    mirror = make_mirror(options.output, options.tasks, options.texts, options.overwrite)
    for one in mirror.written:
        print(f"{options.output}/{one.path}: {one.rows:,} rows of {one.source}")
    for name in mirror.there:
        print(f"{options.output}/{name}: already there")
    if mirror.failed:
        reasons = "; ".join(f"{name} ({reason})" for name, reason in mirror.failed.items())
        raise UsageError(f"Not fetched: {reasons}. What is listed above is there; the same command tries the rest.")


def check_configs(args: Sequence[str], folder: str = "configs") -> bool:
    """Tells a config of another version before its options are found to be unknown.

    Args:
        args: Of the command line.
        folder: Where configs of this kind are.

    Returns:
        Whether a config or an argument names the class of the data.

    Raises:
        UsageError: If a ``--config`` file says another ``config_version``, is missing or is no YAML.
    """
    named = any(arg == "--data" or arg.startswith(("--data=", "--data.class_path")) for arg in args)
    for index, arg in enumerate(args):
        name, _, value = arg.partition("=")
        if name not in ("--config", "-c"):
            continue
        path = value or (args[index + 1] if index + 1 < len(args) else "")
        if not os.path.isfile(path):
            if path and not path.lstrip().startswith("{"):
                there = sorted(str(p) for p in Path(folder).glob("*.yaml"))
                raise UsageError(
                    f"There is no config file {path}. There are: {', '.join(there) or f'none in {folder}/'}."
                )
            continue
        content = read(Path(path))
        data = content.get("data")
        named = named or (isinstance(data, dict) and "class_path" in data)
        version = content.get("config_version", CONFIG_VERSION)
        if version != CONFIG_VERSION:
            raise UsageError(
                f"The config {path} is of config_version {version!r}; this slm_pl reads {CONFIG_VERSION}. "
                "Take a config from the configs/ of this version, or use the slm_pl that it was written for."
            )
    return named


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
    quantization.quieten()  # transformers imports torchao wherever it is installed


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
            if given[:1] == ["compare"]:
                options = compare_parser().parse_args(given[1:])
                from slm_pl.report import compare

                compare(options.results, options.output_dir, options.cards)
            elif given[:1] == ["sweep"]:
                run_sweep(given[1:])
            elif given[:1] == ["estimate"]:
                run_estimate(given[1:])
            elif given[:1] == ["export"]:
                run_export(given[1:])
            elif given[:1] == ["demo"]:
                run_demo(given[1:])
            elif given[:1] == ["data"]:
                mirror_data(given[1:])
            else:
                CLI(None if args is None else given, names_data=check_configs(given))
    except Exception as error:
        message = failures.message_of(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
