"""Ordinary Hugging Face checkpoints of compressed models."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from slm_pl import files
from slm_pl.compression.architecture import num_layers
from slm_pl.compression.plan import MergeLayers, Plan, Step, count_parameters, load_plans, save_plans
from slm_pl.console import LOAD_EXAMPLE
from slm_pl.loading import load_model, load_tokenizer, resolve
from slm_pl.pictures import IMPORTANCE, TRACE, trace_pictures

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save_compressed(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    directory: str | os.PathLike[str],
    plans: list[Plan],
    recovered: bool,
    overwrite: bool = False,
    figures: Mapping[str, bytes] | None = None,
) -> Path:
    """Writes a checkpoint that stock transformers loads; the directory is whole or absent.

    Args:
        model: The compressed model, adapters merged.
        tokenizer: Its tokenizer.
        directory: Where to.
        plans: What was done to it, in order; kept beside the weights.
        recovered: Whether it was trained after compression; the model card says so.
        overwrite: Replace a directory that is not empty.
        figures: More files that say what was done, by name; the model card shows those that are ``.png``.

    Returns:
        The directory.

    Raises:
        UsageError: If the directory is not empty and ``overwrite`` is false, or cannot be written.
    """
    with files.new_directory(directory, overwrite) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        save_plans(plans, temporary)
        shown: dict[str, bytes] = {}
        for number, plan in enumerate(plans, start=1):
            shown |= trace_pictures(plan, number)
        shown |= figures or {}
        for name, content in shown.items():
            (temporary / name).write_bytes(content)
        pictures = [name for name in shown if name.endswith(".png")]
        (temporary / "README.md").write_text(_model_card(model, plans, recovered, pictures), encoding="utf-8")
    return Path(directory)


def load_compressed(
    directory: str | os.PathLike[str],
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase, list[Plan]]":
    """Reads what :func:`save_compressed` wrote.

    Returns:
        The model, its tokenizer, and the plans in the order they were applied.

    Raises:
        UsageError: If the directory is missing or holds no checkpoint.
    """
    source = resolve(os.path.join(os.fspath(directory), ""))
    return load_model(source), load_tokenizer(source), load_plans(directory)


def public_name(pretrained: str) -> str:
    """What may be told of a path: its last part, since an export is made to be shared."""
    return Path(pretrained).name if Path(pretrained).exists() else pretrained


_ALT_TEXTS = {TRACE: "Every try of the search", IMPORTANCE: "The score of every layer"}


def _describe(step: Step) -> str:
    if isinstance(step, MergeLayers):
        return f"merge layers {step.low}–{step.high} into one ({step.consolidation}, norms: {step.other_parameters})"
    return f"remove layers {', '.join(map(str, step.layers))}"


def _model_card(model: "PreTrainedModel", plans: list[Plan], recovered: bool, pictures: list[str]) -> str:
    parameters = count_parameters(model)
    lines = ["---", "library_name: transformers", "tags: [pruned, slm_pl]"]
    lines += ["---", "", "# A compressed causal language model", ""]
    if plans:
        base = plans[0].base
        share = 1 - parameters / base.num_parameters
        lines += [
            f"Made from `{public_name(base.pretrained)}`{f' at revision `{base.revision}`' if base.revision else ''}: "
            f"{base.num_layers} → {num_layers(model)} decoder layers, "
            f"{base.num_parameters:,} → {parameters:,} parameters ({share:.1%} fewer). "
            + ("Recovered by training after compression." if recovered else "Not trained after compression."),
            "",
            "| step | method | what |",
            "|---|---|---|",
        ]
        for number, plan in enumerate(plans, start=1):
            arguments = ", ".join(f"{k}={v}" for k, v in plan.method.init_args.items() if v is not None)
            for step in plan.steps:
                lines.append(f"| {number} | `{plan.method.class_path}({arguments})` | {_describe(step)} |")
        lines += ["", "The plans beside this file (`plan.json`, …) hold every try of the search. Their sha256:"]
        lines += [f"`{plan.sha256}`" for plan in plans]
    else:
        lines += [f"`{public_name(model.config._name_or_path)}`, {parameters:,} parameters; no plan was applied."]
    for picture in pictures:
        what = _ALT_TEXTS.get(picture.partition(".")[0], "How alike the layers were before")
        lines += ["", f"![{what}]({picture})"]
    lines += ["", "```python", LOAD_EXAMPLE.format(path="."), "```", ""]
    lines += [
        "The licence of the base model applies to this checkpoint; so does that of the data it was trained on.",
        "",
    ]
    return "\n".join(lines)
