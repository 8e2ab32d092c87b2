"""What a trainer does from the command line, with every option of its parts: ``fit``, ``test``, ``prune`` and so on."""

import contextlib
import io
import os
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import yaml
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from slm_pl import files
from slm_pl.commands import CONFIG_VERSION, compare_parser, data_parser, sweep_parser
from slm_pl.compression.target import give_ratio
from slm_pl.data import TrainingData
from slm_pl.demo.command import demo_parser
from slm_pl.errors import UsageError
from slm_pl.estimate.command import estimate_parser
from slm_pl.gguf_export import export_parser
from slm_pl.module import CausalLM
from slm_pl.parts import PartsFile
from slm_pl.trainer import Trainer


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
            "--overwrite",
            action="store_true",
            help="Replace results, exports and checkpoints that an earlier run left.",
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
