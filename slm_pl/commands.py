"""Commands that run no trainer in this process: ``compare``, ``sweep``, ``estimate`` and ``data``.

What a command needs is imported when it runs, so that ``compare`` does not wait for what trains.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from slm_pl.errors import UsageError
from slm_pl.parts import PartsFile, read

CONFIG_VERSION = 1


def compare_parser() -> ArgumentParser:
    """Options of ``compare``."""
    parser = ArgumentParser(
        description="Puts the results of several models side by side: a table on the terminal, the same as "
        "comparison.md, .tex, .csv, .json and .html (sortable, one file), and the pictures comparison.png, pareto.png "
        "and comparison_efficiency.png."
    )
    parser.add_argument(
        "results", nargs="+", help="results.json files that `test` wrote, the dense model's among them."
    )
    parser.add_argument("--output_dir", type=str | None, default=None, help="Default: the files' common directory.")
    parser.add_argument(
        "--cards", action="store_true", help="Also put the figures into the model cards of the exports measured."
    )
    return parser


def run_compare(args: Sequence[str]) -> None:
    """Runs ``compare``."""
    options = compare_parser().parse_args(args)
    from slm_pl.report import compare

    compare(options.results, options.output_dir, options.cards)


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
    from slm_pl.trainer_cli import check_run

    overwrite, dry_run, _ = (options.pop(name) for name in ("overwrite", "dry_run", "config"))
    if sweep(SweepConfig.from_dict(options), overwrite, dry_run, check_run):
        raise SystemExit(1)


def run_estimate(args: Sequence[str]) -> None:
    """Runs ``estimate``."""
    from slm_pl.estimate.command import estimate_parser

    options = estimate_parser().parse_args(args)
    from slm_pl.compression.target import give_ratio
    from slm_pl.estimate.command import machine_of, show
    from slm_pl.estimate.run import estimate
    from slm_pl.trainer_cli import whole_config

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
